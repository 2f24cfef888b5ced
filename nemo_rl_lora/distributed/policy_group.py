"""A policy in several processes, each a Ray actor, behind the verbs of one.

Contract: every verb is called in every process with the same whole arguments, and the first process answers. What is
published travels in a file in shared memory, whose tensors are read when they are asked for. A process that fails
ends the run with its own error: the others, which may be waiting for it, are ended too.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.exceptions import RayError, RayTaskError
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from nemo_rl_lora.config.policy import PolicyConfig
from nemo_rl_lora.distributed.ray_runtime import running_ray
from nemo_rl_lora.distributed.shared_memory import shared_memory
from nemo_rl_lora.models.load import load_model
from nemo_rl_lora.policy.backends import build_policy
from nemo_rl_lora.policy.offer import LazyTensors, write_ref
from nemo_rl_lora.policy.protocol import PolicySetup
from nemo_rl_lora.tensors import torch_dtype
from nemo_rl_lora.types import Batch, LossFn, StepOutput, SyncMode, WeightsRef

_START_SECONDS = 300  # an actor's imports, on a busy machine
_GRACE_SECONDS = 10


class _Rank:
    """One of the processes, with its part of the policy."""

    def __init__(self, rank: int, number: int, num_threads: int) -> None:
        self._rank, self._number = rank, number
        torch.set_num_threads(num_threads)

    def free_address(self) -> str:
        """Where the others may meet this process."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def build(self, address: str, config: PolicyConfig, setup: PolicySetup) -> tuple[Any, ...]:
        """Join the others and load this process's part; the modules that have an adapter."""
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, init_method=address, rank=self._rank, world_size=self._number)
        self._policy = build_policy(config, setup)
        return self._policy.adapted

    def call(self, verb: str, *arguments: Any) -> Any:
        """A verb of the policy; what it returns, from the first process."""
        found = getattr(self._policy, verb)(*arguments)
        return found if self._rank == 0 else None

    def publish(self, version: int, mode: SyncMode, path: Path) -> WeightsRef | None:
        """Publish into a file, tensor by tensor: every process makes every tensor with the others, the first writes."""
        ref = self._policy.publish(version, mode)
        assert ref.tensors is not None
        if self._rank == 0:
            write_ref(path, ref)
            return replace(ref, tensors=None, path=path)
        for name in ref.tensors:
            ref.tensors[name]
        return None


class PolicyGroup:
    """A Policy (policy/protocol.py) that is shared by `number` processes of this machine."""

    def __init__(self, config: PolicyConfig, setup: PolicySetup, number: int) -> None:
        self._config, self._setup = config, setup
        self._published: Path | None = None
        self._cleanup = contextlib.ExitStack()
        try:
            self._start(number)
        except BaseException:
            self._cleanup.close()
            raise

    def _start(self, number: int) -> None:
        size = sum(file.stat().st_size for file in self._setup.model_path.glob("*.safetensors"))
        self._directory = Path(tempfile.mkdtemp(prefix="nrl-weights-", dir=shared_memory(size)))
        self._cleanup.callback(shutil.rmtree, self._directory, ignore_errors=True)
        self._cleanup.enter_context(running_ray())
        num_threads = max(1, torch.get_num_threads() // number)
        actor: Any = ray.remote(num_cpus=0, num_gpus=int(torch.cuda.is_available()))(_Rank)
        self._ranks = [actor.remote(rank, number, num_threads) for rank in range(number)]
        self._cleanup.callback(self._end_ranks)
        addresses = [rank.free_address.remote() for rank in self._ranks]
        if late := ray.wait(addresses, num_returns=number, timeout=_START_SECONDS)[1]:
            raise RuntimeError(
                f"cluster.gpus_per_node={number}: {len(late)} of the training processes did not start within "
                f"{_START_SECONDS} seconds. Free a GPU for each, or lower it."
            )
        address = self._wait(addresses)[0]
        self.adapted = self._wait([rank.build.remote(address, self._config, self._setup) for rank in self._ranks])[0]

    def logprobs(self, batch: Batch) -> Tensor:
        """[B, T] fp32, dropout off; 0.0 outside the loss mask."""
        return self._call("logprobs", batch)

    def reference_logprobs(self, batch: Batch) -> Tensor:
        """The same of the reference, the base or the initial adapter."""
        return self._call("reference_logprobs", batch)

    def train_step(self, batch: Batch, loss_fn: LossFn) -> StepOutput:
        """All microbatches, then one optimizer step. FloatingPointError before the optimizer moves on bad numbers."""
        return self._call("train_step", batch, loss_fn)

    def publish(self, version: int, mode: SyncMode) -> WeightsRef:
        """As a policy in this process, but in a file, which stays until the next one is published."""
        path = self._directory / f"version_{version}_{mode}.safetensors"
        if self._published not in (None, path):
            self._published.unlink(missing_ok=True)
        self._published = path
        ref = self._wait([rank.publish.remote(version, mode, path) for rank in self._ranks])[0]
        file = safe_open(path, framework="pt")
        return replace(ref, tensors=LazyTensors({i.name: partial(file.get_tensor, i.name) for i in ref.manifest}))

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
        return load_model(
            self._setup.model_path,
            dtype=self.compute_dtype,
            config_overrides=dict(self._config.hf_config_overrides),
        )

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch_dtype(self._config.precision)

    def _call(self, verb: str, *arguments: Any) -> Any:
        shared = [ray.put(argument) for argument in arguments]  # once for all processes
        return self._wait([rank.call.remote(verb, *shared) for rank in self._ranks])[0]

    def _wait(self, pending: list[Any]) -> list[Any]:
        """The results, in order. The first process that fails ends the wait with its error."""
        left = list(pending)
        while left:
            done, left = ray.wait(left)
            if _failure_of(done[0]) is not None:
                raise self._failure(pending, done[0], left)
        return ray.get(pending)

    def _failure(self, pending: list[Any], first: Any, left: list[Any]) -> Exception:
        """What to raise: a process that is gone comes before those that lost it. Ends those that wait for another."""
        waiting = ray.wait(left, num_returns=len(left), timeout=_GRACE_SECONDS)[1] if left else []
        failures = [(rank, _failure_of(one)) for rank, one in enumerate(pending) if one not in waiting]
        if waiting:
            self._end_ranks()
        for rank, error in failures:
            if error is not None and not isinstance(error, RayTaskError):
                return RuntimeError(f"training process {rank} of {len(pending)} ended: {error}")
        error = _failure_of(first)
        assert isinstance(error, RayTaskError), error
        return error.cause if isinstance(error.cause, Exception) else error

    def _end_ranks(self) -> None:
        for rank in self._ranks:
            ray.kill(rank)


def _failure_of(result: Any) -> RayError | None:
    """Why a result that is there is no result; None where it is one."""
    try:
        ray.get(result)
    except RayError as error:
        return error
    return None
