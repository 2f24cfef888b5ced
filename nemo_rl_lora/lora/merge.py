"""The one place where `W + scale * B @ A` is computed, and where it is judged.

Contract: the product is computed in fp32 from the pristine base weight and rounded once, to the weight's dtype or the
one asked for. The base weight is never written. Nothing is ever unmerged: who needs the base again still has it. Every
function takes a block of rows as well as a whole weight: rows of W with the same rows of B, and all of A.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LEAST_SHARE = 0.9  # of the update, below which merging loses too much of it
MOST_ERROR = 0.5  # of the update's size, above which rounding adds too much beside it
_FP32_ROUNDOFF = 2.0**-24


@torch.no_grad()
def merged_weight(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    out: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`weight [out, in] + scale * lora_b [out, dim] @ lora_a [dim, in]`, in `dtype` or else the weight's.

    `out`, of the weight's shape and dtype, receives the result; it must not share memory with `weight`.
    """
    _check_shapes(weight, lora_a, lora_b)
    merged = weight.to(torch.float32, copy=True).addmm_(lora_b.float(), lora_a.float(), alpha=scale)
    if out is None:
        return merged.to(dtype or weight.dtype)
    assert out.shape == weight.shape, f"out {tuple(out.shape)}, weight {tuple(weight.shape)}"
    assert out.dtype == (dtype or weight.dtype), f"out {out.dtype}, not {dtype or weight.dtype}"
    assert out.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr(), "out is the base weight"
    return out.copy_(merged)


@dataclass(slots=True)
class Survival:
    """What rounding leaves of an update, summed over blocks. With D the update and R what the rounded weights differ by
    from the rounded base: sums of R D, D D and (R - D)^2."""

    kept: float = 0.0
    whole: float = 0.0
    missed: float = 0.0

    def add(self, update: Tensor, left: Tensor) -> None:
        self.kept += float((left * update).sum())
        self.whole += float(update.square().sum())
        self.missed += float((left - update).square_().sum())

    def add_all(self, other: Survival) -> None:
        self.kept, self.whole, self.missed = (
            self.kept + other.kept,
            self.whole + other.whole,
            self.missed + other.missed,
        )

    @property
    def share(self) -> float:
        """<R, D> / <D, D>: how much of the update is left, along its own direction."""
        return self.kept / self.whole if self.whole else 1.0

    @property
    def relative_error(self) -> float:
        """|R - D| / |D|: what is missing or was added by rounding, by the size of the update."""
        return (self.missed / self.whole) ** 0.5 if self.whole else 0.0


@torch.no_grad()
def exact_weight_and_bound(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The same in fp64, and how far `merged_weight` in `dtype` may be from it, element by element.

    The bound: each product takes part in at most dim + 3 roundings to fp32, in whatever order they are summed (Higham,
    Accuracy and Stability of Numerical Algorithms, 3.1), and the result in one to `dtype`. fp64's own error, 1e-16 of
    the terms, is left out.
    """
    _check_shapes(weight, lora_a, lora_b)
    a, b, w = lora_a.double(), lora_b.double(), weight.double()
    exact = torch.addmm(w, b, a, alpha=scale)
    terms = torch.addmm(w.abs(), b.abs(), a.abs(), alpha=abs(scale))
    num_roundings = (lora_a.shape[0] + 3) * _FP32_ROUNDOFF
    underflow = torch.finfo(torch.float32).smallest_normal * lora_a.shape[0]
    bound = terms.mul_(num_roundings / (1 - num_roundings)).add_(underflow)
    if dtype != torch.float32:
        info = torch.finfo(dtype)
        bound += (exact.abs() + bound) * (info.eps / 2) + info.smallest_normal * info.eps / 2
    return exact, bound


def _check_shapes(weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> None:
    expected = (lora_b.shape[0], lora_a.shape[1])
    assert tuple(weight.shape) == expected, f"weight {tuple(weight.shape)}, B @ A {expected}"
    assert lora_a.shape[0] == lora_b.shape[1], f"A {tuple(lora_a.shape)}, B {tuple(lora_b.shape)}"
