"""A linear layer with its LoRA branch on the kernels of low_rank.py, with gradients of x, A and B.

The whole layer is one operation for autograd, so that the branch is added into the base product, and its gradient of x
into the base's, where they lie: no tensor of the update's size is written and read again. The base's weight is frozen.
A and B are masters of any dtype, cast to `dtype` for the products; their gradients are fp32 sums and are not rounded.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemo_rl_lora.kernels.low_rank import expand, project, reduce


def adapted_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    *,
    scale: float,
    dtype: torch.dtype,
    inner: Tensor | None = None,
) -> Tensor:
    """x W^T + bias + scale * (inner A^T) B^T in x's dtype; `inner`, which A reads, is x unless it is given.

    x and inner [..., in], weight [out, in], a [dim, in], b [out, dim].
    """
    assert not weight.requires_grad, "the gradient of the base is not computed here"
    out = _AdaptedLinear.apply(_rows(x), None if inner is None else _rows(inner), weight, bias, a, b, scale, dtype)
    return out.view(*x.shape[:-1], len(b))


def adapter_update(x: Tensor, a: Tensor, b: Tensor, *, scale: float, dtype: torch.dtype) -> Tensor:
    """scale * (x A^T) B^T in `dtype`."""
    out = _AdaptedLinear.apply(_rows(x), None, None, None, a, b, scale, dtype)
    return out.view(*x.shape[:-1], len(b))


def _rows(x: Tensor) -> Tensor:
    """[T, N] whose columns lie side by side, as the kernels read them."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


class _AdaptedLinear(torch.autograd.Function):
    """Without a weight it is the update alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        inner: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        dtype: torch.dtype,
    ) -> Tensor:
        a, b = a.to(dtype), b.to(dtype)
        read = x if inner is None else inner
        h = project(read, a, 1.0, dtype=dtype)
        ctx.save_for_backward(read, h, a, b, weight)
        ctx.scale, ctx.is_apart = scale, inner is not None
        return expand(h, b, scale, base=None if weight is None else F.linear(x, weight, bias), dtype=dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        read, h, a, b, weight = ctx.saved_tensors
        needs_x, needs_inner, _, _, needs_a, needs_b, *_ = ctx.needs_input_grad
        d_y = _rows(d_y)
        d_h = project(d_y, b.t(), ctx.scale, dtype=b.dtype)
        d_x = torch.mm(d_y, weight) if needs_x and weight is not None else None
        d_inner = None
        if ctx.is_apart:
            d_inner = expand(d_h, a.t(), 1.0, dtype=read.dtype) if needs_inner else None
        elif needs_x:
            d_x = expand(d_h, a.t(), 1.0, base=d_x, dtype=read.dtype)
        d_a = reduce(d_h, read, 1.0) if needs_a else None
        d_b = reduce(h, d_y, ctx.scale, transposed=True) if needs_b else None
        return d_x, d_inner, None, None, d_a, d_b, None, None
