"""The Triton kernels on a GPU beside their formula in fp64: ours, of the LoRA layer and the head, and nemo-automodel's.

Ours have one configuration for each dtype and size of rank. nemo-automodel's have one of theirs here, since timing all
of them takes a minute for each new shape; it fits in the shared memory of compute capability 9.0 for ranks up to 64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from types import ModuleType

import torch
import triton
from torch import Tensor

from nemo_rl_lora.kernels import logprobs, low_rank
from nemo_rl_lora.policy.adapted_linear import Branch, Factor, Layer, adapted_linear, adapted_linears
from tests.gpu.checks import Answer, Check, Machine, relative, skipped, within
from tests.policy.dtensor.kernel_cases import (
    Case,
    CountedKernel,
    DtypeName,
    counted_own_kernels,
    measure,
    one_configuration,
)

# fp32: as in tests/kernels/interpreted.py; the products of TF32 would be off by 3e-4. bf16 and fp16: as there, with as
# much again for the base products, which cuBLAS need not sum in fp32 throughout. nemo-automodel's round once more.
BOUNDS: dict[str, float] = {"float32": 2e-6, "bfloat16": 1.2e-2, "float16": 1.5e-3}
# shape of x without its last axis, rank, in_features, out_features
ONE = ((1,), 4, 64, 96)
SMALL = ((17,), 16, 896, 4864)
BATCH = ((2, 300), 16, 4864, 896)
ODD = ((333,), 24, 1001, 777)
LARGE = ((4096,), 64, 4096, 4096)
HIGH = ((1000,), 256, 2048, 512)
# and the dtypes of x and of the adapter's computation
OWN_CASES: tuple[tuple[tuple[tuple[int, ...], int, int, int], DtypeName, DtypeName | None], ...] = (
    *((size, "bfloat16", None) for size in (ONE, SMALL, BATCH, ODD, LARGE, HIGH)),
    *((size, "float32", None) for size in (ONE, BATCH, ODD, HIGH)),
    (BATCH, "float16", None),
    (BATCH, "bfloat16", "float32"),
    (BATCH, "float32", "bfloat16"),
)
AUTOMODEL_CASES: tuple[tuple[tuple[tuple[int, ...], int, int, int], DtypeName], ...] = tuple(
    (size, dtype) for dtype in ("float32", "bfloat16") for size in (ONE, BATCH, LARGE)
)
VOCABULARIES = (9001, 151936)
_BACKWARD = {"BLOCK_SIZE_M": 64, "BLOCK_SIZE_K": 64, "GROUP_SIZE_M": 8}
CONFIGURATIONS = {
    "lora_forward_kernel": {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_K": 128, "BLOCK_SIZE_L": 128, "GROUP_SIZE_M": 8},
    "lora_da_dx_kernel": {**_BACKWARD, "BLOCK_SIZE_L": 64},
    "lora_db_kernel": {**_BACKWARD, "BLOCK_SIZE_N": 64},
}


def checks(machine: Machine) -> Iterator[Check]:
    if not machine.has_gpu:
        yield Check(name="Triton kernels", ask=partial(skipped, "no GPU"))
        return
    for size, dtype, inner in OWN_CASES:
        case = case_of(size, dtype, inner)
        yield Check(name=f"ours, {described(case)}", ask=partial(beside_formula, case, own_counters, 2))
    for dtype in BOUNDS:
        yield Check(
            name=f"ours, {dtype}, q, k and v at once", ask=partial(joined_beside_formula, dtype, low_rank, "cuda")
        )
    yield Check(name="ours, one input twice", ask=repeats)
    for dtype in (torch.bfloat16, torch.float32):
        for vocabulary in VOCABULARIES:
            name = f"ours, log-probabilities of {str(dtype).removeprefix('torch.')} logits, vocabulary {vocabulary}"
            yield Check(name=name, ask=partial(head_beside_formula, vocabulary, dtype))
    for size, dtype in AUTOMODEL_CASES:
        case = case_of(size, dtype, None, automodel=True)
        yield Check(name=f"nemo-automodel's, {described(case)}", ask=partial(beside_formula, case, configure, 1))


def case_of(
    size: tuple[tuple[int, ...], int, int, int], dtype: DtypeName, inner: DtypeName | None, *, automodel: bool = False
) -> Case:
    shape, dim, in_features, out_features = size
    return Case(
        shape=shape,
        dim=dim,
        in_features=in_features,
        out_features=out_features,
        scale=2.0,
        bias=True,
        compute=dtype,
        adapter=inner,
        kernels="automodel" if automodel else "own",
    )


def described(case: Case) -> str:
    adapter_dtype = "" if case.adapter is None else f", adapter in {case.adapter}"
    x = [*case.shape, case.in_features]
    return f"{case.compute}{adapter_dtype}, x {x}, rank {case.dim}, {case.out_features} outputs"


own_counters = cache(counted_own_kernels)


@cache
def configure() -> dict[str, CountedKernel]:
    """Once in a process: one configuration for each kernel of nemo-automodel, and a counter around it."""
    return one_configuration(
        {name: triton.Config(blocks, num_warps=4, num_stages=4) for name, blocks in CONFIGURATIONS.items()}
    )


def beside_formula(case: Case, counters: Callable[[], Mapping[str, CountedKernel]], num_launches: int) -> Answer:
    """`num_launches`: how often each kernel is to be launched."""
    found = measure(case, counters(), "cuda")
    launches = found["launches"]
    bound = max(BOUNDS[case.compute], BOUNDS[case.adapter or case.compute])
    answer = within(bound, found["errors"], launches=sum(launches.values()))
    if set(launches.values()) != {num_launches}:
        return Answer(ok=False, facts={**answer.facts, "wrong": f"{num_launches} of each kernel, not {launches}"})
    return answer


def joined_beside_formula(dtype: str, products: ModuleType, device: str) -> Answer:
    """Three layers of one x as one operation: x A^T is one product, of the rows of all three A."""
    generator = torch.Generator().manual_seed(4)
    shapes = [(600, 1024), (3 * 16, 1024)]
    for width in (1024, 256, 256):
        shapes += [(width, 1024), (width, 16), (600, width)]
    x, a, *rest = (torch.randn(shape, generator=generator) / 8 for shape in shapes)
    exact, leaves = _joined(torch.float64, x, a, rest)
    own, own_leaves = _joined(getattr(torch, dtype), x.to(device), a.to(device), [t.to(device) for t in rest], products)
    pairs = zip((*own, *(leaf.grad for leaf in own_leaves)), (*exact, *(leaf.grad for leaf in leaves)), strict=True)
    names = [
        *(f"y of {layer}" for layer in "qkv"),
        *(f"gradient of {of}" for of in ("x", "A", "q's B", "k's B", "v's B")),
    ]
    return within(
        BOUNDS[dtype], {name: relative(found, wanted) for name, (found, wanted) in zip(names, pairs, strict=True)}
    )


def _joined(
    dtype: torch.dtype, x: Tensor, a: Tensor, rest: Sequence[Tensor], products: ModuleType | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of the layers, and what has gradients: x, A and each B. Without products: the formula."""
    rounded = [tensor.bfloat16().to(dtype) for tensor in (x, a, *rest)]  # so that no side has other inputs
    x, a, weights, all_b, d_ys = rounded[0], rounded[1], rounded[2::3], rounded[3::3], rounded[4::3]
    leaves = [leaf.requires_grad_() for leaf in (x, a, *all_b)]
    if products is None:
        outs = [x @ w.T + 2.0 * (x @ own_a.T) @ b.T for w, own_a, b in zip(weights, a.split(16), all_b, strict=True)]
    else:
        layers = [Layer(w, None, Factor.of(b, dtype)) for w, b in zip(weights, all_b, strict=True)]
        outs = adapted_linears(x, layers, Branch(a=Factor.of(a, dtype), scale=2.0, products=products))
    torch.autograd.backward(outs, d_ys)
    return outs, leaves


