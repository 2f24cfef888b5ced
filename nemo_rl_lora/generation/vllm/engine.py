"""vLLM's engine, as this product uses it: started, asked for completions, given weights, probed. In any process.

Contract: prompts and completions are token ids; a version is served from the end of `receive` on. Nothing here decides
whether the engine is right: it reports what it received and what it shows. The only file that starts vLLM.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from nemo_rl_lora.generation.vllm.worker import ADAPTER_ID
from nemo_rl_lora.patches.vllm import compile_nothing, shut_down
from nemo_rl_lora.types import SamplingParams, TensorInfo

CPU_BLOCK_TOKENS = 32  # the least that vLLM's CPU kernels take: prompts of a group share whole blocks
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One completion to sample."""

    token_ids: tuple[int, ...]
    seed: int
    sampling: SamplingParams
    stop_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """What came of a job. `num_cached_tokens`: of the prompt, how many were not computed again."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: Literal["stop", "length"]
    num_cached_tokens: int


class VllmEngine:
    """An engine in this process. The verbs are those that a process of its own offers too."""

    def __init__(self, settings: EngineSettings) -> None:
        _prepare_environment(settings)
        from vllm import LLM

        self._settings = settings
        self._adapter_path: str | None = None
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
            "worker_extension_cls": WORKER,
        }
        if settings.tokenizer_path is not None:
            arguments["tokenizer"] = str(settings.tokenizer_path)
        if settings.adapter_rank is not None:
            arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": settings.adapter_rank}
        if not torch.cuda.is_available():
            arguments["block_size"] = CPU_BLOCK_TOKENS
        self._llm = LLM(**(arguments | dict(settings.more)))
        # a sync that moves only what carries an adapter is no failure
        logging.getLogger("vllm.model_executor.model_loader.reload").setLevel(logging.ERROR)

    @property
    def block_tokens(self) -> int:
        """Tokens of a block of the prefix cache."""
        return int(self._llm.llm_engine.vllm_config.cache_config.block_size)

    def generate(self, jobs: Sequence[Job]) -> list[Sampled]:
        """All jobs, in their order."""
        outputs = self._llm.generate(
            [{"prompt_token_ids": list(job.token_ids)} for job in jobs],
            [self._sampling(job) for job in jobs],
            lora_request=self._adapter_request(),
            use_tqdm=False,
        )
        return [_sampled(output) for output in outputs]

    def weight_problems(self, manifest: Sequence[TensorInfo]) -> list[str]:
        """Why merged weights of these names and shapes cannot be received."""
        return self._call("weight_problems", manifest)

    def receive_weights(self, source: Mapping[str, Tensor] | str) -> dict[str, str]:
        """Serve merged weights from now on. Returns their digests."""
        received = self._call("receive_weights", source)
        self._forget_prefixes()
        return received

    def receive_adapter(self, directory: str) -> dict[str, str]:
        """Serve an adapter from now on, in the place of the one before. Returns the digests of its tensors."""
        received = self._call("receive_adapter", directory)
        self._adapter_path = directory
        self._llm.llm_engine.add_lora(self._adapter_request(load_inplace=True))
        self._forget_prefixes()
        return received

    def probe(self, kind: Literal["base", "weights"], names: Sequence[str]) -> dict[str, Tensor]:
        """Columns of weights, as the kernels see them."""
        return self._call(f"probe_{kind}", names)

    def probe_adapter(self, names: Sequence[str], ranks: Mapping[str, int]) -> dict[str, Tensor]:
        """Columns of A and of B with its scale, as the LoRA kernels see them."""
        return self._call("probe_adapter", names, ranks)

    def close(self) -> None:
        shut_down(self._llm)

    def _call(self, method: str, *arguments: Any) -> Any:
        (answer,) = self._llm.collective_rpc(method, args=arguments)  # one worker
        return answer

    def _forget_prefixes(self) -> None:
        """Keys and values of other weights must not be met again."""
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache, since requests are still running.")

    def _adapter_request(self, *, load_inplace: bool = False) -> Any:
        if self._adapter_path is None:
            return None
        from vllm.lora.request import LoRARequest

        return LoRARequest("policy", ADAPTER_ID, self._adapter_path, load_inplace=load_inplace)

    def _sampling(self, job: Job) -> Any:
        from vllm import SamplingParams as VllmSampling

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
        )


def _sampled(output: Any) -> Sampled:
    (completion,) = output.outputs
    token_ids = tuple(completion.token_ids)
    logprobs = tuple(step[token].logprob for step, token in zip(completion.logprobs, token_ids, strict=True))
    assert completion.finish_reason in ("stop", "length"), completion.finish_reason
    return Sampled(
        token_ids=token_ids,
        logprobs=logprobs,
        finish_reason=completion.finish_reason,
        num_cached_tokens=int(output.num_cached_tokens or 0),
    )


def _prepare_environment(settings: EngineSettings) -> None:
    """What vLLM reads when it is imported. What the user has set stays."""
    usual = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs where it is started
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    for name, value in usual.items():
        os.environ.setdefault(name, value)
    if not torch.cuda.is_available() and settings.enforce_eager:
        compile_nothing()
