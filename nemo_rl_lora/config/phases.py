"""Phases of an SFT run: all weights, then an adapter, then that adapter merged and another, each on data of its own.

Contract: a phase is an ordinary run's configuration, derived from that of the whole one (`phase_changes`), so that
whatever is checked, planned and trained in a run without phases is so in each phase. The schedule of a phase is a pure
function of where a step lies in it. No torch.

Source: theseus's two-phase trainer (all weights, then LoRA at a token boundary); ReLoRA, arXiv 2307.05695.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from nemo_rl_lora.config.adapter_start import AdapterStartConfig
from nemo_rl_lora.config.base import Section
from nemo_rl_lora.config.lora import LoraCfg, PeftCfg, UnifiedLora, spec_of_block, unified_from_spec
from nemo_rl_lora.seeds import derive_seed

if TYPE_CHECKING:
    from nemo_rl_lora.config.master import SftMaster

Unit = Literal["tokens", "steps", "epochs"]
AtEnd = Literal["inject", "merge", "nothing"]
NO_LIMIT = 10**9  # steps, or epochs, of a phase whose length is counted otherwise

_Share = Annotated[float, Field(ge=0, le=1)]


class PhaseConfig(Section):
    """A part of an SFT run: what trains, on which data, for how long, and what happens at its end."""

    name: str | None = None
    """What messages and plots call it; null: phase_1, phase_2, ..."""
    train: Literal["full", "lora"]
    """All weights, or an adapter on what the phases before have made."""
    tokens: int | None = Field(default=None, ge=1)
    """Length: the phase ends with the step at which it has trained on so many tokens (`total_num_tokens`)."""
    steps: int | None = Field(default=None, ge=1)
    """Length in steps."""
    epochs: int | None = Field(default=None, ge=1)
    """Length in passes over its data."""
    data: dict[str, Any] | tuple[dict[str, Any], ...] | None = None
    """Its training data, written as `data.train` is: a dataset, or a list mixed by rates; null: `data.train`."""
    lr: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Peak learning rate; null: what `policy.optimizer` says for all weights, or for an adapter."""
    warmup_pct: _Share | None = None
    """Share of the phase's length (0.01 is 1 %) in which the learning rate rises to its peak. With this or decay_pct,
    `policy.scheduler` is not used."""
    decay_pct: _Share | None = None
    """Share of the phase's length, its last, in which the learning rate falls to zero along a line."""
    schedule: Literal["restart", "continue"] = "restart"
    """Whether the learning rate's schedule begins anew, or goes on where that of the phase before stands: then shares
    are of the length of both."""
    lora: dict[str, Any] | None = None
    """Keys of the adapter that differ from those of the run's LoRA block, written as those of `policy.lora`."""
    at_end: AtEnd | None = None
    """inject: the trained weights are frozen in the compute dtype, and the next phase's adapter is put on them. merge:
    the adapter is added to the base, in fp32 and rounded once. nothing: the next phase goes on with the same weights,
    and with their moments. null: what the next phase needs."""

    @property
    def length(self) -> tuple[Unit, int]:
        """The unit of its length, and the number."""
        (found,) = self._lengths()
        return found

    @property
    def has_shape(self) -> bool:
        """Whether it says itself how its learning rate rises and falls."""
        return self.warmup_pct is not None or self.decay_pct is not None

    def _lengths(self) -> list[tuple[Unit, int]]:
        units: tuple[Unit, ...] = ("tokens", "steps", "epochs")
        return [(unit, value) for unit in units if (value := getattr(self, unit)) is not None]

    @model_validator(mode="after")
    def _fits_itself(self) -> PhaseConfig:
        found = self._lengths()
        if len(found) != 1:
            said = ", ".join(f"{unit}={value}" for unit, value in found) or "tokens=None, steps=None and epochs=None"
            raise ValueError(f"{said}: a phase has one length. Set tokens, steps or epochs, and no other of them.")
        if self.lora is not None and self.train == "full":
            raise ValueError("lora: this phase trains all weights (train='full'). Remove the block, or set train=lora.")
        if self.lora is not None and "enabled" in self.lora:
            raise ValueError(
                f"lora.enabled={self.lora['enabled']!r}: `train` says whether there is an adapter. Remove it."
            )
        if (self.warmup_pct or 0) + (self.decay_pct or 0) > 1:
            raise ValueError(
                f"warmup_pct={self.warmup_pct}: warm-up and decay ({self.decay_pct}) are together longer than the "
                f"phase. Give shares that add up to 1 at most."
            )
        return self


def check_phases(phases: Sequence[PhaseConfig]) -> None:
    """ValueError, by the phase's key, where phases do not fit each other."""
    for index, phase in enumerate(phases):
        key = f"sft.phases.{index}"
        following = phases[index + 1] if index + 1 < len(phases) else None
        needed = {"inject", "nothing"} if phase.train == "full" else {"merge", "nothing"}
        if phase.at_end is not None and phase.at_end not in needed:
            raise ValueError(
                f"{key}.at_end={phase.at_end!r}: a phase with train={phase.train!r} ends with "
                f"{' or '.join(sorted(needed))}. Choose one of them, or null."
            )
        if following is None:
            if phase.at_end not in (None, "nothing"):
                raise ValueError(
                    f"{key}.at_end={phase.at_end!r}: no phase follows. Remove it; tools/convert_lora_to_hf.py merges "
                    f"the adapter of the last one."
                )
            continue
        chosen = phase.at_end or at_end_of(phases, index)
        if chosen == "inject" and following.train == "full":
            raise ValueError(f"{key}.at_end='inject': the next phase trains all weights. Set it to nothing, or null.")
        if chosen == "nothing" and phase.train != following.train:
            raise ValueError(
                f"{key}.at_end='nothing': this phase trains {_what(phase)}, and the next one {_what(following)}. Set "
                f"it to {'inject' if phase.train == 'full' else 'merge'}, or null."
            )
        if chosen == "nothing" and following.train == "lora" and following.lora is not None:
            raise ValueError(
                f"sft.phases.{index + 1}.lora: the phase goes on with the adapter of the one before. Remove the block, "
                f"or set {key}.at_end=merge for an adapter of its own."
            )
    _check_schedules(phases)
    names = [name_of(phases, index) for index in range(len(phases))]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise ValueError(f"sft.phases.{index}.name={name!r}: an earlier phase has this name. Choose another.")


