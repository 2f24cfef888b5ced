"""vLLM's engine in a process of its own, a Ray actor on this node or another, behind the verbs of one in this process.

Contract: an `Engine` (generation/vllm/proven.py). Weights lie in a file in shared memory, whose path is sent; to
another node the file itself travels, in pieces, once for all engines there (node_files.py). Every wait has a limit. A
process that is gone, or that does not answer in time, is `EngineLost`; what the engine itself raises comes through as
it is. `EngineProcesses` says on which nodes they run, and keeps Ray running for all of them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor

from nemo_rl_lora.config.cluster import RAY_ADDRESS, ClusterConfig, joins_ray
from nemo_rl_lora.config.errors import ConfigError
from nemo_rl_lora.config.generation import GenerationConfig
from nemo_rl_lora.distributed.node_files import BroughtFiles, node_id, sees
from nemo_rl_lora.distributed.placement import Node, choose_nodes, device_of, engine_nodes, nodes_of_ray
from nemo_rl_lora.distributed.ray_runtime import running_ray, worker_environment
from nemo_rl_lora.generation.proof import RankShown
from nemo_rl_lora.generation.vllm.engine import EngineSettings, Job, Sampled, VllmEngine
from nemo_rl_lora.generation.vllm.generation import start_engine
from nemo_rl_lora.generation.vllm.proven import EngineLost
from nemo_rl_lora.run.memory import from_process
from nemo_rl_lora.types import TensorInfo

logger = logging.getLogger(__name__)

_FREE_SECONDS = 30.0  # Ray takes a while to see that a run has ended
_LOOK_SECONDS = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """An engine's process."""

    pid: int
    node_id: str
    address: str


class _Host:
    """The process that the engine runs in."""

    def start(self, settings: EngineSettings) -> Started:
        """Start the engine. ConfigError where its node does not have the model."""
        address = ray.util.get_node_ip_address()
        for path in (settings.model_path, settings.tokenizer_path):
            if path is not None and not sees(path):
                raise ConfigError(
                    f"policy.model_name: node {address}, where the engine runs, does not have {path}. Put the model at "
                    f"the same path of every node, or on a disk that they share."
                )
        with from_process("the engine's process"):
            self._engine: VllmEngine = start_engine(settings)
        return Started(pid=os.getpid(), node_id=node_id(), address=address)

    def call(self, verb: str, *arguments: Any) -> Any:
        try:
            with from_process("the engine's process"):
                return getattr(self._engine, verb)(*arguments)
        except Exception:  # of whatever kind: it is raised again, or all of the engine ends
            if self._engine.has_lost_a_rank:
                os._exit(1)  # as one of the processes that an engine consists of, so all of it
            raise


