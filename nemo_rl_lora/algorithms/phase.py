"""A phase of a run, as the loop and the algorithm see it: what stood when it began, and its learning rate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from nemo_rl_lora.checkpoints.record import PhaseBegin


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleSpan:
    """What part of its schedule a step covers."""

    step: int  # steps before it
    begin_tokens: float
    end_tokens: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One of several parts of a run."""

    begin: PhaseBegin
    is_last: bool
    counters: Mapping[str, float]  # totals of the run when it began
    after: Path | None  # the step that the phase before ended with; None: the first, or one that a run continues in
    goes_on_from: Path | None  # a step's `policy`, whose weights and moments it begins with; None: it has its own
    lr_over: Callable[[ScheduleSpan], float]

    def lr(self, step: int, num_tokens: float, batch_tokens: float) -> float:
        """The learning rate of a step, from the run's steps and tokens before it and its own tokens."""
        before = num_tokens - self.begin.schedule_tokens
        return self.lr_over(
            ScheduleSpan(step=step - self.begin.schedule_step, begin_tokens=before, end_tokens=before + batch_tokens)
        )
