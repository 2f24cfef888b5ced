"""The masters of adapters as layers read them: cast once a step, and their gradients added many at a time.

Contract: a layer reads values in the dtype of the computation, which follow the masters when `refresh` is called, and
sends the gradient of one backward pass to what stands for the masters in autograd's graph. Gradients are fp32 sums and
are added up in the masters' `grad`. For a process that has its masters whole: FSDP gathers and casts by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemo_rl_lora.policy.adapted_linear import Factor

_AT_ONCE = 30  # groups whose gradients are added at once: about as many as one kernel takes, and memory for no more


class Group(NamedTuple):
    """Masters that are read as one tensor, in their order by rows, and the dtype that it has."""

    masters: Sequence[Tensor]
    dtype: torch.dtype

    @property
    def rows(self) -> list[int]:
        return [len(master) for master in self.masters]

    @property
    def shape(self) -> tuple[int, int]:
        return sum(self.rows), self.masters[0].shape[1]


class MasterCopies:
    """A factor for each group. One master that has the dtype is read itself; of others there is a copy."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self._copied: list[tuple[Tensor, Tensor]] = []
        self.factors: list[Factor] = []
        values = [self._value(group) for group in groups]
        self.refresh()
        for start in range(0, len(groups), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            source = torch.zeros((), device=values[start].device, requires_grad=True)
            with torch.enable_grad():  # whatever the caller does
                stand_ins = _StandFor.apply(source, groups[part])
            self.factors += map(Factor, stand_ins, values[part])

    def _value(self, group: Group) -> Tensor:
        first = group.masters[0]
        if len(group.masters) == 1 and first.dtype == group.dtype:
            return first.detach()
        value = torch.empty(group.shape, dtype=group.dtype, device=first.device)
        self._copied += zip(group.masters, value.split(group.rows), strict=True)
        return value

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring masters, which have moved, to the layers."""
        if self._copied:
            masters, copies = zip(*self._copied, strict=True)
            torch._foreach_copy_(copies, masters)


class _StandFor(torch.autograd.Function):
    """A tensor without memory for each group of masters. Backward passes go through it as often as there are any."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, groups: Sequence[Group]) -> tuple[Tensor, ...]:
        ctx.groups = groups
        ctx.set_materialize_grads(False)
        nothing = source.detach()
        return tuple(nothing.expand(group.shape) for group in groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, None]:
        sums, terms = [], []
        for group, gradient in zip(ctx.groups, gradients, strict=True):
            if gradient is None:
                continue
            for master, part in zip(group.masters, gradient.split(group.rows), strict=True):
                if master.grad is None:
                    master.grad = part
                else:
                    sums.append(master.grad)
                    terms.append(part)
        if sums:
            torch._foreach_add_(sums, terms)
        return None, None
