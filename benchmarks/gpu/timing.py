"""Seconds and peak memory of a call on the device, and which share of the card's arithmetic that is.

MFU is of the card's dense bf16 peak as its maker publishes it. A card that is not in the table has tokens/s alone.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from gpu.shapes import flop_of_token
from measure import reset_peak, rss_mib

from nemo_rl_lora.run.utilization import published_peak
from tests.gpu.checks import Answer, Check, Fact, Machine, skipped
from tests.gpu.environment import median_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    seconds: float  # median
    peak_gib: float  # of the card's memory; without a GPU, of the process's


def timed(machine: Machine, call: Callable[[], object], *, num_warm: int, num_timed: int) -> Timed:
    """The peak is of the timed calls."""
    for _ in range(num_warm):
        call()
    forget_peak(machine)
    seconds = median_seconds(call, machine, num_timed)
    return Timed(seconds=seconds, peak_gib=peak_gib(machine))


def forget_peak(machine: Machine) -> None:
    if machine.has_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        reset_peak()


def peak_gib(machine: Machine) -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if machine.has_gpu else rss_mib(peak=True) / 1024


def card_peak_tflop(machine: Machine) -> float | None:
    """The card's dense bf16 TFLOP/s, if this is a known card."""
    return published_peak(torch.cuda.get_device_name(), "bfloat16") if machine.has_gpu else None


def training_facts(machine: Machine, config: Any, found: Timed, num_rows: int, num_tokens: int) -> dict[str, Fact]:
    """Of a step over rows of this many tokens each."""
    rate = num_rows * num_tokens / found.seconds
    facts: dict[str, Fact] = {"tokens_per_s": rate, "step_s": found.seconds, "peak_gib": found.peak_gib}
    if (peak := card_peak_tflop(machine)) is not None:
        facts["mfu"] = rate * flop_of_token(config, num_tokens) / (peak * 1e12)
    elif machine.has_gpu:
        facts["mfu"] = f"unknown: {torch.cuda.get_device_name()} is not in nemo_rl_lora/run/utilization.py"
    return facts


def beside_published(machine: Machine, facts: Mapping[str, Fact], published: float, source: str) -> dict[str, Fact]:
    """The facts with a published rate; without a GPU the shapes are toys, and it is not compared."""
    if not machine.has_gpu:
        return dict(facts)
    rate = facts["tokens_per_s"]
    assert isinstance(rate, float), rate
    return {**facts, "published_tokens_per_s": published, "of_published": rate / published, "source": source}


def measurement(name: str, ask: Callable[[], Mapping[str, Fact]]) -> Check:
    """A check without a verdict. It begins with what the one before left freed; too little memory is a reason, and any
    other exception a failure."""

    def answer() -> Answer:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        try:
            return Answer(ok=None, facts=ask())
        except torch.OutOfMemoryError as error:
            return skipped(f"out of memory: {' '.join(str(error).split())[:200]}")

    return Check(name=name, ask=answer)
