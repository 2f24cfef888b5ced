"""vLLM's engine, as this product uses it: started, asked for completions, given weights, probed. In any process.

Contract: prompts and completions are token ids; a version is served from the end of `receive` on. Nothing here decides
whether the engine is right: it reports what it received and what it shows. The only file that starts vLLM.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from nemo_rl_lora.distributed.ranks import join_alone
from nemo_rl_lora.distributed.shared_memory import mapped_files, removed_at_end
from nemo_rl_lora.generation.proof import RankShown
from nemo_rl_lora.generation.tickets import one_more
from nemo_rl_lora.generation.turns import Turns
from nemo_rl_lora.generation.vllm.worker import ADAPTER_ID, VLLM_FILES
from nemo_rl_lora.patches.vllm import compile_nothing, forget_cached_blocks, shut_down
from nemo_rl_lora.types import SamplingParams, TensorInfo

CPU_BLOCK_TOKENS = 32  # the least that vLLM's CPU kernels take: prompts of a group share whole blocks
_NO_VERSION = -1  # before the first one came, and after one that broke off: no token of it is used
WORKER = "nemo_rl_lora.generation.vllm.worker.WorkerExtension"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What an engine is started with."""

    model_path: Path
    tokenizer_path: Path | None  # None: no stop strings, so the engine needs no text
    hf_overrides: Mapping[str, Any]
    dtype: str
    max_model_len: int
    max_num_seqs: int
    cache_bytes: int | None  # None: a share of the device's memory
    gpu_memory_utilization: float
    enforce_eager: bool
    adapter_rank: int | None  # None: weights are merged before they come
    more: Mapping[str, Any]  # policy.generation.vllm_kwargs
    env_vars: Mapping[str, str] = field(default_factory=dict)
    tensor_parallel_size: int = 1
    in_flight: Literal["keep", "recompute"] | None = None  # keys and values of what goes on under new weights
    sleeps: bool = False  # the GPU's memory is the trainer's while nothing is asked

    @property
    def num_ranks(self) -> int:
        """Processes that share the weights, each with a device of its own."""
        return self.tensor_parallel_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One completion to sample."""

    token_ids: tuple[int, ...]
    seed: int
    sampling: SamplingParams
    stop_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """What came of a job."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    versions: tuple[tuple[int, int], ...]  # as in Completion
    finish_reason: Literal["stop", "length"]


class _Growing:
    """A job that is sampled: what came of it so far."""

    def __init__(self) -> None:
        self._token_ids, self._logprobs = list[int](), list[float]()
        self._versions = list[tuple[int, int]]()
        self.finish_reason: Literal["stop", "length"] | None = None

    def take(self, output: Any, version: int) -> None:
        """What a step has added, from the weights of this version."""
        (completion,) = output.outputs
        for token, logprobs in zip(completion.token_ids, completion.logprobs, strict=True):
            self._token_ids.append(token)
            self._logprobs.append(logprobs[token].logprob)
            one_more(self._versions, version)
        if output.finished:
            assert completion.finish_reason in ("stop", "length"), completion.finish_reason
            self.finish_reason = completion.finish_reason

    def sampled(self) -> Sampled:
        assert self.finish_reason is not None
        return Sampled(
            token_ids=tuple(self._token_ids),
            logprobs=tuple(self._logprobs),
            versions=tuple(self._versions),
            finish_reason=self.finish_reason,
        )


