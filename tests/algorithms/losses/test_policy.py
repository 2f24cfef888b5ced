"""Losses against numbers worked out by hand and against plain formulas written out here."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nemo_rl_lora.algorithms.losses.policy import count_denominators, estimate_kl, make_policy_loss
from nemo_rl_lora.config.grpo import GrpoConfig, check_rollout_against_loss
from nemo_rl_lora.config.loss_fn import LossFnConfig
from nemo_rl_lora.types import Denominators, LossInputs

NO_KL = {"reference_policy_kl_penalty": 0.0}
NO_CLAMP = {"kl_input_clamp_value": None, "kl_output_clamp_value": None}


def row_inputs(
    ratios: list[list[float]], advantages: list[float], dtype: torch.dtype = torch.float32, **more: Tensor
) -> LossInputs:
    """Rows with the given probability ratios; 0 marks a position outside the mask. Old probabilities are 1/2."""
    ratio = torch.tensor(ratios, dtype=dtype)
    mask = ratio != 0
    old = torch.where(mask, math.log(0.5), 0.0).to(dtype)
    logprobs = torch.where(mask, old + ratio.where(mask, 1).log(), 0.0).requires_grad_()
    return LossInputs(
        logprobs=logprobs,
        old_logprobs=old,
        reference_logprobs=more.get("reference"),
        generation_logprobs=more.get("generation"),
        advantages=torch.tensor(advantages, dtype=dtype),
        loss_mask=mask,
        sequence_length=mask.sum(1),
        group_index=torch.arange(len(ratios)),
        denominators=count_denominators(mask),
    )


def evaluate(inputs: LossInputs, **settings) -> tuple[Tensor, dict[str, Tensor]]:
    return make_policy_loss(LossFnConfig(**settings))(inputs)


# Rows of 2 and 1 tokens, advantages 1 and -1, clip 0.2.
# Row 0: min(1.1, 1.1) = 1.1 and min(1.5, 1.2) = 1.2. Row 1: min(-3, -1.2) = -3.
RATIOS, ADVANTAGES = [[1.1, 1.5], [3.0, 0.0]], [1.0, -1.0]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (-1.1 - 1.2 + 3.0) / 3),
        ({"token_level_loss": False}, (-(1.1 + 1.2) / 2 + 3.0) / 2),
        ({"constant_length_normalizer": 10}, (-1.1 - 1.2 + 3.0) / 20),
        ({"ratio_clip_max": 0.4}, (-1.1 - 1.4 + 3.0) / 3),
        ({"ratio_clip_c": 2.0}, (-1.1 - 1.2 + 2.0) / 3),
        ({"force_on_policy_ratio": True}, (-1.0 - 1.0 + 1.0) / 3),
        # -A log p: log 0.55 + log 0.75 - log 1.5
        ({"disable_ppo_ratio": True}, -(math.log(0.55) + math.log(0.75) - math.log(1.5)) / 3),
        # weights 1.1, 1.2 and 1.2
        ({"use_cispo": True}, -(1.1 * math.log(0.55) + 1.2 * math.log(0.75) - 1.2 * math.log(1.5)) / 3),
        # geometric means sqrt(1.65) = 1.2845, clipped to 1.2, and 3
        ({"sequence_level_importance_ratios": True, "token_level_loss": False}, (-1.2 + 3.0) / 2),
        (
            {"sequence_level_importance_ratios": True, "constant_length_normalizer": 1},
            (-1.2 - 1.2 + 3.0) / 2,
        ),
    ],
)
def test_objectives_equal_numbers_by_hand(settings: dict, expected: float) -> None:
    loss, _ = evaluate(row_inputs(RATIOS, ADVANTAGES), **NO_KL, **settings)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_a_ratio_below_the_clip_range_is_clipped_for_negative_advantages_only() -> None:
    loss, metrics = evaluate(row_inputs([[0.5], [0.5]], [1.0, -1.0]), **NO_KL)
    assert loss.item() == pytest.approx((-0.5 + 0.8) / 2)
    assert metrics["clip_fraction_low"].item() == 0.5
    assert metrics["clip_fraction_high"].item() == 0.0


def test_sapo_and_vespo_equal_numbers_by_hand() -> None:
    inputs = row_inputs([[1.5, 1.2], [0.5, 0.0]], [1.0, -2.0])

    def gate(temperature: float, ratio: float) -> float:
        return 4 / temperature / (1 + math.exp(-temperature * (ratio - 1)))

    expected = -(gate(1.0, 1.5) + gate(1.0, 1.2) - 2 * gate(1.05, 0.5)) / 3
    assert evaluate(inputs, **NO_KL, sapo={})[0].item() == pytest.approx(expected, rel=1e-5)

    phi_0 = 1.8**2 * math.exp(3 * (1 - 1.8))  # w = 1.5 * 1.2
    phi_1 = 0.5**3 * math.exp(2 * (1 - 0.5))
    expected = -(phi_0 * (math.log(0.75) + math.log(0.6)) - 2 * phi_1 * math.log(0.25)) / 3
    assert evaluate(inputs, **NO_KL, vespo={})[0].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("kind", "expected"), [("k1", -0.5), ("k2", 0.125), ("k3", math.exp(0.5) - 1 - 0.5)])
def test_kl_estimators_equal_numbers_by_hand(kind: str, expected: float) -> None:
    kl = estimate_kl(torch.tensor([-1.0]), torch.tensor([-0.5]), kind)
    assert kl.item() == pytest.approx(expected)
    inputs = row_inputs([[1.0, 1.0]], [0.0])
    inputs = replace(inputs, reference_logprobs=inputs.old_logprobs + 0.5)
    loss, metrics = evaluate(inputs, reference_policy_kl_penalty=0.1, reference_policy_kl_type=kind)
    assert loss.item() == pytest.approx(0.1 * expected, rel=1e-5)
    assert metrics["kl_penalty"].item() == pytest.approx(expected, rel=1e-5)


def test_kl_clamps_bound_input_and_output() -> None:
    kl = estimate_kl(torch.tensor([-50.0, -9.0]), torch.tensor([0.0, 0.0]), "k1", input_clamp=20.0)
    assert kl.tolist() == [-20.0, -9.0]
    kl = estimate_kl(torch.tensor([-50.0]), torch.tensor([0.0]), "k3", input_clamp=20.0, output_clamp=10.0)
    assert kl.item() == 10.0


def test_kl_weights_by_the_engine_and_by_the_ratio() -> None:
    inputs = row_inputs([[1.2, 1.2]], [0.0])
    inputs = replace(
        inputs,
        reference_logprobs=inputs.logprobs.detach() + 0.5,
        generation_logprobs=inputs.logprobs.detach() - math.log(1.5),
    )
    plain, k3 = {"reference_policy_kl_penalty": 1.0}, math.exp(0.5) - 1.5
    for gradient in ("unbiased", "paper"):
        loss, metrics = evaluate(inputs, **plain, kl_gradient=gradient)
        assert loss.item() == pytest.approx(k3, rel=1e-5)
        assert metrics["kl_penalty"].item() == pytest.approx(k3, rel=1e-5)
        weighted = evaluate(inputs, **plain, use_on_policy_kl_approximation=True, kl_gradient=gradient)[0]
        assert weighted.item() == pytest.approx(1.5 * k3, rel=1e-5)
    assert evaluate(inputs, **plain, use_unbiased_kl_estimate=True)[0].item() == pytest.approx(1.2 * k3, rel=1e-5)


@pytest.mark.parametrize("weight", ["use_on_policy_kl_approximation", "use_unbiased_kl_estimate"])
def test_the_output_clamp_bounds_the_weighted_kl(weight: str) -> None:
    inputs = row_inputs([[100.0, 1.0]], [0.0])
    inputs = replace(
        inputs,
        reference_logprobs=inputs.logprobs.detach() + 1.0,
        generation_logprobs=inputs.old_logprobs,
    )
    settings = {"reference_policy_kl_penalty": 1.0, weight: True, "kl_output_clamp_value": 1.0}
    loss, metrics = evaluate(inputs, **settings)
    assert loss.item() == pytest.approx((1.0 + math.exp(1) - 2) / 2, rel=1e-5)  # in place of 71.8 for the first token
    assert metrics["kl_penalty"].item() == pytest.approx(loss.item())
    (gradient,) = torch.autograd.grad(loss, inputs.logprobs)
    assert gradient[0, 0] == 0
    assert gradient[0, 1] != 0


@pytest.mark.parametrize("settings", [{}, {"use_on_policy_kl_approximation": True}, {"use_unbiased_kl_estimate": True}])
def test_a_token_whose_input_is_clamped_has_no_kl_gradient(settings: dict) -> None:
    inputs = row_inputs([[1.1, 0.9]], [0.0])
    distance = torch.tensor([[-30.0, 0.5]])
    inputs = replace(
        inputs, reference_logprobs=inputs.logprobs.detach() + distance, generation_logprobs=inputs.old_logprobs
    )
    loss, _ = evaluate(inputs, reference_policy_kl_type="k1", kl_output_clamp_value=None, **settings)
    (gradient,) = torch.autograd.grad(loss, inputs.logprobs)
    assert gradient[0, 0] == 0
    assert gradient[0, 1] != 0


def test_an_infinite_weight_counts_as_zero() -> None:
    inputs = row_inputs([[1.0, 1.0]], [1.0])
    engine = inputs.old_logprobs + torch.tensor([[-math.inf, 0.0]])
    inputs = replace(inputs, reference_logprobs=inputs.logprobs.detach() + 0.5, generation_logprobs=engine)
    settings = {"use_on_policy_kl_approximation": True, "use_importance_sampling_correction": True}
    loss, _ = evaluate(inputs, **settings, reference_policy_kl_penalty=1.0)
    assert loss.item() == pytest.approx((-1.0 + math.exp(0.5) - 1.5) / 2, rel=1e-5)
    assert torch.autograd.grad(loss, inputs.logprobs)[0].isfinite().all()


V = 5
POLICY, ENGINE, REFERENCE = (
    torch.randn(1 + V, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in (1, 2, 3)
)


def expected_kl_gradient(engine: Tensor, **settings) -> Tensor:
    """[1 + V, V]: the KL term's gradient by the policy's logits, over every sample of two tokens from V.

    Row 0 has the first token's logits and row 1 + v those of the token after v. Each of the V * V samples counts with
    its probability under the engine, which is also the old policy here.
    """
    logits = POLICY.clone().requires_grad_()
    first, second = torch.arange(V).repeat_interleave(V), torch.arange(V).repeat(V)

    def of_samples(table: Tensor) -> Tensor:
        table = table.log_softmax(-1)
        return torch.stack([table[0, first], table[1 + first, second]], 1)

    sampled, mask = of_samples(engine), torch.ones(1, 2, dtype=torch.bool)
    probabilities, logprobs, reference = sampled.sum(1).exp(), of_samples(logits), of_samples(REFERENCE)
    total = torch.zeros((), dtype=torch.float64)
    for row in range(V * V):
        one = LossInputs(
            logprobs=logprobs[row : row + 1],
            old_logprobs=sampled[row : row + 1],
            reference_logprobs=reference[row : row + 1],
            generation_logprobs=sampled[row : row + 1],
            advantages=torch.zeros(1, dtype=torch.float64),
            loss_mask=mask,
            sequence_length=torch.tensor([2]),
            group_index=torch.tensor([0]),
            denominators=Denominators(num_loss_tokens=1, num_sequences=1),
        )
        total = total + probabilities[row] * evaluate(one, reference_policy_kl_penalty=1.0, **NO_CLAMP, **settings)[0]
    return torch.autograd.grad(total, logits)[0]


def exact_gradient(engine: Tensor, divergence: str) -> Tensor:
    """The gradient of a divergence from the reference, summed over V, at the prefixes as the engine samples them."""
    logits = POLICY.clone().requires_grad_()
    p, q = logits.softmax(-1), REFERENCE.softmax(-1)
    terms = {
        "KL(p || ref)": p * (p / q).log(),
        "KL(ref || p)": q * (q / p).log(),
        "E_p[k2]": p * (p / q).log().square() / 2,
    }
    prefixes = torch.cat([torch.ones(1, dtype=torch.float64), engine.softmax(-1)[0]])
    return torch.autograd.grad((prefixes * terms[divergence].sum(-1)).sum(), logits)[0]


ON_POLICY = [{}, {"use_on_policy_kl_approximation": True}, {"use_unbiased_kl_estimate": True}]


@pytest.mark.parametrize(("kind", "divergence"), [("k1", "KL(p || ref)"), ("k2", "E_p[k2]"), ("k3", "KL(p || ref)")])
@pytest.mark.parametrize(
    ("engine", "settings"),
    [*((POLICY, settings) for settings in ON_POLICY), *((ENGINE, settings) for settings in ON_POLICY[1:])],
    ids=["plain", "approximation", "ratio", "approximation, other engine", "ratio, other old policy"],
)
def test_the_expected_gradient_is_that_of_the_expected_estimate(kind, divergence, engine, settings) -> None:
    found = expected_kl_gradient(engine, reference_policy_kl_type=kind, **settings)
    expected = exact_gradient(engine, divergence)
    assert (found - expected).norm() < 1e-12 * expected.norm()


@pytest.mark.parametrize(("kind", "divergence"), [("k2", "KL(p || ref)"), ("k3", "KL(ref || p)")])
@pytest.mark.parametrize(
    ("engine", "settings"),
    [(POLICY, {}), (POLICY, ON_POLICY[1]), (ENGINE, ON_POLICY[1])],
    ids=["plain", "same", "other"],
)
def test_the_expected_gradient_in_the_papers_form(kind, divergence, engine, settings) -> None:
    found = expected_kl_gradient(engine, reference_policy_kl_type=kind, kl_gradient="paper", **settings)
    expected = exact_gradient(engine, divergence)
    assert (found - expected).norm() < 1e-12 * expected.norm()


def test_importance_sampling_weights_are_truncated_and_counted() -> None:
    inputs = row_inputs([[1.0, 1.0], [1.0, 0.0]], [1.0, -1.0])
    # Old over engine: 3, 0.5 and 1.5.
    weights = torch.tensor([[3.0, 0.5], [1.5, 1.0]])
    inputs = replace(inputs, generation_logprobs=inputs.old_logprobs - weights.log())
    correction = {**NO_KL, "use_importance_sampling_correction": True}
    assert evaluate(inputs, **correction)[0].item() == pytest.approx((-3.0 - 0.5 + 1.5) / 3, rel=1e-5)
    tis = {"truncated_importance_sampling_type": "tis", "truncated_importance_sampling_ratio": 2.0}
    loss, metrics = evaluate(inputs, **correction, **tis)
    assert loss.item() == pytest.approx((-2.0 - 0.5 + 1.5) / 3, rel=1e-5)
    assert metrics["is_oob_ratio"].item() == pytest.approx(1 / 3)
    assert metrics["sampling_importance_ratio"].item() == pytest.approx((2.0 + 0.5 + 1.5) / 3, rel=1e-5)
    loss, metrics = evaluate(inputs, **correction, **tis, truncated_importance_sampling_ratio_min=0.9)
    assert loss.item() == pytest.approx((-2.0 - 0.9 + 1.5) / 3, rel=1e-5)
    assert metrics["is_oob_ratio"].item() == pytest.approx(2 / 3)
    assert metrics["sampling_importance_ratio"].item() == pytest.approx((2.0 + 0.9 + 1.5) / 3, rel=1e-5)
    # Per sequence: products 1.5 and 1.5.
    gspo = {"sequence_level_importance_ratios": True, "token_level_loss": False}
    loss, metrics = evaluate(inputs, **correction, **gspo)
    assert loss.item() == pytest.approx((-1.5 + 1.5) / 2, abs=1e-6)
    assert metrics["sampling_importance_ratio"].item() == pytest.approx(1.5, rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "bounds", "loss", "share"),
    [
        # per token: 3 is above 2 and 0.4 below 0.5; what is left is 0.9 (advantage 1) and 1.5 (advantage -1)
        ("icepop", (0.5, 2.0), (-0.9 + 1.5) / 4, 2 / 4),
        # geometric means: (3 * 0.4 * 0.9)^(1/3) = 1.026 of the first row, 1.5 of the second
        # one of two sequences, whatever their lengths; the row without loss tokens is none
        ("seq-mask-tis", (0.9, 1.2), (-3.0 - 0.4 - 0.9) / 4, 1 / 2),
        ("seq-mask-tis", (1.03, 2.0), 1.5 / 4, 1 / 2),
        ("icepop", (0.0, 2.0), (-0.4 - 0.9 + 1.5) / 4, 1 / 4),
    ],
)
def test_weights_out_of_bounds_are_masked(kind, bounds, loss, share) -> None:
    inputs = row_inputs([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]], [1.0, -1.0, 1.0])
    weights = torch.tensor([[3.0, 0.4, 0.9], [1.5, 1.0, 1.0], [1.0, 1.0, 1.0]])
    inputs = replace(inputs, generation_logprobs=inputs.old_logprobs - weights.log())
    found, metrics = evaluate(
        inputs,
        **NO_KL,
        use_importance_sampling_correction=True,
        truncated_importance_sampling_type=kind,
        truncated_importance_sampling_ratio_min=bounds[0],
        truncated_importance_sampling_ratio=bounds[1],
    )
    assert found.item() == pytest.approx(loss, rel=1e-5)
    assert metrics["is_oob_ratio"].item() == pytest.approx(share)


def test_metrics_equal_numbers_by_hand() -> None:
    inputs = row_inputs(RATIOS, ADVANTAGES)
    engine = torch.where(inputs.loss_mask, inputs.old_logprobs + math.log(1.25), 0.0)
    _, metrics = evaluate(replace(inputs, generation_logprobs=engine), **NO_KL)
    expected = {
        "probs_ratio": (1.1 + 1.5 + 3.0) / 3,
        "probs_ratio_clamped": (1.1 + 1.2 + 1.2) / 3,
        "probs_ratio_min": 1.1,
        "probs_ratio_max": 3.0,
        "probs_ratio_clamped_min": 1.1,
        "probs_ratio_clamped_max": 1.2,
        "clip_fraction": 1 / 3,
        "token_mult_prob_error": 1.25,
        "gen_kl_error": 0.8 - 1 - math.log(0.8),
        "policy_kl_error": 1.25 - 1 - math.log(1.25),
        # p = 0.5, q = 0.625, m = 0.5625
        "js_divergence_error": (
            0.5 * (0.5 / 0.5625 - 1 - math.log(0.5 / 0.5625)) + 0.5 * (0.625 / 0.5625 - 1 - math.log(0.625 / 0.5625))
        ),
        "sampling_importance_ratio": 0.8,
        "approx_entropy": -sum(r * 0.8 * math.log(0.5 * r) for r in (1.1, 1.5, 3.0)) / 3,
        "num_valid_samples": 2,
    }
    for name, value in expected.items():
        assert metrics[name].item() == pytest.approx(value, rel=2e-4), name
        assert not metrics[name].requires_grad, name
    assert "kl_penalty" not in metrics


GRADIENT_CASES = [
    {},
    {"token_level_loss": False, "ratio_clip_max": 0.3},
    {"constant_length_normalizer": 5, "ratio_clip_c": 1.5},
    {"use_cispo": True},
    {"sapo": {}},
    {"disable_ppo_ratio": True},
    {"force_on_policy_ratio": True},
    {"sequence_level_importance_ratios": True, "token_level_loss": False},
    {"use_unbiased_kl_estimate": True},
    {"use_on_policy_kl_approximation": True, "reference_policy_kl_type": "k2"},
    {"reference_policy_kl_type": "k1"},
    {"kl_gradient": "paper", "reference_policy_kl_type": "k2"},
    {"kl_gradient": "paper", "use_on_policy_kl_approximation": True},
    {
        "use_importance_sampling_correction": True,
        "truncated_importance_sampling_type": "tis",
        "truncated_importance_sampling_ratio": 1.05,
        "truncated_importance_sampling_ratio_min": 0.95,
    },
]


def random_inputs(num_rows: int = 6, length: int = 9) -> LossInputs:
    generator = torch.Generator().manual_seed(7)

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(num_rows, length, generator=generator, dtype=torch.float64)

    old = -noise(1.0).abs() - 0.1
    mask = torch.arange(length) >= torch.tensor([2, 2, 5, 5, 3, 3])[:, None]
    mask &= torch.arange(length) < torch.tensor([9, 4, 9, 7, 8, 3])[:, None]  # the last row is filtered out
    return LossInputs(
        logprobs=(old + noise(0.3)).requires_grad_(),
        old_logprobs=old,
        reference_logprobs=old + noise(0.4),
        generation_logprobs=old + noise(0.1),
        advantages=torch.tensor([1.0, -0.5, 0.3, -2.0, 0.0, 4.0], dtype=torch.float64),
        loss_mask=mask,
        sequence_length=mask.sum(1),
        group_index=torch.tensor([0, 0, 1, 1, 2, 2]),
        denominators=count_denominators(mask),
    )


def plain_formula(inputs: LossInputs, settings: dict) -> Tensor:
    """Token by token in Python, without masks or reductions of the code under test."""
    config = LossFnConfig(**settings)
    total = torch.zeros((), dtype=torch.float64)
    num_tokens = int(inputs.loss_mask.sum())
    rows = [r for r in range(len(inputs.logprobs)) if inputs.loss_mask[r].any()]
    for r in rows:
        tokens = inputs.loss_mask[r].nonzero().squeeze(1).tolist()
        advantage = inputs.advantages[r]
        log_ratios = {t: inputs.logprobs[r, t] - inputs.old_logprobs[r, t] for t in tokens}
        if config.force_on_policy_ratio:
            log_ratios = {t: inputs.logprobs[r, t] - inputs.logprobs[r, t].detach() for t in tokens}
        if config.sequence_level_importance_ratios:
            mean = sum(log_ratios.values()) / len(tokens)
            log_ratios = dict.fromkeys(tokens, mean)
        for t in tokens:
            ratio, logprob = log_ratios[t].exp(), inputs.logprobs[r, t]
            clipped = ratio.clamp(1 - config.ratio_clip_min, 1 + config.ratio_clip_max)
            if config.disable_ppo_ratio:
                value = -advantage * logprob
            elif config.use_cispo:
                value = -clipped.detach() * advantage * logprob
            elif config.sapo is not None:
                tau = 1.0 if advantage > 0 else 1.05
                value = -advantage * 4 / tau / (1 + (-tau * (ratio - 1)).exp())
            else:
                value = -torch.min(ratio * advantage, clipped * advantage)
                if config.ratio_clip_c is not None and advantage < 0:
                    value = torch.min(value, -advantage * config.ratio_clip_c)
            if config.use_importance_sampling_correction:
                weight = (inputs.old_logprobs[r, t] - inputs.generation_logprobs[r, t]).exp()
                value = value * weight.clamp(
                    config.truncated_importance_sampling_ratio_min, config.truncated_importance_sampling_ratio
                )
            d = inputs.reference_logprobs[r, t] - logprob
            kl = {"k1": -d, "k2": d * d / 2, "k3": d.exp() - 1 - d}[config.reference_policy_kl_type]
            weight = (logprob - logprob.detach()).exp()
            if config.use_unbiased_kl_estimate:
                weight = ratio
            if config.use_on_policy_kl_approximation:
                weight = (logprob - inputs.generation_logprobs[r, t]).exp()
            kl = kl * (weight.detach() if config.kl_gradient == "paper" else weight)
            value = value + config.reference_policy_kl_penalty * kl
            if config.constant_length_normalizer is not None:
                total = total + value / (len(rows) * config.constant_length_normalizer)
            elif config.token_level_loss:
                total = total + value / num_tokens
            else:
                total = total + value / len(tokens) / len(rows)
    return total


@pytest.mark.parametrize("settings", GRADIENT_CASES)
def test_loss_and_gradient_equal_a_plain_formula_in_fp64(settings: dict) -> None:
    settings = {"reference_policy_kl_penalty": 0.3, **NO_CLAMP, **settings}
    inputs = random_inputs()
    loss, _ = evaluate(inputs, **settings)
    expected = plain_formula(inputs, settings)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    (ours,) = torch.autograd.grad(loss, inputs.logprobs)
    (reference,) = torch.autograd.grad(expected, inputs.logprobs)
    assert (ours - reference).norm() < 1e-12 * reference.norm()


def split(inputs: LossInputs, rows: list[int]) -> LossInputs:
    names = ("logprobs", "old_logprobs", "reference_logprobs", "generation_logprobs", "advantages")
    more = ("loss_mask", "sequence_length", "group_index")
    return replace(inputs, **{name: getattr(inputs, name)[rows] for name in names + more})


@pytest.mark.parametrize("settings", [*GRADIENT_CASES, {"vespo": {}}])
@pytest.mark.parametrize("rows", [[[0], [1], [2], [3], [4], [5]], [[5, 0, 3], [1, 2, 4]]])
def test_loss_and_metrics_add_up_over_any_split_into_microbatches(settings: dict, rows: list) -> None:
    inputs = random_inputs()
    loss, metrics = evaluate(inputs, **settings)
    parts = [evaluate(split(inputs, part), **settings) for part in rows]
    assert sum(part[0].item() for part in parts) == pytest.approx(loss.item(), rel=1e-12)
    for name, value in metrics.items():
        values = [part[1][name].item() for part in parts]
        combine = min if name.endswith("_min") else max if name.endswith("_max") else sum
        assert combine(values) == pytest.approx(value.item(), rel=1e-12), name


def test_nothing_outside_the_mask_reaches_loss_or_gradient() -> None:
    inputs = random_inputs()
    clean, _ = evaluate(inputs)
    outside = ~inputs.loss_mask
    poison = torch.tensor([math.nan, math.inf, -math.inf], dtype=torch.float64)
    poisoned = inputs.logprobs.detach().clone()
    poisoned[outside] = poison.repeat(len(poisoned[outside]))[: int(outside.sum())]
    logprobs = poisoned.clone().requires_grad_()
    loss, metrics = evaluate(
        replace(
            inputs,
            logprobs=logprobs,
            old_logprobs=poisoned,
            reference_logprobs=inputs.reference_logprobs.where(inputs.loss_mask, math.nan),
            generation_logprobs=inputs.generation_logprobs.where(inputs.loss_mask, math.nan),
        )
    )
    loss.backward()
    assert all(value.isfinite() for value in metrics.values())
    assert logprobs.grad[outside].abs().sum() == 0
    assert logprobs.grad[inputs.loss_mask].isfinite().all()
    assert loss.isfinite()
    assert clean.isfinite()


def test_a_filtered_completion_changes_nothing() -> None:
    inputs = random_inputs()
    without = split(inputs, [0, 1, 2, 3, 4])
    assert count_denominators(inputs.loss_mask) == count_denominators(without.loss_mask)
    for settings in GRADIENT_CASES:
        assert evaluate(inputs, **settings)[0].item() == pytest.approx(evaluate(without, **settings)[0].item())


def test_a_batch_without_any_loss_token_has_loss_zero() -> None:
    inputs = split(random_inputs(), [5])
    loss, _ = evaluate(replace(inputs, denominators=Denominators(num_loss_tokens=0, num_sequences=0)))
    loss.backward()
    assert loss.item() == 0.0


def test_advantages_may_differ_by_token() -> None:
    inputs = random_inputs()
    by_token = replace(inputs, advantages=inputs.advantages[:, None].expand_as(inputs.logprobs))
    assert evaluate(by_token)[0].item() == evaluate(inputs)[0].item()
    sharper = replace(inputs, advantages=torch.linspace(-1, 1, 9, dtype=torch.float64).expand(6, 9))
    assert evaluate(sharper)[0].item() != evaluate(inputs)[0].item()


def test_a_loss_says_which_passes_it_needs() -> None:
    def needs(**settings) -> tuple[bool, bool, bool]:
        loss = make_policy_loss(LossFnConfig(**settings))
        return loss.needs_reference, loss.needs_old_logprobs, loss.needs_generation_logprobs

    assert needs() == (True, True, False)
    assert needs(**NO_KL) == (False, True, False)
    assert needs(**NO_KL, force_on_policy_ratio=True) == (False, False, False)
    assert needs(**NO_KL, disable_ppo_ratio=True) == (False, False, False)
    assert needs(**NO_KL, disable_ppo_ratio=True, use_importance_sampling_correction=True) == (False, True, True)
    assert needs(use_on_policy_kl_approximation=True) == (True, True, True)


def test_a_loss_survives_pickling() -> None:
    loss = make_policy_loss(LossFnConfig(sapo={}))
    again = pickle.loads(pickle.dumps(loss))
    assert again == loss
    assert again(random_inputs())[0].item() == loss(random_inputs())[0].item()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_cispo": True, "ratio_clip_c": 3.0}, "loss_fn.ratio_clip_c=3.0"),
        ({"use_cispo": True, "token_level_loss": False}, "loss_fn.token_level_loss=False"),
        ({"use_cispo": True, "force_on_policy_ratio": True}, "loss_fn.force_on_policy_ratio=True"),
        (
            {"use_cispo": True, "sequence_level_importance_ratios": True},
            "loss_fn.sequence_level_importance_ratios=True",
        ),
        ({"use_cispo": True, "disable_ppo_ratio": True}, "loss_fn.use_cispo=True: excludes"),
        ({"use_cispo": True, "sapo": {}}, "loss_fn.use_cispo=True: excludes"),
        ({"disable_ppo_ratio": True, "force_on_policy_ratio": True}, "has no ratio to force"),
        ({"sequence_level_importance_ratios": True}, "Set loss_fn.token_level_loss=false"),
        (
            {"constant_length_normalizer": 5, "token_level_loss": False},
            "loss_fn.constant_length_normalizer=5",
        ),
        (
            {"truncated_importance_sampling_type": "icepop", "truncated_importance_sampling_ratio": 2.0},
            "ratio_min=None: 'icepop' needs a lower bound of at most",
        ),
        (
            {
                "truncated_importance_sampling_type": "tis",
                "truncated_importance_sampling_ratio": 2.0,
                "truncated_importance_sampling_ratio_min": 2.5,
            },
            "ratio_min=2.5: 'tis' needs a lower bound of at most loss_fn.truncated_importance_sampling_ratio=2.0",
        ),
        ({"truncated_importance_sampling_ratio_min": 0.5}, "ratio_min=0.5: has no effect without a type"),
        ({"kl_gradient": "paper", "reference_policy_kl_type": "k1"}, "kl_gradient='paper': its expected gradient"),
        ({"kl_gradient": "paper", "use_unbiased_kl_estimate": True}, "kl_gradient='paper': would take"),
        (
            {
                "truncated_importance_sampling_type": "seq-mask-tis",
                "truncated_importance_sampling_ratio": 2.0,
                "truncated_importance_sampling_ratio_min": 0.5,
                "sequence_level_importance_ratios": True,
                "token_level_loss": False,
            },
            "judges sequences and weights tokens",
        ),
        ({"truncated_importance_sampling_type": "tis"}, "needs an upper bound"),
        ({"truncated_importance_sampling_ratio": 2.0}, "has no effect without a type"),
        (
            {"truncated_importance_sampling_type": "tis", "truncated_importance_sampling_ratio": 2.0},
            "Set loss_fn.use_importance_sampling_correction=true",
        ),
        ({"vespo": {}, "use_importance_sampling_correction": True}, "VESPO weights whole sequences"),
        (
            {"use_unbiased_kl_estimate": True, "use_on_policy_kl_approximation": True},
            "Keep one of them",
        ),
        ({"ratio_clip_c": 1.0}, "greater than 1"),
    ],
)
def test_bad_combinations_are_refused_by_name(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossFnConfig(**settings)


def test_rules_across_sections_are_refused_by_name() -> None:
    grpo = GrpoConfig(num_prompts_per_step=2, num_generations_per_prompt=4)
    check_rollout_against_loss(grpo, LossFnConfig(), 4)
    with pytest.raises(ValueError, match="policy.train_global_batch_size=3: must divide the 8 completions"):
        check_rollout_against_loss(grpo, LossFnConfig(), 3)
    with pytest.raises(ValueError, match="a rollout of 8 completions makes 2"):
        check_rollout_against_loss(grpo, LossFnConfig(force_on_policy_ratio=True), 4)
    skips = grpo.model_copy(update={"skip_reference_policy_logprobs_calculation": True})
    with pytest.raises(ValueError, match="reference_policy_kl_penalty=0.01"):
        check_rollout_against_loss(skips, LossFnConfig(), 8)
