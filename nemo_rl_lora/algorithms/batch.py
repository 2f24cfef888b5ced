"""Rows become a logical batch: examples, preference pairs and scored groups, laid out, counted and cut into slices.

Every function that makes a batch counts its global denominators, once. Axes: B rows, T tokens of the longest row; of
groups P prompts with G completions each, B = P x G in that order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nemo_rl_lora.algorithms.advantages import advantages_from_config, shaped_rewards
from nemo_rl_lora.algorithms.losses.policy import count_denominators
from nemo_rl_lora.config.grpo import GrpoConfig
from nemo_rl_lora.types import Batch, Example, PreferencePair, RolloutGroup


def collate_examples(examples: Sequence[Example]) -> Batch:
    """One row per example; the loss is on the tokens that its mask names."""
    lengths = torch.tensor([len(example.token_ids) for example in examples])
    loss_mask = _padded([example.loss_mask for example in examples], torch.bool)
    loss_mask[:, 0] = False  # nothing predicts the first token
    return Batch(
        token_ids=_padded([example.token_ids for example in examples], torch.int64),
        loss_mask=loss_mask,
        sequence_length=lengths,
        prompt_length=torch.where(loss_mask.any(dim=1), loss_mask.int().argmax(dim=1), lengths),
        group_index=torch.arange(len(examples)),
        denominators=count_denominators(loss_mask),
    )


def collate_pairs(pairs: Sequence[PreferencePair]) -> Batch:
    """Two rows per pair, the chosen answer first; the loss is on the answers."""
    rows = [(pair.prompt_ids, answer) for pair in pairs for answer in (pair.chosen_ids, pair.rejected_ids)]
    return replace(_collate_answers(rows, torch.arange(len(pairs)).repeat_interleave(2)), whole_groups=True)


def collate_rollouts(groups: Sequence[RolloutGroup], advantages: Tensor, *, overlong_filtering: bool) -> Batch:
    """One row per completion. `advantages` is [B]; its groups follow the rows' order.

    With `overlong_filtering` a completion that was cut at the length limit has no loss token.
    """
    rows = [(group.prompt.token_ids, completion) for group in groups for completion in group.completions]
    batch = _collate_answers([(prompt, completion.token_ids) for prompt, completion in rows], group_index(groups))
    loss_mask = batch.loss_mask
    if overlong_filtering:
        is_cut = torch.tensor([completion.finish_reason == "length" for _, completion in rows])
        loss_mask = loss_mask & ~is_cut[:, None]
    logprobs = _padded([(*[0.0] * len(prompt), *completion.logprobs) for prompt, completion in rows], torch.float32)
    return replace(
        batch,
        loss_mask=loss_mask,
        denominators=count_denominators(loss_mask),
        generation_logprobs=logprobs.masked_fill(~loss_mask, 0.0),
        advantages=advantages,
    )


def _collate_answers(rows: Sequence[tuple[Sequence[int], Sequence[int]]], index: Tensor) -> Batch:
    """One row per (prompt, answer), with the loss on the answer. `index`: [B] the group of each row."""
    prompt_length = torch.tensor([len(prompt) for prompt, _ in rows])
    sequence_length = prompt_length + torch.tensor([len(answer) for _, answer in rows])
    token_ids = _padded([(*prompt, *answer) for prompt, answer in rows], torch.int64)
    columns = torch.arange(token_ids.shape[1])[None]
    loss_mask = (columns >= prompt_length[:, None]) & (columns < sequence_length[:, None])
    return Batch(
        token_ids=token_ids,
        loss_mask=loss_mask,
        sequence_length=sequence_length,
        prompt_length=prompt_length,
        group_index=index,
        denominators=count_denominators(loss_mask),
    )


def longest_rows(
    groups: Tensor, *, num_prompt_tokens: int, num_tokens: int, vocabulary: int, whole_groups: bool = False
) -> Batch:
    """Rows of one length, of made-up tokens, in these groups [B]; the loss is on all that follows the prompt."""
    shape = len(groups), num_tokens
    loss_mask = (torch.arange(num_tokens) >= num_prompt_tokens).expand(shape)
    return Batch(
        token_ids=(torch.arange(len(groups) * num_tokens) % vocabulary).view(shape),
        loss_mask=loss_mask,
        sequence_length=torch.full(shape[:1], num_tokens),
        prompt_length=torch.full(shape[:1], num_prompt_tokens),
        group_index=groups,
        denominators=count_denominators(loss_mask),
        whole_groups=whole_groups,
    )


def _padded(rows: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
    """[B, T], with zeros on the right."""
    return pad_sequence([torch.tensor(row, dtype=dtype) for row in rows], batch_first=True)


def rollout_advantages(groups: Sequence[RolloutGroup], config: GrpoConfig) -> Tensor:
    """[B] fp32, of the rewards as the config scales and shapes them, group by group."""
    completions = [completion for group in groups for completion in group.completions]
    rewards = shaped_rewards(
        rewards_of(groups),
        config,
        completion_lengths=torch.tensor([len(completion.token_ids) for completion in completions]),
        is_truncated=torch.tensor([completion.finish_reason == "length" for completion in completions]),
    )
    return advantages_from_config(rewards, group_index(groups), config)


def group_index(groups: Sequence[RolloutGroup]) -> Tensor:
    """[B] int64: the group of each row."""
    return torch.tensor([i for i, group in enumerate(groups) for _ in group.completions])


def rewards_of(groups: Sequence[RolloutGroup]) -> Tensor:
    """[B] fp32, in the order of the rows."""
    return torch.tensor([reward for group in groups for reward in group.rewards], dtype=torch.float32)


def optimizer_slices(batch: Batch, num_rows: int) -> list[Batch]:
    """The parts of a batch that get an optimizer step each, of so many rows, with denominators of their own."""
    total = len(batch.token_ids)
    if total <= num_rows:
        return [batch]
    return [_take_rows(batch, slice(begin, begin + num_rows)) for begin in range(0, total, num_rows)]


def _take_rows(batch: Batch, rows: slice) -> Batch:
    """These rows of every tensor, with their denominators counted anew."""
    taken = batch.of_rows(rows)
    return replace(taken, denominators=count_denominators(taken.loss_mask))
