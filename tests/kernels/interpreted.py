"""Our Triton kernels beside formulas in fp64 and beside the paths of torch, in Triton's interpreter.

tests/kernels/test_kernels.py runs this file in a process of its own, which has the interpreter from its start.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nemo_rl_lora.kernels import logprobs, low_rank
from nemo_rl_lora.lora.spec import LoraSpec
from nemo_rl_lora.lora.targets import AdaptedModule
from nemo_rl_lora.models.own_forward import HeadForm
from nemo_rl_lora.policy import head
from nemo_rl_lora.policy.adapted_linear import adapted_linear
from nemo_rl_lora.policy.dtensor.linear import copy_masters, install_adapters
from nemo_rl_lora.policy.head import Head
from tests.gpu.checks import relative
from tests.kernels import interpreter
from tests.policy.dtensor.kernel_cases import Case, DtypeName, counted_own_kernels, make_layer, measure

# fp32: sums of at most 600 products, each rounding 6e-8 of its term. Measured at most 2.1e-7.
# bf16: operands are exact in the reference. What is rounded on the way to a result is the product of low rank (x A^T,
# or dy B), the base product, and their sum, each by at most 2^-9 of its term: 6e-3 together. Measured at most 2.9e-3.
# The gradients of A and B are never rounded themselves. fp16 has three bits more.
BOUNDS: dict[str, float] = {"float32": 2e-6, "bfloat16": 6e-3, "float16": 7.5e-4}
# of x, and of the adapter's computation where that is another
PLAIN_DTYPES: tuple[tuple[DtypeName, DtypeName | None], ...] = (("float32", None), ("bfloat16", None))
MIXED_DTYPES: tuple[tuple[DtypeName, DtypeName | None], ...] = (("bfloat16", "float32"), ("float32", "bfloat16"))
# shape of x without its last axis, rank, in, out: sizes on both sides of blocks, and sums that are split
SIZES = (
    ((1,), 4, 33, 65),
    ((70,), 8, 150, 200),
    ((17,), 16, 600, 130),
    ((2, 40), 64, 72, 40),
    ((40,), 128, 70, 130),
    ((33,), 256, 70, 130),
    ((20,), 300, 40, 50),
    ((5,), 1, 16, 16),
)


interpreter.compute_bfloat16()


def case_of(size: tuple[tuple[int, ...], int, int, int], compute: DtypeName, adapter: DtypeName | None = None) -> Case:
    shape, dim, in_features, out_features = size
    return Case(
        shape=shape,
        dim=dim,
        in_features=in_features,
        out_features=out_features,
        scale=1.7,
        bias=dim % 3 == 1,
        compute=compute,
        adapter=adapter,
    )


@pytest.fixture
def counted(monkeypatch) -> dict:
    for name in ("project_kernel", "expand_kernel", "reduce_kernel"):
        monkeypatch.setattr(low_rank, name, getattr(low_rank, name))  # is put back afterwards
    return counted_own_kernels()


@pytest.mark.parametrize(
    ("size", "compute", "inner"),
    [
        *((size, *dtypes) for dtypes in PLAIN_DTYPES for size in SIZES),
        *((size, *dtypes) for dtypes in (*MIXED_DTYPES, ("float16", None)) for size in SIZES[1:7:3]),
    ],
    ids=str,
)
def test_values_and_gradients_of_x_a_and_b_equal_the_formula(counted, size, compute, inner):
    found = measure(case_of(size, compute, inner), counted)
    bound = max(BOUNDS[compute], BOUNDS[inner or compute])
    assert {name: error for name, error in found["errors"].items() if not error <= bound} == {}
    assert found["dtypes"] == {"y": compute, "x": compute, "A": "float32", "B": "float32"}
    assert found["shapes_kept"]
    assert list(found["launches"].values()) == [2, 2, 2]


def inputs(num_tokens: int, width: int, dim: int, out: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """x, W, A, B and the gradient of y."""
    generator = torch.Generator().manual_seed(num_tokens + width + dim + out)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x, weight, d_y = draw(num_tokens, width).to(dtype), draw(out, width).to(dtype), draw(num_tokens, out).to(dtype)
    return x, weight, draw(dim, width) / width**0.5, draw(out, dim) / dim**0.5, d_y


def beside_formula(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, d_y: Tensor) -> dict[str, float]:
    """Errors of the layer's output and gradients."""
    scale, leaves = 0.6, [tensor.detach().requires_grad_() for tensor in (x, a, b)]
    y = adapted_linear(leaves[0], weight, *leaves[1:], scale=scale, dtype=x.dtype, products=low_rank)
    y.backward(d_y)
    x, weight, a, b, d_y = (tensor.detach().to(x.dtype).double() for tensor in (x, weight, a, b, d_y))
    expected = {
        "y": x @ weight.T + scale * (x @ a.T) @ b.T,
        "x": d_y @ weight + scale * (d_y @ b) @ a,
        "a": scale * (d_y @ b).flatten(0, -2).T @ x.flatten(0, -2),
        "b": scale * d_y.flatten(0, -2).T @ (x @ a.T).flatten(0, -2),
    }
    found = dict(zip(expected, (y, *(leaf.grad for leaf in leaves)), strict=True))
    return {name: relative(found[name], want) for name, want in expected.items()}


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    num_tokens=st.integers(1, 140),
    width=st.integers(1, 140),
    dim=st.integers(1, 40),
    out=st.integers(1, 140),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_sizes_equal_the_formula(num_tokens, width, dim, out, dtype):
    errors = beside_formula(*inputs(num_tokens, width, dim, out, dtype))
    assert max(errors.values()) <= BOUNDS[str(dtype).removeprefix("torch.")], errors


