"""From prompts to a batch: completions are sampled, scored, and laid out as rows. Knows no engine and no model.

Axes: P prompts, G completions of each, B = P x G rows in that order, T tokens of the longest row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemo_rl_lora.algorithms.losses import count_denominators
from nemo_rl_lora.config.generation import EngineConfig
from nemo_rl_lora.environments.protocol import Environment
from nemo_rl_lora.randomness import derive_seed
from nemo_rl_lora.types import Batch, CompletionGroup, GroupRequest, Prompt, RolloutGroup, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutParams:
    """How a rollout is drawn: every seed follows from (seed, purpose, draw, prompt, completion)."""

    num_completions: int
    sampling: SamplingParams
    max_sequence_length: int  # prompt and completion
    seed: int
    purpose: str  # "rollout" or "validation"


def validation_sampling(engine: EngineConfig) -> SamplingParams:
    """How completions are drawn where nothing is trained on them."""
    return SamplingParams(
        max_new_tokens=engine.max_new_tokens,
        temperature=engine.val_temperature,
        top_p=engine.val_top_p,
        top_k=engine.val_top_k,
        stop_token_ids=tuple(engine.stop_token_ids or ()),
        stop_strings=tuple(engine.stop_strings or ()),
    )


def group_requests(prompts: Sequence[Prompt], params: RolloutParams, draw: str) -> list[GroupRequest]:
    """What to ask the engine for. `draw` names this rollout (the step, and which one of the step)."""
    return [
        GroupRequest(
            prompt=prompt,
            num_completions=params.num_completions,
            seeds=tuple(
                derive_seed(params.seed, params.purpose, draw, place, prompt.index, g)
                for g in range(params.num_completions)
            ),
            sampling=_within(params, prompt),
        )
        for place, prompt in enumerate(prompts)
    ]


def _within(params: RolloutParams, prompt: Prompt) -> SamplingParams:
    room = params.max_sequence_length - len(prompt.token_ids)
    return replace(params.sampling, max_new_tokens=min(params.sampling.max_new_tokens, room))


def score(
    groups: Sequence[CompletionGroup], environments: Mapping[str, Environment]
) -> tuple[list[RolloutGroup], dict[str, float]]:
    """Rewards from each group's own environment, one call an environment, and the environments' metrics."""
    rewards: list[list[float]] = [[0.0] * len(group.completions) for group in groups]
    metrics: dict[str, float] = {}
    for name in sorted({group.prompt.environment for group in groups}):
        places = [
            (i, g)
            for i, group in enumerate(groups)
            if group.prompt.environment == name
            for g in range(len(group.completions))
        ]
        scores = environments[name].score(
            [groups[i].prompt for i, _ in places], [groups[i].completions[g].text for i, g in places]
        )
        for (i, g), reward in zip(places, scores.rewards, strict=True):
            rewards[i][g] = reward
        for metric, value in scores.metrics.items():
            metrics[metric] = metrics.get(metric, 0.0) + value
    scored = [
        RolloutGroup(prompt=group.prompt, completions=group.completions, rewards=tuple(row))
        for group, row in zip(groups, rewards, strict=True)
    ]
    return scored, metrics


def collate_rollouts(groups: Sequence[RolloutGroup], advantages: Tensor, *, overlong_filtering: bool) -> Batch:
    """One row per completion, prompt first. `advantages` is [B]; its groups follow the rows' order.

    With `overlong_filtering` a completion that was cut at the length limit has no loss token. Counts the global
    denominators, once.
    """
    rows = [(group, completion) for group in groups for completion in group.completions]
    prompt_length = torch.tensor([len(group.prompt.token_ids) for group, _ in rows])
    completion_length = torch.tensor([len(completion.token_ids) for _, completion in rows])
    sequence_length = prompt_length + completion_length
    width = int(sequence_length.max())
    token_ids = torch.zeros(len(rows), width, dtype=torch.int64)
    generation_logprobs = torch.zeros(len(rows), width, dtype=torch.float32)
    for row, (group, completion) in enumerate(rows):
        begin, end = int(prompt_length[row]), int(sequence_length[row])
        token_ids[row, :begin] = torch.tensor(group.prompt.token_ids)
        token_ids[row, begin:end] = torch.tensor(completion.token_ids)
        generation_logprobs[row, begin:end] = torch.tensor(completion.logprobs)
    columns = torch.arange(width)[None]
    loss_mask = (columns >= prompt_length[:, None]) & (columns < sequence_length[:, None])
    if overlong_filtering:
        is_cut = torch.tensor([completion.finish_reason == "length" for _, completion in rows])
        loss_mask = loss_mask & ~is_cut[:, None]
    return Batch(
        token_ids=token_ids,
        loss_mask=loss_mask,
        sequence_length=sequence_length,
        prompt_length=prompt_length,
        group_index=group_index(groups),
        denominators=count_denominators(loss_mask),
        generation_logprobs=generation_logprobs.masked_fill(~loss_mask, 0.0),
        advantages=advantages,
    )


def group_index(groups: Sequence[RolloutGroup]) -> Tensor:
    """[B] int64: the group of each row."""
    return torch.tensor([i for i, group in enumerate(groups) for _ in group.completions])


def rewards_of(groups: Sequence[RolloutGroup]) -> Tensor:
    """[B] fp32, in the order of the rows."""
    return torch.tensor([reward for group in groups for reward in group.rewards], dtype=torch.float32)


def optimizer_slices(batch: Batch, train_global_batch_size: int) -> list[Batch]:
    """The parts of a rollout that get an optimizer step each, every one with its own denominators."""
    num_rows = len(batch.token_ids)
    if num_rows <= train_global_batch_size:
        return [batch]
    return [
        take_rows(batch, slice(begin, begin + train_global_batch_size))
        for begin in range(0, num_rows, train_global_batch_size)
    ]


def take_rows(batch: Batch, rows: slice) -> Batch:
    """These rows of every field, with their denominators counted anew."""

    def of(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[rows]

    loss_mask = batch.loss_mask[rows]
    return replace(
        batch,
        token_ids=batch.token_ids[rows],
        loss_mask=loss_mask,
        sequence_length=batch.sequence_length[rows],
        prompt_length=batch.prompt_length[rows],
        group_index=batch.group_index[rows],
        denominators=count_denominators(loss_mask),
        old_logprobs=of(batch.old_logprobs),
        reference_logprobs=of(batch.reference_logprobs),
        generation_logprobs=of(batch.generation_logprobs),
        advantages=of(batch.advantages),
    )
