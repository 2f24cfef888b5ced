"""One forward pass: a microbatch in, log-probabilities of its loss tokens out.

Two layouts of the same rows. Flat: segments in one run of tokens, for models with full causal attention. Padded: one
row a sequence, with the model's own attention mask, for every other model (no packing and no shared prefix there).
The pass is a module of its own around body and head, so that whoever shards the model can wrap all that a pass reads.
Tensor-parallel ranks may share the body's matrices, the vocabulary, and with sequence parallelism the tokens: then the
weights are DTensors here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from nemo_rl_lora.lora.targets import AdaptedModule
from nemo_rl_lora.models.own_forward import (
    body_of,
    compared_attention,
    fastest_of,
    last_hidden_states,
    reached_linears,
    read_head,
    refusal,
)
from nemo_rl_lora.models.shapes import type_name
from nemo_rl_lora.policy import attention
from nemo_rl_lora.policy.flash_segments import FlashPlan, plan_flash
from nemo_rl_lora.policy.head import Head, target_logprobs
from nemo_rl_lora.policy.microbatches import Microbatch, Segment
from nemo_rl_lora.policy.upload import upload
from nemo_rl_lora.types import Batch

_CHUNK_TOKENS = {"cuda": 1024, "cpu": 256}  # a GPU is kept busy by 263 MB of logits: 128k words in bf16
_NUM_PROBE_TOKENS = 24
# What rounding may come to, where the form of the head and each attention call are known to be exact: of
# log-probabilities, on average, and of hidden states relative to their size, of the worst token and of the middle one.
_FP32_BOUNDS = (1e-3, 1e-3)
_BF16_BOUNDS = (0.25, 0.1)


def default_chunk_tokens(device: torch.device) -> int:
    """Tokens whose logits exist at a time, where policy.logprob_chunk_size is null."""
    return _CHUNK_TOKENS.get(device.type, _CHUNK_TOKENS["cpu"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Padded:
    """Rows of a microbatch one below the other, padded on the right."""

    token_ids: Tensor  # [b, longest]
    mask: Tensor  # [b, longest] int64
    places: Tensor  # [N] of flat tokens among the b * longest


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A microbatch where it is computed, with all that a pass reads of it."""

    micro: Microbatch
    rows: Batch | None  # its rows, for the loss
    flash: FlashPlan | None
    padded: Padded | None


