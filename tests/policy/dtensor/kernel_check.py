"""Run AdapterLinear with the Triton kernels in Triton's interpreter; print one JSON list of what was found.

A script of its own: TRITON_INTERPRET has to be set before triton is imported. It measures and judges nothing; see
test_kernels.py. The references are written out in fp64 and share no code with the product.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import json
import sys
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
import triton
import triton.language as tl
import triton.runtime.interpreter as interpreter
from nemo_automodel.components._peft import lora_kernel
from torch import Tensor, nn

from nemo_rl_lora.lora.spec import LoraSpec
from nemo_rl_lora.lora.targets import AdaptedModule
from nemo_rl_lora.policy.dtensor.linear import AdapterLinear, install_adapters

DtypeName = Literal["float32", "bfloat16"]
KERNELS = ("lora_forward_kernel", "lora_da_dx_kernel", "lora_db_kernel")
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A layer and an input; `shape` is that of x without its last axis."""

    shape: tuple[int, ...]
    dim: int
    in_features: int
    out_features: int
    scale: float
    bias: bool
    compute: DtypeName  # of x, W and b
    adapter: DtypeName | None  # in which the adapter computes; None: as x
    kernels: bool = True


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


class CountedKernel:
    """A kernel that counts its launches, as `kernel[grid](...)`."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.num_launches = 0

    def __getitem__(self, grid: Any) -> Any:
        self.num_launches += 1
        return self.kernel[grid]


def prepare_kernels() -> dict[str, CountedKernel]:
    """One block configuration for each kernel (the interpreter cannot be timed), and a counter around it."""
    counted = {}
    for name in KERNELS:
        kernel = getattr(lora_kernel, name)
        kernel.configs = [triton.Config(BLOCKS[name])]
        counted[name] = CountedKernel(kernel)
        setattr(lora_kernel, name, counted[name])
    return counted


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


def make_layer(case: Case, generator: torch.Generator) -> AdapterLinear:
    """A random layer whose B is not zero."""
    model = nn.Sequential(nn.Linear(case.in_features, case.out_features, bias=case.bias))
    model.to(getattr(torch, case.compute))
    spec = LoraSpec(dim=case.dim, alpha=case.scale * case.dim, dtype=case.adapter)
    module = AdaptedModule(
        name="0",
        in_features=case.in_features,
        out_features=case.out_features,
        dim=case.dim,
        alpha=case.scale * case.dim,
        scale=case.scale,
    )
    install_adapters(model, (module,), spec, use_kernels=case.kernels)
    layer = model[0]
    assert isinstance(layer, AdapterLinear)
    with torch.no_grad():
        for weight in (layer.lora_A.weight, layer.lora_B.weight):
            weight.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5)
    return layer


def expected(case: Case, x: Tensor, layer: AdapterLinear, d_y: Tensor) -> dict[str, Tensor]:
    """y = x W^T + b + scale (x A^T) B^T and its gradients, in fp64, from operands rounded as the layer computes."""

    def of(tensor: Tensor, dtype: DtypeName) -> Tensor:
        return tensor.detach().to(getattr(torch, dtype)).double()

    inner = case.adapter or case.compute
    x, d_y = x.flatten(0, -2), d_y.flatten(0, -2)
    w, a, b = of(layer.weight, case.compute), of(layer.lora_A.weight, inner), of(layer.lora_B.weight, inner)
    y = of(x, case.compute) @ w.T + case.scale * (of(x, inner) @ a.T) @ b.T
    if layer.bias is not None:
        y = y + of(layer.bias, case.compute)
    return {
        "y": y,
        "x": of(d_y, case.compute) @ w + case.scale * (of(d_y, inner) @ b) @ a,
        "A": case.scale * (of(d_y, inner) @ b).T @ of(x, inner),
        "B": case.scale * of(d_y, inner).T @ (of(x, inner) @ a.T),
    }


def run(case: Case, counted: dict[str, CountedKernel]) -> dict[str, object]:
    """What the layer does with one input: errors by tensor (L2, relative), dtypes and launches."""
    generator = torch.Generator().manual_seed(7)
    layer = make_layer(case, generator)
    compute = getattr(torch, case.compute)
    x = torch.randn(*case.shape, case.in_features, generator=generator).to(compute).requires_grad_()
    d_y = torch.randn(*case.shape, case.out_features, generator=generator).to(compute)
    before = {name: kernel.num_launches for name, kernel in counted.items()}
    y = layer(x)
    y.backward(d_y)
    assert x.grad is not None
    assert layer.lora_A.weight.grad is not None
    assert layer.lora_B.weight.grad is not None
    found = {"y": y.detach(), "x": x.grad, "A": layer.lora_A.weight.grad, "B": layer.lora_B.weight.grad}
    errors = {
        name: float((found[name].double().reshape(want.shape) - want).norm() / want.norm())
        for name, want in expected(case, x, layer, d_y).items()
    }
    return {
        "case": asdict(case),
        "errors": errors,
        "dtypes": {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in found.items()},
        "shapes_kept": y.shape[:-1] == x.shape[:-1] and x.grad.shape == x.shape,
        "launches": {name: kernel.num_launches - before[name] for name, kernel in counted.items()},
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    multiply_bfloat16_as_numbers()
    counters = prepare_kernels()
    json.dump([run(case, counters) for case in CASES], sys.stdout)
