"""A linear layer with a LoRA branch, on nemo-automodel's LinearLoRA.

The vendor's layer owns the parameters' names. What it lacks is here: a switch that turns the branch off (the reference
policy is the same model without it), the layer as one operation (adapted_linear.py), fp32 masters cast to the dtype of
the computation, a scale that need not be alpha / dim, dropout and initialisation that are functions of a seed and the
module's name (adapter_state.py), and Triton kernels for any rank (kernels/low_rank.py), beside the vendor's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from nemo_automodel.components._peft.lora import LinearLoRA, apply_memory_efficient_lora
from nemo_automodel.shared.tp_linear import tp_linear_forward
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from nemo_rl_lora.lora.adapter_tensors import AdapterTensors
from nemo_rl_lora.lora.spec import LoraSpec
from nemo_rl_lora.lora.targets import AdaptedModule
from nemo_rl_lora.patches.nemo_automodel import adapt, multiply_in_ieee
from nemo_rl_lora.policy import low_rank
from nemo_rl_lora.policy.adapted_linear import Branch, Factor, Layer, adapted_linears
from nemo_rl_lora.policy.adapter_state import AdapterSwitch, keep_mask
from nemo_rl_lora.policy.master_copies import Group, MasterCopies
from nemo_rl_lora.tensors import torch_dtype

_SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # siblings, in transformers' models


class AdapterLinear(LinearLoRA):
    """y = x W^T + b + scale * (x A^T) B^T, with x [..., in], A [dim, in], B [out, dim].

    A and B are fp32 masters. The last term is computed in `adapter_dtype`, or in x's dtype where that is None.
    """

    lora_A: nn.Linear  # noqa: N815
    lora_B: nn.Linear  # noqa: N815
    dropout_p: float
    dropout_position: str
    adapter_name: str
    adapter_dtype: torch.dtype | None
    scale: float
    switch: AdapterSwitch
    kernels: Literal["own", "automodel"] | None
    products: ModuleType  # those of low_rank.py, or our kernels'
    factors: tuple[Factor, Factor] | None  # A and B as of master_copies.py; None: the parameters are read and cast
    together: Together | None  # with layers that read the same x

    @property
    def tensors(self) -> AdapterTensors:
        """The masters."""
        return AdapterTensors(a=self.lora_A.weight, b=self.lora_B.weight, scale=self.scale)

    def forward(self, x: Tensor) -> Tensor:
        if not self.switch.on:
            return self._base(x)
        dtype = self.adapter_dtype or x.dtype
        drops = self.dropout_p > 0.0 and self.switch.dropout_seed is not None
        if isinstance(x, DTensor) or self.kernels == "automodel":
            return self._base_and_update(x, dtype, self.dropout_position if drops else None)
        if self.together is not None and not drops and (out := self.together.output_of(self, x)) is not None:
            return out
        a, b = self.factors or (Factor.of(self.lora_A.weight, dtype), Factor.of(self.lora_B.weight, dtype))
        mask, position = None, "post" if self.dropout_position == "post" else "pre"
        if drops:
            width = self.out_features if position == "post" else x.shape[-1]
            mask = self._mask(torch.Size((*x.shape[:-1], width)), a.value)
        branch = Branch(a=a, scale=self.scale, mask=mask, masked=position, products=self.products)
        return adapted_linears(x, [Layer(self.weight, self.bias, b)], branch)[0]

    def _base(self, x: Tensor) -> Tensor:
        """The product with the frozen weight."""
        if isinstance(x, DTensor):
            return tp_linear_forward(x, self.weight, self.bias, mm_for_2d_compile=False)
        return F.linear(x, self.weight, self.bias)

    def _base_and_update(self, x: Tensor, dtype: torch.dtype, dropout_position: str | None) -> Tensor:
        """The layer in several operations: where tensor-parallel ranks have parts of it, or on the vendor's kernels."""
        base, inner = self._base(x), x.to(dtype)
        if dropout_position == "pre":
            inner = self._dropped(inner)
        a, b = self.lora_A.weight.to(dtype), self.lora_B.weight.to(dtype)
        if isinstance(inner, DTensor):
            update = _shared_update(inner, a, b, self.scale)
        else:
            update = apply_memory_efficient_lora(inner, a, b, self.scale, True)
        if dropout_position == "post":
            update = self._dropped(update)
        return base + update.to(base.dtype)

    def _dropped(self, x: Tensor) -> Tensor:
        """x after dropout. Of an x that tensor-parallel ranks share, each draws the whole mask and takes its part."""
        mask = self._mask(x.shape, x.to_local() if isinstance(x, DTensor) else x)
        return x * (_own_part(mask, x) if isinstance(x, DTensor) else mask)

    def _mask(self, shape: torch.Size, like: Tensor) -> Tensor:
        seed = self.switch.dropout_seed
        assert seed is not None
        return keep_mask(shape, probability=self.dropout_p, seed=seed, name=self.adapter_name, like=like)