class ForwardPass(nn.Module):
    """The body and head of a causal language model, run on microbatches."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        flat: bool,
        temperature: float,
        chunk_tokens: int,
        autocast_dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        sequence_mesh: DeviceMesh | None = None,
    ) -> None:
        """`flat` chooses the layout. `autocast_dtype`: the compute dtype of fp32 weights, where it is another.

        `device`: where to compute, where weights are kept elsewhere. `sequence_mesh`: ranks that share a sequence's
        activations outside of attention and MLP, and so need lengths that are multiples of their number. ValueError
        for a model whose head is not one that can be run in chunks.
        """
        super().__init__()
        self.model, self.flat, self.temperature, self.chunk_tokens = model, flat, temperature, chunk_tokens
        self.autocast_dtype, self.sequence_mesh = autocast_dtype, sequence_mesh
        self.device = device or next(model.parameters()).device
        try:
            self.form = read_head(model)
        except ValueError as error:
            raise self._refusal(str(error)) from None
        self._attention = attention.NAME if flat else "eager"

    def prepare(self) -> None:
        """Choose the attention implementation that the layout needs: the model's own, until `verify` found another."""
        self.model.set_attn_implementation(self._attention)

    @torch.no_grad()
    def verify(
        self,
        compute_dtype: torch.dtype = torch.float32,
        change_layers: Callable[[PreTrainedModel], None] | None = None,
    ) -> frozenset[str]:
        """ValueError unless this computes what the model's own forward pass with its eager attention does. Returns the
        names of the linear modules that the pass reached. `change_layers` is called between the two.

        Each attention call is decided exactly, in fp64; padded rows get torch's fused attention where all are the
        model's own. Whatever else may be between the two, other processes included, shows in the hidden states and
        log-probabilities of two sequences, to the rounding of the compute dtype.
        """
        vocabulary = int(self.model.config.get_text_config().vocab_size)
        half = _NUM_PROBE_TOKENS // 2 + -(_NUM_PROBE_TOKENS // 2) % self._length_multiple
        token_ids = torch.arange(1, 2 * half + 1) * 37 % vocabulary
        whole, both, width = _probe(token_ids, [2 * half]), _probe(token_ids, [2 * half, half]), 2 * half
        candidate, settings = ALL_ATTENTION_FUNCTIONS["sdpa"], {}
        if self.flat:
            plan = attention.AttentionPlan(whole.segments, self.device)
            candidate, settings = attention.segment_attention, {"attention_plan": plan, "attention_mask": None}
        self.model.set_attn_implementation("eager")
        assert self.model.config._attn_implementation == "eager", "load_model gives it to models that cannot change it"
        with compared_attention(candidate, **settings) as calls, reached_linears(self.model) as reached:
            own_hidden, own_logprobs = self(whole, width, as_the_model=True)
        if self.flat and not calls.are_served:
            raise self._refusal(calls.unserved or "has an attention that cannot be replaced")
        if not self.flat:
            self._attention = fastest_of(self.model, calls)
        self.prepare()
        if change_layers is not None:
            change_layers(self.model)
        hidden = self(replace(both, rows=both.rows[:0]), width).float().cpu()
        logprobs = self(both, width).cpu()
        expected = torch.cat([own_hidden, own_hidden[:half]])
        errors = (hidden - expected).norm(dim=-1) / expected.norm(dim=-1)
        is_fp32 = compute_dtype == torch.float32
        hidden_error = float(errors.max() if is_fp32 else errors.median())
        logprob_error = float((logprobs - own_logprobs)[0, 1:].abs().mean())
        hidden_bound, logprob_bound = _FP32_BOUNDS if is_fp32 else _BF16_BOUNDS
        if not (hidden_error <= hidden_bound and logprob_error <= logprob_bound):
            raise self._refusal(
                f"gives other numbers by itself than here: hidden states of {len(hidden)} tokens differ by "
                f"{hidden_error:.3g} of their size (bound {hidden_bound:g}), log-probabilities by {logprob_error:.3g} "
                f"(bound {logprob_bound:g})"
            )
        return frozenset(reached)

    def _refusal(self, reason: str) -> ValueError:
        return refusal(str(self.model.config.name_or_path), f"{type(self.model).__name__} {reason}")

    def place(self, micro: Microbatch, batch: Batch | None = None) -> Placed:
        """Bring a microbatch, and its rows of a batch, to the device: one copy, which nothing waits for.

        So the host lays out the next microbatch while the device computes this one, as long as it reads nothing back.
        """
        placed = Placed(
            micro=micro,
            rows=None if batch is None else batch.of_rows(micro.rows),
            flash=plan_flash(micro.segments) if self.flat and self.device.type == "cuda" else None,
            padded=None if self.flat else _padded(micro, self._length_multiple),
        )
        return upload(placed, self.device)

    def forward(self, micro: Microbatch | Placed, width: int, *, as_the_model: bool = False) -> Any:
        """[b, width] fp32, in the order of the microbatch's rows; 0.0 where there is no loss token. A microbatch
        without rows gives [N, H] hidden states.

        `as_the_model`: hidden states [N, H] and log-probabilities of a microbatch of one row, by the model's own
        forward pass.
        """
        placed = micro if isinstance(micro, Placed) else self.place(micro)
        micro = placed.micro
        with torch.autocast(
            self.device.type, dtype=self.autocast_dtype or torch.bfloat16, enabled=self.autocast_dtype is not None
        ):
            if as_the_model:
                return self._by_the_model(micro, width)
            hidden = self._hidden(placed)
            if len(micro.rows) > 0:
                hidden = hidden.index_select(0, micro.predictor)
        if self.autocast_dtype is not None:
            hidden = hidden.to(self.autocast_dtype)
        head = self._head()
        if len(micro.rows) > 0:
            return logprob_rows(hidden, head, micro, width)
        # Gradients are reduced between ranks in groups of parameters, of which each rank must have the same ones.
        return hidden + 0.0 * head.weight.sum() if head.weight.requires_grad else hidden

    def _by_the_model(self, micro: Microbatch, width: int) -> tuple[Tensor, Tensor]:
        with last_hidden_states(self.model) as found:
            logits = self.model(input_ids=micro.token_ids[None], use_cache=False).logits
        logits = logits.full_tensor() if isinstance(logits, DTensor) else logits
        logprobs = torch.log_softmax(logits[0, :-1].float() / self.temperature, -1)
        logprobs = logprobs.gather(1, micro.token_ids[1:, None])[:, 0]
        rows = F.pad(logprobs, (1, width - len(logprobs) - 1))[None]
        return self._whole(found[0])[0].float().cpu(), rows.cpu()

    def _head(self) -> Head:
        output = self.model.get_output_embeddings()
        assert isinstance(output, nn.Linear), type(output)
        weight = output.weight
        if not isinstance(weight, DTensor):
            return Head(weight=weight, temperature=self.temperature, chunk_tokens=self.chunk_tokens, form=self.form)
        mesh = weight.device_mesh
        return Head(
            weight=weight.to_local(),
            temperature=self.temperature,
            chunk_tokens=self.chunk_tokens,
            form=self.form,
            group=mesh.get_group(),
            first_row=min(mesh.get_local_rank() * -(-weight.shape[0] // mesh.size()), weight.shape[0]),
        )

    def _hidden(self, placed: Placed) -> Tensor:
        """[N, H] in the order of the flat layout."""
        body, micro, padded = body_of(self.model), placed.micro, placed.padded
        if padded is None:
            output = body(
                input_ids=micro.token_ids[None],
                position_ids=micro.position_ids[None],
                use_cache=False,
                attention_plan=attention.AttentionPlan(micro.segments, self.device, placed.flash),
            )
            return self._whole(output.last_hidden_state)[0]
        output = body(input_ids=padded.token_ids, attention_mask=padded.mask, use_cache=False)
        return self._whole(output.last_hidden_state).flatten(0, 1).index_select(0, padded.places)

    def _whole(self, hidden: Tensor) -> Tensor:
        """All tokens [b, N, H] of what is this rank's share of them."""
        if self.sequence_mesh is not None and not isinstance(hidden, DTensor):
            hidden = DTensor.from_local(hidden, self.sequence_mesh, [Shard(1)], run_check=False)
        # The head gives every rank the whole gradient, of which each sends back that of its own tokens.
        return hidden.full_tensor() if isinstance(hidden, DTensor) else hidden

    @property
    def _length_multiple(self) -> int:
        return 1 if self.sequence_mesh is None else self.sequence_mesh.size()


def refuse_unreached(adapted: Sequence[AdaptedModule], reached: Collection[str], config_key: str) -> None:
    """ValueError where no text reaches modules that have adapters, which would never learn: another modality's, or
    modules that the model reads without calling them. Of experts, those of a kind count as one."""
    kinds = {type_name(name) for name in reached}
    if idle := list(dict.fromkeys(type_name(m.name) for m in adapted if type_name(m.name) not in kinds)):
        shown = ", ".join(idle[:5]) + (f" and {len(idle) - 5} more" if len(idle) > 5 else "")
        raise ValueError(
            f"{config_key}.target_modules: selects {shown}, which no token of a text reaches, so that their adapters "
            f"would never learn. Add {idle!r} to {config_key}.exclude_modules."
        )


def logprob_rows(hidden: Tensor, head: Head, micro: Microbatch, width: int) -> Tensor:
    """[b, width] fp32 from the hidden states [M, H] that predict the loss tokens, on whose device the microbatch is."""
    values = target_logprobs(hidden, head, micro.target)
    rows = torch.zeros(len(micro.rows), width, dtype=torch.float32, device=hidden.device)
    return rows.index_put((micro.loss_row, micro.loss_column), values)


def _probe(token_ids: Tensor, lengths: Sequence[int]) -> Microbatch:
    """A sequence of each length, from the first token on, whose every token but the first is a loss token."""
    starts = [sum(lengths[:row]) for row in range(len(lengths))]
    columns = torch.cat([torch.arange(1, length) for length in lengths])
    rows = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths) - 1)
    return Microbatch(
        rows=torch.arange(len(lengths)),
        token_ids=torch.cat([token_ids[:length] for length in lengths]),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        segments=tuple(Segment(start=s, length=n, parent=None) for s, n in zip(starts, lengths, strict=True)),
        predictor=torch.tensor(starts)[rows] + columns - 1,
        loss_row=rows,
        loss_column=columns,
        target=token_ids[columns],
        num_padding_tokens=0,
    )


def _padded(micro: Microbatch, multiple: int = 1) -> Padded:
    """A plain microbatch, which has a segment a row, in flat order."""
    assert all(segment.parent is None for segment in micro.segments), "a shared prefix needs the flat layout"
    lengths = [segment.length for segment in micro.segments]
    longest = max(lengths) + -max(lengths) % multiple
    token_ids = torch.zeros(len(lengths), longest, dtype=torch.int64)
    mask = torch.zeros_like(token_ids)
    for row, segment in enumerate(micro.segments):
        token_ids[row, : segment.length] = _tokens_of(micro, segment)
        mask[row, : segment.length] = 1
    return Padded(token_ids=token_ids, mask=mask, places=mask.flatten().nonzero()[:, 0])


def _tokens_of(micro: Microbatch, segment: Segment) -> Tensor:
    return micro.token_ids[segment.start : segment.start + segment.length]
