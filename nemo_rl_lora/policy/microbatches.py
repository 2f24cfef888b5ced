"""How a logical batch is cut into microbatches and laid out as one flat run of tokens. Pure planning.

A batch is shared out among data-parallel ranks first: a rank's portion is its rows and how they are cut, so that no
rank needs the rows of another. A microbatch is a list of *segments*: contiguous tokens that attend to themselves
causally, and to one whole parent segment where they have one. A plain sequence is a segment without a parent; a group
with a shared prompt is one prompt segment and a child for each completion, whose positions continue the prompt's. So
there is no padding in any linear layer, packed sequences cannot see each other, and a prompt is computed once for its
group. Exact, since attention is causal. This module does not run a model and knows nothing of attention kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from nemo_rl_lora.config.policy import PolicyConfig
from nemo_rl_lora.distributed.ranks import DataShare
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

    @property
    def num_loss_tokens(self) -> int:
        return int(self.target.numel())

    @property
    def num_attention_scores(self) -> int:
        """Pairs of a token and one that it sees; padding, which is the last segment where there is any, has none."""
        segments = self.segments[:-1] if self.num_padding_tokens else self.segments
        return sum(
            s.length * (s.length + 1) // 2 + (0 if s.parent is None else s.length * segments[s.parent].length)
            for s in segments
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MicrobatchPlan:
    """How to cut: by rows, or by a budget of tokens (filled in order of length, or packed first-fit-decreasing)."""

    fill: Literal["rows", "sorted", "packed"]
    max_rows: int  # used by "rows"; groups, where they stay whole
    max_tokens: int  # used by "sorted" and "packed"
    share_prefix: bool
    max_shared_tokens: int  # a shared run longer than this repeats its prompt
    round_to: int = 1  # the flat length becomes a multiple of this, by padding that nothing attends to


Kind = Literal["train", "logprob"]


def plan_from_config(
    config: PolicyConfig,
    kind: Kind,
    *,
    max_rows: int,
    flat: bool,
    can_share: bool = True,
    round_to: int = 1,
) -> MicrobatchPlan:
    """What the configuration says, where lengths must also be multiples of `round_to`.

    `flat`: the model's attention serves the flat layout. `can_share`: there, prompts may be shared.
    """
    round_to = math.lcm(round_to, config.make_sequence_length_divisible_by)
    fill: Literal["rows", "sorted", "packed"] = "rows"
    if config.dynamic_batching.enabled:
        fill, round_to = "sorted", math.lcm(round_to, config.dynamic_batching.sequence_length_round)
    elif config.sequence_packing.enabled:
        fill, round_to = "packed", math.lcm(round_to, config.sequence_packing.sequence_length_round)
    return MicrobatchPlan(
        fill=fill,
        max_rows=max_rows,
        max_tokens=config.microbatch_tokens(kind, max_rows),
        share_prefix=flat and can_share and config.shared_prefix.enabled is not False,
        max_shared_tokens=config.shared_prefix.max_row_tokens,
        round_to=round_to if flat else 1,
    )


@dataclass(frozen=True, slots=True)
class _Unit:
    """Rows that travel together: a whole group, a part of one, or one row."""

    rows: tuple[int, ...]
    num_tokens: int
    shared: bool = False  # one prompt for all rows


@dataclass(frozen=True, slots=True)
class _Cut:
    """A microbatch that is not laid out yet. Without units it is there to keep step with other ranks."""

    units: tuple[_Unit, ...]
    round_to: int  # its flat length

    @property
    def num_tokens(self) -> int:
        """Its flat length."""
        size = sum(unit.num_tokens for unit in self.units)
        return size + -size % self.round_to if self.units else self.round_to


@dataclass(frozen=True, slots=True, kw_only=True)
class Portion:
    """What one data-parallel rank has of a batch: its rows alone, and how they are cut into microbatches."""

    rows: Tensor  # [b] int64, rising, indices into the batch
    batch: Batch  # these rows; its denominators are the whole batch's
    cuts: tuple[_Cut, ...]

    @property
    def most_tokens(self) -> int:
        """Of its largest microbatch, with padding."""
        return max((cut.num_tokens for cut in self.cuts), default=0)

    def first(self, number: int) -> Portion:
        """The same with so many of its microbatches."""
        return replace(self, cuts=self.cuts[:number])

    def microbatches(self) -> list[Microbatch]:
        """The microbatches, whose `rows` are indices into this portion's batch."""
        lengths, prompts = self.batch.sequence_length.tolist(), self.batch.prompt_length.tolist()
        return [_layout(self.batch, lengths, prompts, cut) for cut in self.cuts]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cutting:
    """How the ranks of a policy share batches: the same on all of them but for `share.index`."""

    train: MicrobatchPlan
    logprob: MicrobatchPlan
    share: DataShare

    def with_train_tokens(self, tokens: int) -> Cutting:
        """The same with another budget of training microbatches."""
        return replace(self, train=replace(self.train, max_tokens=tokens))

    def portions(self, batch: Batch, kind: Kind) -> list[Portion]:
        """One for each data-parallel rank. Every row is in exactly one microbatch of one portion, and the rows of a
        unit share their prompt."""
        plan = self.train if kind == "train" else self.logprob
        lengths, prompts = batch.sequence_length.tolist(), batch.prompt_length.tolist()
        units = _units(batch, lengths, prompts, plan)
        if self.share.number == 1:
            cuts = tuple(_Cut(tuple(bin_), plan.round_to) for bin_ in _bins(units, plan, batch.whole_groups))
            return [Portion(rows=torch.arange(len(lengths)), batch=batch, cuts=cuts)]
        everybodys = [_bins(own, plan, batch.whole_groups) for own in _deal(units, self.share.number)]
        most = max(map(len, everybodys))
        if self.share.meets != "never":
            everybodys = [bins + [[]] * (most - len(bins)) for bins in everybodys]
        sizes = [plan.round_to] * most
        if self.share.meets == "tokens":
            longest = [
                max(sum(unit.num_tokens for unit in bin_) for bin_ in beside)
                for beside in zip(*everybodys, strict=True)
            ]
            sizes = [size + -size % plan.round_to for size in longest]
        return [_portion(batch, bins, sizes) for bins in everybodys]


