"""Run AdapterLinear with nemo-automodel's kernels in Triton's interpreter; print one JSON list of what was found.

A script of its own: TRITON_INTERPRET=1 has to be set before triton is imported. It measures and judges nothing; see
test_kernels.py.
"""

from __future__ import annotations

import json
import sys

import torch
import triton

from tests.kernels import interpreter
from tests.policy.dtensor.kernel_cases import Case, DtypeName, measure, one_configuration

# Blocks smaller than the layers below, so that every loop over blocks runs more than once and ends on a part of one.
BLOCKS = {
    "lora_forward_kernel": {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_K": 32, "BLOCK_SIZE_L": 32, "GROUP_SIZE_M": 8},
    "lora_da_dx_kernel": {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_K": 32, "BLOCK_SIZE_L": 32, "GROUP_SIZE_M": 8},
    "lora_db_kernel": {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_K": 32, "BLOCK_SIZE_N": 32, "GROUP_SIZE_M": 8},
}

DTYPE_PAIRS: tuple[tuple[DtypeName, DtypeName | None], ...] = (
    ("float32", None),
    ("bfloat16", None),
    ("float32", "bfloat16"),
    ("bfloat16", "float32"),
)

CASES = tuple(
    Case(
        shape=shape,
        dim=dim,
        in_features=n_in,
        out_features=n_out,
        scale=scale,
        bias=bias,
        compute=compute,
        adapter=m,
        kernels="automodel",
    )
    for shape, dim, n_in, n_out, scale, bias in (
        ((1,), 4, 40, 72, 2.0, True),
        ((17,), 16, 72, 40, 0.75, False),
        ((64,), 4, 33, 65, 0.5, True),
        ((64,), 16, 96, 64, 3.0, False),
        ((1, 17), 4, 72, 40, 0.75, True),
        ((4, 16), 16, 40, 72, 2.0, True),
    )
    for compute, m in DTYPE_PAIRS
) + tuple(
    Case(
        shape=shape,
        dim=4,
        in_features=40,
        out_features=72,
        scale=2.0,
        bias=True,
        compute=compute,
        adapter=m,
        kernels=None,
    )
    for shape in ((17,), (4, 16))
    for compute, m in DTYPE_PAIRS[:2]
)


if __name__ == "__main__":
    torch.manual_seed(0)
    interpreter.compute_bfloat16()
    counters = one_configuration({name: triton.Config(blocks) for name, blocks in BLOCKS.items()})
    json.dump([measure(case, counters) for case in CASES], sys.stdout)
