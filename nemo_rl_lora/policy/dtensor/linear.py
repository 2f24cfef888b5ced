"""A linear layer with a LoRA branch, on nemo-automodel's LinearLoRA.

The vendor's layer owns the parameters' names and the memory-efficient products. What it lacks is here: a switch that
turns the branch off (the reference policy is the same model without it), fp32 masters cast to the dtype of the
computation, a scale that need not be alpha / dim, dropout and initialisation that are functions of a seed and the
module's name (adapter_state.py), and Triton kernels for any rank (kernels/adapter.py), beside the vendor's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

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
from nemo_rl_lora.policy.adapter_state import AdapterSwitch, keep_mask
from nemo_rl_lora.tensors import torch_dtype


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

    @property
    def tensors(self) -> AdapterTensors:
        """The masters."""
        return AdapterTensors(a=self.lora_A.weight, b=self.lora_B.weight, scale=self.scale)

    def forward(self, x: Tensor) -> Tensor:
        if not self.switch.on:
            return self._base(x)
        dtype = self.adapter_dtype or x.dtype
        position = self.dropout_position if self.dropout_p > 0.0 and self.switch.dropout_seed is not None else None
        if self.kernels == "own":
            return self._by_own_kernels(x, dtype, position)
        base = self._base(x)
        a, b = self.lora_A.weight.to(dtype), self.lora_B.weight.to(dtype)
        inner = x.to(dtype)
        if position == "pre":
            inner = self._dropped(inner)
        if isinstance(inner, DTensor):
            update = _shared_update(inner, a, b, self.scale)
        elif dtype == base.dtype and position != "post":
            return apply_memory_efficient_lora(inner, a, b, self.scale, self.kernels is not None, base)
        else:
            update = apply_memory_efficient_lora(inner, a, b, self.scale, self.kernels is not None)
        if position == "post":
            update = self._dropped(update)
        return base + update.to(base.dtype)

    def _base(self, x: Tensor) -> Tensor:
        """The product with the frozen weight."""
        if isinstance(x, DTensor):
            return tp_linear_forward(x, self.weight, self.bias, mm_for_2d_compile=False)
        return F.linear(x, self.weight, self.bias)

    def _by_own_kernels(self, x: Tensor, dtype: torch.dtype, dropout_position: str | None) -> Tensor:
        """The whole layer in one operation; dropout on the output of B needs the update by itself."""
        from nemo_rl_lora.kernels.adapter import adapted_linear, adapter_update

        a, b = self.lora_A.weight, self.lora_B.weight
        if dropout_position == "post":
            update = self._dropped(adapter_update(x, a, b, scale=self.scale, dtype=dtype))
            return self._base(x) + update.to(x.dtype)
        inner = self._dropped(x.to(dtype)) if dropout_position == "pre" else None
        return adapted_linear(x, self.weight, self.bias, a, b, scale=self.scale, dtype=dtype, inner=inner)

    def _dropped(self, x: Tensor) -> Tensor:
        """x after dropout. Of an x that tensor-parallel ranks share, each draws the whole mask and takes its part."""
        assert self.switch.dropout_seed is not None
        local = x.to_local() if isinstance(x, DTensor) else x
        mask = keep_mask(
            x.shape,
            probability=self.dropout_p,
            seed=self.switch.dropout_seed,
            name=self.adapter_name,
            like=local,
        )
        return x * (_own_part(mask, x) if isinstance(x, DTensor) else mask)


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
    if kernels == "automodel":
        multiply_in_ieee()
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
        linear.kernels = kernels
    return switch


def named_adapters(model: nn.Module, modules: Sequence[AdaptedModule]) -> Iterator[tuple[str, AdapterLinear]]:
    """Adapted modules by their full Hugging Face name."""
    for module in modules:
        linear = model.get_submodule(module.name)
        assert isinstance(linear, AdapterLinear), type(linear)
        yield module.name, linear
