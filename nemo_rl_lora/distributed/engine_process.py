"""vLLM's engine in a process of its own, a Ray actor, behind the verbs of one in this process.

Contract: an `Engine` (generation/vllm/generation.py). Weights never travel through Ray: they are written to a file in
shared memory and its path is sent. Every wait has a limit. A process that is gone, or that does not answer in time, is
`EngineLost`; what the engine itself raises comes through as it is.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from safetensors.torch import save_file
from torch import Tensor

from nemo_rl_lora.distributed.ray_runtime import running_ray
from nemo_rl_lora.distributed.shared_memory import shared_memory
from nemo_rl_lora.generation.vllm.engine import EngineSettings, Job, Sampled
from nemo_rl_lora.generation.vllm.generation import EngineLost, start_engine
from nemo_rl_lora.types import TensorInfo

logger = logging.getLogger(__name__)


class _Host:
    """The process that the engine runs in."""

    def start(self, settings: EngineSettings) -> tuple[int, int]:
        """Start the engine; tokens of a cache block, and the process's number."""
        self._engine = start_engine(settings)
        return self._engine.block_tokens, os.getpid()

    def call(self, verb: str, *arguments: Any) -> Any:
        return getattr(self._engine, verb)(*arguments)


class EngineProcess:
    """An engine in another process of this machine."""

    def __init__(self, settings: EngineSettings, timeout_seconds: float) -> None:
        self._timeout_seconds = timeout_seconds
        self._cleanup = contextlib.ExitStack()
        try:
            self._directory = Path(tempfile.mkdtemp(prefix="nrl-engine-", dir=shared_memory()))
            self._cleanup.callback(shutil.rmtree, self._directory, ignore_errors=True)
            self._cleanup.enter_context(running_ray())
            # Ray would give an actor one thread; the trainer waits while the engine works
            environment = {"env_vars": {"OMP_NUM_THREADS": str(torch.get_num_threads())}}
            actor = ray.remote(num_cpus=0, num_gpus=int(torch.cuda.is_available()), runtime_env=environment)(_Host)
            self._host: Any = actor.remote()
            self._cleanup.callback(ray.kill, self._host)
            self.block_tokens, self.pid = self._wait("start", self._host.start.remote(settings))
        except BaseException:
            self.close()
            raise
        logger.info("generation: vLLM runs in process %d", self.pid)

    def generate(self, jobs: Sequence[Job]) -> list[Sampled]:
        return self._call("generate", list(jobs))

    def weight_problems(self, manifest: Sequence[TensorInfo]) -> list[str]:
        return self._call("weight_problems", tuple(manifest))

    def receive_weights(self, source: Mapping[str, Tensor] | str) -> dict[str, str]:
        if isinstance(source, str):
            return self._call("receive_weights", source)
        path = self._directory / "weights.safetensors"
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in source.items()}, path)
        try:
            return self._call("receive_weights", str(path))
        finally:
            path.unlink()

    def receive_adapter(self, directory: str) -> dict[str, str]:
        return self._call("receive_adapter", directory)

    def probe(self, kind: str, names: Sequence[str]) -> dict[str, Tensor]:
        return self._call("probe", kind, list(names))

    def probe_adapter(self, names: Sequence[str], ranks: Mapping[str, int]) -> dict[str, Tensor]:
        return self._call("probe_adapter", list(names), dict(ranks))

    def close(self) -> None:
        self._cleanup.close()

    def _call(self, verb: str, *arguments: Any) -> Any:
        return self._wait(verb, self._host.call.remote(verb, *arguments))

    def _wait(self, verb: str, pending: Any) -> Any:
        try:
            return ray.get(pending, timeout=self._timeout_seconds)
        except RayTaskError as error:
            raise (error.cause or error) from None
        except GetTimeoutError:
            raise EngineLost(f"did not answer {verb!r} within {self._timeout_seconds:g} s") from None
        except RayError as error:
            raise EngineLost(f"died during {verb!r} ({type(error).__name__})") from error
