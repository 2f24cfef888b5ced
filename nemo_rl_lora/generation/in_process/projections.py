"""The linear layers of the decoder: a weight that is shared with the trainer, or one of its own, and an adapter.

Contract: what is shared is never written. New numbers of the same form are written over the old ones of our own, at
the same address.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_rl_lora.lora.adapter_tensors import AdapterTensors
from nemo_rl_lora.tensors import cpu_multiplies_bfloat16


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN can hold linear weights in its own layout here (about a quarter off the products' time)."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and cpu_multiplies_bfloat16())


def in_place(old: Tensor | None, new: Tensor, shared: Tensor | None = None) -> Tensor:
    """The new numbers, written over the old ones where these have their form, so that a captured graph goes on to read
    them; never over those that are shared."""
    if old is None or old is shared or (old.shape, old.dtype, old.device) != (new.shape, new.dtype, new.device):
        return new
    return old.copy_(new)


class Projection:
    """A linear layer: a shared weight, or an own one in oneDNN's layout, with an adapter beside it."""

    __slots__ = ("adapter", "bias", "packed", "shared_bias", "shared_weight", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.shared_weight, self.shared_bias = weight, bias
        self.weight: Tensor | None = weight
        self.packed: Tensor | None = None
        self.bias = bias
        self.adapter: AdapterTensors | None = None

    def hold(self, weight: Tensor | None, bias: Tensor | None, batch_rows: int) -> None:
        """Hold tensors of our own, or share where there is none. A weight is packed where that works, and the plain
        tensor is let go then."""
        self.bias = self.shared_bias if bias is None else in_place(self.bias, bias, self.shared_bias)
        if weight is None:
            self.packed, self.weight = None, self.shared_weight
        elif can_pack(weight.device, weight.dtype):
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, batch_rows)
            self.weight = None
        else:
            self.packed, self.weight = None, in_place(self.weight, weight, self.shared_weight)

    def adapt(self, adapter: AdapterTensors | None) -> None:
        """Use this adapter, or none."""
        old = self.adapter
        if adapter is not None and old is not None and old.scale == adapter.scale:
            adapter = replace(adapter, a=in_place(old.a, adapter.a), b=in_place(old.b, adapter.b))
        self.adapter = adapter

    def tensors(self) -> Iterator[Tensor]:
        """All that a product reads."""
        of_adapter = (None, None) if self.adapter is None else (self.adapter.a, self.adapter.b)
        yield from (one for one in (self.weight, self.packed, self.bias, *of_adapter) if one is not None)

    def held(self) -> Tensor:
        """The weight as a plain tensor."""
        held = self.weight if self.packed is None else self.packed.to_dense()
        assert held is not None
        return held

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.packed is not None:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, bias, "none", [], "")
        assert self.weight is not None
        return F.linear(x, self.weight, bias)

    def __call__(self, x: Tensor) -> Tensor:
        y = self.multiply(x, self.bias)
        if self.adapter is None:
            return y
        return y + self.adapter.update(x).to(y.dtype)
