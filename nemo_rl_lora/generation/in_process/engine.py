"""The generation engine that runs beside the trainer, in its process, on the base weights it already holds.

Contract: the Generation protocol. A prompt is computed once for its group; all submitted groups are decoded
together, up to a number of concurrent sequences; a finished sequence leaves the batch and a waiting group enters. A
completion depends on its prompt, its seed, the sampling and the weights, not on what is decoded beside it (but for
the rounding of differently shaped products). A merged sync is held in own copies of the named tensors, an adapter
sync as A and B beside the shared base; the base model's tensors are never written. Merged weights take the place of
those before one tensor at a time: a sync that breaks off leaves an engine that serves no version until the next one.
Not here: the arithmetic of the model (decoder.py, fallback.py) and of drawing a token (sampling.py).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nemo_rl_lora.generation.in_process.bursts import BURST_TOKENS, Bursts, CudaGraphs
from nemo_rl_lora.generation.in_process.decoder import CausalDecoder, Decoder, unsupported_reason
from nemo_rl_lora.generation.in_process.fallback import PlainDecoder
from nemo_rl_lora.generation.in_process.inspection import Inspection
from nemo_rl_lora.generation.in_process.sampling import sample, uniforms
from nemo_rl_lora.generation.proof import Incoming
from nemo_rl_lora.generation.protocol import Ticket
from nemo_rl_lora.generation.tickets import FinishReason, Ticketed, one_more
from nemo_rl_lora.generation.turns import Turns
from nemo_rl_lora.lora.adapter_tensors import AdapterTensors, canonical_shapes
from nemo_rl_lora.tensors import torch_dtype
from nemo_rl_lora.types import CompletionGroup, GroupRequest, SyncMode, SyncReceipt, WeightsRef

if TYPE_CHECKING:
    from nemo_rl_lora.lora.spec import LoraSpec
    from nemo_rl_lora.lora.targets import AdaptedModule

logger = logging.getLogger(__name__)

CudaGraphsChoice = bool | Literal["auto"]

_KEPT_SHARE = 0.1  # of a GPU's memory, for a cache that stays between rollouts and the CUDA graphs that use it
_NO_LIMIT = 2**31  # positions of a model without a table of them: ALiBi, recurrent layers
_NUM_PROBE_STEPS = 3
_FP32_BOUND = 1e-3  # of logits relative to their size: rounding is 1e-6, with recurrent layers 1e-4
_BF16_BOUND = 0.1  # rounding is a few hundredths, a lost cache of the order of 1


@dataclass(slots=True, kw_only=True)
class _Sequence:
    """A completion in the making."""

    ticket: Ticket
    index: int  # within its group
    request: GroupRequest
    limit: int  # tokens it may have
    stop_token_ids: frozenset[int]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[tuple[int, int]] = field(default_factory=list)  # as in Completion
    finish_reason: FinishReason | None = None
    is_held_up: bool = False  # a burst left the draw of its next token to the host


class InProcessGeneration(Ticketed):
    """`spec` and `adapted` say what a sync moves: the adapted modules, or every parameter where `spec` is None."""

    def __init__(
        self,
        base_model: PreTrainedModel,
        *,
        tokenizer: PreTrainedTokenizerBase,
        spec: LoraSpec | None,
        adapted: Sequence[AdaptedModule],
        compute_dtype: torch.dtype,
        max_concurrent_sequences: int,
        cuda_graphs: CudaGraphsChoice = "auto",
    ) -> None:
        config = base_model.config.get_text_config()
        super().__init__(
            tokenizer,
            getattr(base_model.generation_config, "eos_token_id", None),
            vocabulary=int(config.vocab_size),
            max_context=int(getattr(config, "max_position_embeddings", _NO_LIMIT)),
        )
        self._dtype, self._device = compute_dtype, base_model.device
        self._adapter_dtype = compute_dtype if spec is None or spec.dtype is None else torch_dtype(spec.dtype)
        self._max_concurrent = max_concurrent_sequences
        self._adapted = {module.name: module for module in adapted} if spec is not None else {}
        self._expected = {
            "merged": _merged_shapes(base_model, None if spec is None else self._adapted),
            "adapter": None if spec is None else canonical_shapes(self._adapted.values()),
        }
        self._turns = Turns()
        self._decoder = _choose_decoder(base_model, compute_dtype, max_concurrent_sequences)
        self._bursts = _choose_bursts(self._decoder, cuda_graphs)
        self._inspection = Inspection(self._decoder, base_model, list(self._adapted.values()), compute_dtype)

    def sync_weights(self, ref: WeightsRef) -> SyncReceipt:
        """Between two steps of a rollout, if one runs: its completions go on under these weights, on the keys and
        values that they have."""
        with self._turns.update(), torch.inference_mode():
            return self._sync(ref)

    def _sync(self, ref: WeightsRef) -> SyncReceipt:
        start = time.perf_counter()
        expected = _checked_shapes(ref, self._expected[ref.mode])
        self._inspection.begin(ref)
        incoming = Incoming({name: partial(self._taken, ref, name, shape) for name, shape in expected.items()})
        if ref.mode == "merged":
            self._version = None  # in between it serves no version
            self._decoder.set_adapters({})
            self._decoder.set_weights(incoming)
            incoming.read_rest()
        else:  # A and B are small: they are all there before anything is touched
            staged = {name: incoming[name] for name in expected}
            self._version = None
            self._decoder.set_weights({})
            modules = self._adapted.items()
            self._decoder.set_adapters({name: AdapterTensors.of(name, m.scale, staged) for name, m in modules})
        served = time.perf_counter()
        digest, verdict = self._inspection.judge()
        self._version = ref.version
        done = time.perf_counter()
        return SyncReceipt(
            version=ref.version,
            mode=ref.mode,
            digest=digest,
            num_tensors=len(expected),
            num_bytes=sum(info.num_bytes for info in ref.manifest),
            seconds=done - start,
            verdict=verdict,
            proof_seconds=self._inspection.noting_seconds + done - served,
        )

    def _taken(self, ref: WeightsRef, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor of a ref as the engine is to hold it, of which the inspection knows."""
        assert ref.tensors is not None
        tensor = ref.tensors[name]
        if tuple(tensor.shape) != shape:
            keeps = "serves no version" if self._version is None else f"keeps version {self._version}"
            raise ValueError(
                f"weights of version {ref.version}: {name!r} has shape {tuple(tensor.shape)}, not {shape}. "
                f"The engine {keeps}."
            )
        own = self._copied(tensor, self._adapter_dtype if ref.mode == "adapter" else self._dtype)
        self._inspection.note(name, tensor, own)
        return own

    def _copied(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The engine's own, which stays as it is while the policy trains on."""
        return tensor.detach().to(device=self._device, dtype=dtype, copy=True)

    def kept_bytes(self, mode: SyncMode) -> int:
        """What it holds between rollouts once it serves such a sync, beside the base: the tensors, and its cache."""
        dtype = self._adapter_dtype if mode == "adapter" else self._dtype
        shapes = (self._expected[mode] or {}).values()
        cache = self._decoder.kept_bytes if isinstance(self._decoder, CausalDecoder) else 0
        return sum(map(math.prod, shapes)) * dtype.itemsize + cache

    def close(self) -> None:
        self._turns.stop()
        with self._turns.update():
            self._decoder.reset()
        super().close()

    @torch.inference_mode()
    def _run(self) -> None:
        """Decode everything that waits. After an error nothing is open, and what was open is lost."""
        rows: list[_Sequence] = []
        groups: dict[Ticket, list[_Sequence]] = {}
        try:
            while self._waiting or rows:
                with self._turns.step():
                    self._require_weights()
                    admitted = self._admissible(len(rows))
                    if admitted:
                        rows += self._open(admitted, groups)
                    elif self._bursts is None or any(row.is_held_up for row in rows):
                        last = torch.tensor([row.token_ids[-1] for row in rows], device=self._device)
                        self._draw(rows, self._decoder.step(last))
                    else:
                        self._extend(rows, self._bursts)
                    rows = self._close_finished(rows, groups)
        except BaseException:
            self._decoder.reset()
            raise
        finally:
            if self._bursts is not None:
                self._bursts.forget()

    def _admissible(self, num_open: int) -> list[tuple[Ticket, GroupRequest]]:
        """The groups that enter now: a group is never split, so one larger than the limit runs alone."""
        if num_open and not self._decoder.late_admission:
            return []
        admitted: list[tuple[Ticket, GroupRequest]] = []
        while self._waiting:
            ticket, request = next(iter(self._waiting.items()))
            if num_open and num_open + request.num_completions > self._max_concurrent:
                break
            num_open += request.num_completions
            admitted.append((ticket, self._waiting.pop(ticket)))
        return admitted

    def _open(
        self, admitted: Sequence[tuple[Ticket, GroupRequest]], groups: dict[Ticket, list[_Sequence]]
    ) -> list[_Sequence]:
        requests = [request for _, request in admitted]
        counts = [request.num_completions for request in requests]
        logits = self._decoder.admit([request.prompt.token_ids for request in requests], counts)
        for ticket, request in admitted:
            sampling = request.sampling
            groups[ticket] = [
                _Sequence(
                    ticket=ticket,
                    index=index,
                    request=request,
                    limit=min(sampling.max_new_tokens, self._max_context - len(request.prompt.token_ids)),
                    stop_token_ids=self._stop_token_ids(sampling),
                )
                for index in range(request.num_completions)
            ]
        opened = [row for ticket, _ in admitted for row in groups[ticket]]
        repeats = torch.tensor(counts, device=logits.device)
        self._draw(opened, logits.repeat_interleave(repeats, dim=0, output_size=sum(counts)))  # else it is read back
        return opened

    def _draw(self, rows: Sequence[_Sequence], logits: Tensor) -> None:
        u = self._uniforms(rows, 1)[0]
        tokens, logprobs = sample(logits, [row.request.sampling for row in rows], u)
        for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
            self._append(row, token, logprob)
            row.is_held_up = False

    def _extend(self, rows: Sequence[_Sequence], bursts: Bursts) -> None:
        num_tokens = min(BURST_TOKENS, max(row.limit - len(row.token_ids) for row in rows))
        sampling = [row.request.sampling for row in rows]
        found = bursts.extend([row.token_ids[-1] for row in rows], sampling, self._uniforms(rows, num_tokens))
        for row, new in zip(rows, found, strict=True):
            for token, logprob in new:
                if row.finish_reason is None:
                    self._append(row, token, logprob)
            row.is_held_up = len(new) < num_tokens and row.finish_reason is None

    def _uniforms(self, rows: Sequence[_Sequence], num_tokens: int) -> Tensor:
        """[tokens, N]: for the next tokens of every row."""
        seeds = [row.request.seeds[row.index] for row in rows] * num_tokens
        positions = [len(row.token_ids) + later for later in range(num_tokens) for row in rows]
        return uniforms(seeds, positions).view(num_tokens, len(rows))

    def _append(self, row: _Sequence, token: int, logprob: float) -> None:
        assert self._version is not None, "_run requires weights"
        row.token_ids.append(token)
        row.logprobs.append(logprob)
        one_more(row.versions, self._version)
        row.finish_reason = self._finish_reason(row)

    def _finish_reason(self, row: _Sequence) -> FinishReason | None:
        """Why the last token ended the row, or None."""
        if row.token_ids[-1] in row.stop_token_ids or self._ends_in_stop_string(row):
            return "stop"
        return "length" if len(row.token_ids) >= row.limit else None

    def _ends_in_stop_string(self, row: _Sequence) -> bool:
        stop_strings = row.request.sampling.stop_strings
        if not stop_strings:
            return False
        # A token gives at least one byte, so a stop string that the last token completes lies in this many tokens; four
        # more, the longest character in UTF-8, since the first of them may begin within one.
        reach = max(len(stop.encode()) for stop in stop_strings) + 4
        for token_ids in (row.token_ids[-reach:], row.token_ids):  # the whole only where the end has one
            text = self._decode(row.request.sampling, token_ids)
            if not any(stop in text for stop in stop_strings):
                return False
        return True

    def _close_finished(self, rows: list[_Sequence], groups: dict[Ticket, list[_Sequence]]) -> list[_Sequence]:
        finished = [i for i, row in enumerate(rows) if row.finish_reason is not None]
        if not finished:
            return rows
        for ticket in {rows[i].ticket for i in finished}:
            if all(row.finish_reason is not None for row in groups[ticket]):
                self._done[ticket] = self._completed(groups.pop(ticket))
        return [rows[i] for i in self._decoder.retire(finished)]

    def _completed(self, members: Sequence[_Sequence]) -> CompletionGroup:
        request, completions = members[0].request, []
        for row in members:
            assert row.finish_reason is not None
            completions.append(
                self._completion(request.sampling, row.token_ids, row.logprobs, row.finish_reason, row.versions)
            )
        return CompletionGroup(prompt=request.prompt, completions=tuple(completions))


def _choose_decoder(model: PreTrainedModel, dtype: torch.dtype, batch_rows: int) -> Decoder:
    reason = unsupported_reason(model)
    if reason is None:
        logger.info("generation: in-process engine, shared prompts, up to %d sequences at once", batch_rows)
        model.set_attn_implementation("sdpa")  # the same attention, as every model that this decoder serves has it
        decoder: Decoder = CausalDecoder(model, dtype, batch_rows)
    else:
        logger.warning("generation: in-process engine on transformers' own forward pass, slower: %s", reason)
        decoder = PlainDecoder(model, dtype)
    _refuse_other_logits(decoder, model, _FP32_BOUND if dtype == torch.float32 else _BF16_BOUND)
    return decoder


def _choose_bursts(decoder: Decoder, cuda_graphs: CudaGraphsChoice) -> Bursts | None:
    """None where a step at a time is as fast: on a CPU, which need not be told what to do ahead."""
    if not isinstance(decoder, CausalDecoder) or decoder.embedding.device.type != "cuda":
        if cuda_graphs is True:
            raise ValueError(
                "policy.generation.cuda_graphs=True: only the engine's fast decoder is captured, and only on a GPU. "
                "Set it to auto, or remove it."
            )
        return None
    memory = torch.cuda.get_device_properties(decoder.embedding.device).total_memory
    decoder.kept_bytes = int(_KEPT_SHARE * memory)
    return Bursts(decoder, CudaGraphs if cuda_graphs else None, may_fail=cuda_graphs == "auto")


@torch.inference_mode()
def _refuse_other_logits(decoder: Decoder, model: PreTrainedModel, bound: float) -> None:
    """ValueError unless a decoder continues two prompts with the logits of the model's own forward pass without a
    cache: some models have a cache of their own kind, or none.

    The median of the steps counts: in bf16 the rounding of one step may be as large as its logits, where a cache that
    is wrong is so at every step.
    """
    token_ids = [i * 37 % int(model.config.get_text_config().vocab_size) for i in range(3, 15)]
    rows, errors = [token_ids[:9], token_ids[:5]], list[float]()
    try:
        decoder.admit(rows, [1, 1])
        for token in token_ids[-_NUM_PROBE_STEPS:]:
            found = decoder.step(torch.tensor([token, token], device=model.device)).float()
            rows = [[*row, token] for row in rows]
            for row, logits in zip(rows, found, strict=True):
                own = model(input_ids=torch.tensor([row], device=model.device), use_cache=False).logits[0, -1].float()
                own, logits = own - own.mean(), logits - logits.mean()
                errors.append(float((logits - own).norm() / own.norm()))
        error = median(errors)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as problem:
        reason = f"cannot be decoded with transformers' DynamicCache ({problem})"
    else:
        reason = f"decoded with a cache gives logits that differ by {error:.3g} of their size (bound {bound:g})"
        if error <= bound:
            decoder.reset()
            return
    raise ValueError(
        f"policy.model_name={str(model.config.name_or_path)!r}: {type(model).__name__} {reason}, so this engine would "
        f"sample from another model. Set policy.generation.backend=vllm, or choose a model with key-value caches."
    )


def _merged_shapes(model: PreTrainedModel, adapted: Mapping[str, AdaptedModule] | None) -> dict[str, tuple[int, ...]]:
    """What a merged sync must bring: adapted weights, or every parameter (tied ones under one name)."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    if adapted is None:
        return shapes
    names = [f"{name}.weight" for name in adapted]
    missing = [name for name in names if name not in shapes]
    if missing:
        raise ValueError(f"adapted modules that {type(model).__name__} does not have as linear layers: {missing[:5]}")
    return {name: shapes[name] for name in names}


def _checked_shapes(ref: WeightsRef, expected: Mapping[str, tuple[int, ...]] | None) -> Mapping[str, tuple[int, ...]]:
    """What this engine serves, by name. Refuses, before anything is touched, a ref that is not exactly that."""
    label = f"weights of version {ref.version} ({ref.mode})"
    if expected is None:
        raise ValueError(f"{label}: this engine serves a model without an adapter. Publish mode 'merged'.")
    if ref.tensors is None:
        raise ValueError(f"{label}: the in-process engine reads tensors of this process, and the ref has none.")
    names = [info.name for info in ref.manifest]
    missing = [name for name in expected if name not in set(names)]
    unexpected = [name for name in names if name not in expected]
    if missing or unexpected or len(names) != len(expected):
        raise ValueError(
            f"{label}: {len(names)} tensors for {len(expected)} expected; "
            f"missing {missing[:5]}, unexpected {unexpected[:5]}. Nothing was changed."
        )
    for info in ref.manifest:
        if info.name not in ref.tensors or tuple(info.shape) != expected[info.name]:
            raise ValueError(
                f"{label}: {info.name!r} with shape {tuple(info.shape)}, expected {expected[info.name]}. "
                f"Nothing was changed."
            )
    return expected
