"""From rewards to advantages: scaling, shaping by length, group baselines, and which groups teach anything.

Pure functions of tensors with one row per completion, [P * G]. Contract: no NaN for any finite reward; a
group whose rewards are all equal, or of a single completion, has advantages of exactly 0. Nothing here
samples, scores or drops rows: `keep_groups` says which rows to drop and the driver does it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_rl_lora.config.grpo import GrpoConfig, RewardScalingConfig, RewardShapingConfig


def shaped_rewards(rewards: Tensor, config: GrpoConfig, *, completion_lengths: Tensor, is_truncated: Tensor) -> Tensor:
    """What advantages are computed from: `rewards` scaled, then shaped, where the config says so.

    completion_lengths: [P * G] sampled tokens; is_truncated: [P * G] bool, ended by the length limit.
    """
    if config.reward_scaling.enabled:
        rewards = scale_rewards(rewards, config.reward_scaling)
    if config.reward_shaping.enabled:
        rewards = shape_rewards(rewards, config.reward_shaping, completion_lengths, is_truncated)
    return rewards


def scale_rewards(rewards: Tensor, config: RewardScalingConfig) -> Tensor:
    """The linear map of the source range to the target range; rewards are clamped to the source."""
    position = (rewards.clamp(config.source_min, config.source_max) - config.source_min) / (
        config.source_max - config.source_min
    )
    return config.target_min + position * (config.target_max - config.target_min)


def shape_rewards(
    rewards: Tensor, config: RewardShapingConfig, completion_lengths: Tensor, is_truncated: Tensor
) -> Tensor:
    """Rewards less DAPO's overlong penalty (arXiv 2503.14476, eq. 13), or times a factor where truncated.

    The penalty is 0 up to max_response_length - overlong_buffer_length tokens, and overlong_buffer_penalty at
    max_response_length; unlike the paper's it goes on growing beyond, as NeMo RL's does.
    """
    if config.stop_properly_penalty_coef is not None:
        return torch.where(is_truncated, rewards * config.stop_properly_penalty_coef, rewards)
    limit, buffer = config.max_response_length, config.overlong_buffer_length
    penalty = config.overlong_buffer_penalty
    assert limit is not None, config
    assert buffer is not None, config
    assert penalty is not None, config
    num_over = (completion_lengths - (limit - buffer)).clamp(min=0)
    return rewards - num_over.to(rewards.dtype) / buffer * penalty


def advantages_from_config(rewards: Tensor, group_index: Tensor, config: GrpoConfig) -> Tensor:
    """`group_advantages` with the settings of `grpo`."""
    return group_advantages(
        rewards,
        group_index,
        leave_one_out=config.use_leave_one_out_baseline,
        std_epsilon=config.adv_estimator.std_epsilon if config.normalize_rewards else None,
        clip=(config.advantage_clip_low, config.advantage_clip_high),
    )


def group_advantages(
    rewards: Tensor,
    group_index: Tensor,
    *,
    leave_one_out: bool = True,
    std_epsilon: float | None = 1e-6,
    clip: tuple[float | None, float | None] = (None, None),
) -> Tensor:
    """Rewards less the baseline of their group: [P * G] fp32, computed in fp64.

    leave_one_out: baseline and deviation are those of the *other* completions (RLOO, arXiv 2402.14740);
    otherwise of the whole group (GRPO, arXiv 2402.03300).
    std_epsilon: divide by (unbiased standard deviation + this); None: do not divide. Where the rewards
    behind the baseline are all equal (or one alone), the advantage is not divided.
    clip: lower and upper bound of the result.
    """
    advantages = torch.zeros_like(rewards, dtype=torch.float64)
    for group in group_index.unique():
        rows = (group_index == group).nonzero().squeeze(1)
        advantages[rows] = _one_group(rewards[rows].double(), leave_one_out, std_epsilon)
    low, high = clip
    if low is not None or high is not None:
        advantages = advantages.clamp(min=low, max=high)
    return advantages.float()


def _one_group(rewards: Tensor, leave_one_out: bool, std_epsilon: float | None) -> Tensor:
    """[G] -> [G]. Row g of `pool` holds the rewards that the baseline of completion g is taken from."""
    num_completions = len(rewards)
    if num_completions == 1 or rewards.min() == rewards.max():
        return torch.zeros_like(rewards)
    pool = rewards.expand(num_completions, num_completions)
    if leave_one_out:
        is_other = ~torch.eye(num_completions, dtype=torch.bool, device=rewards.device)
        pool = pool[is_other].reshape(num_completions, num_completions - 1)
    advantages = rewards - pool.mean(dim=1)
    if std_epsilon is None or pool.shape[1] == 1:
        return advantages
    # Compared exactly: rounding in the mean would make a tiny deviation out of equal rewards.
    has_spread = pool.amin(dim=1) < pool.amax(dim=1)
    return torch.where(has_spread, advantages / (pool.std(dim=1) + std_epsilon), advantages)


def keep_groups(rewards: Tensor, group_index: Tensor) -> Tensor:
    """[P * G] bool: true on the rows of groups with unequal rewards, which dynamic sampling keeps (DAPO)."""
    keep = torch.zeros_like(group_index, dtype=torch.bool)
    for group in group_index.unique():
        rows = group_index == group
        keep |= rows & (rewards[rows].min() < rewards[rows].max())
    return keep
