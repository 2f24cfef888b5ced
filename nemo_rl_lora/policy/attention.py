"""Attention over a flat run of segments (see microbatches.py), as an attention function of transformers.

On a GPU, in bf16 and fp16, it is flash attention without padding (flash_segments.py). Everywhere else
segments of similar length are padded together into a few buckets, for attention alone; a child's keys are its
parent's keys followed by its own. Work and memory grow with the sum of (own length) x (parent + own length), so a
group costs what its completions cost. The probabilities are computed again in the backward pass rather than kept.
Only full causal attention is served: no sliding window, no soft cap, no attention dropout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface

from nemo_rl_lora.config.policy import PolicyConfig
from nemo_rl_lora.models.families import families_for, shortening_window
from nemo_rl_lora.models.own_forward import unserved_argument
from nemo_rl_lora.policy.cpu_attention import attend_on_cpu
from nemo_rl_lora.policy.determinism import repeatable
from nemo_rl_lora.policy.flash_segments import FlashPlan, attend_by_flash, plan_flash, takes
from nemo_rl_lora.policy.microbatches import Segment
from nemo_rl_lora.policy.upload import upload

NAME = "nemo_rl_lora_segments"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bucket:
    """S segments padded to L tokens, at `start` of the padded layout; children name their parents' bucket."""

    start: int
    num_segments: int
    length: int
    parent_bucket: int | None
    parent_row: Tensor | None  # [S] row of each segment's parent within the parents' bucket
    blocked: Tensor  # [S or 1, L, Lp + L] bool: true where a query must not look


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddedPlan:
    """Where flat tokens go for attention. N flat tokens, M places of the padded layout."""

    padded_from_flat: Tensor  # [M] int64; padding points at token 0
    flat_from_padded: Tensor  # [N] int64
    is_padding: Tensor  # [M] bool
    buckets: tuple[_Bucket, ...]


class AttentionPlan:
    """The segments of a microbatch, laid out in the form that a layer's kernel takes.

    `flash` is given where the device has flash attention, to come there with all else; the other form is laid out when
    a layer first asks for it.
    """

    def __init__(self, segments: Sequence[Segment], device: torch.device, flash: FlashPlan | None = None) -> None:
        self._segments, self._device, self._flash = segments, device, flash

    @cached_property
    def padded(self) -> PaddedPlan:
        return upload(plan_padded(self._segments), self._device)

    @cached_property
    def flash(self) -> FlashPlan:
        return self._flash or upload(plan_flash(self._segments), self._device)


def supports_segments(config: Any, max_length: int) -> bool:
    """Whether a transformers config describes full causal attention for sequences up to `max_length` tokens."""
    if config.model_type not in families_for("segments") or shortening_window(config, max_length) is not None:
        return False
    return not getattr(config, "attention_dropout", 0.0)


def layout_problems(policy: PolicyConfig, model_config: Any) -> list[str]:
    """A paragraph for each layout that was asked for and that this model's attention does not allow."""
    if supports_segments(model_config, policy.max_total_sequence_length):
        return []
    kind = f"{model_config.model_type} does not have at this length (or with attention dropout)"
    problems = []
    if policy.sequence_packing.enabled:
        problems.append(
            f"policy.sequence_packing.enabled=True: packing needs full causal attention, which {kind}. "
            f"Set policy.sequence_packing.enabled=false."
        )
    if policy.shared_prefix.enabled is True:
        problems.append(
            f"policy.shared_prefix.enabled=True: sharing needs full causal attention, which {kind}. "
            f"Set policy.shared_prefix.enabled=auto."
        )
    return problems


def plan_padded(segments: Sequence[Segment]) -> PaddedPlan:
    """Bucket segments: those without a parent by length class, children by their parents' bucket and length class."""
    placed: dict[int, tuple[int, int]] = {}  # segment -> (bucket, row)
    buckets: list[_Bucket] = []
    members: list[list[int]] = []
    size = 0
    roots = [i for i, segment in enumerate(segments) if segment.parent is None]
    children = [i for i, segment in enumerate(segments) if segment.parent is not None]
    for level in (roots, children):
        classes: dict[tuple[int | None, int], list[int]] = {}
        for i in level:
            parent = segments[i].parent
            parent_bucket = None if parent is None else placed[parent][0]
            classes.setdefault((parent_bucket, segments[i].length.bit_length()), []).append(i)
        for (parent_bucket, _), indices in classes.items():
            for row, i in enumerate(indices):
                placed[i] = (len(buckets), row)
            rows = None if parent_bucket is None else [placed[segments[i].parent or 0][1] for i in indices]
            buckets.append(_bucket(segments, indices, size, parent_bucket, rows, buckets))
            members.append(indices)
            size += buckets[-1].num_segments * buckets[-1].length
    num_tokens = sum(segment.length for segment in segments)
    padded_from_flat = torch.zeros(size, dtype=torch.int64)
    is_padding = torch.ones(size, dtype=torch.bool)
    flat_from_padded = torch.empty(num_tokens, dtype=torch.int64)
    for bucket, indices in zip(buckets, members, strict=True):
        for row, i in enumerate(indices):
            segment = segments[i]
            at = bucket.start + row * bucket.length
            padded_from_flat[at : at + segment.length] = torch.arange(segment.start, segment.start + segment.length)
            is_padding[at : at + segment.length] = False
            flat_from_padded[segment.start : segment.start + segment.length] = torch.arange(at, at + segment.length)
    return PaddedPlan(
        padded_from_flat=padded_from_flat,
        flat_from_padded=flat_from_padded,
        is_padding=is_padding,
        buckets=tuple(buckets),
    )


