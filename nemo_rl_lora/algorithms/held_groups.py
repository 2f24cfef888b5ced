"""Groups that dynamic sampling kept beyond what a step needs, and holds for the next one.

A held group is older than the policy that trains on it, so it brings the log-probabilities of the policy that sampled
it: the ratio of the loss is the one between the two. Values survive a checkpoint bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nemo_rl_lora.algorithms.rollout import collate_rollouts
from nemo_rl_lora.policy.protocol import Policy
from nemo_rl_lora.types import Batch, Completion, Prompt, RolloutGroup

HELD_FILE = "held_groups.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldGroup:
    """A group, and for each completion what the policy that sampled it gave its tokens."""

    group: RolloutGroup
    old_logprobs: tuple[tuple[float, ...], ...]


def hold(groups: Sequence[RolloutGroup], policy: Policy) -> list[HeldGroup]:
    """These groups with the log-probabilities of the policy as it is now, which sampled them."""
    if not groups:
        return []
    num_rows = sum(len(group.completions) for group in groups)
    batch = collate_rollouts(groups, torch.zeros(num_rows), overlong_filtering=False)
    logprobs = policy.logprobs(batch)
    spans = zip(batch.prompt_length.tolist(), batch.sequence_length.tolist(), strict=True)
    rows = iter([tuple(logprobs[row, begin:end].tolist()) for row, (begin, end) in enumerate(spans)])
    return [HeldGroup(group=group, old_logprobs=tuple(next(rows) for _ in group.completions)) for group in groups]


def with_held_logprobs(batch: Batch, held: Sequence[HeldGroup]) -> Batch:
    """The batch, whose first rows are those of the held groups, with their own old logprobs."""
    assert batch.old_logprobs is not None
    old = batch.old_logprobs.clone()
    for row, logprobs in enumerate(logprobs for group in held for logprobs in group.old_logprobs):
        old[row, int(batch.prompt_length[row]) : int(batch.sequence_length[row])] = torch.tensor(logprobs)
    return replace(batch, old_logprobs=old)


def save_held(path: Path, held: Sequence[HeldGroup]) -> None:
    """A JSON list; a prompt is named by its index in the dataset."""
    rows = [
        {
            "prompt_index": one.group.prompt.index,
            "completions": [asdict(completion) for completion in one.group.completions],
            "rewards": one.group.rewards,
            "old_logprobs": one.old_logprobs,
        }
        for one in held
    ]
    path.write_text(json.dumps(rows) + "\n", encoding="utf-8")


def load_held(path: Path, prompts: Sequence[Prompt]) -> list[HeldGroup]:
    """What `save_held` wrote; nothing where a run held nothing."""
    if not path.is_file():
        return []
    return [
        HeldGroup(
            group=RolloutGroup(
                prompt=prompts[row["prompt_index"]],
                completions=tuple(_completion(**completion) for completion in row["completions"]),
                rewards=tuple(row["rewards"]),
            ),
            old_logprobs=tuple(tuple(logprobs) for logprobs in row["old_logprobs"]),
        )
        for row in json.loads(path.read_text(encoding="utf-8"))
    ]


def _completion(**fields: Any) -> Completion:
    lists = {name: tuple(fields[name]) for name in ("token_ids", "logprobs")}
    return Completion(**{**fields, **lists, "versions": tuple((n, version) for n, version in fields["versions"])})