@pytest.mark.parametrize(
    "arrange",
    [
        lambda x: x[:, 1::2],  # every other column
        lambda x: x.t().contiguous().t(),  # columns apart
        lambda x: x[3:, 5:],  # rows that begin within another tensor
        lambda x: x.view(2, -1, x.shape[1]).transpose(0, 1),  # sequences turned
        lambda x: x[:1].expand(24, -1),  # one row for all tokens
    ],
    ids=["columns", "transposed", "slice", "turned", "expanded"],
)
@pytest.mark.parametrize("side", ["x", "d_y"])
def test_tensors_that_are_not_contiguous(arrange, side):
    x, weight, a, b, d_y = inputs(30, 90, 8, 70)
    arranged = arrange(x if side == "x" else d_y)
    assert not arranged.is_contiguous()
    rows = arranged.shape[:-1]
    if side == "x":
        width, out = arranged.shape[-1], 70
        tensors = arranged, weight[:, :width], a[:, :width], b, d_y[:24].repeat(2, 1)[: rows.numel()].view(*rows, out)
    else:
        width, out = 90, arranged.shape[-1]
        tensors = x[:24].repeat(2, 1)[: rows.numel()].view(*rows, width), weight[:out], a, b[:out], arranged
    assert max(beside_formula(*tensors).values()) <= BOUNDS["float32"]


def test_no_token_has_no_output_and_gradients_of_zero():
    x, weight, a, b, d_y = inputs(0, 24, 4, 40)
    leaves = [tensor.requires_grad_() for tensor in (x, a, b)]
    y = adapted_linear(leaves[0], weight, *leaves[1:], scale=2.0, dtype=torch.float32, products=low_rank)
    y.backward(d_y)
    assert (y.shape, leaves[0].grad.shape) == ((0, 40), (0, 24))
    assert not leaves[1].grad.any()
    assert not leaves[2].grad.any()


