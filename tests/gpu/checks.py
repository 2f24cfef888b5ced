"""What every group of checks of tools/gpu_check.py is made of.

A group is a function of a Machine that yields its checks in their order. A check says nothing until it is asked, so
that a budget of time can end the list, and an exception is that check's alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

Fact = float | int | bool | str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where the checks run. `root` is an empty directory for what they write."""

    device: Literal["cuda", "cpu"]
    root: Path

    @property
    def has_gpu(self) -> bool:
        return self.device == "cuda"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """`ok` is None for a measurement, and for what was skipped."""

    ok: bool | None
    facts: Mapping[str, Fact]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    name: str
    ask: Callable[[], Answer]


def within(bound: float, errors: Mapping[str, float], **facts: Fact) -> Answer:
    """Whether every error is at most `bound`; one that is not a number is not."""
    return Answer(ok=all(error <= bound for error in errors.values()), facts={**errors, "bound": bound, **facts})


def skipped(reason: str) -> Answer:
    return Answer(ok=None, facts={"skipped": reason})


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The L2 norm of the difference by that of what is expected, in fp64 on the CPU."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).norm() / expected.norm())


@contextmanager
def without_gpu() -> Iterator[None]:
    """The product as on a machine without a GPU: it asks torch whether there is one."""
    original = torch.cuda.is_available
    torch.cuda.is_available = lambda: False
    try:
        yield
    finally:
        torch.cuda.is_available = original