class Together:
    """Layers that a model calls one after the other with the same x: the first call computes them all.

    Where one of them turns out to be called with another x, each computes its own from then on.
    """

    def __init__(self, linears: Sequence[AdapterLinear], a: Factor, all_b: Sequence[Factor]) -> None:
        self._linears, self._a, self._all_b = linears, a, all_b
        self._x: Tensor | None = None
        self._outs: dict[AdapterLinear, Tensor] = {}
        self._is_split = False

    def forget(self) -> None:
        """Let go of what a pass has left that broke off between two of the calls."""
        self._outs.clear()
        self._x = None

    def output_of(self, linear: AdapterLinear, x: Tensor) -> Tensor | None:
        """None where the layer has to be computed by itself."""
        if self._outs and x is not self._x:
            self._is_split = True
            self.forget()
        if self._is_split:
            return None
        if linear not in self._outs:
            layers = [Layer(one.weight, one.bias, b) for one, b in zip(self._linears, self._all_b, strict=True)]
            outs = adapted_linears(x, layers, Branch(a=self._a, scale=linear.scale, products=linear.products))
            self._outs = dict(zip(self._linears, outs, strict=True))
        out = self._outs.pop(linear)
        self._x = x if self._outs else None
        return out


def copy_masters(model: nn.Module, modules: Sequence[AdaptedModule]) -> MasterCopies:
    """The adapted layers of a model read copies from now on, and those that read the same x are computed together."""
    sets = _same_input(dict(named_adapters(model, modules)))
    groups = []
    for linears in sets:
        dtype = linears[0].adapter_dtype or linears[0].weight.dtype
        groups.append(Group([linear.lora_A.weight for linear in linears], dtype))
        groups += [Group([linear.lora_B.weight], dtype) for linear in linears]
    copies = MasterCopies(groups)
    factors = iter(copies.factors)
    for linears in sets:
        a, *all_b = (next(factors) for _ in range(1 + len(linears)))
        if len(linears) == 1:
            linears[0].factors = (a, all_b[0])
            continue
        together, dims = Together(linears, a, all_b), [linear.dim for linear in linears]
        every_a = map(Factor, a.tracked.split(dims), a.value.split(dims))
        for linear, own_a, b in zip(linears, every_a, all_b, strict=True):
            linear.factors, linear.together = (own_a, b), together
    return copies


def _same_input(linears: Mapping[str, AdapterLinear]) -> list[list[AdapterLinear]]:
    """Layers in sets that one operation can compute, in the order of the model."""
    sets: dict[Any, list[AdapterLinear]] = {}
    for name, linear in linears.items():
        parent, _, leaf = name.rpartition(".")
        kind = next((kind for kind in _SAME_INPUT if leaf in kind), None)
        goes_along = kind is not None and linear.kernels != "automodel"
        sets.setdefault((parent, kind, linear.scale) if goes_along else name, []).append(linear)
    return list(sets.values())


def _shared_update(x: DTensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale * (x A^T) B^T on tensor-parallel ranks.

    Of a column-parallel base each has rows of A and of B, and x A^T, which is narrow, is gathered; of a row-parallel
    one columns of both, and x A^T is summed. So nemo-automodel's plans split A and B.
    """
    whole = [Replicate()] * x.device_mesh.ndim
    inner = F.linear(x, a)
    assert isinstance(inner, DTensor)
    return F.linear(inner.redistribute(placements=whole) * scale, b)


def _own_part(mask: Tensor, like: DTensor) -> DTensor:
    """A mask that every rank has drawn, split as `like` is; whole where `like` is a sum that is still to be made."""
    placements = [Replicate() if placement.is_partial() else placement for placement in like.placements]
    return distribute_tensor(mask, like.device_mesh, placements, src_data_rank=None)


def install_adapters(
    model: nn.Module,
    modules: Sequence[AdaptedModule],
    spec: LoraSpec,
    *,
    kernels: Literal["own", "automodel"] | None,
) -> AdapterSwitch:
    """Freeze the model and put an adapter on each of these linear modules, in place; `drawn_a` starts them."""
    switch = AdapterSwitch()
    products: ModuleType = low_rank
    if kernels == "automodel":
        multiply_in_ieee()
    elif kernels == "own":
        products = import_module("nemo_rl_lora.kernels.low_rank")  # which imports Triton
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in modules:
        linear = adapt(
            model.get_submodule(module.name),
            AdapterLinear,
            dim=module.dim,
            dropout=spec.dropout,
            dropout_position=spec.dropout_position,
        )
        linear.adapter_name = module.name
        linear.adapter_dtype = None if spec.dtype is None else torch_dtype(spec.dtype)
        linear.scale = module.scale
        linear.switch = switch
        linear.kernels, linear.products, linear.factors, linear.together = kernels, products, None, None
    return switch


def named_adapters(model: nn.Module, modules: Sequence[AdaptedModule]) -> Iterator[tuple[str, AdapterLinear]]:
    """Adapted modules by their full Hugging Face name."""
    for module in modules:
        linear = model.get_submodule(module.name)
        assert isinstance(linear, AdapterLinear), type(linear)
        yield module.name, linear
