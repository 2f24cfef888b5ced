"""The products of kernels/low_rank.py by torch: those that a LoRA layer and its gradients are made of, one launch each.

Contract: as there, but that every operand may have any strides. Products are in w's and h's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

_HALVES = (torch.bfloat16, torch.float16)


def project(x: Tensor, w: Tensor, scale: float, *, dtype: torch.dtype) -> Tensor:
    """scale * x W^T [T, R]; x [T, N], w [R, N]."""
    x = x.to(w.dtype)
    return torch.addmm(x.new_empty(()), x, w.t(), beta=0.0, alpha=scale).to(dtype)  # of which nothing is read


def expand(
    h: Tensor, w: Tensor, scale: float, *, base: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """base + scale * h W^T [T, N], written over base; without one, a new tensor of this dtype. h [T, R], w [N, R]."""
    if base is None:
        return project(h, w, scale, dtype=dtype or h.dtype)
    if base.dtype == h.dtype:
        return base.addmm_(h, w.t(), alpha=scale)
    return base.add_(torch.mm(h, w.t()), alpha=scale)


def reduce(h: Tensor, x: Tensor, scale: float, *, transposed: bool = False) -> Tensor:
    """scale * h^T x [R, N] in fp32; `transposed`: [N, R]. h [T, R], x [T, N]. A CPU rounds it to h's dtype before."""
    x = x.to(h.dtype)
    left, right = (x.t(), h) if transposed else (h.t(), x)
    if h.is_cuda and h.dtype in _HALVES:
        total = torch.mm(left, right, out_dtype=torch.float32)
    else:
        total = torch.mm(left, right)
    total = total.to(torch.promote_types(h.dtype, torch.float32))
    return total if scale == 1.0 else total.mul_(scale)
