"""The tensors of an adapter: what a linear layer's LoRA is made of, its names and shapes, what it adds, how it merges.

Contract: an adapter of a module is y = x W^T + scale * (x A^T) B^T with A [dim, in] and B [out, dim]. A set of adapters
is a mapping of module names to `AdapterTensors`, or, on its way to a file, a mapping of canonical names to tensors.
Another kind of adapter (a magnitude beside A and B, say) adds its factor here. Not here: files, and which modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_rl_lora.lora.files import adapter_tensor_name
from nemo_rl_lora.lora.merge import merged_weight
from nemo_rl_lora.lora.targets import AdaptedModule

Side = Literal["A", "B"]
SIDES: tuple[Side, ...] = ("A", "B")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterTensors:
    """The adapter of one linear layer, whole or one rank's shards of it, in any dtype."""

    a: Tensor  # [dim, in]
    b: Tensor  # [out, dim]
    scale: float

    @classmethod
    def of(cls, module: str, scale: float, tensors: Mapping[str, Tensor]) -> AdapterTensors:
        """The adapter of a module out of tensors by canonical name."""
        a, b = (tensors[adapter_tensor_name(module, side)] for side in SIDES)
        return cls(a=a, b=b, scale=scale)

    def factor(self, side: Side) -> Tensor:
        return self.a if side == "A" else self.b

    def to(self, where: torch.device | torch.dtype) -> AdapterTensors:
        return replace(self, a=self.a.to(where), b=self.b.to(where))

    def update(self, x: Tensor) -> Tensor:
        """What is added to the base layer's output [.., out], in the dtype of A and B; scaled between the products."""
        return self.expand(self.shrink(x))

    def shrink(self, x: Tensor) -> Tensor:
        """The first product, [.., dim]."""
        return F.linear(x.to(self.a.dtype), self.a)

    def expand(self, shrunk: Tensor) -> Tensor:
        """The second product, [.., out], of its scaled input."""
        return F.linear(shrunk * self.scale, self.b)

    def product(self, side: Side, x: Tensor) -> Tensor:
        """One of the two."""
        return self.shrink(x) if side == "A" else self.expand(x)

    def merged(self, weight: Tensor) -> Tensor:
        """The base weight [out, in] with this adapter in it, on its device and in its dtype (lora/merge.py)."""
        return merged_weight(weight, self.a.to(weight.device), self.b.to(weight.device), self.scale)


def side_of(name: str) -> Side | None:
    """Which factor of an adapter a tensor's name stands for; None for any other tensor."""
    return next((side for side in SIDES if name.endswith(f".lora_{side}.weight")), None)


def factor_shape(module: AdaptedModule, side: Side) -> tuple[int, int]:
    """The shape of a module's whole A or B."""
    return (module.dim, module.in_features) if side == "A" else (module.out_features, module.dim)


def canonical_shapes(modules: Iterable[AdaptedModule]) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every tensor of the adapters of these modules."""
    return {adapter_tensor_name(m.name, side): factor_shape(m, side) for m in modules for side in SIDES}


def canonical_tensors(adapters: Mapping[str, AdapterTensors]) -> dict[str, Tensor]:
    """Canonical name -> tensor of adapters by module name."""
    return {adapter_tensor_name(name, side): one.factor(side) for name, one in adapters.items() for side in SIDES}
