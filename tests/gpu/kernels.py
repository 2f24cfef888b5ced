"""The Triton LoRA kernels on a GPU beside their formula in fp64: values, gradients, and one launch of each.

Each kernel has one of its configurations, since timing all of them takes a minute for each new shape; the one chosen
fits in the shared memory of compute capability 9.0 for ranks up to 64, in fp32 and in bf16.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial

import triton

from tests.gpu.checks import Answer, Check, Machine, skipped, within
from tests.policy.dtensor.kernel_cases import Case, CountedKernel, DtypeName, measure, one_configuration

# fp32: as in tests/policy/dtensor/test_kernels.py; the products of TF32 would be off by 3e-4.
# bf16: a rounding is at most 2^-9, and four stages round (x A^T, its product with B, the base, the sum): 8e-3.
BOUNDS: dict[DtypeName, float] = {"float32": 2e-6, "bfloat16": 1.2e-2}
# shape of x without its last axis, rank, in_features, out_features
SHAPES = (
    ((1,), 4, 64, 96),
    ((17,), 16, 896, 4864),
    ((2, 300), 16, 4864, 896),
    ((1000,), 8, 2048, 512),
    ((4096,), 64, 4096, 4096),
)
_BACKWARD = {"BLOCK_SIZE_M": 64, "BLOCK_SIZE_K": 64, "GROUP_SIZE_M": 8}
CONFIGURATIONS = {
    "lora_forward_kernel": {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_K": 128, "BLOCK_SIZE_L": 128, "GROUP_SIZE_M": 8},
    "lora_da_dx_kernel": {**_BACKWARD, "BLOCK_SIZE_L": 64},
    "lora_db_kernel": {**_BACKWARD, "BLOCK_SIZE_N": 64},
}


def checks(machine: Machine) -> Iterator[Check]:
    if not machine.has_gpu:
        yield Check(name="Triton LoRA kernels", ask=partial(skipped, "no GPU"))
        return
    for dtype, bound in BOUNDS.items():
        for shape, dim, in_features, out_features in SHAPES:
            case = Case(
                shape=shape,
                dim=dim,
                in_features=in_features,
                out_features=out_features,
                scale=2.0,
                bias=True,
                compute=dtype,
                adapter=None,
            )
            name = f"{dtype}, x {[*shape, in_features]}, rank {dim}, {out_features} outputs"
            yield Check(name=name, ask=partial(beside_formula, case, bound))


@cache
def configure() -> dict[str, CountedKernel]:
    """Once in a process: one configuration for each kernel, and a counter around it. Other groups need it as well,
    since every shape of theirs would be timed."""
    return one_configuration(
        {name: triton.Config(blocks, num_warps=4, num_stages=4) for name, blocks in CONFIGURATIONS.items()}
    )


def beside_formula(case: Case, bound: float) -> Answer:
    found = measure(case, configure(), "cuda")
    launches = found["launches"]
    answer = within(bound, found["errors"], launches=sum(launches.values()))
    if set(launches.values()) != {1}:
        return Answer(ok=False, facts={**answer.facts, "wrong": f"one launch of each kernel, not {launches}"})
    return answer
