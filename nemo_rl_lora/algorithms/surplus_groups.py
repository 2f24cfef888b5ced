"""Groups that dynamic sampling kept beyond what a step needs, for the next one.

A surplus group is older than the policy that trains on it, so it brings the log-probabilities of the policy that
sampled it: the ratio of the loss is the one between the two. Values survive a checkpoint bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nemo_rl_lora.algorithms.batch import collate_rollouts
from nemo_rl_lora.algorithms.group_records import group_from, group_record, prompt_of
from nemo_rl_lora.policy.protocol import Policy
from nemo_rl_lora.types import Batch, Prompt, RolloutGroup

SURPLUS_FILE = "held_groups.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class SurplusGroup(RolloutGroup):
    """A group, and for each completion what the policy that sampled it gave its tokens."""

    old_logprobs: tuple[tuple[float, ...], ...]


def as_surplus(groups: Sequence[RolloutGroup], policy: Policy) -> list[SurplusGroup]:
    """These groups with the log-probabilities of the policy as it is now, which sampled them."""
    if not groups:
        return []
    num_rows = sum(len(group.completions) for group in groups)
    batch = collate_rollouts(groups, torch.zeros(num_rows), overlong_filtering=False)
    logprobs = policy.logprobs(batch)
    spans = zip(batch.prompt_length.tolist(), batch.sequence_length.tolist(), strict=True)
    rows = iter([tuple(logprobs[row, begin:end].tolist()) for row, (begin, end) in enumerate(spans)])
    return [_surplus(group, [next(rows) for _ in group.completions]) for group in groups]


def with_old_logprobs(batch: Batch, logprobs: torch.Tensor, groups: Sequence[RolloutGroup]) -> Batch:
    """The batch of these groups with `logprobs`, [B, T] of the policy as it is now, as the old ones; a surplus group
    has its own."""
    old, row = logprobs.clone(), 0
    for group in groups:
        if isinstance(group, SurplusGroup):
            for place, own in enumerate(group.old_logprobs, start=row):
                old[place, int(batch.prompt_length[place]) : int(batch.sequence_length[place])] = torch.tensor(own)
        row += len(group.completions)
    return replace(batch, old_logprobs=old)


def save_surplus(path: Path, groups: Sequence[SurplusGroup]) -> None:
    """A JSON list."""
    rows = [{**group_record(group), "old_logprobs": group.old_logprobs} for group in groups]
    path.write_text(json.dumps(rows) + "\n", encoding="utf-8")


def load_surplus(path: Path, prompts: Sequence[Prompt]) -> list[SurplusGroup]:
    """What `save_surplus` wrote, without groups of prompts that are no longer there; nothing where a run keeps none."""
    rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    found = [(row, prompt_of(row, prompts)) for row in rows]
    return [
        _surplus(group_from(row, prompt), [tuple(logprobs) for logprobs in row["old_logprobs"]])
        for row, prompt in found
        if prompt is not None
    ]


def _surplus(group: RolloutGroup, old_logprobs: Sequence[tuple[float, ...]]) -> SurplusGroup:
    return SurplusGroup(
        prompt=group.prompt, completions=group.completions, rewards=group.rewards, old_logprobs=tuple(old_logprobs)
    )
