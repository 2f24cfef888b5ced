"""The generation engine that runs beside the trainer, in its process, on the base weights it already holds.

Contract: the Generation protocol. A prompt is computed once for its group; all submitted groups are decoded
together, up to a number of concurrent sequences; a finished sequence leaves the batch and a waiting group enters. A
completion depends on its prompt, its seed, the sampling and the weights, not on what is decoded beside it (but for
the rounding of differently shaped products). A merged sync is held in own copies of the named tensors, an adapter
sync as A and B beside the shared base; the base model's tensors are never written.
Not here: the arithmetic of the model (decoder.py, fallback.py) and of drawing a token (sampling.py).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nemo_rl_lora.generation.in_process.decoder import CausalDecoder, Decoder, unsupported_reason
from nemo_rl_lora.generation.in_process.fallback import PlainDecoder
from nemo_rl_lora.generation.in_process.sampling import sample, uniforms
from nemo_rl_lora.generation.protocol import Ticket
from nemo_rl_lora.generation.tickets import FinishReason, Ticketed
from nemo_rl_lora.lora.adapter_tensors import AdapterTensors, canonical_shapes
from nemo_rl_lora.tensors import torch_dtype
from nemo_rl_lora.types import CompletionGroup, GroupRequest, SyncReceipt, WeightsRef

if TYPE_CHECKING:
    from nemo_rl_lora.lora.spec import LoraSpec
    from nemo_rl_lora.lora.targets import AdaptedModule

logger = logging.getLogger(__name__)


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
    finish_reason: FinishReason | None = None


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
    ) -> None:
        config = base_model.config.get_text_config()
        super().__init__(
            tokenizer,
            getattr(base_model.generation_config, "eos_token_id", None),
            vocabulary=int(config.vocab_size),
            max_context=int(config.max_position_embeddings),
        )
        self._dtype, self._device = compute_dtype, base_model.device
        self._adapter_dtype = compute_dtype if spec is None or spec.dtype is None else torch_dtype(spec.dtype)
        self._max_concurrent = max_concurrent_sequences
        self._adapted = {module.name: module for module in adapted} if spec is not None else {}
        self._expected = {
            "merged": _merged_shapes(base_model, None if spec is None else self._adapted),
            "adapter": None if spec is None else canonical_shapes(self._adapted.values()),
        }
        self._decoder = _choose_decoder(base_model, compute_dtype, max_concurrent_sequences)

    @torch.inference_mode()
    def sync_weights(self, ref: WeightsRef) -> SyncReceipt:
        start = time.perf_counter()
        expected = _checked_shapes(ref, self._expected[ref.mode])
        assert ref.tensors is not None
        staged: dict[str, Tensor] = {}
        num_bytes = 0
        for name, shape in expected.items():
            tensor = ref.tensors[name]
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"weights of version {ref.version}: {name!r} has shape {tuple(tensor.shape)}, not {shape}. "
                    f"The engine keeps version {self._version}."
                )
            num_bytes += tensor.numel() * tensor.element_size()
            dtype = self._adapter_dtype if ref.mode == "adapter" else self._dtype
            staged[name] = tensor.detach().to(device=self._device, dtype=dtype, copy=True)
        if ref.mode == "merged":
            self._decoder.set_adapters({})
            self._decoder.set_weights(staged)
        else:
            self._decoder.set_weights({})
            modules = self._adapted.items()
            self._decoder.set_adapters({name: AdapterTensors.of(name, m.scale, staged) for name, m in modules})
        self._version = ref.version
        return SyncReceipt(
            version=ref.version,
            mode=ref.mode,
            digest=ref.digest,
            num_tensors=len(expected),
            num_bytes=num_bytes,
            seconds=time.perf_counter() - start,
        )

    def close(self) -> None:
        self._decoder.reset()
        super().close()

    @torch.inference_mode()
    def _run(self) -> None:
        """Decode everything that waits. After an error nothing is open, and what was open is lost."""
        rows: list[_Sequence] = []
        groups: dict[Ticket, list[_Sequence]] = {}
        try:
            while self._waiting or rows:
                admitted = self._admissible(len(rows))
                if admitted:
                    rows += self._open(admitted, groups)
                else:
                    last = torch.tensor([row.token_ids[-1] for row in rows], device=self._device)
                    self._draw(rows, self._decoder.step(last))
                rows = self._close_finished(rows, groups)
        except BaseException:
            self._decoder.reset()
            raise

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
        self._draw(opened, logits.repeat_interleave(torch.tensor(counts, device=logits.device), dim=0))
        return opened

    def _draw(self, rows: Sequence[_Sequence], logits: Tensor) -> None:
        seeds = [row.request.seeds[row.index] for row in rows]
        u = uniforms(seeds, [len(row.token_ids) for row in rows])
        tokens, logprobs = sample(logits, [row.request.sampling for row in rows], u)
        for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
            row.token_ids.append(token)
            row.logprobs.append(logprob)
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
            text = self._decode(token_ids)
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
            completions.append(self._completion(request.sampling, row.token_ids, row.logprobs, row.finish_reason))
        return CompletionGroup(prompt=request.prompt, completions=tuple(completions))


def _choose_decoder(model: PreTrainedModel, dtype: torch.dtype, batch_rows: int) -> Decoder:
    reason = unsupported_reason(model)
    if reason is None:
        logger.info("generation: in-process engine, shared prompts, up to %d sequences at once", batch_rows)
        return CausalDecoder(model, dtype, batch_rows)
    logger.warning("generation: in-process engine on transformers' own forward pass, several times slower: %s", reason)
    return PlainDecoder(model, dtype)


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
