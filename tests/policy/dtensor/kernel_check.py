"""Run AdapterLinear with the Triton kernels in Triton's interpreter; print one JSON list of what was found.

A script of its own: TRITON_INTERPRET has to be set before triton is imported. It measures and judges nothing; see
test_kernels.py. The references are written out in fp64 and share no code with the product.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import json
import sys
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
import triton.runtime.interpreter as interpreter

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
    Case(shape=shape, dim=dim, in_features=n_in, out_features=n_out, scale=scale, bias=bias, compute=compute, adapter=m)
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
        kernels=False,
    )
    for shape in ((17,), (4, 16))
    for compute, m in DTYPE_PAIRS[:2]
)


def multiply_bfloat16_as_numbers() -> None:
    """The interpreter keeps bf16 as 16-bit integers and multiplies those: give its dot the numbers in fp32."""
    create_dot = interpreter.InterpreterBuilder.create_dot

    def as_float32(handle: interpreter.TensorHandle) -> interpreter.TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        return create_dot(self, as_float32(a), as_float32(b), d, input_precision, max_num_imprecise_acc)

    interpreter.InterpreterBuilder.create_dot = dot


if __name__ == "__main__":
    torch.manual_seed(0)
    multiply_bfloat16_as_numbers()
    counters = one_configuration({name: triton.Config(blocks) for name, blocks in BLOCKS.items()})
    json.dump([measure(case, counters) for case in CASES], sys.stdout)
