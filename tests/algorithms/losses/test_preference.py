"""Preference losses against formulas written out here, pair by pair in Python's own fp64."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace

import pytest
import torch

from nemo_rl_lora.algorithms.losses.policy import count_denominators
from nemo_rl_lora.algorithms.losses.preference import PreferenceLoss, pair_rewards, row_logprobs
from nemo_rl_lora.config.dpo import DpoConfig
from nemo_rl_lora.types import LossInputs

BETA = 0.4
# Three pairs: log-probabilities of the loss tokens of the chosen and the rejected row, and the reference's sums.
PAIRS = [
    ([-0.5, -1.25, -0.25], -3.5, [-2.0, -0.75], -1.0),
    ([-1.5], -0.25, [-0.5, -0.5, -2.5, -1.0], -6.5),
    ([-0.125, -0.375], -4.75, [-3.0, -1.5, -2.25], -0.5),
]
LOSSES = {  # of a pair, with d the difference of the log ratios, summed or averaged
    "sigmoid": lambda d: -log_sigmoid(BETA * d),
    "smoothed": lambda d: -0.9 * log_sigmoid(BETA * d) - 0.1 * log_sigmoid(-BETA * d),
    "robust": lambda d: (-0.9 * log_sigmoid(BETA * d) + 0.1 * log_sigmoid(-BETA * d)) / 0.8,
    "ipo": lambda d: (d - 1 / (2 * BETA)) ** 2,
    "hinge": lambda d: max(0.0, 1 - BETA * d),
}
SETTINGS = {
    "smoothed": {"label_smoothing": 0.1},
    "robust": {"loss_type": "robust", "label_smoothing": 0.1},
    "ipo": {"loss_type": "ipo"},
    "hinge": {"loss_type": "hinge"},
}


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def log_ratios(*, average: bool) -> list[tuple[float, float]]:
    """(chosen, rejected) of each pair."""

    def log_ratio(row: list[float], reference: float) -> float:
        return (sum(row) - reference) / (len(row) if average else 1)

    return [(log_ratio(*pair[:2]), log_ratio(*pair[2:])) for pair in PAIRS]


def pair_inputs() -> LossInputs:
    """PAIRS after prompts of one token, with NaN wherever there is no loss token."""
    rows = [row for chosen, _, rejected, _ in PAIRS for row in (chosen, rejected)]
    logprobs = torch.full((6, 5), math.nan, dtype=torch.float64)
    for i, row in enumerate(rows):
        logprobs[i, 1 : 1 + len(row)] = torch.tensor(row)
    mask = ~logprobs.isnan()
    return LossInputs(
        logprobs=logprobs.requires_grad_(),
        old_logprobs=logprobs.detach(),
        reference_logprobs=torch.tensor([r for _, chosen, _, rejected in PAIRS for r in (chosen, rejected)]),
        generation_logprobs=None,
        advantages=None,
        loss_mask=mask,
        sequence_length=mask.sum(1) + 1,
        group_index=torch.tensor([4, 4, 9, 9, 2, 2]),
        denominators=count_denominators(mask),
    )


def part(inputs: LossInputs, rows: slice) -> LossInputs:
    assert inputs.reference_logprobs is not None
    return replace(
        inputs,
        logprobs=inputs.logprobs[rows],
        reference_logprobs=inputs.reference_logprobs[rows],
        loss_mask=inputs.loss_mask[rows],
        group_index=inputs.group_index[rows],
    )


def make_loss(**settings) -> PreferenceLoss:
    return PreferenceLoss(config=DpoConfig.model_validate({"reference_policy_kl_penalty": BETA} | settings))


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("case", LOSSES)
def test_loss_is_the_mean_of_its_formula_over_the_pairs(case: str, average: bool) -> None:
    differences = [chosen - rejected for chosen, rejected in log_ratios(average=average)]
    expected = sum(map(LOSSES[case], differences)) / len(differences)
    loss, metrics = make_loss(**SETTINGS.get(case, {}), preference_average_log_probs=average)(pair_inputs())
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert metrics["preference_loss"].item() == pytest.approx(expected, rel=1e-12)


def test_gradient_of_a_sigmoid_pair_is_beta_times_the_doubt_and_zero_outside_the_mask() -> None:
    inputs = pair_inputs()
    make_loss()(inputs)[0].backward()
    expected = torch.zeros(6, 5, dtype=torch.float64)
    for i, (chosen, rejected) in enumerate(log_ratios(average=False)):
        doubt = 1 / (1 + math.exp(BETA * (chosen - rejected)))
        expected[2 * i], expected[2 * i + 1] = -BETA * doubt / 3, BETA * doubt / 3
    assert inputs.logprobs.grad is not None
    torch.testing.assert_close(inputs.logprobs.grad, expected * inputs.loss_mask, rtol=1e-12, atol=0)


@pytest.mark.parametrize("average", [False, True])
def test_sft_term_is_the_likelihood_of_the_chosen_rows(average: bool) -> None:
    likelihoods = [sum(chosen) / (len(chosen) if average else 1) for chosen, *_ in PAIRS]
    preference, _ = make_loss()(pair_inputs())
    loss, metrics = make_loss(preference_loss_weight=2.0, sft_loss_weight=0.5, sft_average_log_probs=average)(
        pair_inputs()
    )
    assert metrics["sft_loss"].item() == pytest.approx(-sum(likelihoods) / 3, rel=1e-12)
    assert loss.item() == pytest.approx(2 * preference.item() - 0.5 * sum(likelihoods) / 3, rel=1e-12)


def test_likelihood_alone_needs_no_reference() -> None:
    loss_fn = make_loss(preference_loss_weight=0.0, sft_loss_weight=1.0)
    loss, metrics = loss_fn(replace(pair_inputs(), reference_logprobs=None))
    assert loss.item() == metrics["sft_loss"].item() == pytest.approx((2.0 + 1.5 + 0.5) / 3, rel=1e-12)
    assert metrics.keys() == {"sft_loss"}
    assert not loss_fn.needs_reference
    assert make_loss().needs_reference


@pytest.mark.parametrize("average", [False, True])
def test_metrics_are_means_over_the_pairs(average: bool) -> None:
    ratios = log_ratios(average=average)
    _, metrics = make_loss(preference_average_log_probs=average)(pair_inputs())
    chosen, rejected = (BETA * sum(column) / 3 for column in zip(*ratios, strict=True))
    assert {name: value.item() for name, value in metrics.items()} == {
        "preference_loss": pytest.approx(sum(-log_sigmoid(BETA * (c - r)) for c, r in ratios) / 3),
        "accuracy": pytest.approx(sum(c > r for c, r in ratios) / 3),
        "rewards_chosen_mean": pytest.approx(chosen),
        "rewards_rejected_mean": pytest.approx(rejected),
        "rewards_margin_mean": pytest.approx(chosen - rejected),
    }
    assert not any(value.requires_grad for value in metrics.values())
    assert 0 < metrics["accuracy"] < 1


def test_rewards_of_pairs_are_those_of_the_metrics() -> None:
    inputs, config = pair_inputs(), make_loss().config
    assert inputs.reference_logprobs is not None
    rewards = pair_rewards(inputs.logprobs, inputs.reference_logprobs, inputs.loss_mask, config)
    expected = torch.tensor(log_ratios(average=False), dtype=torch.float64) * BETA
    torch.testing.assert_close(torch.stack([rewards.chosen, rewards.rejected], dim=1), expected, rtol=1e-12, atol=0)
    assert rewards.accuracy.tolist() == [float(c > r) for c, r in log_ratios(average=False)]


def test_policy_that_has_not_moved_prefers_neither_answer() -> None:
    inputs = pair_inputs()
    inputs = replace(inputs, reference_logprobs=row_logprobs(inputs.logprobs.detach(), inputs.loss_mask))
    loss, metrics = make_loss()(inputs)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-12)
    assert metrics["accuracy"] == 0.5


def test_microbatches_add_up_to_the_batch() -> None:
    inputs, loss_fn = pair_inputs(), make_loss(sft_loss_weight=0.3, sft_average_log_probs=True)
    loss, metrics = loss_fn(inputs)
    parts = [loss_fn(part(inputs, rows)) for rows in (slice(0, 2), slice(2, 6))]
    assert sum(share.item() for share, _ in parts) == pytest.approx(loss.item(), rel=1e-12)
    assert metrics.keys() == parts[0][1].keys()
    for name, value in metrics.items():
        assert sum(shares[name].item() for _, shares in parts) == pytest.approx(value.item(), rel=1e-12), name


def test_sum_of_a_long_row_is_exact_to_fp32() -> None:
    logprobs = -torch.rand(2, 20_000, generator=torch.Generator().manual_seed(0))
    exact = torch.tensor([math.fsum(row) for row in logprobs.tolist()], dtype=torch.float64)
    found = row_logprobs(logprobs, torch.ones_like(logprobs, dtype=torch.bool))
    assert found.dtype == torch.float32
    assert torch.equal(found, exact.float())


@pytest.mark.parametrize("rows", [slice(0, 3), slice(1, 5)])
def test_rows_that_are_not_pairs_are_a_bug(rows: slice) -> None:
    with pytest.raises(AssertionError, match="tensor"):
        make_loss()(part(pair_inputs(), rows))


def test_loss_can_be_sent_to_a_worker() -> None:
    loss = make_loss(loss_type="robust", label_smoothing=0.2)
    assert pickle.loads(pickle.dumps(loss)) == loss
