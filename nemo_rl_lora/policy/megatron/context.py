"""Context parallelism over the flat layout: each rank has two stretches of the tokens, and attends to all before them.

A run of N tokens is cut into 2 C stretches for C ranks; rank r has stretches r and 2 C - 1 - r, so that every rank has
as many keys to look at (Megatron-Core's and Llama 3's split). Keys and values are gathered, and their gradients are
summed back. Segments have no parents here: a prompt is not shared between ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import lcm

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from nemo_rl_lora.policy.attention import attend
from nemo_rl_lora.policy.microbatches import Microbatch, Segment


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Own tokens that look at the same segment: queries `own`, keys `seen`, of which the last is the last query's."""

    own: slice  # of this rank's tokens
    seen: slice  # of the flat run


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextPlan:
    """This rank's part of a flat run of N tokens."""

    own: Tensor  # [N / C] flat places of this rank's tokens
    flat_from_gathered: Tensor  # [N]
    pieces: tuple[Piece, ...]
    group: dist.ProcessGroup


def length_multiple(tp: int, cp: int, sequence_parallel: bool) -> int:
    """What the length of a flat run must be a multiple of, for ranks that share it."""
    return lcm(2 * cp if cp > 1 else 1, cp * tp if sequence_parallel else 1)


def plan_context(segments: Sequence[Segment], num_tokens: int, group: dist.ProcessGroup) -> ContextPlan:
    """Where this rank's tokens stand in a run of `num_tokens`, and what each looks at."""
    assert all(segment.parent is None for segment in segments), "a shared prompt does not split over ranks"
    number, length = group.size(), num_tokens // (2 * group.size())
    starts = [stretch * length for rank in range(number) for stretch in (rank, 2 * number - 1 - rank)]
    gathered = torch.cat([torch.arange(start, start + length) for start in starts])
    own_starts = starts[2 * group.rank() : 2 * group.rank() + 2]
    pieces = []
    for place, start in enumerate(own_starts):
        for segment in segments:
            begin, end = max(start, segment.start), min(start + length, segment.start + segment.length)
            if begin < end:
                own = slice(place * length + begin - start, place * length + end - start)
                pieces.append(Piece(own=own, seen=slice(segment.start, end)))
    own = gathered.view(number, -1)[group.rank()]
    return ContextPlan(own=own, flat_from_gathered=gathered.argsort(), pieces=tuple(pieces), group=group)


def context_attention(query: Tensor, key: Tensor, value: Tensor, plan: ContextPlan) -> Tensor:
    """query [N / C, heads, d], key and value [N / C, kv heads, d], rotated -> [N / C, heads, d]."""
    order = plan.flat_from_gathered.to(key.device)
    key, value = (
        gather_from_sequence_parallel_region(x.contiguous(), group=plan.group).index_select(0, order)
        for x in (key, value)
    )
    out = []
    for piece in plan.pieces:
        q, k, v = query[piece.own], key[piece.seen], value[piece.seen]
        num_queries, num_keys = q.shape[0], k.shape[0]
        blocked = torch.ones(1, num_queries, num_keys, dtype=torch.bool, device=q.device)
        blocked = blocked.triu(num_keys - num_queries + 1)
        out.append(attend(q[None], k[None], v[None], blocked, q.shape[-1] ** -0.5)[0])
    return torch.cat(out)


def own_loss_tokens(micro: Microbatch, plan: ContextPlan) -> Microbatch:
    """The microbatch with only those loss tokens that this rank's tokens predict, by their place among its own."""
    place = torch.full((micro.num_tokens,), -1, dtype=torch.int64)
    place[plan.own] = torch.arange(len(plan.own))
    predictor = place[micro.predictor]
    here = predictor >= 0
    return replace(
        micro,
        predictor=predictor[here],
        loss_row=micro.loss_row[here],
        loss_column=micro.loss_column[here],
        target=micro.target[here],
    )
