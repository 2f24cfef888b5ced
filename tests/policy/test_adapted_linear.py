"""Adapted layers as one operation, and the copies that they read, beside the formula in fp64 by torch's autograd."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from nemo_rl_lora.lora.spec import LoraSpec
from nemo_rl_lora.lora.targets import AdaptedModule
from nemo_rl_lora.policy import low_rank
from nemo_rl_lora.policy.adapted_linear import Branch, Layer, adapted_linears
from nemo_rl_lora.policy.dtensor.linear import AdapterLinear, copy_masters, install_adapters
from nemo_rl_lora.policy.master_copies import Group, MasterCopies

# fp32: sums of at most 40 products, each rounding 6e-8 of its term. bf16: operands are exact in the reference, and
# three stages round, each by at most 2^-9 of its term. A sum over passes adds errors of one kind. Measured 3e-7, 4e-3.
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
OUTS, DIMS, WIDTH, SCALE = (6, 4, 10), (3, 2, 5), 12, 0.75


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


def relative(found: Tensor | None, wanted: Tensor) -> float:
    assert found is not None
    return float((found.detach().double() - wanted.detach()).norm() / wanted.detach().norm())


def formula(x: Tensor, weights, all_a, all_b, mask: Tensor | None, masked: str) -> list[Tensor]:
    def of(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        read = x * mask if mask is not None and masked == "pre" else x
        update = SCALE * (read @ a.T) @ b.T
        return x @ weight.T + (update * mask if mask is not None and masked == "post" else update)

    return [of(*tensors) for tensors in zip(weights, all_a, all_b, strict=True)]


@pytest.mark.parametrize(
    ("number", "masked", "compute", "inner"),
    [
        (number, masked, *dtypes)
        for (number, masked), dtypes in product(
            [(1, None), (3, None), (1, "pre"), (1, "post")],
            [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)],
        )
    ],
)
def test_values_and_gradients_of_several_passes_equal_the_formula(number, masked, compute, inner):
    weights = [drawn(out, WIDTH).to(compute) for out in OUTS[:number]]
    all_a = [nn.Parameter(drawn(dim, WIDTH)) for dim in DIMS[:number]]
    all_b = [nn.Parameter(drawn(out, dim)) for out, dim in zip(OUTS, DIMS, strict=True)][:number]
    copies = MasterCopies([Group(all_a, inner), *(Group([b], inner) for b in all_b)])
    a, *factors = copies.factors
    layers = [Layer(weight, None, b) for weight, b in zip(weights, factors, strict=True)]
    expected = [0.0] * (1 + 2 * number)
    x = drawn(2, 9, WIDTH).to(compute).requires_grad_()
    for place in range(3):
        width = OUTS[0] if masked == "post" else WIDTH
        mask = None if masked is None else (drawn(2, 9, width, seed=place) > 0).to(inner) * 2
        ys = adapted_linears(x, layers, Branch(a=a, scale=SCALE, mask=mask, masked=masked or "pre"))
        d_ys = [drawn(*y.shape, seed=place).to(compute) for y in ys]
        torch.autograd.backward(ys, d_ys)
        exact = [
            leaf.detach().to(dtype).double().requires_grad_()
            for leaf, dtype in [(x, compute), *((factor, inner) for factor in (*all_a, *all_b))]
        ]
        mask = None if mask is None else mask.double()
        wanted = formula(
            exact[0], [w.double() for w in weights], exact[1 : 1 + number], exact[1 + number :], mask, masked or ""
        )
        torch.autograd.backward(wanted, [d_y.double() for d_y in d_ys])
        expected = [total + leaf.grad for total, leaf in zip(expected, exact, strict=True)]
        bound = BOUNDS[compute]
        assert max(relative(y, want) for y, want in zip(ys, wanted, strict=True)) <= bound
    errors = [relative(leaf.grad, want) for leaf, want in zip((x, *all_a, *all_b), expected, strict=True)]
    assert max(errors) <= bound, errors
    assert all(leaf.grad.dtype == torch.float32 for leaf in (*all_a, *all_b))


class Attention(nn.Module):
    """Reads one x with q, k and v, or another with k."""

    def __init__(self) -> None:
        super().__init__()
        for name, out in zip(("q_proj", "k_proj", "v_proj"), OUTS, strict=True):
            self.add_module(name, nn.Linear(WIDTH, out, bias=name == "q_proj"))

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(other), self.v_proj(x)], dim=-1)


def adapted(targets: tuple[str, ...], *, dropout: float = 0.0) -> tuple[Attention, list[AdaptedModule]]:
    torch.manual_seed(1)
    model = Attention()
    modules = [
        AdaptedModule(name=name, in_features=WIDTH, out_features=out, dim=dim, alpha=SCALE * dim, scale=SCALE)
        for name, out, dim in zip(("q_proj", "k_proj", "v_proj"), OUTS, DIMS, strict=True)
        if name in targets
    ]
    spec = LoraSpec(dim=4, alpha=3, dropout=dropout, dropout_position="post")
    switch = install_adapters(model, modules, spec, kernels=None)
    switch.dropout_seed = 5 if dropout else None
    for place, linear in enumerate(linear for linear in model.modules() if isinstance(linear, AdapterLinear)):
        for factor in (linear.lora_A.weight, linear.lora_B.weight):
            factor.data = drawn(*factor.shape, seed=place)
    return model, modules


@pytest.mark.parametrize("is_same", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("targets", [("q_proj", "k_proj", "v_proj"), ("q_proj", "v_proj")])
def test_layers_of_one_input_are_computed_together_and_alike(monkeypatch, is_same, dropout, targets):
    """As each by itself, whichever of them have adapters, and also where one turns out to read another x."""
    found, products, project = [], [], low_rank.project
    monkeypatch.setattr(low_rank, "project", lambda *args, **more: products.append(1) or project(*args, **more))
    for together in (False, True):
        model, modules = adapted(targets, dropout=dropout)
        if together:
            copy_masters(model, modules)
            products.clear()
        total = 0.0
        for seed in range(2):
            x, other = drawn(7, WIDTH, seed=seed).requires_grad_(), drawn(7, WIDTH, seed=9)
            y = model(x, x if is_same else other)
            y.backward(drawn(*y.shape))
            total = total + x.grad
        linears = [linear for linear in model.modules() if isinstance(linear, AdapterLinear)]
        found.append([y, total, *(f.weight.grad for linear in linears for f in (linear.lora_A, linear.lora_B))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    once = is_same or targets == ("q_proj", "v_proj")
    if dropout == 0.0 and once:
        assert len(products) == 2 * (1 + len(targets))  # in each pass, one forward, and one backward for each B


def test_layers_follow_their_masters_when_they_are_refreshed():
    model, modules = adapted(("q_proj", "k_proj", "v_proj"))
    copies, x = copy_masters(model, modules), drawn(7, WIDTH)
    with torch.no_grad():
        before = model(x, x)
        for name in ("q_proj", "k_proj", "v_proj"):
            model.get_submodule(name).lora_A.weight.mul_(2)
        copies.refresh()
        base = [model.get_submodule(name)._base(x) for name in ("q_proj", "k_proj", "v_proj")]
    torch.testing.assert_close(model(x, x), 2 * before - torch.cat(base, dim=-1))
