"""A run in phases: where each starts from, and how one goes over into the next.

Contract: every phase is checked before a weight is loaded, with the configuration that is derived for it. A phase ends
with a checkpoint. From that alone follows what the next one begins with, so that a run which is killed on the way, and
continues, crosses again and is the same run. What a crossing makes, `base_of_phase_N` beside the steps, is there whole
or not at all, and stays as long as a step needs it. The loss on fixed rows is measured on both sides.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from nemo_rl_lora.algorithms.algorithm import Run
from nemo_rl_lora.algorithms.loop import RunResult
from nemo_rl_lora.algorithms.phase import Phase, ScheduleSpan
from nemo_rl_lora.algorithms.sft import Sft
from nemo_rl_lora.checkpoints.durable_files import (
    TMP_PREFIX,
    flush,
    flush_tree,
    make_unfinished,
    put_in_place,
    remove_unfinished,
)
from nemo_rl_lora.checkpoints.record import PHASE_BASE_PREFIX, PHASE_RECORD_FILE, PHASE_WEIGHTS, PhaseBegin, read_info
from nemo_rl_lora.checkpoints.steps import Checkpointer, ResumePoint
from nemo_rl_lora.config.errors import ConfigError
from nemo_rl_lora.config.load import derived
from nemo_rl_lora.config.master import SftMaster
from nemo_rl_lora.config.optimizer_settings import peak_lr
from nemo_rl_lora.config.phases import (
    AtEnd,
    at_end_of,
    name_of,
    phase_changes,
    schedule_begin,
    schedule_length,
    share_of_peak,
)
from nemo_rl_lora.export.convert import ExportRequest, export
from nemo_rl_lora.export.frozen import write_frozen
from nemo_rl_lora.models.source import ModelSource, resolve_model
from nemo_rl_lora.plan.phases import PhasePlan
from nemo_rl_lora.plan.plan import Plan
from nemo_rl_lora.run.preflight import Start, expected_steps
from nemo_rl_lora.run.warm_start import InitialAdapter
from nemo_rl_lora.types import Example

logger = logging.getLogger(__name__)

_NUM_FIXED_ROWS = 32


class PhaseShiftError(RuntimeError):
    """The loss on fixed rows is another after a crossing than before it."""


class PhaseStart(Start):
    """A phase of a run, with the configuration that is derived for it."""

    def __init__(self, run_config: SftMaster, index: int, shared: PhaseStart | None = None) -> None:
        """`shared`: the first phase, where this is another; it has what all of them share."""
        self._run_config, self.index, self._shared = run_config, index, shared or self
        self.name = name_of(run_config.sft.phases, index)
        try:
            config = derived(run_config, phase_changes(run_config, index), f"sft.phases.{index}")
        except ConfigError as error:
            raise ConfigError("\n".join(f"{self.label}{line}" for line in str(error).splitlines())) from error
        super().__init__(config)
        self.following: tuple[PhaseStart, ...] = ()
        self._begin = PhaseBegin(index=index, name=self.name)
        self._counters: Mapping[str, float] = {}
        self._goes_on_from: Path | None = None

    @property
    def run_config(self) -> SftMaster:
        return self._run_config

    @property
    def label(self) -> str:
        return f"sft.phases.{self.index} ({self.name}): "

    @cached_property
    def checkpointer(self) -> Checkpointer:
        return self.new_checkpointer() if self._shared is self else self._shared.checkpointer

    @cached_property
    def run_resume(self) -> ResumePoint | None:
        """Where the run continues, in whichever phase."""
        return self.checkpointer.find_resume() if self._shared is self else self._shared.run_resume

    @property
    def resume(self) -> ResumePoint | None:
        """Where the run continues, if that is in this phase."""
        return self.run_resume if index_of(self.run_resume) == self.index else None

    @cached_property
    def clock(self) -> str | None:
        return self.new_clock(self.run_resume) if self._shared is self else self._shared.clock

    @cached_property
    def initial_adapter(self) -> InitialAdapter | None:
        """An adapter is started from where the first phase has one."""
        return self.new_initial_adapter() if self.index == 0 else None

    @property
    def is_finished(self) -> bool:
        return not self.following and super().is_finished

    @property
    def phase(self) -> Phase:
        return Phase(
            begin=self._begin,
            is_last=not self.following,
            counters=self._counters,
            goes_on_from=self._goes_on_from,
            lr_over=self.lr_over(),
        )

    def lr_over(self) -> Callable[[ScheduleSpan], float]:
        """The learning rate of a step by what it covers of the schedule."""
        phases, adam = self._run_config.sft.phases, self.adam
        shape, unit = phases[schedule_begin(phases, self.index)], phases[self.index].length[0]
        if not shape.has_shape:
            return lambda span: adam.lr_at(span.step)
        length = self.num_steps if unit == "epochs" else schedule_length(phases, self.index)
        peak = peak_lr(self.config, lora=self.spec is not None) if self.config.policy.adapter.trainable else 0.0

        def lr(span: ScheduleSpan) -> float:
            begin, end = (span.begin_tokens, span.end_tokens) if unit == "tokens" else (span.step, span.step + 1)
            return peak * share_of_peak(shape, begin / length, end / length)

        return lr

    def continues(self, point: ResumePoint) -> None:
        """The phase is that of a step of the run. ValueError where what it builds on is gone."""
        self._begin = PhaseBegin(**(point.info.phase_begin or asdict(self._begin)))
        if self._begin.base is not None:
            base = _base_beside(point, self._begin.base)
            self._begin = replace(self._begin, base=os.path.relpath(base, self._directory))  # of a run elsewhere, too
            self._build_on(base)

    def follow(self, before: PhaseStart, step: int, counters: Mapping[str, float], at: Path, base: str | None) -> None:
        """The phase comes after another, which ended with this step, saved here. `base`: what the crossing made."""
        goes_on = self._run_config.sft.phases[self.index].schedule == "continue"
        num_tokens, earlier = counters.get("num_tokens", 0.0), before.phase.begin
        self._begin = PhaseBegin(
            index=self.index,
            name=self.name,
            step=step,
            num_tokens=num_tokens,
            schedule_step=earlier.schedule_step if goes_on else step,
            schedule_tokens=earlier.schedule_tokens if goes_on else num_tokens,
            base=base or earlier.base,
        )
        self._counters = counters
        if base is None:
            self._goes_on_from = at / "policy"
        if self._begin.base is not None:
            self._build_on(self._directory / self._begin.base)

    @property
    def _directory(self) -> Path:
        return Path(self.config.checkpointing.checkpoint_dir)

    def _build_on(self, base: Path) -> None:
        """In place of the run's own model."""
        weights = base / PHASE_WEIGHTS
        self.source = replace(resolve_model(str(weights), "sft.phases"), description=f"{weights}, made by this run")
        self.__dict__.pop("base_digest", None)

    @cached_property
    def source(self) -> ModelSource:
        return super().source if self._shared is self else self._shared.source


