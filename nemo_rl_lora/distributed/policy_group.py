"""A policy in several processes, each a Ray actor, on one node or several, behind the verbs of one.

Contract: every verb is called in every process with the same whole arguments, and the first process answers. What is
published is a file in the shared memory of the driver's node, whose tensors are read when they are asked for: the
first process writes it, and where it runs on another node the file travels once. Every wait has a limit, and a process
that fails, dies or hangs ends all of them (members.py).
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from nemo_rl_lora.config.cluster import ClusterConfig
from nemo_rl_lora.config.cluster_rules import env_vars
from nemo_rl_lora.config.errors import ConfigError
from nemo_rl_lora.config.policy import PolicyConfig
from nemo_rl_lora.distributed.members import Members
from nemo_rl_lora.distributed.node_files import bring, node_id, num_pieces, write_piece
from nemo_rl_lora.distributed.placement import choose_nodes, nodes_of_ray, reserve
from nemo_rl_lora.distributed.rank_process import Built, Place, RankProcess
from nemo_rl_lora.distributed.ray_runtime import running_ray, worker_environment
from nemo_rl_lora.distributed.shared_memory import shared_directory
from nemo_rl_lora.policy.microbatches import Portion
from nemo_rl_lora.policy.offer import OfferedTensors
from nemo_rl_lora.policy.protocol import PolicySetup
from nemo_rl_lora.policy.token_budget import FoundTokens
from nemo_rl_lora.policy.trained import load_base
from nemo_rl_lora.tensors import torch_dtype
from nemo_rl_lora.types import Batch, LossFn, StepOutput, SyncMode, WeightsRef

NOTHING: Mapping[Path, str] = MappingProxyType({})


class PolicyGroup:
    """A Policy (policy/protocol.py) that is shared by the training processes of a cluster."""

    def __init__(
        self,
        config: PolicyConfig,
        setup: PolicySetup,
        cluster: ClusterConfig,
        *,
        written: Mapping[Path, str] = NOTHING,
        read: Mapping[Path, str] = NOTHING,
    ) -> None:
        """Every node has to see the directories that are `written` into, and what is `read` later: each with its
        key=value. ConfigError where the cluster does not have what this needs."""
        self._config, self._setup, self._cluster = config, setup, cluster
        self._cleanup = contextlib.ExitStack()
        try:
            self._start(written, read)
        except BaseException:
            self._cleanup.close()
            raise

    def _start(self, written: Mapping[Path, str], read: Mapping[Path, str]) -> None:
        cluster, number = self._cluster, self._cluster.num_processes
        self._cleanup.enter_context(running_ray(number))
        nodes = choose_nodes(nodes_of_ray(), cluster, driver=node_id())
        reserved = reserve(nodes, cluster.gpus_per_node, cluster.start_timeout_seconds)
        self._cleanup.callback(ray.util.remove_placement_group, reserved)
        single = cluster.num_nodes == 1 and nodes[0].node_id == node_id()
        num_threads = max(1, torch.get_num_threads() // cluster.gpus_per_node) if single else None
        actor: Any = ray.remote(
            num_cpus=1, num_gpus=int(nodes[0].num_gpus > 0), runtime_env=worker_environment(env_vars(self._config))
        )(RankProcess)
        self._members = Members(
            cluster=cluster,
            actors=[
                actor.options(
                    scheduling_strategy=PlacementGroupSchedulingStrategy(reserved, placement_group_bundle_index=rank)
                ).remote(rank, cluster, num_threads)
                for rank in range(number)
            ],
        )
        self._cleanup.callback(self._members.end)
        places = self._places(written, read)
        self._members.addresses = [place.address for place in places]
        self._is_apart = places[0].node_id != node_id()
        if self._is_apart:
            size = sum(file.stat().st_size for file in self._setup.model_path.glob("*.safetensors"))
            self._directory = self._cleanup.enter_context(shared_directory("nrl-brought-", size))
        meeting = places[0].address, places[0].port
        built: list[Built] = self._all("build", meeting, self._config, self._setup, starting=True)
        self.adapted, self.gpu_name = built[0].adapted, built[0].gpu_name
        self.device = "; ".join(sorted({one.device for one in built}))
        self._cuttings = [one.cutting for one in built]

    def _places(self, written: Mapping[Path, str], read: Mapping[Path, str]) -> list[Place]:
        """Where the processes run. ConfigError where a node does not have what it reads or writes."""
        setup = self._setup
        named = {setup.model_path.resolve(): f"policy.model_name={setup.base_model_name!r}"}
        if setup.initial_adapter is not None:
            named[setup.initial_adapter.resolve()] = f"policy.adapter.init_from={str(setup.initial_adapter)!r}"
        named |= {path.resolve(): label for path, label in read.items()}
        with contextlib.ExitStack() as probes:
            named |= {probes.enter_context(_probe(directory)): label for directory, label in written.items()}
            places: list[Place] = self._all("place", tuple(named), starting=True)
        for place in places:
            for path, seen in zip(named, place.seen, strict=True):
                if not seen:
                    raise ConfigError(
                        f"{named[path]}: node {place.address} does not see {path}. Put it on a disk that all nodes "
                        f"share, or, if it is only read, at the same path of every node."
                    )
        return places

    def logprobs(self, batch: Batch) -> Tensor:
        """[B, T] fp32, dropout off; 0.0 outside the loss mask."""
        return self._logprobs("logprobs_of", batch)

    def reference_logprobs(self, batch: Batch) -> Tensor:
        """The same of the reference, the base or the initial adapter."""
        return self._logprobs("reference_logprobs_of", batch)

    def train_step(self, batch: Batch, loss_fn: LossFn) -> StepOutput:
        """All microbatches, then one optimizer step. FloatingPointError before the optimizer moves on bad numbers."""
        portions = self._cuttings[0].portions(batch, "train")
        return self._on_portions("train_on", portions, loss_fn)[0]

    def use_train_tokens(self, tokens: int) -> None:
        """As in a policy of this process."""
        self._call("use_train_tokens", tokens)
        self._cuttings = [cutting.with_train_tokens(tokens) for cutting in self._cuttings]

    def find_train_tokens(self, longest: Batch, kept_bytes: int = 0) -> FoundTokens:
        """As in a policy of this process: the smallest budget of all of them, which all use from now on."""
        found: FoundTokens = self._call("find_train_tokens", longest, kept_bytes)
        self._cuttings = [cutting.with_train_tokens(found.tokens) for cutting in self._cuttings]
        return found

    def publish(self, version: int, mode: SyncMode) -> WeightsRef:
        """As a policy in this process, but in a file of this node, which stays until the next one is published."""
        ref: WeightsRef = self._all("publish", version, mode)[0]
        assert ref.path is not None
        path = self._brought(ref.path) if self._is_apart else ref.path
        file = safe_open(path, framework="pt")
        tensors = OfferedTensors({info.name: partial(file.get_tensor, info.name) for info in ref.manifest}, mode)
        return replace(ref, path=path, tensors=tensors, handed=tensors.handed)

    def save(self, path: Path) -> None:
        """As a policy in this process; the files are the same."""
        self._call("save", path.resolve())

    def load(self, path: Path) -> None:
        """Strictly what `save` of either backend wrote. Without moments the optimizer starts anew."""
        self._call("load", path.resolve())

    def close(self) -> None:
        self._cleanup.close()

    # Beyond the protocol: what the composition root wires into an engine of this process.

    def base_model(self) -> PreTrainedModel:
        """The base model, loaded once more in this process."""
        return load_base(self._config, self._setup)

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch_dtype(self._config.precision)

    def _logprobs(self, verb: str, batch: Batch) -> Tensor:
        portions = self._cuttings[0].portions(batch, "logprob")
        out = torch.zeros(batch.token_ids.shape, dtype=torch.float32)
        for portion, rows in zip(portions, self._on_portions(verb, portions), strict=True):
            out[portion.rows] = rows
        return out

    def _on_portions(self, verb: str, portions: Sequence[Portion], *arguments: Any) -> list[Any]:
        """What a verb gives of each portion; a process gets its own and no other."""
        sent, shared = [ray.put(portion) for portion in portions], [ray.put(argument) for argument in arguments]
        indices = [cutting.share.index for cutting in self._cuttings]
        pending = [
            actor.on_portion.remote(verb, sent[index], *shared)
            for index, actor in zip(indices, self._members.actors, strict=True)
        ]
        results = zip(indices, self._members.results(verb, pending), strict=True)
        found = {index: result for index, result in results if result is not None}
        return [found[index] for index in range(len(portions))]

    def _call(self, verb: str, *arguments: Any) -> Any:
        shared = [ray.put(argument) for argument in arguments]  # once for all processes
        pending = [actor.call.remote(verb, *shared) for actor in self._members.actors]
        return self._members.results(verb, pending)[0]

    def _all(self, method: str, *arguments: Any, starting: bool = False) -> list[Any]:
        """What a method of the processes' class returns, in the order of the ranks."""
        pending = [getattr(actor, method).remote(*arguments) for actor in self._members.actors]
        return self._members.results(method, pending, starting=starting)

    def _first(self, method: str, *arguments: Any) -> Any:
        """What a method of the first process returns."""
        pending = [getattr(self._members.actors[0], method).remote(*arguments)]
        return self._members.results(method, pending)[0]

    def _brought(self, path: Path) -> Path:
        """A file of the first process's node, on this one; it takes the place of the file before."""
        for file in self._directory.glob("*.safetensors"):
            file.unlink()
        here = self._directory / path.name
        begin = self._members.actors[0].piece.remote

        def take(index: int, piece: Any) -> None:
            write_piece(here, index, self._members.results("piece", [piece])[0])

        bring(num_pieces(self._first("size_of", path)), partial(begin, path), take)
        return here


@contextlib.contextmanager
def _probe(directory: Path) -> Iterator[Path]:
    """A file in the directory, for other nodes to see."""
    directory.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".seen-by-every-node-", dir=directory.resolve())
    os.close(handle)
    try:
        yield Path(name)
    finally:
        Path(name).unlink()
