"""A linear layer with a LoRA branch, on nemo-automodel's LinearLoRA.

The vendor's layer owns the parameters' names and the memory-efficient and Triton products. What it lacks is here:
a switch that turns the branch off (the reference policy is the same model without it), fp32 masters cast to the
dtype of the computation, a scale that need not be alpha / dim, and dropout and initialisation that are functions of a
seed and the module's name (adapter_state.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from nemo_automodel.components._peft.lora import LinearLoRA, apply_memory_efficient_lora
from torch import Tensor, nn

from nemo_rl_lora.lora.adapter_tensors import AdapterTensors
from nemo_rl_lora.lora.spec import LoraSpec
from nemo_rl_lora.lora.targets import AdaptedModule
from nemo_rl_lora.patches.nemo_automodel import adapt
from nemo_rl_lora.policy.adapter_state import AdapterSwitch, draw_a, keep_mask
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
    use_kernels: bool

    @property
    def tensors(self) -> AdapterTensors:
        """The masters."""
        return AdapterTensors(a=self.lora_A.weight, b=self.lora_B.weight, scale=self.scale)

    def forward(self, x: Tensor) -> Tensor:
        base = F.linear(x, self.weight, self.bias)
        if not self.switch.on:
            return base
        dtype = self.adapter_dtype or x.dtype
        a, b = self.lora_A.weight.to(dtype), self.lora_B.weight.to(dtype)
        inner = x.to(dtype)
        position = self.dropout_position if self.dropout_p > 0.0 and self.switch.dropout_seed is not None else None
        if position == "pre":
            inner = inner * self._keep_mask(inner)
        if dtype == base.dtype and position != "post":
            return apply_memory_efficient_lora(inner, a, b, self.scale, self.use_kernels, base)
        update = apply_memory_efficient_lora(inner, a, b, self.scale, self.use_kernels)
        if position == "post":
            update = update * self._keep_mask(update)
        return base + update.to(base.dtype)

    def _keep_mask(self, like: Tensor) -> Tensor:
        assert self.switch.dropout_seed is not None
        return keep_mask(
            like.shape,
            probability=self.dropout_p,
            seed=self.switch.dropout_seed,
            name=self.adapter_name,
            like=like,
        )


def install_adapters(
    model: nn.Module, modules: Sequence[AdaptedModule], spec: LoraSpec, *, seed: int, use_kernels: bool
) -> AdapterSwitch:
    """Freeze the model and put an adapter on each of these linear modules, in place."""
    switch = AdapterSwitch()
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
        linear.use_kernels = use_kernels
        drawn = draw_a(spec, name=module.name, in_features=module.in_features, dim=module.dim, seed=seed)
        with torch.no_grad():
            linear.lora_A.weight.copy_(drawn)
            linear.lora_B.weight.zero_()
    return switch