def test_operands_are_left_as_they_are():
    """The kernels write over the base product and its gradient, and over nothing that they were given."""
    tensors = inputs(20, 40, 8, 50)
    before = [tensor.clone() for tensor in tensors]
    beside_formula(*tensors)
    assert all(torch.equal(now, then) for now, then in zip(tensors, before, strict=True))


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3))[1:], ids=str)
def test_gradients_that_nobody_wants_are_not_computed(monkeypatch, wanted):
    """The first layer's x, for one, has none."""
    reduced, called = low_rank.reduce, []
    monkeypatch.setattr(low_rank, "reduce", lambda *args, **more: called.append(1) or reduced(*args, **more))
    x, weight, a, b, d_y = inputs(20, 40, 8, 50)
    leaves = [tensor.requires_grad_(want) for tensor, want in zip((x, a, b), wanted, strict=True)]
    adapted_linear(leaves[0], weight, *leaves[1:], scale=2.0, dtype=torch.float32, products=low_rank).backward(d_y)
    assert [leaf.grad is not None for leaf in leaves] == list(wanted)
    assert len(called) == sum(wanted[1:])


def test_few_rows_and_many_columns_are_a_sum_in_parts(monkeypatch):
    """And each part is a whole number of blocks, so that what a part holds follows from shapes alone."""
    added, parts_of = low_rank._added, []
    monkeypatch.setattr(low_rank, "_added", lambda parts, total: parts_of.append(parts.dim()) or added(parts, total))
    x, weight, a, b, d_y = inputs(140, 300, 8, 40)
    assert max(beside_formula(x, weight, a, b, d_y).values()) <= BOUNDS["float32"]
    assert parts_of == [3, 2, 3, 3]  # x A^T over 300 columns; dy B over 40; both gradients over 140 tokens


WIDTHS, DIMS = {"q_proj": 70, "k_proj": 33, "v_proj": 130}, (8, 3, 90)  # of layers that read one x


def siblings(compute: DtypeName, inner: DtypeName | None, generator: torch.Generator) -> nn.Module:
    """Layers on our kernels, computed together, whose B are not zero."""
    model = nn.Module()
    for name, width in WIDTHS.items():
        model.add_module(name, nn.Linear(150, width, bias=name == "q_proj", dtype=getattr(torch, compute)))
    modules = [
        AdaptedModule(name=name, in_features=150, out_features=width, dim=dim, alpha=1.7 * dim, scale=1.7)
        for (name, width), dim in zip(WIDTHS.items(), DIMS, strict=True)
    ]
    install_adapters(model, modules, LoraSpec(dim=8, alpha=8, dtype=inner), kernels="own")
    for name in WIDTHS:
        linear = model.get_submodule(name)
        for factor in (linear.lora_A.weight, linear.lora_B.weight):
            factor.data = torch.randn(factor.shape, generator=generator) / factor.shape[1] ** 0.5
    copy_masters(model, modules)
    return model


@pytest.mark.parametrize(("compute", "inner"), [*PLAIN_DTYPES, *MIXED_DTYPES], ids=str)
def test_layers_of_one_input_share_its_product_with_a_and_equal_the_formula(counted, compute, inner):
    """Of ranks and sizes that fill no block, and which together have a larger one than each; in two passes."""
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(0)  # of the base
    model = siblings(compute, inner, generator)
    linears, dtype = [model.get_submodule(name) for name in WIDTHS], getattr(torch, compute)
    x = torch.randn(2, 41, 150, generator=generator).to(dtype).requires_grad_()
    masters = [factor.weight for linear in linears for factor in (linear.lora_A, linear.lora_B)]
    exact = [
        x.detach().double().requires_grad_(),
        *(m.detach().to(getattr(torch, inner or compute)).double().requires_grad_() for m in masters),
    ]
    for _ in range(2):
        ys = [linear(x) for linear in linears]
        expected = [
            F.linear(exact[0], linear.weight.double(), None if linear.bias is None else linear.bias.double())
            + 1.7 * (exact[0] @ a.T) @ b.T
            for linear, a, b in zip(linears, exact[1::2], exact[2::2], strict=True)
        ]
        d_ys = [torch.randn(y.shape, generator=generator).to(dtype) for y in ys]
        torch.autograd.backward(ys, d_ys)
        torch.autograd.backward(expected, [d_y.double() for d_y in d_ys])
        errors = [relative(y.detach(), want.detach()) for y, want in zip(ys, expected, strict=True)]
        errors += [relative(leaf.grad, want.grad) for leaf, want in zip((x, *masters), exact, strict=True)]
        assert max(errors) <= max(BOUNDS[compute], BOUNDS[inner or compute]), errors
    # in each pass: x A^T once, and dy B for each; B of each, and all A at once; the gradients likewise
    assert [kernel.num_launches for kernel in counted.values()] == [2 * (1 + 3), 2 * (3 + 1), 2 * (1 + 3)]


