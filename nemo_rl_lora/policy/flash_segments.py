"""Attention over a flat run of segments on a GPU: two variable-length flash calls, without masks, buckets or padding.

In one call every segment attends to itself, causally; in the other, children attend to all of their parent. Each call
gives its softmax's log-sum-exp, by which the two outputs are merged into that of the whole softmax. The backward pass
hands both calls the merged output and log-sum-exp, so that each computes its part of the whole softmax's gradient: what
ring attention does (Liu, Zaharia and Abbeel, arXiv:2310.01889). Rows that are gathered are distinct, so none is added
to by two threads. Not run on a GPU yet; what merges and gathers is compared with a dense softmax in fp64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_rl_lora.kernels import machine
from nemo_rl_lora.policy.determinism import strictly
from nemo_rl_lora.policy.microbatches import Segment

DTYPES = (torch.bfloat16, torch.float16)
LARGEST_HEAD = 256
_HEAD_MULTIPLE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """Which queries attend to which keys in one flash call: run i of queries to run i of keys. Row numbers are those of
    the flat run; bounds are int32, as the kernel takes them."""

    query_rows: Tensor | None  # None: all, in their order
    key_rows: Tensor | None
    query_bounds: Tensor  # [runs + 1]
    key_bounds: Tensor
    longest_query: int
    longest_key: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FlashPlan:
    """The calls of a microbatch; `above` is None where no segment has a parent."""

    own: Call
    above: Call | None


def takes(query: Tensor, value: Tensor) -> bool:
    """Whether flash kernels take these: query [.., d] and value, whose dtype is that of the computation."""
    size = query.shape[-1]
    fits = value.is_cuda and value.dtype in DTYPES and size % _HEAD_MULTIPLE == 0 and size <= LARGEST_HEAD
    return fits and machine.is_recent()


def plan_flash(segments: Sequence[Segment]) -> FlashPlan:
    """The calls of segments that follow each other without gaps."""
    lengths = [segment.length for segment in segments]
    own = Call(
        query_rows=None,
        key_rows=None,
        query_bounds=_bounds(lengths),
        key_bounds=_bounds(lengths),
        longest_query=max(lengths),
        longest_key=max(lengths),
    )
    families: dict[int, list[Segment]] = {}
    for segment in segments:
        if segment.parent is not None:
            families.setdefault(segment.parent, []).append(segment)
    if not families:
        return FlashPlan(own=own, above=None)
    children = [torch.cat([_rows(child) for child in family]) for family in families.values()]
    parents = [_rows(segments[parent]) for parent in families]
    above = Call(
        query_rows=torch.cat(children),
        key_rows=torch.cat(parents),
        query_bounds=_bounds([len(rows) for rows in children]),
        key_bounds=_bounds([len(rows) for rows in parents]),
        longest_query=max(len(rows) for rows in children),
        longest_key=max(len(rows) for rows in parents),
    )
    return FlashPlan(own=own, above=above)


def gathered(tensor: Tensor, rows: Tensor | None) -> Tensor:
    """These rows; None: all."""
    return tensor if rows is None else tensor.index_select(0, rows)


def _rows(segment: Segment) -> Tensor:
    return torch.arange(segment.start, segment.start + segment.length)


def _bounds(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def attend_by_flash(query: Tensor, key: Tensor, value: Tensor, plan: FlashPlan, scale: float) -> Tensor:
    """query [N, H, d], key and value [N, KV, d] of the flat run -> [N, H, d]."""
    return _Attend.apply(query, key, value, plan, scale)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: FlashPlan, scale: float) -> Tensor:
        out, total, state = flash_forward(q, k, v, plan.own, scale, causal=True)
        states = [*state]
        if plan.above is not None:
            above, rows = plan.above, plan.above.query_rows
            assert rows is not None
            upper, upper_sum, state = flash_forward(q, k, v, above, scale, causal=False)
            states += state
            own_sum = total.index_select(1, rows)
            merged = torch.logaddexp(own_sum, upper_sum)
            share = (own_sum - merged).exp().t()[..., None]  # of a query's own segment, [rows, H, 1]
            mixed = torch.lerp(upper.to(share.dtype), out.index_select(0, rows).to(share.dtype), share)
            out.index_copy_(0, rows, mixed.to(out.dtype))
            total.index_copy_(1, rows, merged)
        ctx.save_for_backward(q, k, v, out, total, *states)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, out, total, *states = ctx.saved_tensors
        plan, scale, grad = ctx.plan, ctx.scale, grad.contiguous()
        dq, dk, dv = flash_backward(grad, q, k, v, out, total, states[:2], plan.own, scale, causal=True)
        if plan.above is not None:
            rows, keys = plan.above.query_rows, plan.above.key_rows
            more = flash_backward(grad, q, k, v, out, total, states[2:], plan.above, scale, causal=False)
            for whole, at, part in zip((dq, dk, dv), (rows, keys, keys), more, strict=True):
                whole.index_copy_(0, at, whole.index_select(0, at) + part)  # distinct rows: nothing is added atomically
        return dq, dk, dv, None, None


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, call: Call, scale: float, *, causal: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(output [rows, H, d], log-sum-exp [H, rows] fp32, two tensors for the backward pass)."""
    out, total, state, unused, _ = torch.ops.aten._flash_attention_forward(
        gathered(q, call.query_rows),
        gathered(k, call.key_rows),
        gathered(v, call.key_rows),
        call.query_bounds,
        call.key_bounds,
        call.longest_query,
        call.longest_key,
        0.0,  # dropout
        causal,
        False,  # no probabilities for debugging
        scale=scale,
    )
    return out, total, [state, unused]


def flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    total: Tensor,
    states: Sequence[Tensor],
    call: Call,
    scale: float,
    *,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the call's queries, keys and values, where `out` and `total` are those of the whole softmax."""
    rows = call.query_rows
    inputs = (
        gathered(grad, rows),
        gathered(q, rows),
        gathered(k, call.key_rows),
        gathered(v, call.key_rows),
        gathered(out, rows),
        total if rows is None else total.index_select(1, rows),
    )
    with strictly():  # else it adds the gradients of queries up in any order
        return torch.ops.aten._flash_attention_backward(
            *inputs,
            call.query_bounds,
            call.key_bounds,
            call.longest_query,
            call.longest_key,
            0.0,
            causal,
            *states,
            scale=scale,
        )
