"""A LoRA layer on Triton kernels, our own or nemo-automodel's, beside its formula, written out in fp64: cases, launches
and errors.

Without the interpreter's patches (tests/kernels/interpreter.py), so that a GPU's kernels are measured by the same
lines. The references share no code with the product.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import triton
from nemo_automodel.components._peft import lora_kernel
from torch import Tensor, nn

from nemo_rl_lora.kernels import low_rank
from nemo_rl_lora.lora.spec import LoraSpec
from nemo_rl_lora.lora.targets import AdaptedModule
from nemo_rl_lora.policy.dtensor.linear import AdapterLinear, install_adapters

DtypeName = Literal["float32", "bfloat16", "float16"]
KERNELS = ("lora_forward_kernel", "lora_da_dx_kernel", "lora_db_kernel")  # nemo-automodel's
OWN_KERNELS = ("project_kernel", "expand_kernel", "reduce_kernel")


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
    kernels: Literal["own", "automodel"] | None = "own"


class CountedKernel:
    """A kernel that counts its launches, as `kernel[grid](...)`."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.num_launches = 0

    def __getitem__(self, grid: Any) -> Any:
        self.num_launches += 1
        return self.kernel[grid]


def one_configuration(configurations: Mapping[str, triton.Config]) -> dict[str, CountedKernel]:
    """Each kernel of nemo-automodel with one configuration, so that none is timed against others, and a counter around
    it."""
    counted = {}
    for name in KERNELS:
        kernel = getattr(lora_kernel, name)
        kernel.configs = [configurations[name]]
        counted[name] = CountedKernel(kernel)
        setattr(lora_kernel, name, counted[name])
    return counted


def counted_own_kernels() -> dict[str, CountedKernel]:
    """A counter around each of ours, which has one configuration in any case."""
    counted = {name: CountedKernel(getattr(low_rank, name)) for name in OWN_KERNELS}
    for name, kernel in counted.items():
        setattr(low_rank, name, kernel)
    return counted


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
    install_adapters(model, (module,), spec, kernels=case.kernels)
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


def measure(case: Case, counted: Mapping[str, CountedKernel], device: str = "cpu") -> dict[str, Any]:
    """What the layer does with one input: errors by tensor (L2, relative), dtypes and launches."""
    generator = torch.Generator().manual_seed(7)
    layer = make_layer(case, generator).to(device)
    compute = getattr(torch, case.compute)
    x = torch.randn(*case.shape, case.in_features, generator=generator).to(device, compute).requires_grad_()
    d_y = torch.randn(*case.shape, case.out_features, generator=generator).to(device, compute)
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