def repeats() -> Answer:
    """Output and gradients, bit for bit, where every sum is split."""
    generator = torch.Generator("cuda").manual_seed(3)
    shapes = (600, 2048), (1024, 2048), (32, 2048), (1024, 32), (600, 1024)
    x, weight, a, b, d_y = (torch.randn(*s, generator=generator, device="cuda").bfloat16() / 8 for s in shapes)
    found = []
    for _ in range(2):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, a, b)]
        y = adapted_linear(leaves[0], weight, *leaves[1:], scale=2.0, dtype=x.dtype, products=low_rank)
        y.backward(d_y)
        found.append((y, *(leaf.grad for leaf in leaves)))
    same = [torch.equal(one, other) for one, other in zip(*found, strict=True)]
    return Answer(ok=all(same), facts=dict(zip(("y", "x", "A", "B"), same, strict=True)))


def head_beside_formula(vocabulary: int, dtype: torch.dtype) -> Answer:
    """With a soft cap. Log-probabilities are fp32 whatever the logits are."""
    generator = torch.Generator().manual_seed(5)
    logits = (4 * torch.randn(64, vocabulary, generator=generator)).to("cuda", dtype)
    target = torch.randint(vocabulary, (64,), generator=generator).to("cuda")
    exact = logits.double().requires_grad_()
    expected = torch.log_softmax(3.0 * torch.tanh(2.0 * exact / 3.0) / 0.7, -1).gather(1, target[:, None])[:, 0]
    expected.sum().backward()
    assert exact.grad is not None
    values = logprobs.target_logprobs(logits, target, factor=2.0, soft_cap=3.0, temperature=0.7, with_slope=True)
    slope = relative(logits.double() * (2.0 / 0.7), exact.grad)
    error, bound = relative(values, expected), BOUNDS["float32"]
    answer = within(BOUNDS[str(dtype).removeprefix("torch.")], {"slope": slope}, logprobs=error, logprobs_bound=bound)
    return replace(answer, ok=bool(answer.ok) and error <= bound)
