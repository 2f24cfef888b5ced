"""What each phase of a run starts from.

Contract: every phase is checked before a weight is loaded, with the configuration that is derived for it. In which
phase a run continues, and where that began, is what its checkpoint says.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

from nemo_rl_lora.algorithms.phase import Phase, ScheduleSpan
from nemo_rl_lora.checkpoints.record import PHASE_BASE_PREFIX, PHASE_WEIGHTS, PhaseBegin
from nemo_rl_lora.checkpoints.retention import base_beside, base_step
from nemo_rl_lora.checkpoints.steps import Checkpointer, ResumePoint
from nemo_rl_lora.config.errors import ConfigError
from nemo_rl_lora.config.load import derived
from nemo_rl_lora.config.master import SftMaster
from nemo_rl_lora.config.optimizer_settings import peak_lr
from nemo_rl_lora.config.phases import (
    AtEnd,
    at_end_of,
    length_before,
    name_of,
    phase_changes,
    schedule_begin,
    schedule_length,
    share_of_peak,
)
from nemo_rl_lora.models.source import ModelSource, resolve_model
from nemo_rl_lora.plan.phases import PhasePlan
from nemo_rl_lora.plan.plan import Plan
from nemo_rl_lora.run.preflight import Start, expected_steps
from nemo_rl_lora.run.warm_start import InitialAdapter
from nemo_rl_lora.tensors import stored_tensors


class PhaseStart(Start):
    """A phase of a run, with the configuration that is derived for it."""

    def __init__(self, run_config: SftMaster, index: int, shared: PhaseStart | None = None) -> None:
        """`shared`: the first phase, where this is another; it has what all of them share."""
        self._run_config, self.index, self._shared = run_config, index, shared or self
        self.name = name_of(run_config.sft.phases, index)
        try:
            config = derived(run_config, phase_changes(run_config, index), f"sft.phases.{index}")
        except ConfigError as error:
            raise ConfigError("\n".join(map(self.named, str(error).splitlines()))) from error
        super().__init__(config)
        self.following: tuple[PhaseStart, ...] = ()
        self._begin = PhaseBegin(index=index, name=self.name)
        self._counters: Mapping[str, float] = {}
        self._after: Path | None = None
        self._goes_on = False
        self._kept_initial: Mapping[str, str] | None = None

    @property
    def run_config(self) -> SftMaster:
        return self._run_config

    @property
    def label(self) -> str:
        return f"sft.phases.{self.index} ({self.name}): "

    def named(self, problem: str) -> str:
        """A problem of this phase, by the keys that the user wrote: in the phase, where it has some of its own."""
        phase, key = self._run_config.sft.phases[self.index], f"sft.phases.{self.index}"
        if phase.data is not None:
            problem = re.sub(r"\bdata\.train\b", f"{key}.data", problem)
        for own in phase.lora or {}:
            problem = re.sub(rf"\bpolicy\.lora\.{re.escape(own)}\b", f"{key}.lora.{own}", problem)
        return f"{self.label}{problem}"

    @property
    def at_end(self) -> AtEnd:
        """What happens when the phase is over."""
        return at_end_of(self._run_config.sft.phases, self.index)

    @property
    def made_base(self) -> Path | None:
        """What is made at the end of the phase, for the next one; None where that has the same weights."""
        if not self.following or self.at_end == "nothing":
            return None
        return self._directory / f"{PHASE_BASE_PREFIX}{self.index + 2}"

    def check_end(self) -> None:
        if self.made_base is None:
            return
        refuse_what_is_in_the_way(self.made_base)
        phases = self._run_config.sft.phases
        is_on_the_model = all(at_end_of(phases, before) == "nothing" for before in range(self.index))
        if (
            self.at_end == "merge"
            and is_on_the_model
            and self.plan is not None
            and not stored_tensors(self.source.path)
        ):
            raise ValueError(
                f"policy.model_name={self.config.policy.model_name!r}: {self.source.path} holds no safetensors file, "
                f"and a phase whose adapter is merged into it needs one. Load the model with transformers, and save it "
                f"again with save_pretrained."
            )

    @property
    def made_bytes(self) -> int:
        return 0 if self.made_base is None or self.plan is None else self.plan.sizes.base_bytes

    @property
    def initial_record(self) -> Mapping[str, str] | None:
        """An adapter that goes on has the beginning of the one before."""
        return self._kept_initial if self.resume is None and self.index else super().initial_record

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
            after=self._after,
            goes_on_from=self._after / "policy" if self._after is not None and self._goes_on else None,
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
        self._begin = point.info.phase_begin or self._begin
        if self._begin.base is not None:
            base = base_beside(point.path, self._begin.base)
            if base is None:
                raise ValueError(
                    f"checkpointing.load_path={str(point.path)!r}: its phase builds on {self._begin.base}, which is "
                    f"not there. Put it back beside the step, or continue from a step of an earlier phase."
                )
            self._begin = replace(self._begin, base=os.path.relpath(base, self._directory.resolve()))
            self._build_on(base)

    def follow(self, before: PhaseStart, step: int, counters: Mapping[str, float], at: Path) -> None:
        """The phase comes after another, which ended with this step, saved here."""
        phases, earlier = self._run_config.sft.phases, before.phase.begin
        num_tokens, base = counters.get("num_tokens", 0.0), before.made_base
        goes_on = phases[self.index].schedule == "continue"
        self._begin = PhaseBegin(
            index=self.index,
            name=self.name,
            step=step,
            num_tokens=num_tokens,
            schedule_step=earlier.schedule_step if goes_on else step,
            schedule_tokens=num_tokens - length_before(phases, self.index),  # of which a phase may have some more
            base=earlier.base if base is None else base.name,
        )
        self._counters, self._after, self._goes_on = counters, at, base is None
        if base is None:
            self._kept_initial = before.initial_record
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
    return 0 if point is None else point.info.begin.index


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
    found, begin = [], starts[0].phase.begin
    step, tokens, schedule_step = begin.step, begin.num_tokens, begin.schedule_step
    for start, plan in zip(starts, plans, strict=True):
        phases, (num_steps, _) = start.run_config.sft.phases, expected_steps(start)
        num_tokens = num_steps * start.loader.mean_of_a_batch(lambda row: len(row.token_ids))
        if phases[start.index].schedule == "restart":
            schedule_step = step
        before = length_before(phases, start.index)
        lr_at = partial(_expected_lr, start.lr_over(), (step - schedule_step, num_steps), (before, num_tokens))
        found.append(
            PhasePlan(
                name=start.name,
                plan=plan,
                first_step=step,
                num_steps=num_steps,
                num_tokens=num_tokens,
                lr_at=lr_at,
                at_end=start.at_end,
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


def refuse_what_is_in_the_way(base: Path) -> None:
    """ValueError where the name of what a phase's end makes is taken by something that no run made."""
    if os.path.lexists(base) and base_step(base) is None:
        raise ValueError(
            f"checkpointing.checkpoint_dir={str(base.parent)!r}: {base} is in the way, and was not made by a run. Move "
            f"it away, and give the same command again."
        )
