"""Linear layers with their LoRA branches as one operation for autograd, with gradients of x, A and B.

So the branch is added into the base product, and its gradient of x into the base's, where they lie: no tensor of the
update's size is written and read again. The base's weight is frozen. Layers that read the same x may be one operation:
x A^T is one product then, and so is the gradient of all their A. The products are torch's (low_rank.py) or our
kernels' (kernels/low_rank.py). Not here: layers that tensor-parallel ranks share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemo_rl_lora.policy import low_rank


class Factor(NamedTuple):
    """An A or a B."""

    tracked: Tensor  # what its gradient, an fp32 sum, goes to
    value: Tensor  # in the dtype of the product

    @staticmethod
    def of(master: Tensor, dtype: torch.dtype) -> Factor:
        return Factor(master, master.detach().to(dtype))


class Layer(NamedTuple):
    """A linear layer, and its B [out, dim]; without a weight [out, in] it is the update alone."""

    weight: Tensor | None
    bias: Tensor | None
    b: Factor


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """What layers that are one operation have in common."""

    a: Factor  # [sum of dims, in], of the layers in their order
    scale: float
    mask: Tensor | None = None  # of one layer: what A reads (pre) or B gives (post) is multiplied by it
    masked: Literal["pre", "post"] = "pre"
    products: ModuleType = low_rank


def adapted_linears(x: Tensor, layers: Sequence[Layer], branch: Branch) -> list[Tensor]:
    """x W^T + bias + scale * (x A^T) B^T of each layer, in x's dtype; x [..., in]."""
    assert all(layer.weight is None or not layer.weight.requires_grad for layer in layers), "the base is frozen"
    assert branch.mask is None or len(layers) == 1, "each layer drops for itself"
    mask = None if branch.mask is None else _rows(branch.mask)
    flat = [tensor for layer in layers for tensor in (layer.weight, layer.bias, *layer.b)]
    outs = _AdaptedLinears.apply(branch, _rows(x), mask, *branch.a, *flat)
    return [out.view(*x.shape[:-1], out.shape[-1]) for out in outs]


def adapted_linear(
    x: Tensor,
    weight: Tensor | None,
    a: Tensor,
    b: Tensor,
    *,
    scale: float,
    dtype: torch.dtype,
    products: ModuleType = low_rank,
) -> Tensor:
    """One layer from its masters, cast to `dtype`."""
    branch = Branch(a=Factor.of(a, dtype), scale=scale, products=products)
    return adapted_linears(x, [Layer(weight, None, Factor.of(b, dtype))], branch)[0]


def _rows(x: Tensor) -> Tensor:
    """[T, N] whose columns lie side by side, as kernels read them."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


class _AdaptedLinears(torch.autograd.Function):
    """In: the branch, x, its mask, tracked A, A; then for each layer its weight, bias, tracked B, B."""

    @staticmethod
    def forward(
        ctx: Any, branch: Branch, x: Tensor, mask: Tensor | None, _tracked: Tensor, a: Tensor, *flat: Tensor | None
    ) -> tuple[Tensor, ...]:
        products, dtype = branch.products, a.dtype
        pre, post = (mask if branch.masked == position else None for position in ("pre", "post"))
        read = x if pre is None else x.to(dtype) * pre
        h = products.project(read, a, branch.scale, dtype=dtype)
        outs = []
        for part, weight, bias, b in zip(_parts(h, flat[3::4]), flat[::4], flat[1::4], flat[3::4], strict=True):
            out = None if weight is None else F.linear(x, weight, bias)
            if post is not None:
                update = products.expand(part, b, 1.0, dtype=dtype).mul_(post)
                outs.append(update if out is None else out.add_(update))
            else:
                outs.append(products.expand(part, b, 1.0, base=out, dtype=dtype))
        ctx.save_for_backward(read, h, mask, a, *flat[::4], *flat[3::4])
        ctx.branch, ctx.is_pre, ctx.is_post, ctx.x_dtype = branch, pre is not None, post is not None, x.dtype
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_outs: Tensor) -> tuple[Tensor | None, ...]:
        read, h, mask, a, *rest = ctx.saved_tensors
        weights, all_b = rest[: len(d_outs)], rest[len(d_outs) :]
        branch, products, dtype = ctx.branch, ctx.branch.products, a.dtype
        _, needs_x, _, needs_a, _, *needs = ctx.needs_input_grad
        d_outs = tuple(map(_rows, d_outs))
        updates = tuple(d_out.to(dtype) * mask for d_out in d_outs) if ctx.is_post else d_outs
        parts = [
            products.project(update, b.t(), branch.scale, dtype=dtype) for update, b in zip(updates, all_b, strict=True)
        ]
        d_h = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        d_x = None
        if needs_x:
            for d_out, weight in zip(d_outs, weights, strict=True):
                if weight is not None:
                    d_x = torch.mm(d_out, weight) if d_x is None else d_x.addmm_(d_out, weight)
            if ctx.is_pre:
                d_read = products.expand(d_h, a.t(), 1.0, dtype=dtype)
                d_x = (d_read * mask).to(ctx.x_dtype) if d_x is None else d_x.addcmul_(d_read, mask)
            else:
                d_x = products.expand(d_h, a.t(), 1.0, base=d_x, dtype=ctx.x_dtype)
        d_a = products.reduce(d_h, read, 1.0) if needs_a else None
        d_layers: list[Tensor | None] = []
        for part, update, needs_b in zip(_parts(h, all_b), updates, needs[2::4], strict=True):
            d_b = products.reduce(part, update, 1.0, transposed=True) if needs_b else None
            d_layers += [None, None, d_b, None]
        return None, d_x, None, d_a, None, *d_layers


def _parts(h: Tensor, all_b: Sequence[Any]) -> Sequence[Tensor]:
    """x A^T of each layer."""
    return (h,) if len(all_b) == 1 else h.split([b.shape[1] for b in all_b], dim=1)