def index_of(point: ResumePoint | None) -> int:
    """The phase that a step is part of; the first for a new run."""
    return 0 if point is None or point.info.phase_begin is None else int(point.info.phase_begin["index"])


def phase_starts(config: SftMaster) -> list[PhaseStart]:
    """The phase in which the run continues, or the first one, and those that follow. Raises ValueError."""
    shared = PhaseStart(config, 0)
    try:
        point = shared.run_resume
    except ValueError:
        point = None  # the checks of the first phase say why it cannot be continued
    index = index_of(point)
    starts = [PhaseStart(config, number, shared) if number else shared for number in range(len(config.sft.phases))]
    for number, start in enumerate(starts):
        start.following = tuple(starts[number + 1 :])
    if point is not None:
        starts[index].continues(point)
    return starts[index:]


def phase_plans(starts: Sequence[PhaseStart], plans: Sequence[Plan]) -> list[PhasePlan]:
    """What is known of phases before a weight is loaded, in their order. ValueError where their rows cannot be used."""
    found, step, tokens = [], 0, 0.0
    schedule_step, schedule_tokens = 0, 0.0
    for start, plan in zip(starts, plans, strict=True):
        phases, (num_steps, _) = start.run_config.sft.phases, expected_steps(start)
        num_tokens = num_steps * start.loader.mean_of_a_batch(lambda row: len(row.token_ids))
        if phases[start.index].schedule == "restart":
            schedule_step, schedule_tokens = step, tokens
        lr_at = partial(
            _expected_lr, start.lr_over(), (step - schedule_step, num_steps), (tokens - schedule_tokens, num_tokens)
        )
        at_end = at_end_of(phases, start.index)
        found.append(
            PhasePlan(
                name=start.name, plan=plan, num_steps=num_steps, num_tokens=num_tokens, lr_at=lr_at, at_end=at_end
            )
        )
        step, tokens = step + num_steps, tokens + num_tokens
    return found


def _expected_lr(
    lr_over: Callable[[ScheduleSpan], float], steps: tuple[int, int], tokens: tuple[float, float], share: float
) -> float:
    """Of the step at this share of a phase; `steps` and `tokens` are where it begins in its schedule, and how many."""
    step = int(share * steps[1])
    begin, end = (tokens[0] + tokens[1] * (step + more) / steps[1] for more in (0, 1))
    return lr_over(ScheduleSpan(step=steps[0] + step, begin_tokens=begin, end_tokens=end))


