"""Advantages against numbers worked out by hand and Python's statistics module."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from nemo_rl_lora.algorithms.advantages import (
    advantages_from_config,
    group_advantages,
    keep_groups,
    shaped_rewards,
)
from nemo_rl_lora.config.grpo import GrpoConfig

GROUPS = torch.tensor([7, 7, 7, 7, 2, 2, 2, 2])
REWARDS = torch.tensor([1.0, 2.0, 4.0, 5.0, 0.0, 0.0, 1.0, 0.0])


def test_leave_one_out_baseline_by_hand() -> None:
    found = group_advantages(REWARDS, GROUPS, std_epsilon=None)
    expected = [1 - 11 / 3, 2 - 10 / 3, 4 - 8 / 3, 5 - 7 / 3, -1 / 3, -1 / 3, 1.0, -1 / 3]
    assert found.tolist() == pytest.approx(expected)


def test_leave_one_out_deviation_is_that_of_the_others() -> None:
    found = group_advantages(REWARDS, GROUPS, std_epsilon=0.5)
    others = [2.0, 4.0, 5.0]
    assert found[0].item() == pytest.approx((1 - 11 / 3) / (statistics.stdev(others) + 0.5))
    assert found[4].item() == pytest.approx((-1 / 3) / (statistics.stdev([0, 1, 0]) + 0.5))
    assert found[6].item() == 1.0  # the others are all 0: not divided


def test_mean_baseline_with_group_deviation_is_that_of_trl() -> None:
    found = group_advantages(REWARDS, GROUPS, leave_one_out=False, std_epsilon=1e-4)
    for rows in (slice(0, 4), slice(4, 8)):
        rewards = REWARDS[rows].tolist()
        mean, deviation = statistics.mean(rewards), statistics.stdev(rewards)
        expected = [(reward - mean) / (deviation + 1e-4) for reward in rewards]
        assert found[rows].tolist() == pytest.approx(expected, rel=1e-6)


def test_rows_of_a_group_need_not_stand_together() -> None:
    order = torch.tensor([4, 0, 5, 1, 6, 2, 7, 3])
    mixed = group_advantages(REWARDS[order], GROUPS[order])
    assert torch.equal(mixed, group_advantages(REWARDS, GROUPS)[order])


@pytest.mark.parametrize("leave_one_out", [True, False])
@pytest.mark.parametrize("std_epsilon", [None, 0.0, 1e-6])
@pytest.mark.parametrize("rewards", [[0.1] * 3, [1e8 + 0.1] * 7, [3.0], [-0.3, -0.3]])
def test_equal_rewards_and_single_completions_have_advantage_zero(
    rewards: list[float], leave_one_out: bool, std_epsilon: float | None
) -> None:
    index = torch.zeros(len(rewards), dtype=torch.long)
    found = group_advantages(torch.tensor(rewards), index, leave_one_out=leave_one_out, std_epsilon=std_epsilon)
    assert found.tolist() == [0.0] * len(rewards)


def test_one_reward_beside_equal_others_is_not_blown_up() -> None:
    found = group_advantages(torch.tensor([1.0] + [0.1] * 6), torch.zeros(7, dtype=torch.long))
    assert found[0].item() == pytest.approx(0.9)
    assert found.abs().max() < 10


def test_a_group_of_two_is_compared_without_a_deviation() -> None:
    found = group_advantages(torch.tensor([3.0, 1.0]), torch.zeros(2, dtype=torch.long))
    assert found.tolist() == [2.0, -2.0]


def test_advantages_are_clipped() -> None:
    found = group_advantages(REWARDS, GROUPS, std_epsilon=None, clip=(-2.0, 1.5))
    assert found.tolist() == pytest.approx([-2.0, 2 - 10 / 3, 4 - 8 / 3, 1.5, -1 / 3, -1 / 3, 1.0, -1 / 3])
    one_sided = group_advantages(REWARDS, GROUPS, std_epsilon=None, clip=(None, 0.5))
    assert one_sided.min() == pytest.approx(1 - 11 / 3)
    assert one_sided.max() == 0.5


def test_the_config_reaches_the_advantages() -> None:
    def from_config(**settings) -> list[float]:
        return advantages_from_config(REWARDS, GROUPS, GrpoConfig(**settings)).tolist()

    assert from_config() == group_advantages(REWARDS, GROUPS).tolist()
    assert from_config(normalize_rewards=False) == group_advantages(REWARDS, GROUPS, std_epsilon=None).tolist()
    assert (
        from_config(use_leave_one_out_baseline=False) == group_advantages(REWARDS, GROUPS, leave_one_out=False).tolist()
    )
    assert (
        from_config(adv_estimator={"std_epsilon": 0.5}) == group_advantages(REWARDS, GROUPS, std_epsilon=0.5).tolist()
    )
    clipped = from_config(advantage_clip_low=-0.1, advantage_clip_high=0.2)
    assert (min(clipped), max(clipped)) == pytest.approx((-0.1, 0.2))


def shape(rewards: list[float], lengths: list[int], truncated: list[bool], **settings) -> list[float]:
    found = shaped_rewards(
        torch.tensor(rewards),
        GrpoConfig(**settings),
        completion_lengths=torch.tensor(lengths),
        is_truncated=torch.tensor(truncated),
    )
    return found.tolist()


def test_the_overlong_penalty_by_hand() -> None:
    shaping = {
        "enabled": True,
        "max_response_length": 100,
        "overlong_buffer_length": 20,
        "overlong_buffer_penalty": 0.5,
    }
    found = shape([1.0] * 5, [10, 80, 90, 100, 120], [False] * 5, reward_shaping=shaping)
    assert found == pytest.approx([1.0, 1.0, 0.75, 0.5, 0.0])


def test_truncated_completions_keep_a_part_of_their_reward() -> None:
    shaping = {"enabled": True, "stop_properly_penalty_coef": 0.25}
    assert shape([1.0, 1.0], [500, 500], [True, False], reward_shaping=shaping) == [0.25, 1.0]


def test_rewards_are_clamped_and_scaled_before_they_are_shaped() -> None:
    scaling = {"enabled": True, "source_min": 0.0, "source_max": 2.0, "target_min": -1.0, "target_max": 1.0}
    assert shape([-5.0, 0.5, 9.0], [1, 1, 1], [False] * 3, reward_scaling=scaling) == [-1.0, -0.5, 1.0]
    shaping = {"enabled": True, "stop_properly_penalty_coef": 0.0}
    found = shape([9.0], [1], [True], reward_scaling=scaling, reward_shaping=shaping)
    assert found == [0.0]


def test_dynamic_sampling_keeps_groups_with_unequal_rewards() -> None:
    index = torch.tensor([5, 5, 1, 1, 1, 3])
    rewards = torch.tensor([0.1, 0.1, 0.0, 0.0, 1.0, 1.0])
    assert keep_groups(rewards, index).tolist() == [False, False, True, True, True, False]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_generations_per_prompt": 1}, "greater than or equal to 2"),
        (
            {"adv_estimator": {"normalize_rewards": False}},
            "grpo.adv_estimator.normalize_rewards=False: disagrees with grpo.normalize_rewards=True",
        ),
        ({"advantage_clip_low": 1.0, "advantage_clip_high": 0.0}, "grpo.advantage_clip_low=1.0: must be below"),
        ({"stop_at_validation_metric": "accuracy"}, "Set both or neither"),
        ({"batch_multiplier": 2}, "Set grpo.use_dynamic_sampling=true"),
        ({"reward_shaping": {"enabled": True}}, "grpo.reward_shaping.max_response_length=None"),
        ({"reward_scaling": {"source_min": 1.0}}, "grpo.reward_scaling.source_min=1.0: must be below"),
    ],
)
def test_bad_settings_are_refused_by_name(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GrpoConfig(**settings)


def test_the_mirrored_switches_may_agree() -> None:
    mirror = {"normalize_rewards": False, "use_leave_one_out_baseline": True}
    config = GrpoConfig(normalize_rewards=False, adv_estimator=mirror)
    found = advantages_from_config(REWARDS, GROUPS, config)
    assert all(math.isfinite(value) for value in found.tolist())