def _portion(batch: Batch, bins: Sequence[Sequence[_Unit]], sizes: Sequence[int]) -> Portion:
    """The rows of these bins, in the batch's order, and the bins by their places among them."""
    rows = sorted(row for bin_ in bins for unit in bin_ for row in unit.rows)
    place = {row: index for index, row in enumerate(rows)}
    cuts = tuple(
        _Cut(tuple(replace(unit, rows=tuple(place[row] for row in unit.rows)) for unit in bin_), size)
        for bin_, size in zip(bins, sizes, strict=False)
    )
    index = torch.tensor(rows, dtype=torch.int64)
    return Portion(rows=index, batch=batch.of_rows(index), cuts=cuts)


def _bins(units: Sequence[_Unit], plan: MicrobatchPlan, whole_groups: bool) -> list[list[_Unit]]:
    if plan.fill == "packed":
        return _first_fit_decreasing(units, plan.max_tokens)
    if plan.fill == "sorted":
        return _fill(sorted(units, key=lambda unit: -unit.num_tokens), plan.max_tokens, by_rows=False)
    return _fill(units, plan.max_rows, by_rows=True, whole_groups=whole_groups)


def _deal(units: Sequence[_Unit], number: int) -> list[list[_Unit]]:
    """Units in shares of about as many tokens: the longest first, each to the share that has the least so far."""
    shares: list[list[_Unit]] = [[] for _ in range(number)]
    used = [0] * number
    for unit in sorted(units, key=lambda unit: -unit.num_tokens):
        least = used.index(min(used))
        shares[least].append(unit)
        used[least] += unit.num_tokens
    return shares


def _units(batch: Batch, lengths: list[int], prompts: list[int], plan: MicrobatchPlan) -> list[_Unit]:
    if not (plan.share_prefix or batch.whole_groups):
        return [_Unit((row,), lengths[row]) for row in range(len(lengths))]
    members: dict[int, list[int]] = {}
    for row, group in enumerate(batch.group_index.tolist()):
        members.setdefault(group, []).append(row)
    if batch.whole_groups:
        return [_whole(rows, lengths, prompts, plan) for rows in members.values()]
    budget = plan.max_shared_tokens if plan.fill == "rows" else min(plan.max_shared_tokens, plan.max_tokens)
    units: list[_Unit] = []
    for rows in members.values():
        taken: list[int] = []
        tokens = 0
        for row in rows:
            own = lengths[row] - prompts[row]
            full = len(taken) >= plan.max_rows if plan.fill == "rows" else False
            if taken and (full or tokens + own > budget):
                units.append(_Unit(tuple(taken), tokens, shared=True))
                taken, tokens = [], 0
            tokens += own if taken else lengths[row]
            taken.append(row)
        units.append(_Unit(tuple(taken), tokens, shared=True))
    return units


def _whole(rows: list[int], lengths: list[int], prompts: list[int], plan: MicrobatchPlan) -> _Unit:
    """All rows of a group. Over the token budget they still share their prompt: repeating it would only add tokens."""
    repeated = sum(lengths[row] for row in rows)
    shared = repeated - (len(rows) - 1) * prompts[rows[0]]
    if plan.share_prefix and shared <= plan.max_shared_tokens:
        return _Unit(tuple(rows), shared, shared=True)
    return _Unit(tuple(rows), repeated)


def _fill(units: Sequence[_Unit], limit: int, *, by_rows: bool, whole_groups: bool = False) -> list[list[_Unit]]:
    bins: list[list[_Unit]] = []
    used = 0
    for unit in units:
        size = unit.num_tokens if not by_rows else 1 if whole_groups else len(unit.rows)
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


def _layout(batch: Batch, lengths: list[int], prompts: list[int], cut: _Cut) -> Microbatch:
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

    for unit in cut.units:
        first = unit.rows[0]
        shared = unit.shared and len(unit.rows) > 1 and prompts[first] > 0
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
    num_padding = cut.num_tokens - size
    if num_padding:
        segments.append(Segment(start=size, length=num_padding, parent=None))
        tokens.append(torch.zeros(num_padding, dtype=torch.int64))
        positions.append(torch.arange(num_padding))
    index = torch.tensor(rows, dtype=torch.int64)
    loss_row, loss_column = batch.loss_mask[index].nonzero(as_tuple=True)
    starts = torch.tensor([0, *[len(flat) for flat in flat_of_row]]).cumsum(0)[:-1]
    predictor = torch.cat([torch.zeros(0, dtype=torch.int64), *flat_of_row])[starts[loss_row] + loss_column - 1]
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