class Crossing:
    """From the end of a phase into the next one."""

    def __init__(self, start: PhaseStart, result: RunResult) -> None:
        """The phase has ended, and its weights are still there."""
        self._start, self._result, self._next = start, result, start.following[0]
        self._rows = _fixed_rows(start)
        self._loss = _mean_loss(start, self._rows)
        self._made: Mapping[str, Any] = {}

    def make(self) -> PhaseStart:
        """What the next phase begins with. Nothing else may hold the run of the phase before: its weights go first."""
        self._start.algorithm.leave()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        start, step, saved = self._start, self._result.step, self._result.checkpoint
        assert saved is not None, "a phase ends with a checkpoint"
        at_end = at_end_of(start.run_config.sft.phases, start.index)
        base = None
        if at_end != "nothing":
            base = f"{PHASE_BASE_PREFIX}{self._next.index + 1}"
            logger.info(f"{start.name} ends after step {step}: {base} is made ({at_end})")
            start.checkpointer.set_aside_other_steps()
            self._made = _make_base(at_end, saved, start, Path(start.config.checkpointing.checkpoint_dir) / base)
        self._next.follow(start, step, self._result.counters, saved, base)
        return self._next

    def confirm(self, run: Run) -> None:
        """Say what the next phase begins with; PhaseShiftError where the loss has moved too far. `run` is its own."""
        now = _mean_loss(self._next, self._rows)
        shift, bound = now - self._loss, self._start.run_config.sft.max_phase_loss_shift
        step = self._result.step
        found = {"loss_before": self._loss, "loss_after": now, "loss_shift": shift, **self._made}
        run.log.log(step, "phase", {"phase": float(self._next.index + 1), **found})
        run.console.say(
            f"{self._next.name} begins after step {step}: {what_trains(self._next)}. Loss of {len(self._rows)} fixed "
            f"rows: {self._loss:.5f} before, {now:.5f} after{_made_line(self._made)}"
        )
        if not abs(shift) <= bound:
            raise PhaseShiftError(
                f"sft.max_phase_loss_shift={bound}: the loss of {len(self._rows)} fixed rows is {now:.5f} at the "
                f"beginning of {self._next.name}, and was {self._loss:.5f} at the end of {self._start.name}. Its last "
                f"step is saved: {self._result.checkpoint}. Choose policy.precision=float32, or allow a larger shift."
            )


def _fixed_rows(start: PhaseStart) -> list[Example]:
    """The rows whose loss is measured on both sides of a crossing: of validation, or else of training."""
    assert isinstance(start.algorithm, Sft), start.algorithm
    sets = start.algorithm.validation_sets or start.algorithm.train_sets
    return list(islice((rows[place] for rows in sets for place in range(len(rows))), _NUM_FIXED_ROWS))


def _mean_loss(start: PhaseStart, rows: Sequence[Example]) -> float:
    assert isinstance(start.algorithm, Sft), start.algorithm
    return start.algorithm.mean_loss(rows)


def what_trains(start: PhaseStart) -> str:
    """How many parameters a phase trains, of how many."""
    plan = start.plan
    assert plan is not None
    spec = start.spec
    what = "all weights" if spec is None else f"an adapter of dim {spec.dim}"
    total = plan.num_params + (plan.num_trainable_params if spec is not None else 0)
    return f"{what}, {plan.num_trainable_params:,} of {total:,} parameters"


def _made_line(made: Mapping[str, Any]) -> str:
    if "surviving_share" in made:
        return (
            f"; of the merged update {made['surviving_share']:.1%} survives the rounding, which adds "
            f"{made['relative_rounding_error']:.1%} of its size"
        )
    if "relative_rounding_error" in made:
        return f"; rounding changed the weights by {made['relative_rounding_error']:.2g} of their size"
    return ""


def _make_base(at_end: AtEnd, step: Path, start: PhaseStart, target: Path) -> Mapping[str, float]:
    """The directory that the next phase builds on; what rounding did, as numbers. Replaces one that this product made.

    ValueError where the name is taken by anything else.
    """
    if os.path.lexists(target) and not (target / PHASE_RECORD_FILE).is_file():
        raise ValueError(
            f"checkpointing.checkpoint_dir={str(target.parent)!r}: {target} is in the way, and was not made by a run. "
            f"Move it away, and give the same command again."
        )
    policy, temporary = start.config.policy, make_unfinished(target.with_name(f"{TMP_PREFIX}{target.name}"))
    try:
        weights = temporary / PHASE_WEIGHTS
        if at_end == "inject":
            weights.mkdir()
            found = write_frozen(step / "policy" / "weights", step / "policy" / "tokenizer", weights, policy.precision)
        else:
            found = _merged(step, start.source.path, weights, policy.precision)
        record = {"step": read_info(step).step, "index": start.index + 1, "made_by": at_end, **found}
        (temporary / PHASE_RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        flush_tree(temporary)
        put_in_place(temporary, target, f"{TMP_PREFIX}old_")
        flush(target.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            remove_unfinished(temporary)
        raise
    return found


def _merged(step: Path, base: Path, target: Path, dtype: str) -> Mapping[str, float]:
    """A step's adapter merged into its base: in fp32, rounded once, read back."""
    request = ExportRequest(adapter=step, output=target, base_directory=base, dtype=dtype)
    (made,) = export(request)
    if made.status != "written":
        raise RuntimeError(f"{step} could not be merged: {made.problem}")
    return {key: made.report[key] for key in ("surviving_share", "relative_rounding_error") if key in made.report}


def _base_beside(point: ResumePoint, name: str) -> Path:
    """What a step's phase builds on, which lies beside the step."""
    base = point.path.parent / name
    if not (base / PHASE_RECORD_FILE).is_file():
        raise ValueError(
            f"checkpointing.load_path={str(point.path)!r}: its phase builds on {base}, which is not there. Put it "
            f"back, or continue from a step of an earlier phase."
        )
    return base