class EngineProcess:
    """An engine in another process: of this node where it has room, or of the node that is named."""

    takes_files = True

    def __init__(
        self,
        settings: EngineSettings,
        timeout_seconds: float,
        *,
        node: str | None = None,
        avoided: str | None = None,
        files: BroughtFiles | None = None,
    ) -> None:
        """`files` are those of all engines of the run; without it this one has its own. `avoided`: where no node is
        named, it does not run on this one."""
        self._timeout_seconds, self._is_closed = timeout_seconds, False
        self._cleanup = contextlib.ExitStack()
        try:
            # where Ray does not run yet, this process trains, on the first GPU
            self._cleanup.enter_context(running_ray(taken_gpus=int(torch.cuda.is_available())))
            if files is None:
                files = BroughtFiles()
                self._cleanup.callback(files.close)
            self._files = files
            self._host = _host(node, settings, avoided)
            self._cleanup.callback(ray.kill, self._host)
            started: Started = self._wait("start", self._host.start.remote(settings))
        except BaseException:
            self.close()
            raise
        self.pid, self._node = started.pid, started.node_id
        self._is_apart = started.node_id != node_id()
        self.where = f"process {self.pid}" + (f" of node {started.address}" if self._is_apart else "")
        logger.info("generation: vLLM runs in %s", self.where)

    def generate(self, jobs: Sequence[Job]) -> list[Sampled]:
        return self._call("generate", list(jobs))

    def weight_problems(self, manifest: Sequence[TensorInfo]) -> list[str]:
        return self._call("weight_problems", tuple(manifest))

    def receive_weights(self, source: Mapping[str, Tensor] | str, version: int) -> list[dict[str, str]]:
        assert isinstance(source, str), "takes files"
        return self._call("receive_weights", self._here(Path(source)), version)

    def receive_adapter(self, directory: str, version: int) -> list[dict[str, str]]:
        paths = [self._here(file) for file in sorted(Path(directory).iterdir())]
        return self._call("receive_adapter", str(Path(paths[0]).parent), version)

    def release(self, path: str) -> None:
        """A file that was received, and that no engine reads any more."""
        self._files.drop(Path(path), self._timeout_seconds)

    def num_kept_blocks(self) -> int:
        return self._call("num_kept_blocks")

    def probe(self, kind: str, names: Sequence[str]) -> list[RankShown]:
        return self._call("probe", kind, list(names))

    def probe_adapter(self, names: Sequence[str], ranks: Mapping[str, int]) -> list[RankShown]:
        return self._call("probe_adapter", list(names), dict(ranks))

    def rest(self) -> None:
        """Its devices are its own."""

    @property
    def is_open(self) -> bool:
        return not self._is_closed

    def close(self) -> None:
        self._is_closed = True
        self._cleanup.close()

    def _here(self, path: Path) -> str:
        """A file of the driver's node, on the engine's."""
        if not self._is_apart:
            return str(path)
        with self._translated("take"):
            return self._files.path_on(self._node, path, self._timeout_seconds)

    def _call(self, verb: str, *arguments: Any) -> Any:
        return self._wait(verb, self._host.call.remote(verb, *arguments))

    def _wait(self, verb: str, pending: Any) -> Any:
        with self._translated(verb):
            return ray.get(pending, timeout=self._timeout_seconds)

    @contextlib.contextmanager
    def _translated(self, verb: str) -> Iterator[None]:
        """What Ray raises, in this module's words."""
        try:
            yield
        except RayTaskError as error:
            raise (error.cause or error) from None
        except GetTimeoutError:
            limit = f"policy.generation.timeout_seconds={self._timeout_seconds:g}"
            raise EngineLost(f"did not answer {verb!r} within {self._timeout_seconds:g} s ({limit})") from None
        except RayError as error:
            raise EngineLost(f"died during {verb!r} ({type(error).__name__})") from error


class EngineProcesses:
    """The places of a run's engines. ConfigError where Ray does not have them, before anything is loaded."""

    def __init__(self, generation: GenerationConfig, cluster: ClusterConfig) -> None:
        self._timeout_seconds = generation.timeout_seconds
        self._lock, self._used = threading.Lock(), dict[int, EngineProcess | None]()
        self._cleanup = contextlib.ExitStack()
        number, size = cluster.num_processes, generation.devices_per_engine
        alone = number == 1  # this process trains, on the first GPU, without Ray
        room = (0 if alone else number) + size * (generation.known_engines or 1)
        try:
            taken = int(alone and torch.cuda.is_available())
            self._cleanup.enter_context(running_ray(room, taken_gpus=taken))
            own = node_id()
            training = [] if alone else choose_nodes(nodes_of_ray(), cluster, driver=own)
            choose = partial(engine_nodes, generation=generation, training=training, per_node=cluster.gpus_per_node)
            # a cluster that is joined may give away the GPU that this process uses: then other nodes are left
            self._avoided = own if taken and joins_ray() else None
            number = generation.known_engines
            self.nodes = _free_nodes(partial(choose, driver=own), self._avoided, takes_fewer=number is None)
            self._files = BroughtFiles()
            self._cleanup.callback(self._files.close)
        except BaseException:
            self.close()
            raise

    def start(self, settings: EngineSettings) -> EngineProcess:
        """An engine at a place where none runs: on the node that was meant for it or, where that is gone, another."""
        with self._lock:
            self._used = {place: engine for place, engine in self._used.items() if engine is None or engine.is_open}
            place = next(place for place in range(len(self.nodes)) if place not in self._used)
            self._used[place] = None  # it starts
        try:
            alive = {node.node_id for node in nodes_of_ray()}
            node = self.nodes[place].node_id
            engine = EngineProcess(
                settings,
                self._timeout_seconds,
                node=node if node in alive else None,
                avoided=self._avoided,
                files=self._files,
            )
        except BaseException:
            with self._lock:
                del self._used[place]
            raise
        self._used[place] = engine
        return engine

    def close(self) -> None:
        self._cleanup.close()