def _bucket(
    segments: Sequence[Segment],
    indices: list[int],
    start: int,
    parent_bucket: int | None,
    parent_rows: list[int] | None,
    buckets: list[_Bucket],
) -> _Bucket:
    length = max(segments[i].length for i in indices)
    blocked = torch.ones(length, length, dtype=torch.bool).triu(1)[None]
    if parent_bucket is not None:
        parent_lengths = torch.tensor([segments[segments[i].parent or 0].length for i in indices])
        parent_padding = torch.arange(buckets[parent_bucket].length)[None] >= parent_lengths[:, None]  # [S, Lp]
        if bool((parent_lengths == parent_lengths[0]).all()):
            parent_padding = parent_padding[:1]
        rows = parent_padding.shape[0]
        blocked = torch.cat([parent_padding[:, None].expand(rows, length, -1), blocked.expand(rows, -1, -1)], dim=-1)
    return _Bucket(
        start=start,
        num_segments=len(indices),
        length=length,
        parent_bucket=parent_bucket,
        parent_row=None if parent_rows is None else torch.tensor(parent_rows),
        blocked=blocked,
    )


class _Permute(torch.autograd.Function):
    """Rows of x in another order. Its gradient is a gather too, because padding carries none."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, inverse: Tensor, drop: Tensor | None) -> Tensor:
        ctx.save_for_backward(index, inverse, drop)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad: Tensor):
        _, inverse, drop = ctx.saved_tensors
        grad = grad.index_select(0, inverse)
        if drop is not None:
            grad[drop] = 0
        return grad, None, None, None


def attend(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor, scale: float) -> Tensor:
    """softmax(scale * q k^T) v [S, L, H, d]: q [S, L, H, d], k and v [S, K, KV, d], blocked [S or 1, L, K] true where
    not to look, as cpu_attention.py has it."""
    if not q.is_cuda:
        return attend_on_cpu(q, k, v, blocked, scale)
    num_heads, num_kv = q.shape[2], k.shape[2]
    heads_as_rows = q.unflatten(2, (num_kv, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [S, KV, heads * L, d]
    mask = ~blocked[:, None].repeat(1, 1, num_heads // num_kv, 1)
    with sdpa_kernel(
        repeatable([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
    ):  # cuDNN builds a graph for every length
        out = F.scaled_dot_product_attention(
            heads_as_rows, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=scale
        )
    return out.unflatten(2, (num_heads // num_kv, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def segment_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    attention_plan: AttentionPlan,
    **others: Any,
) -> tuple[Tensor, None]:
    """query [1, H, N, d], key and value [1, KV, N, d] -> ([1, N, H, d], None), for transformers' interface."""
    assert attention_mask is None, "segments need no mask"
    assert unserved_argument(others) is None, unserved_argument(others)
    assert not dropout, dropout
    head_dim = query.shape[-1]
    scale = head_dim**-0.5 if scaling is None else scaling
    dtype = value.dtype
    if takes(query, value):
        q, k, v = (x.to(dtype)[0].transpose(0, 1) for x in (query, key, value))
        return attend_by_flash(q, k, v, attention_plan.flash, scale)[None], None
    plan = attention_plan.padded
    q, k, v = (
        _Permute.apply(x.to(dtype)[0].transpose(0, 1).contiguous(), plan.padded_from_flat, plan.flat_from_padded, None)
        for x in (query, key, value)
    )  # [M, heads, d]
    keys: list[Tensor] = []
    values: list[Tensor] = []
    outputs: list[Tensor] = []
    for bucket in plan.buckets:
        num, length = bucket.num_segments, bucket.length
        part = slice(bucket.start, bucket.start + num * length)
        own_q, own_k, own_v = (x[part].view(num, length, -1, head_dim) for x in (q, k, v))
        keys.append(own_k)
        values.append(own_v)
        if bucket.parent_bucket is not None:
            assert bucket.parent_row is not None
            own_k = torch.cat([keys[bucket.parent_bucket].index_select(0, bucket.parent_row), own_k], dim=1)
            own_v = torch.cat([values[bucket.parent_bucket].index_select(0, bucket.parent_row), own_v], dim=1)
        outputs.append(attend(own_q, own_k, own_v, bucket.blocked, scale).flatten(0, 1))
    padded = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    flat = _Permute.apply(padded, plan.flat_from_padded, plan.padded_from_flat, plan.is_padding)
    return flat[None], None


AttentionInterface.register(NAME, segment_attention)
