"""The merge against fp64, in each dtype that a base can have."""

import pytest
import torch

from nemo_rl_lora.lora.merge import exact_weight_and_bound, merged_weight


def _factors(out_features=48, in_features=32, dim=8):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator)
    lora_a = torch.randn(dim, in_features, generator=generator) * 0.1
    lora_b = torch.randn(out_features, dim, generator=generator) * 0.1
    return weight, lora_a, lora_b


def test_fp32_merge_is_within_one_part_in_a_million_of_fp64():
    weight, lora_a, lora_b = _factors()
    exact = weight.double() + 4.0 * (lora_b.double() @ lora_a.double())
    merged = merged_weight(weight, lora_a, lora_b, 4.0)
    assert merged.dtype == torch.float32
    assert torch.linalg.norm(merged.double() - exact) <= 1e-6 * torch.linalg.norm(exact)


@pytest.mark.parametrize(("dtype", "epsilon"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)])
def test_low_precision_merge_is_within_one_rounding_of_fp64(dtype, epsilon):
    weight, lora_a, lora_b = _factors()
    weight = weight.to(dtype)
    exact = weight.double() + 4.0 * (lora_b.double() @ lora_a.double())
    error = (merged_weight(weight, lora_a, lora_b, 4.0).double() - exact).abs()
    assert (error <= epsilon * exact.abs() + 1e-6).all()


def test_small_updates_survive_as_they_would_not_when_the_product_is_rounded_first():
    weight = torch.full((1, 1), 1.0, dtype=torch.bfloat16)
    lora_a, lora_b = torch.full((1, 1), 1.0), torch.full((1, 1), 2.0**-7 * 0.51)
    assert merged_weight(weight, lora_a, lora_b, 1.0).item() == 1.0 + 2.0**-7


def test_the_base_weight_keeps_its_bits():
    weight, lora_a, lora_b = _factors()
    before = weight.clone()
    merged_weight(weight, lora_a, lora_b, 4.0)
    merged_weight(weight, lora_a, lora_b, 4.0, out=torch.empty_like(weight))
    assert torch.equal(weight, before)


def test_out_receives_the_same_values():
    weight, lora_a, lora_b = _factors()
    weight, out = weight.bfloat16(), torch.empty(48, 32, dtype=torch.bfloat16)
    returned = merged_weight(weight, lora_a, lora_b, 0.5, out=out)
    assert returned is out
    assert torch.equal(out, merged_weight(weight, lora_a, lora_b, 0.5))


def test_out_may_not_be_the_base():
    weight, lora_a, lora_b = _factors()
    with pytest.raises(AssertionError, match="out is the base weight"):
        merged_weight(weight, lora_a, lora_b, 0.5, out=weight)


def test_no_gradient_is_recorded():
    weight, lora_a, lora_b = _factors()
    assert not merged_weight(weight, lora_a.requires_grad_(), lora_b, 1.0).requires_grad


@pytest.mark.parametrize(
    ("dtype", "unit", "half_subnormal"),
    [(torch.float32, 0.0, 0.0), (torch.bfloat16, 2.0**-8, 2.0**-134), (torch.float16, 2.0**-11, 2.0**-25)],
)
def test_the_bound_is_that_of_the_roundings(dtype, unit, half_subnormal):
    """Of dim + 3 roundings to fp32 of every term, with what may underflow, and of one rounding of the result."""
    weight, lora_a, lora_b = _factors()
    exact, bound = exact_weight_and_bound(weight, lora_a, lora_b, -4.0, dtype)
    for row, column in ((0, 0), (7, 30), (47, 31)):
        products = [float(lora_b[row, k].double() * lora_a[k, column].double()) for k in range(8)]
        value, terms = float(weight[row, column]), abs(float(weight[row, column]))
        for product in products:
            value, terms = value - 4.0 * product, terms + 4.0 * abs(product)
        limit = terms * 11 * 2.0**-24 / (1 - 11 * 2.0**-24) + 8 * 2.0**-126
        limit += (abs(value) + limit) * unit + half_subnormal
        assert exact[row, column].item() == pytest.approx(value, rel=1e-12)
        assert bound[row, column].item() == pytest.approx(limit, rel=1e-9)
