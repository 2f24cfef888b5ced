"""The largest token budget of a training microbatch with which the device has enough memory: `train_mb_tokens: auto`.

Contract: an attempt goes forward and backward on microbatches of the longest rows, and leaves nothing behind. What a
step needs beside it is reserved. All processes find the same number, the smallest of theirs.

- One process on a GPU: attempts from the largest budget down, each half of the one before, until one runs.
- On a CPU, where the kernel ends a process that takes too much: by what two small attempts take, the largest budget
  that would take CPU_SHARE of the free memory, and the longest row at the least.
- Several GPUs, whose processes would wait for one that has no memory left: by what two small attempts take as well, of
  all the free memory, and one attempt with what was found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from nemo_rl_lora.distributed.ranks import Ranks
from nemo_rl_lora.policy import device_memory
from nemo_rl_lora.run.memory import memory_error
from nemo_rl_lora.scalars import scaled_bytes

CPU_SHARE = 0.5

Attempt = Callable[[int], int]  # of a budget; returns the tokens of the largest microbatch that ran


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Budgets that make sense: the longest row, and all rows of a step that one process has. Each is a multiple of what
    lengths are rounded up to."""

    least: int
    largest: int
    round_to: int

    def within(self, tokens: int) -> int:
        """Such a budget, and no larger than this but for the least one."""
        return min(max(tokens - tokens % self.round_to, self.least), self.largest)

    def halves(self) -> Iterator[int]:
        """From the largest to the least."""
        tokens = self.largest
        while tokens > self.least:
            yield tokens
            tokens = self.within(tokens // 2)
        yield self.least


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundTokens:
    """What a search came to. `reason` says why it is no more."""

    tokens: int
    num_trials: int
    reason: str


class LongestRowTooLongError(ValueError):
    """Not even a microbatch of the longest row fits."""

    def __init__(self, tokens: int) -> None:
        super().__init__(tokens)
        self.tokens = tokens


def find_tokens(
    attempt: Attempt, sizes: Sizes, *, device: torch.device, ranks: Ranks, reserve_bytes: int
) -> FoundTokens:
    """The same on all processes. LongestRowTooLongError where no budget fits."""
    if device.type == "cuda" and ranks.number == 1:
        return by_halving(attempt, sizes, device=device, reserve_bytes=reserve_bytes)
    found = by_forecast(attempt, sizes, device=device, ranks=ranks, reserve_bytes=reserve_bytes)
    if device.type == "cuda":
        with device_memory.held(device, reserve_bytes):
            attempt(found.tokens)
        device_memory.forget(device)
    return found


def by_halving(attempt: Attempt, sizes: Sizes, *, device: torch.device, reserve_bytes: int) -> FoundTokens:
    """The first budget that runs, of the largest and the halves below it: what whole rows filled of it, since shorter
    rows may fill more."""
    failed: list[int] = []
    for tokens in sizes.halves():
        if (ran := _tokens_that_ran(attempt, tokens, device, reserve_bytes)) is not None:
            reason = f"{_listed(failed)} did not fit" if failed else "all rows of a step fit at once"
            return FoundTokens(tokens=ran, num_trials=len(failed) + 1, reason=reason)
        failed.append(tokens)
    raise LongestRowTooLongError(sizes.least)


def _tokens_that_ran(attempt: Attempt, tokens: int, device: torch.device, reserve_bytes: int) -> int | None:
    """What an attempt returns; None where there was no memory for it."""
    ran = None
    try:
        with device_memory.held(device, reserve_bytes):
            ran = attempt(tokens)
    except Exception as error:
        if memory_error(error) is None:
            raise
    device_memory.forget(device)  # here the error holds no tensor any more
    return ran


def by_forecast(
    attempt: Attempt, sizes: Sizes, *, device: torch.device, ranks: Ranks, reserve_bytes: int
) -> FoundTokens:
    """The largest budget that would fit, by what one longest row takes and what two do: memory grows with tokens."""
    room = _room(device, ranks, reserve_bytes)
    first, num_trials = _measured(attempt, sizes.least, device), 1
    is_cramped = device.type == "cuda" and first[1] > room
    if any(ranks.everybodys(is_cramped)):
        raise LongestRowTooLongError(sizes.least)
    if sizes.least == sizes.largest or any(ranks.everybodys(2 * first[1] > room)):
        tokens, reason = sizes.least, f"{first[0]} tokens take {scaled_bytes(first[1])} of {scaled_bytes(room)}"
    else:  # the first attempt also took what is taken once
        two, one = (_measured(attempt, size, device) for size in (sizes.within(2 * sizes.least), sizes.least))
        num_trials = 3
        once, each = _line(one, two)
        tokens = int((room - once) // each)
        taken, further, there = map(scaled_bytes, (one[1], each, room))
        reason = f"{one[0]} tokens take {taken}, each further one {further}, and {there} are there"
    tokens, reason = min(ranks.everybodys((sizes.within(tokens), reason)))
    if tokens == sizes.largest > sizes.least:
        reason = f"all rows of a step fit at once: {reason}"
    return FoundTokens(tokens=tokens, num_trials=num_trials, reason=reason)


def _room(device: torch.device, ranks: Ranks, reserve_bytes: int) -> int:
    """What microbatches may take here. Processes look before any of them takes more."""
    free = device_memory.free_bytes(device)
    machines = ranks.everybodys(_machine())
    if device.type != "cuda":
        free = int(CPU_SHARE * free / machines.count(_machine()))
    return max(0, free - reserve_bytes)


def _machine() -> str:
    """The same for processes that share memory."""
    return Path("/proc/sys/kernel/random/boot_id").read_text()


def _measured(attempt: Attempt, tokens: int, device: torch.device) -> tuple[int, int]:
    """(tokens of the largest microbatch, bytes that it took at most)."""
    ran: list[int] = []
    taken = device_memory.peak_bytes(device, lambda: ran.append(attempt(tokens)))
    device_memory.forget(device)
    return ran[0], taken


def _line(one: tuple[int, int], two: tuple[int, int]) -> tuple[float, float]:
    """(bytes that are taken once, bytes of each token) through two measurements, never less than either of them."""
    if two[0] == one[0] or two[1] <= one[1]:
        return 0.0, max(bytes_ / max(tokens, 1) for tokens, bytes_ in (one, two))
    each = (two[1] - one[1]) / (two[0] - one[0])
    return max(0.0, one[1] - each * one[0]), each


def _listed(numbers: list[int]) -> str:
    *others, last = map(str, numbers)
    return f"{', '.join(others)} and {last}" if others else last