class VllmEngine:
    """An engine in this process. The verbs are those that a process of its own offers too.

    One thread may sample while another one gives weights and probes: they take turns, a step at a time. Completions
    that are open go on under the new weights (`in_flight`). No completion meets what another version has computed: each
    begins with its version's own cache salt. An engine that `sleeps` wakes up when it is asked anything.
    """

    takes_files, where = False, "the trainer's process"

    def __init__(self, settings: EngineSettings) -> None:
        _prepare_environment(settings)
        from vllm import LLM

        self._files = contextlib.ExitStack()
        self._settings = settings
        self._adapter_path: str | None = None
        self._turns, self._version, self._is_asleep = Turns(), _NO_VERSION, False
        self._open: dict[str, _Growing] = {}
        self._num_jobs = self._num_kept_blocks = 0
        arguments: dict[str, Any] = {
            "model": str(settings.model_path),
            "dtype": settings.dtype,
            "hf_overrides": dict(settings.hf_overrides),
            "max_model_len": settings.max_model_len,
            "max_num_seqs": settings.max_num_seqs,
            "kv_cache_memory_bytes": settings.cache_bytes,
            "gpu_memory_utilization": settings.gpu_memory_utilization,
            "enforce_eager": settings.enforce_eager,
            "logprobs_mode": "processed_logprobs",
            "generation_config": "vllm",  # sampling is what the request says, and nothing from the model's files
            "skip_tokenizer_init": settings.tokenizer_path is None,
            "use_tqdm_on_load": False,
            "disable_log_stats": True,
            "async_scheduling": False,  # a step's tokens are those of the weights that it ran with
            "worker_extension_cls": WORKER,
        }
        if settings.num_ranks > 1:
            arguments |= {"tensor_parallel_size": settings.num_ranks, "distributed_executor_backend": "mp"}
        if settings.tokenizer_path is not None:
            arguments["tokenizer"] = str(settings.tokenizer_path)
        if settings.adapter_rank is not None:
            arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": settings.adapter_rank}
        if torch.cuda.is_available():
            arguments["enable_sleep_mode"] = settings.sleeps
        else:
            arguments["block_size"] = CPU_BLOCK_TOKENS
        with _on_the_loopback():
            if settings.num_ranks == 1:
                join_alone()  # vLLM would meet itself in a file, which its groups need as long as the process lives
            self._llm = LLM(**(arguments | dict(settings.more)))
        if settings.num_ranks > 1:
            shared = {path for paths in self._call("shared_files") for path in paths} | {*mapped_files(VLLM_FILES)}
            self._files.enter_context(removed_at_end([Path(path) for path in sorted(shared)]))
        # a sync that moves only what carries an adapter is no failure
        logging.getLogger("vllm.model_executor.model_loader.reload").setLevel(logging.ERROR)

    def num_kept_blocks(self) -> int:
        """Blocks of the prefix cache that a prompt could have met when the newest weights had come."""
        return self._num_kept_blocks

    @property
    def has_lost_a_rank(self) -> bool:
        """Whether a process that shares the weights is gone, so that nothing can be asked any more."""
        return bool(getattr(self._core.model_executor, "is_failed", False))

    @property
    def _core(self) -> Any:
        """vLLM's core, which runs in this process."""
        client: Any = self._llm.llm_engine.engine_core
        return client.engine_core

    def generate(self, jobs: Sequence[Job]) -> list[Sampled]:
        """All jobs, in their order."""
        engine, names = self._llm.llm_engine, []
        with self._turns.step():
            self._wake()
            for job in jobs:
                self._num_jobs += 1
                names.append(str(self._num_jobs))
                self._open[names[-1]] = _Growing()
                prompt: Any = {"prompt_token_ids": list(job.token_ids), "cache_salt": str(self._version)}
                engine.add_request(names[-1], prompt, self._sampling(job), lora_request=self._adapter_request())
        try:
            while any(self._open[name].finish_reason is None for name in names):
                with self._turns.step():
                    for output in engine.step():
                        self._open[output.request_id].take(output, self._version)
            return [self._open[name].sampled() for name in names]
        finally:
            for name in names:
                del self._open[name]

    def weight_problems(self, manifest: Sequence[TensorInfo]) -> list[str]:
        """Why merged weights of these names and shapes cannot be received."""
        return self._call("weight_problems", manifest)[0]

    def receive_weights(self, source: Mapping[str, Tensor] | str, version: int) -> list[dict[str, str]]:
        """Serve merged weights from now on. Returns their digests, of each rank. ValueError where nothing was touched;
        after any other exception no version is served."""
        with self._update():
            before, self._version = self._version, _NO_VERSION
            try:
                received = self._llm.collective_rpc("receive_weights", args=(source,))
            except ValueError:
                self._version = before
                raise
            self._begin(version)
        return received

    def receive_adapter(self, directory: str, version: int) -> list[dict[str, str]]:
        """Serve an adapter from now on, in the place of the one before. Returns its tensors' digests, of each rank."""
        with self._update():
            received = self._llm.collective_rpc("receive_adapter", args=(directory,))
            self._adapter_path = directory
            self._llm.llm_engine.add_lora(self._adapter_request(load_inplace=True))
            self._begin(version)
        return received

    def release(self, path: str) -> None:
        """A file that was received, and that no engine reads any more."""

    def probe(self, kind: Literal["base", "weights"], names: Sequence[str]) -> list[RankShown]:
        """Columns of weights, as the kernels see them."""
        return self._call(f"probe_{kind}", names)

    def probe_adapter(self, names: Sequence[str], ranks: Mapping[str, int]) -> list[RankShown]:
        """Columns of A and of B with its scale, as the LoRA kernels see them."""
        return self._call("probe_adapter", names, ranks)

    def rest(self) -> None:
        """Give the GPU's memory to the trainer until something is asked: weights wait in the machine's memory, keys and
        values are forgotten."""
        if self._settings.sleeps and not self._is_asleep:
            with self._turns.update():
                self._llm.sleep(level=1)
                self._is_asleep = True

    def close(self) -> None:
        self._turns.stop()
        with self._turns.update():
            shut_down(self._llm)
        self._files.close()

    def _call(self, method: str, *arguments: Any) -> list[Any]:
        """What each rank answers."""
        with self._update():
            return self._llm.collective_rpc(method, args=arguments)

    @contextlib.contextmanager
    def _update(self) -> Iterator[None]:
        """The engine between two steps, awake."""
        with self._turns.update():
            self._wake()
            yield

    def _wake(self) -> None:
        if self._is_asleep:
            self._llm.wake_up()
            self._is_asleep = False

    def _begin(self, version: int) -> None:
        """What starts from now on starts under these weights: keys and values of others must not be met again."""
        self._version, pool = version, self._core.scheduler.kv_cache_manager.block_pool
        self._empty_prefix_cache(pool)
        self._num_kept_blocks = len(pool.cached_block_hash_to_block)

    def _empty_prefix_cache(self, pool: Any) -> None:
        if self._open and self._settings.in_flight == "keep":
            forget_cached_blocks(pool)
        elif not self._llm.reset_prefix_cache(reset_running_requests=bool(self._open)):
            raise RuntimeError("vLLM kept its prefix cache, since requests are still running.")

    def _adapter_request(self, *, load_inplace: bool = False) -> Any:
        if self._adapter_path is None:
            return None
        from vllm.lora.request import LoRARequest

        return LoRARequest("policy", ADAPTER_ID, self._adapter_path, load_inplace=load_inplace)

    def _sampling(self, job: Job) -> Any:
        from vllm import SamplingParams as VllmSampling
        from vllm.sampling_params import RequestOutputKind

        sampling = job.sampling
        return VllmSampling(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or 0,
            max_tokens=sampling.max_new_tokens,
            stop=list(sampling.stop_strings) or None,
            stop_token_ids=list(job.stop_token_ids),
            ignore_eos=True,  # stop_token_ids has it
            seed=job.seed,
            logprobs=0,  # of the sampled token alone
            detokenize=bool(sampling.stop_strings),
            skip_special_tokens=sampling.skip_special_tokens,
            output_kind=RequestOutputKind.DELTA,  # each step says which tokens it has added
        )


@contextlib.contextmanager
def _on_the_loopback() -> Iterator[None]:
    """gloo, which listens for others, does so where no other machine is. What this process starts later, as training on
    several nodes, is not told so; where the user has said which interface, that stays."""
    name = "GLOO_SOCKET_IFNAME"
    if name in os.environ:
        yield
        return
    os.environ[name] = "lo"
    try:
        yield
    finally:
        del os.environ[name]


def _prepare_environment(settings: EngineSettings) -> None:
    """What vLLM reads when it is imported. What the user has set stays."""
    os.environ |= settings.env_vars
    usual = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs where it is started
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    for name, value in usual.items():
        os.environ.setdefault(name, value)
    if torch.cuda.is_available():
        return
    if settings.num_ranks > 1:  # processes that vLLM starts, and would bind each to a NUMA node of its own
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")
    if settings.enforce_eager:
        if settings.num_ranks > 1:
            os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        compile_nothing()
