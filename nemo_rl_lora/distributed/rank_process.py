"""What runs in each training process: a Ray actor with its part of the policy.

Contract: imported by Ray's workers. Files that it publishes lie on its own node, and end with it.
"""

from __future__ import annotations

import contextlib
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from nemo_rl_lora.config.cluster import ClusterConfig
from nemo_rl_lora.config.policy import PolicyConfig
from nemo_rl_lora.distributed.network import join, listen
from nemo_rl_lora.distributed.node_files import piece_of, sees
from nemo_rl_lora.distributed.shared_memory import shared_directory
from nemo_rl_lora.lora.targets import AdaptedModule
from nemo_rl_lora.policy.backends import build_policy
from nemo_rl_lora.policy.determinism import deterministic_algorithms
from nemo_rl_lora.policy.microbatches import Cutting, Portion
from nemo_rl_lora.policy.offer import write_ref
from nemo_rl_lora.policy.protocol import PolicySetup
from nemo_rl_lora.run.memory import from_process
from nemo_rl_lora.types import SyncMode, WeightsRef


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a process runs, and which of the paths that it was asked for are there."""

    node_id: str
    address: str
    port: int  # of the first process's store; 0 in the others
    seen: tuple[bool, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """What the driver has to know of a process's policy."""

    adapted: tuple[AdaptedModule, ...]
    cutting: Cutting
    gpu_name: str | None
    device: str


class RankProcess:
    """One of the processes, with its part of the policy."""

    def __init__(self, rank: int, cluster: ClusterConfig, num_threads: int | None) -> None:
        """`num_threads` None: this node's share, where the driver's node says nothing about it."""
        self._rank, self._cluster = rank, cluster
        torch.set_num_threads(num_threads or max(1, (os.cpu_count() or 1) // cluster.gpus_per_node))
        self._files = contextlib.ExitStack()

    def place(self, paths: tuple[Path, ...]) -> Place:
        """Where this process runs, and which of the paths its node sees; the first process listens from now on."""
        self._address = ray.util.get_node_ip_address()
        self._opened = listen(self._address) if self._rank == 0 else None
        return Place(
            node_id=ray.get_runtime_context().get_node_id(),
            address=self._address,
            port=0 if self._opened is None else self._opened.getsockname()[1],
            seen=tuple(map(sees, paths)),
        )

    def build(self, meeting: tuple[str, int], config: PolicyConfig, setup: PolicySetup) -> Built:
        """Join the others and load this process's part."""
        join(
            rank=self._rank,
            number=self._cluster.num_processes,
            own=self._address,
            meeting=meeting,
            opened=self._opened,
            start_seconds=self._cluster.start_timeout_seconds,
            step_seconds=self._cluster.step_timeout_seconds,
        )
        if self._rank == 0:
            size = sum(file.stat().st_size for file in setup.model_path.glob("*.safetensors"))
            self._directory = self._files.enter_context(shared_directory("nrl-weights-", size))
        self._files.enter_context(deterministic_algorithms(config.deterministic))
        with self._named():
            self._policy = build_policy(config, setup)
        policy = self._policy
        return Built(adapted=policy.adapted, cutting=policy.cutting, gpu_name=policy.gpu_name, device=policy.device)

    def on_portion(self, verb: str, portion: Portion, *arguments: Any) -> Any:
        """A verb of the policy with this process's portion of a batch; what it returns, from processes that report."""
        with self._named():
            found = getattr(self._policy, verb)(portion, *arguments)
        return found if self._policy.reports else None

    def call(self, verb: str, *arguments: Any) -> Any:
        """A verb of the policy; what it returns, from the first process."""
        with self._named():
            found = getattr(self._policy, verb)(*arguments)
        return found if self._rank == 0 else None

    def publish(self, version: int, mode: SyncMode) -> WeightsRef | None:
        """Publish into a file, tensor by tensor: every process makes every tensor with the others, the first writes.
        It takes the place of the file before."""
        with self._named():
            return self._publish(version, mode)

    def _publish(self, version: int, mode: SyncMode) -> WeightsRef | None:
        ref = self._policy.publish(version, mode)
        assert ref.tensors is not None
        if self._rank == 0:
            for file in self._directory.glob("*.safetensors"):
                file.unlink()
            path = self._directory / f"version_{version}_{mode}.safetensors"
            write_ref(path, ref)
            return replace(ref, tensors=None, path=path, handed={})
        for name in ref.tensors:
            ref.tensors[name]
        return None

    def _named(self) -> AbstractContextManager[None]:
        """An error about memory says that it comes from this process."""
        return from_process(f"training process {self._rank}")

    def piece(self, path: Path, number: int) -> np.ndarray:
        """A piece of a file of this node, for another one."""
        return piece_of(path, number)

    def size_of(self, path: Path) -> int:
        return path.stat().st_size
