"""The one place where `W + scale * B @ A` is computed.

Contract: the product is computed in fp32 from the pristine base weight and rounded once, to the weight's
dtype. The base weight is never written. Nothing is ever unmerged: who needs the base again still has it.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def merged_weight(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """`weight [out, in] + scale * lora_b [out, dim] @ lora_a [dim, in]`, in the weight's dtype.

    `out`, of the weight's shape and dtype, receives the result; it must not share memory with `weight`.
    """
    expected = (lora_b.shape[0], lora_a.shape[1])
    assert tuple(weight.shape) == expected, f"weight {tuple(weight.shape)}, B @ A {expected}"
    assert lora_a.shape[0] == lora_b.shape[1], f"A {tuple(lora_a.shape)}, B {tuple(lora_b.shape)}"
    merged = torch.addmm(weight.float(), lora_b.float(), lora_a.float(), alpha=scale)
    if out is None:
        return merged.to(weight.dtype)
    assert out.shape == weight.shape, f"out {tuple(out.shape)}, weight {tuple(weight.shape)}"
    assert out.dtype == weight.dtype, f"out {out.dtype}, weight {weight.dtype}"
    assert out.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr(), "out is the base weight"
    return out.copy_(merged)