@pytest.mark.parametrize(("compute", "inner"), [PLAIN_DTYPES[0], *MIXED_DTYPES])
@pytest.mark.parametrize("position", ["pre", "post"])
def test_dropout_drops_what_the_path_of_torch_drops(position, compute, inner):
    case = case_of(((30,), 8, 50, 70), compute, inner)
    found = []
    for kernels in ("own", None):
        torch.manual_seed(0)  # of the base
        generator = torch.Generator().manual_seed(5)
        layer = make_layer(replace(case, kernels=kernels), generator)
        layer.dropout_p, layer.dropout_position, layer.switch.dropout_seed = 0.4, position, 11
        x = torch.randn(30, 50, generator=generator).to(getattr(torch, compute)).requires_grad_()
        y = layer(x)
        y.backward(torch.randn(30, 70, generator=generator).to(y.dtype))
        found.append((y, x.grad, layer.lora_A.weight.grad, layer.lora_B.weight.grad))
    bound = 2 * max(BOUNDS[compute], BOUNDS[inner or compute])  # both sides round
    assert max(relative(ours, theirs) for ours, theirs in zip(*found, strict=True)) <= bound


FORMS = (HeadForm(), HeadForm(scale=0.3), HeadForm(soft_cap=1.5), HeadForm(scale=2.0, soft_cap=3.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("vocabulary", [50, 4096, 9001])
def test_logprobs_and_their_slope_equal_the_formula(vocabulary, form, dtype):
    """Log-probabilities are fp32 whatever the logits are; the slope, which lies over them, is rounded once."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = (4 * torch.randn(5, vocabulary, generator=generator)).to(dtype)
    target = torch.randint(vocabulary, (5,), generator=generator)
    exact = logits.double().requires_grad_()
    z = exact * form.scale
    z = z if form.soft_cap is None else form.soft_cap * torch.tanh(z / form.soft_cap)
    expected = torch.log_softmax(z / 0.7, -1).gather(1, target[:, None])[:, 0]
    expected.sum().backward()
    values, left = (
        (
            logprobs.target_logprobs(
                logits, target, factor=form.scale, soft_cap=form.soft_cap, temperature=0.7, with_slope=with_slope
            )
            for with_slope in (False, True)
        ),
        exact.grad,
    )
    without, with_slope = values
    assert torch.equal(without, with_slope)
    torch.testing.assert_close(without.double(), expected.detach(), atol=3e-6, rtol=0)
    assert relative(logits.double() * form.scale / 0.7, left) <= BOUNDS[str(dtype).removeprefix("torch.")]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("form", FORMS[1:], ids=str)
def test_the_heads_of_the_kernel_and_of_torch_are_the_same(monkeypatch, form, trained):
    """In chunks, the last of which is smaller."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(37, 12, generator=generator), torch.randn(50, 12, generator=generator)
    target, outer = torch.randint(50, (37,), generator=generator), torch.randn(37, generator=generator)
    found = []
    for by_kernel in (False, True):
        monkeypatch.setattr(head, "_kernel_takes", lambda *_, by_kernel=by_kernel: by_kernel)
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)
        values = head.target_logprobs(
            leaves[0], Head(weight=leaves[1], temperature=0.7, chunk_tokens=8, form=form), target
        )
        (values * outer).sum().backward()
        found.append([values, *(leaf.grad for leaf in leaves if leaf.grad is not None)])
    assert [len(tensors) for tensors in found] == [2 + trained] * 2
    assert max(relative(ours, theirs) for ours, theirs in zip(*found, strict=True)) <= 2e-6
