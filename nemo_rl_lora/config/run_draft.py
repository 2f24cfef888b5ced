"""What the translations of other tools' whole files share: their document, and the configuration that becomes of it.

Contract: every key of their file is carried over, known to change no result here, or listed as left out; nothing is
dropped in silence. What their file cannot answer is `???` in the configuration, with which no run starts; for that, and
for what is counted otherwise there, a line says what it is. No file is read here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from nemo_rl_lora.config.lora import unified_from_spec
from nemo_rl_lora.config.their_keys import EMPTY, Theirs
from nemo_rl_lora.config.tree import with_value
from nemo_rl_lora.lora.dialects import parse_dtype
from nemo_rl_lora.lora.other_tools import Translation, translate

OPEN = "???"
"""A value that the user has to give; a configuration that holds it does not load."""
NO_STEP_LIMIT = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTranslation:
    """A file of another tool as a configuration of one driver, and what the configuration does not say."""

    tool: str
    tree: dict[str, Any]
    to_decide: tuple[str, ...]  # `key: what it is`, for the user to fill in or to look at
    differences: tuple[str, ...]  # what is otherwise here than there
    left_out: Mapping[str, Any]  # their keys that have no counterpart here
    without_effect: tuple[str, ...]  # their keys that change no result

    @property
    def is_whole(self) -> bool:
        """Whether the configuration trains what the file trains, so that it may run as it is."""
        return not self.to_decide and not self.left_out


class NoSuchRunError(ValueError):
    """A run that has no counterpart here, however its file is written; its adapter may have one."""


@dataclass(slots=True)
class Draft:
    """A configuration while it is written."""

    theirs: Theirs
    tree: dict[str, Any] = field(default_factory=dict)
    to_decide: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    left_out: dict[str, Any] = field(default_factory=dict)  # below what was read: the rest finds itself in `finish`

    def set(self, key: str, value: Any) -> None:
        """Write a value at a dotted key."""
        self.tree = with_value(self.tree, key.split("."), value)

    def leave_open(self, key: str, what: str, value: Any = OPEN) -> None:
        """Leave a key to the user, who is told what it is; `value` stands there where one can be meant."""
        self.set(key, value)
        self.to_decide.append(f"{key}: {what}")

    def carry(self, ours: str, value: Any) -> Any:
        """Their value at our key, where the file or the tool's default has one."""
        if value is not None:
            self.set(ours, value)
        return value

    def differs(self, text: str) -> None:
        """Say what is otherwise here than there."""
        self.differences.append(text)

    def finish(
        self, tool: str, harmless: Mapping[str, Sequence[Any] | None], own_switches: Sequence[str] = ()
    ) -> RunTranslation:
        """The translation. `harmless`: globs of their keys, with the values at which they change no result here (None:
        at any). `own_switches`: sections whose `enable` switches only some of them off."""
        unread = self.theirs.unread()
        off = {key.rpartition(".")[0] for key in self.theirs.switched_off()} - {*own_switches}
        quiet = {
            key
            for key, value in unread.items()
            if value in EMPTY or _is_harmless(key, value, harmless) or _is_below(key, off)
        }
        return RunTranslation(
            tool=tool,
            tree=self.tree,
            to_decide=tuple(self.to_decide),
            differences=tuple(self.differences),
            left_out={key: value for key, value in unread.items() if key not in quiet} | self.left_out,
            without_effect=tuple(key for key in unread if key in quiet and unread[key] not in EMPTY),
        )


def set_adapter(draft: Draft, found: Translation | None) -> None:
    """The adapter block, where the file describes an adapter; without one all weights are trained."""
    draft.set("policy.backend", "megatron" if found is not None and found.spec.fused == "shared" else "dtensor")
    if found is None:
        return
    draft.set("policy.lora", unified_from_spec(found.spec))
    if found.init_from is not None:
        draft.set("policy.adapter.init_from", found.init_from)


def adapter_of(theirs: Theirs, *places: str, is_on: bool) -> Translation | None:
    """The adapter of the file, whose keys then count as read. ValueError for one that has no counterpart."""
    for place in places:
        theirs.mark(place)
    return translate(theirs.document) if is_on else None


def set_precision(draft: Draft, written: Mapping[str, Any]) -> None:
    """`policy.precision` where their keys for it, all of which count, do not mean bfloat16."""
    names = {parse_dtype(value) or "bfloat16" for value in written.values()}
    if names == {"float32"}:
        draft.set("policy.precision", "float32")
    elif names - {"bfloat16", "bf16"}:
        there = ", ".join(f"{key}={value}" for key, value in written.items())
        draft.leave_open("policy.precision", f"float32 or bfloat16. There {there}", value="bfloat16")


def set_schedule(
    draft: Draft, name: str, *, warmup: float, total: int | None, min_lr_ratio: float = 0.0, why_open: str
) -> None:
    """`policy.scheduler`: `warmup` is a number of steps, or below 1 a share of all. `why_open`: what to put where the
    file does not say how many steps there are."""
    is_share = 0 < warmup < 1
    if name == "constant" and not warmup:
        return
    draft.set("policy.scheduler.name", name)
    if is_share and total is None:
        draft.leave_open("policy.scheduler.warmup_steps", f"{warmup:g} of all steps. {why_open}")
    elif warmup:
        draft.set("policy.scheduler.warmup_steps", int(warmup * (total or 0)) if is_share else int(warmup))
    if name == "constant":
        return
    if total is None:
        draft.leave_open("policy.scheduler.total_steps", f"the number of the run's steps. {why_open}")
    else:
        draft.set("policy.scheduler.total_steps", total)
    if min_lr_ratio:
        draft.set("policy.scheduler.min_lr_ratio", round(min_lr_ratio, 9))


def set_length(draft: Draft, algorithm: str, *, steps: int | None, epochs: int | None) -> None:
    """How long the run is, whichever comes first; null: no limit of that kind."""
    draft.set(f"{algorithm}.max_num_steps", NO_STEP_LIMIT if steps is None else steps)
    draft.set(f"{algorithm}.max_num_epochs", NO_STEP_LIMIT if epochs is None else epochs)


def set_validation(draft: Draft, algorithm: str, *, has_rows: bool, period: int, at_start: bool = False) -> None:
    """When the run validates; never without rows."""
    if not has_rows:
        draft.set("data.validation", None)
    draft.set(f"{algorithm}.val_period", max(period, 0) if has_rows else 0)
    draft.set(f"{algorithm}.val_at_start", at_start and has_rows)


def steps_of(tokens: float, tokens_of_a_step: float) -> int:
    """Steps that together have so many tokens."""
    return math.ceil(tokens / tokens_of_a_step)


def _is_harmless(key: str, value: Any, harmless: Mapping[str, Sequence[Any] | None]) -> bool:
    return any(fnmatchcase(key, glob) and (values is None or value in values) for glob, values in harmless.items())


def _is_below(key: str, sections: set[str]) -> bool:
    return any(key.startswith(f"{section}.") for section in sections)