def _check_schedules(phases: Sequence[PhaseConfig]) -> None:
    for index, phase in enumerate(phases):
        key = f"sft.phases.{index}"
        if phase.schedule == "restart":
            continue
        if index == 0:
            raise ValueError(f"{key}.schedule='continue': there is no phase before it. Set it to restart.")
        if phase.has_shape:
            raise ValueError(
                f"{key}.schedule='continue': its shape is that of the phase where the schedule began. Remove "
                f"warmup_pct and decay_pct here, or set schedule=restart."
            )
        first = schedule_begin(phases, index)
        units = {part.length[0] for part in phases[first : index + 1]}
        if phases[first].has_shape and (len(units) > 1 or "epochs" in units):
            raise ValueError(
                f"{key}.schedule='continue': shares of one schedule need lengths in one unit, tokens or steps, and "
                f"those of phases {first} to {index} are in {' and '.join(sorted(units))}. Give all of them in tokens."
            )


def _what(phase: PhaseConfig) -> str:
    return "all weights" if phase.train == "full" else "an adapter"


def name_of(phases: Sequence[PhaseConfig], index: int) -> str:
    """What messages call a phase."""
    return phases[index].name or f"phase_{index + 1}"


def at_end_of(phases: Sequence[PhaseConfig], index: int) -> AtEnd:
    """What happens at a phase's end: what it says, or what the next phase needs."""
    phase = phases[index]
    if phase.at_end is not None or index + 1 == len(phases):
        return phase.at_end or "nothing"
    following = phases[index + 1]
    if phase.train == "full":
        return "inject" if following.train == "lora" else "nothing"
    return "merge" if following.train == "full" or following.lora is not None else "nothing"


def schedule_begin(phases: Sequence[PhaseConfig], index: int) -> int:
    """The phase in which the schedule of this one began."""
    while phases[index].schedule == "continue":
        index -= 1
    return index


def schedule_length(phases: Sequence[PhaseConfig], index: int) -> int:
    """Of the whole schedule that this phase is in, in its unit."""
    first = last = schedule_begin(phases, index)
    while last + 1 < len(phases) and phases[last + 1].schedule == "continue":
        last += 1
    return sum(phase.length[1] for phase in phases[first : last + 1])


def length_before(phases: Sequence[PhaseConfig], index: int) -> int:
    """Of the schedule that a phase is in, what its earlier phases have, in their unit; 0 where it begins there."""
    return sum(phase.length[1] for phase in phases[schedule_begin(phases, index) : index])


def share_of_peak(phase: PhaseConfig, begin: float, end: float) -> float:
    """What the peak learning rate is multiplied with, in a step that goes from `begin` to `end` of the schedule, both
    shares of its length: warm-up, constant, decay to zero. `phase` is the one in which the schedule began."""
    factor = 1.0
    if phase.warmup_pct:
        factor = min(factor, end / phase.warmup_pct)
    if phase.decay_pct:
        factor = min(factor, max(0.0, 1 - begin) / phase.decay_pct)
    return factor


def phase_changes(config: SftMaster, index: int) -> dict[str, Any]:
    """Dotted key -> value: what a phase's own configuration has instead of the whole run's."""
    phases = config.sft.phases
    phase, policy = phases[index], config.policy
    unit, number = phase.length
    changes: dict[str, Any] = {
        "sft.phases": [],
        "sft.max_num_tokens": number if unit == "tokens" else None,
        "sft.max_num_steps": number if unit == "steps" else NO_LIMIT,
        "sft.seed": config.sft.seed if index == 0 else derive_seed(config.sft.seed, "phase", index),
        "sft.max_num_epochs": number if unit == "epochs" else NO_LIMIT,
        LoraCfg.KEY: {},
        PeftCfg.KEY: {},
        UnifiedLora.KEY: None,
    }
    if phase.data is not None:
        changes["data.train"] = list(phase.data) if isinstance(phase.data, tuple) else phase.data
    if phase.train == "lora":
        changes[UnifiedLora.KEY] = unified_from_spec(spec_of_block(policy)) | _lora_keys(phases, index)
    if phase.lr is not None:
        changes |= {"policy.optimizer.kwargs.lr": phase.lr, "policy.optimizer.full_finetuning_lr": None}
    if index > 0 or phase.train == "full":  # what an adapter starts from, the first phase's does
        changes["policy.adapter"] = AdapterStartConfig().model_dump(mode="json")
    return changes


def _lora_keys(phases: Sequence[PhaseConfig], index: int) -> dict[str, Any]:
    """What a phase's adapter has of its own: of one that goes on, what the phase says that began it."""
    while index > 0 and phases[index - 1].train == "lora" and at_end_of(phases, index - 1) == "nothing":
        index -= 1
    return phases[index].lora or {}
