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
from nemo_rl_lora.config.tree import flatten, with_value
from nemo_rl_lora.lora.other_tools import Translation, translate
from nemo_rl_lora.scalars import as_number

OPEN = "???"
"""A value that the user has to give; a configuration that holds it does not load."""
NO_STEP_LIMIT = 1_000_000
_EMPTY: tuple[Any, ...] = (None, {}, [])


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


class Theirs:
    """The keys of another tool's file, dotted or with slashes, which knows those that were read."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.document = _nested(document)
        self._values = flatten(self.document)
        self._read = set[str]()

    def take(self, *keys: str, default: Any = None) -> Any:
        """The value of the first of these keys that is written and not null, else the tool's default."""
        found = default
        for key in reversed(keys):
            self.mark(key)
            if (value := self._at(key)) is not None:
                found = value
        return found

    def take_number(self, *keys: str, default: float | None = None) -> Any:
        """The same of a number, also where it is written as text. ValueError where it is none."""
        value = as_number(self.take(*keys, default=default))
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{self.written(*keys)}={value!r}: must be a number. Correct it.")
        return value

    def written(self, *keys: str) -> str:
        """The first of these keys that the file has, or the first of all."""
        return next((key for key in keys if self._at(key) is not None), keys[0])

    def has(self, key: str) -> bool:
        """Whether something stands at or below a key that is not null."""
        return self._at(key) not in _EMPTY

    def mark(self, key: str) -> None:
        """Count the key, and what stands below it, as read."""
        self._read |= {name for name in self._values if name == key or name.startswith(f"{key}.")}

    def unread(self) -> dict[str, Any]:
        """What nobody asked for."""
        return {key: value for key, value in self._values.items() if key not in self._read}

    def switched_off(self) -> list[str]:
        """The switches `enable` and `enabled` that are false: what stands beside them has no effect there."""
        return [k for k, value in self._values.items() if value is False and k.endswith((".enable", ".enabled"))]

    def _at(self, key: str) -> Any:
        node: Any = self.document
        for part in key.split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        return node


@dataclass(slots=True)
class Draft:
    """A configuration while it is written."""

    theirs: Theirs
    tree: dict[str, Any] = field(default_factory=dict)
    to_decide: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)

    def set(self, key: str, value: Any) -> None:
        """Write a value at a dotted key."""
        self.tree = with_value(self.tree, key.split("."), value)

    def leave_open(self, key: str, what: str, value: Any = OPEN) -> None:
        """Leave a key to the user, who is told what it is; `value` stands there where one can be meant."""
        self.set(key, value)
        self.to_decide.append(f"{key}: {what}")

    def carry(self, ours: str, *keys: str, default: Any = None) -> Any:
        """Their value at our key, where the file or the tool's default has one."""
        value = self.theirs.take(*keys, default=default)
        if value is not None:
            self.set(ours, value)
        return value

    def differs(self, text: str) -> None:
        """Say what is otherwise here than there."""
        self.differences.append(text)

    def finish(self, tool: str, harmless: Mapping[str, Sequence[Any] | None]) -> RunTranslation:
        """The translation. `harmless`: globs of their keys, with the values at which they change no result here (None:
        at any)."""
        unread = self.theirs.unread()
        off = {key.rpartition(".")[0] for key in self.theirs.switched_off()}
        quiet = {
            key
            for key, value in unread.items()
            if value in _EMPTY or _is_harmless(key, value, harmless) or _is_below(key, off)
        }
        return RunTranslation(
            tool=tool,
            tree=self.tree,
            to_decide=tuple(self.to_decide),
            differences=tuple(self.differences),
            left_out={key: value for key, value in unread.items() if key not in quiet},
            without_effect=tuple(key for key in unread if key in quiet and unread[key] not in _EMPTY),
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
        draft.leave_open("policy.scheduler.total_steps", f"the number of optimizer steps. {why_open}")
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


def _nested(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document with keys such as `training/batch_size` as keys below keys."""
    tree: dict[str, Any] = {}
    for key, value in document.items():
        tree = with_value(tree, str(key).split("/"), _nested(value) if isinstance(value, Mapping) else value)
    return tree