def _usable_nodes(avoided: str | None) -> list[Node]:
    """Ray's nodes, without one that is avoided where that has GPUs."""
    return [node for node in nodes_of_ray() if node.node_id != avoided or not node.num_gpus]


def _free_nodes(choose: Callable[..., list[Node]], avoided: str | None, *, takes_fewer: bool = False) -> list[Node]:
    """Places that are free, or will be within _FREE_SECONDS, as after a run that has just ended; after that fewer, if
    it `takes_fewer`. ConfigError where the cluster has too few, or others use them."""
    nodes, until = _usable_nodes(avoided), time.monotonic() + _FREE_SECONDS
    if avoided is not None:
        _refuse_the_drivers_gpus(nodes)
    number = len(choose(nodes))
    while True:
        is_over, found = time.monotonic() > until, list[Node]()
        with contextlib.suppress(ConfigError):
            found = choose(nodes, only_free=True)
        if len(found) >= number or (is_over and takes_fewer and found):
            return found[:number]
        nodes = _usable_nodes(avoided)
        if is_over:
            raise ConfigError(
                f"policy.generation.colocated.enabled=False: the cluster has room for {number} engine(s), and other "
                f"runs use it: free are {', '.join(f'{node.num_free} of {node}' for node in nodes[:8])}. Wait for "
                f"their end, or lower policy.generation.num_engines."
            )
        time.sleep(_LOOK_SECONDS)


def _refuse_the_drivers_gpus(nodes: Sequence[Node]) -> None:
    """ConfigError where a cluster that is joined has no GPUs beside those of the driver's node."""
    if not any(node.num_gpus for node in nodes):
        raise ConfigError(
            f"policy.generation.colocated.enabled=False: one process trains, on a GPU of this node, and the Ray "
            f"cluster at {RAY_ADDRESS}={os.environ[RAY_ADDRESS]!r} may give an engine the same one, since it has GPUs "
            f"on no other node. Unset {RAY_ADDRESS} to run on this machine alone, or let several processes train "
            f"(cluster.gpus_per_node=2)."
        )


def _host(node: str | None, settings: EngineSettings, avoided: str | None) -> Any:
    """The actor, with its devices on one node: the one that is named, or the driver's if they are free there, else the
    first node that has them free. Where weights come in flight it answers two calls at once."""
    nodes, own, num_devices = _usable_nodes(avoided), node_id(), settings.num_ranks
    num_threads = 1 if settings.in_flight is None else 2
    if node is None:
        free = [found for found in nodes if found.num_free >= num_devices]
        chosen = next((found for found in free if found.node_id == own), free[0] if free else None)
        node = None if chosen is None else chosen.node_id
    options: dict[str, Any] = {}
    if node is not None:  # else Ray waits until one is free
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=False)
    # Ray would give an actor one thread; the trainer waits while the engine works
    environment = worker_environment({"OMP_NUM_THREADS": str(torch.get_num_threads()), **settings.env_vars})
    num_gpus = num_devices if device_of(nodes) == "GPU" else 0
    options |= {"num_cpus": num_devices, "num_gpus": num_gpus, "runtime_env": environment}
    return ray.remote(**options)(_Host).options(max_concurrency=num_threads).remote()
