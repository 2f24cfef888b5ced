"""How a logical batch is cut into microbatches and laid out as one flat run of tokens. Pure planning.

A microbatch is a list of *segments*: contiguous tokens that attend to themselves causally, and to one whole parent
segment where they have one. A plain sequence is a segment without a parent; a group with a shared prompt is one
prompt segment and a child for each completion, whose positions continue the prompt's. So there is no padding in any
linear layer, packed sequences cannot see each other, and a prompt is computed once for its group. Exact, since
attention is causal. This module does not run a model and knows nothing of attention kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nemo_rl_lora.types import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """`length` tokens from `start` of the flat layout; `parent` is an index into the segments, or None."""

    start: int
    length: int
    parent: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Microbatch:
    """Rows of a batch in flat layout. N flat tokens, b rows, M loss tokens.

    `predictor[m]` is the flat position whose hidden state predicts loss token m, which stands at
    (`loss_row[m]`, `loss_column[m]`) of the rows, and whose id is `target[m]`.
    """

    rows: Tensor  # [b] int64, indices into the batch
    token_ids: Tensor  # [N] int64
    position_ids: Tensor  # [N] int64, restarting with each sequence
    segments: tuple[Segment, ...]
    predictor: Tensor  # [M] int64
    loss_row: Tensor  # [M] int64, in 0..b-1
    loss_column: Tensor  # [M] int64
    target: Tensor  # [M] int64
    num_padding_tokens: int

    @property
    def num_tokens(self) -> int:
        return int(self.token_ids.numel())


@dataclass(frozen=True, slots=True, kw_only=True)
class MicrobatchPlan:
    """How to cut: by rows, or by a budget of tokens (filled in order of length, or packed first-fit-decreasing)."""

    fill: Literal["rows", "sorted", "packed"]
    max_rows: int  # used by "rows"
    max_tokens: int  # used by "sorted" and "packed"
    share_prefix: bool
    max_shared_tokens: int  # a shared run longer than this repeats its prompt
    round_to: int = 1  # the flat length becomes a multiple of this, by padding that nothing attends to


@dataclass(frozen=True, slots=True)
class _Unit:
    """Rows that travel together: a whole group, a part of one, or one row."""

    rows: tuple[int, ...]
    num_tokens: int


def plan_microbatches(batch: Batch, plan: MicrobatchPlan) -> list[Microbatch]:
    """Cut a batch. Every row is in exactly one microbatch, and the rows of a unit share their prompt."""
    lengths = batch.sequence_length.tolist()
    prompts = batch.prompt_length.tolist()
    units = _units(batch.group_index.tolist(), lengths, prompts, plan)
    if plan.fill == "packed":
        bins = _first_fit_decreasing(units, plan.max_tokens)
    elif plan.fill == "sorted":
        bins = _fill(sorted(units, key=lambda unit: -unit.num_tokens), plan.max_tokens, by_rows=False)
    else:
        bins = _fill(units, plan.max_rows, by_rows=True)
    return [_layout(batch, lengths, prompts, units_of_bin, plan) for units_of_bin in bins]


def _units(groups: list[int], lengths: list[int], prompts: list[int], plan: MicrobatchPlan) -> list[_Unit]:
    if not plan.share_prefix:
        return [_Unit((row,), lengths[row]) for row in range(len(lengths))]
    budget = plan.max_shared_tokens if plan.fill == "rows" else min(plan.max_shared_tokens, plan.max_tokens)
    units: list[_Unit] = []
    members: dict[int, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    for rows in members.values():
        taken: list[int] = []
        tokens = 0
        for row in rows:
            own = lengths[row] - prompts[row]
            full = len(taken) >= plan.max_rows if plan.fill == "rows" else False
            if taken and (full or tokens + own > budget):
                units.append(_Unit(tuple(taken), tokens))
                taken, tokens = [], 0
            tokens += own if taken else lengths[row]
            taken.append(row)
        units.append(_Unit(tuple(taken), tokens))
    return units


def _fill(units: Sequence[_Unit], limit: int, *, by_rows: bool) -> list[list[_Unit]]:
    bins: list[list[_Unit]] = []
    used = 0
    for unit in units:
        size = len(unit.rows) if by_rows else unit.num_tokens
        if not bins or used + size > limit:
            bins.append([])
            used = 0
        bins[-1].append(unit)
        used += size
    return bins


def _first_fit_decreasing(units: Sequence[_Unit], limit: int) -> list[list[_Unit]]:
    bins: list[list[_Unit]] = []
    used: list[int] = []
    for unit in sorted(units, key=lambda unit: -unit.num_tokens):
        place = next((i for i, size in enumerate(used) if size + unit.num_tokens <= limit), None)
        if place is None:
            bins.append([])
            used.append(0)
            place = len(bins) - 1
        bins[place].append(unit)
        used[place] += unit.num_tokens
    return bins


def _layout(
    batch: Batch, lengths: list[int], prompts: list[int], units: Sequence[_Unit], plan: MicrobatchPlan
) -> Microbatch:
    segments: list[Segment] = []
    tokens: list[Tensor] = []
    positions: list[Tensor] = []
    rows: list[int] = []
    flat_of_row: list[Tensor] = []  # [length of the row]: where each of its tokens stands
    size = 0

    def add(row: int, begin: int, end: int, parent: int | None) -> Tensor:
        nonlocal size
        segments.append(Segment(start=size, length=end - begin, parent=parent))
        tokens.append(batch.token_ids[row, begin:end])
        positions.append(torch.arange(begin, end))
        where = torch.arange(size, size + end - begin)
        size += end - begin
        return where

    for unit in units:
        first = unit.rows[0]
        shared = plan.share_prefix and len(unit.rows) > 1 and prompts[first] > 0
        prompt_at = add(first, 0, prompts[first], None) if shared else None
        parent = len(segments) - 1
        for row in unit.rows:
            rows.append(row)
            if prompt_at is None:
                flat_of_row.append(add(row, 0, lengths[row], None))
            elif lengths[row] == prompts[row]:
                flat_of_row.append(prompt_at)
            else:
                flat_of_row.append(torch.cat([prompt_at, add(row, prompts[row], lengths[row], parent)]))
    num_padding = -size % plan.round_to
    if num_padding:
        segments.append(Segment(start=size, length=num_padding, parent=None))
        tokens.append(torch.zeros(num_padding, dtype=torch.int64))
        positions.append(torch.arange(num_padding))
    index = torch.tensor(rows, dtype=torch.int64)
    loss_row, loss_column = batch.loss_mask[index].nonzero(as_tuple=True)
    starts = torch.tensor([0, *[len(flat) for flat in flat_of_row]]).cumsum(0)[:-1]
    predictor = torch.cat(flat_of_row)[starts[loss_row] + loss_column - 1]
    return Microbatch(
        rows=index,
        token_ids=torch.cat(tokens),
        position_ids=torch.cat(positions),
        segments=tuple(segments),
        predictor=predictor,
        loss_row=loss_row,
        loss_column=loss_column,
        target=batch.token_ids[index[loss_row], loss_column],
        num_padding_tokens=num_padding,
    )
