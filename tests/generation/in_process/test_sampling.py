"""Drawing tokens against brute-force references and expected frequencies."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_rl_lora.generation.in_process.sampling import TOP_P_PREFIX, sample, uniforms
from nemo_rl_lora.types import SamplingParams


def params(**fields: float | int | None) -> SamplingParams:
    return SamplingParams(**{"max_new_tokens": 1, **fields})  # type: ignore[arg-type]


def brute_force(logits: list[float], sampling: SamplingParams) -> dict[int, float]:
    """Token to probability, written with plain loops."""
    weights = [math.exp((x - max(logits)) / sampling.temperature) for x in logits]
    ranked = sorted(range(len(logits)), key=lambda i: -weights[i])
    if sampling.top_k is not None:
        ranked = ranked[: sampling.top_k]
    total = sum(weights[i] for i in ranked)
    kept, mass = [], 0.0
    for i in ranked:
        if mass >= sampling.top_p:
            break
        kept.append(i)
        mass += weights[i] / total
    total = sum(weights[i] for i in kept)
    return {i: weights[i] / total for i in kept}


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 0.01]),
    top_k=st.sampled_from([None, 1, 3, 50]),
)
def test_support_and_logprobs_are_those_of_a_brute_force_truncation(
    seed: int, temperature: float, top_p: float, top_k: int | None
) -> None:
    logits = 2 * torch.randn(1, 11, generator=torch.Generator().manual_seed(seed))
    sampling = params(temperature=temperature, top_p=top_p, top_k=top_k)
    expected = brute_force(logits[0].tolist(), sampling)
    u = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    tokens, logprobs = sample(logits.expand(4000, -1), [sampling] * 4000, u)
    assert set(tokens.tolist()) <= set(expected)
    for token, probability in expected.items():
        share = (tokens == token).double().mean().item()
        assert share == pytest.approx(probability, abs=1 / 4000 + 1e-6)  # evenly spaced draws leave no noise
        if share:
            assert logprobs[tokens == token][0].item() == pytest.approx(math.log(probability), abs=1e-5)


@pytest.mark.parametrize("vocabulary", [1, 255, 256, 257, 1500])
def test_frequencies_follow_the_probabilities_in_any_vocabulary(vocabulary: int) -> None:
    logits = torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    count = 20_000
    tokens, _ = sample(logits.expand(count, -1), [params()] * count, uniforms([5] * count, range(count)))
    expected = logits[0].softmax(-1).double() * count
    observed = torch.bincount(tokens, minlength=vocabulary).double()
    chi_square = ((observed - expected) ** 2 / expected).sum().item()
    freedom = vocabulary - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom) + 1e-9


def test_each_position_of_a_seed_and_each_seed_draws_evenly() -> None:
    for numbers in (uniforms([3] * 20_000, range(20_000)), uniforms(range(20_000), [0] * 20_000)):
        counts = torch.histc(numbers, bins=50, min=0, max=1)
        assert ((counts - 400) ** 2 / 400).sum().item() < 49 + 4 * math.sqrt(98)
    neighbours = torch.stack([uniforms(range(5000), [p] * 5000) for p in (0, 1)])
    assert abs(torch.corrcoef(neighbours)[0, 1].item()) < 0.06


def test_a_draw_is_a_function_of_seed_and_position() -> None:
    numbers = uniforms([1, 2, 2**63 + 5, 2], [0, 7, 3, 8])
    assert numbers[1] == uniforms([2], [7])[0]
    assert len(set(numbers.tolist())) == 4
    assert ((numbers >= 0) & (numbers < 1)).all()


def test_a_row_draws_the_same_whatever_stands_beside_it() -> None:
    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(1))
    mixed = [params(), params(top_k=5), params(temperature=0), params(top_p=0.4), params(temperature=0.5), params()]
    u = uniforms(range(6), [4] * 6)
    tokens, logprobs = sample(logits, mixed, u)
    for i in range(6):
        token, logprob = sample(logits[i : i + 1], [mixed[i]], u[i : i + 1])
        assert (token, logprob) == (tokens[i], logprobs[i])


def test_greedy_takes_the_likeliest_token_and_its_plain_logprob() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    token, logprob = sample(logits, [params(temperature=0)], torch.tensor([0.9]))
    assert token.tolist() == [1]
    assert logprob.item() == pytest.approx(math.log(math.exp(2) / (1 + math.exp(1) + math.exp(2))))


def test_extreme_draws_pick_only_tokens_that_have_mass() -> None:
    logits = torch.full((2, 600), -1e4)
    logits[:, 300] = 0.0
    logits[:, 310] = 0.0
    almost_one = 1 - 2.0**-53
    tokens, _ = sample(logits, [params()] * 2, torch.tensor([0.0, almost_one], dtype=torch.float64))
    assert tokens.tolist() == [300, 310]


def test_top_p_that_reaches_past_the_sorted_prefix() -> None:
    logits = torch.zeros(1, 4 * TOP_P_PREFIX)
    u = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    _, logprobs = sample(logits.expand(64, -1), [params(top_p=0.5)] * 64, u)
    assert torch.allclose(logprobs, torch.tensor(-math.log(2 * TOP_P_PREFIX), dtype=torch.float64), atol=1e-5)


@pytest.mark.parametrize("sampling", [params(), params(temperature=0), params(top_k=2), params(top_p=0.5)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_without_a_distribution_are_refused(bad: float, sampling: SamplingParams) -> None:
    logits = torch.tensor([[0.0, 1.0, bad, 0.5]])
    with pytest.raises(FloatingPointError, match="NaN"):
        sample(logits, [sampling], torch.tensor([0.5]))
