"""Groups as JSON, for a checkpoint: values survive bit for bit. A prompt is named by its index in the dataset, and by
the digest of its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from nemo_rl_lora.checkpoints.step_digests import token_digest
from nemo_rl_lora.types import Completion, Prompt, RolloutGroup


def prompt_record(prompt: Prompt) -> dict[str, Any]:
    return {"prompt_index": prompt.index, "prompt_tokens": token_digest([prompt.token_ids])}


def prompt_of(record: Mapping[str, Any], prompts: Sequence[Prompt]) -> Prompt | None:
    """The prompt of a record; None where it is no longer there, or another one now."""
    index = record["prompt_index"]
    prompt = prompts[index] if index < len(prompts) else None
    if prompt is None or record.get("prompt_tokens") not in (None, token_digest([prompt.token_ids])):
        return None
    return prompt


def group_record(group: RolloutGroup) -> dict[str, Any]:
    completions = [asdict(completion) for completion in group.completions]
    return {**prompt_record(group.prompt), "completions": completions, "rewards": group.rewards}


def group_from(record: Mapping[str, Any], prompt: Prompt) -> RolloutGroup:
    """The group of a record, whose prompt is this one."""
    completions = tuple(_completion(**completion) for completion in record["completions"])
    return RolloutGroup(prompt=prompt, completions=completions, rewards=tuple(record["rewards"]))


def _completion(**fields: Any) -> Completion:
    lists = {name: tuple(fields[name]) for name in ("token_ids", "logprobs")}
    return Completion(**{**fields, **lists, "versions": tuple((n, version) for n, version in fields["versions"])})
