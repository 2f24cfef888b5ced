"""Keys of NeMo RL that have no effect here, from refused_keys.tsv: key, the values it may have, what to do otherwise.

Contract: such a key is known and may stand in a file at one of its values: NeMo RL's base files and recipes load. The
values are a JSON list; `any` where none changes a result or what fits into memory, and the third column says why; or a
mapping of switches to their values, for a section that is accepted whole, null included, while its switches are off.
They are taken out of the tree before the schema sees it, so that its classes have only what works. Any other value is
refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from nemo_rl_lora.config.schema import field_map, section_at
from nemo_rl_lora.config.tree import flatten, lookup, without
from nemo_rl_lora.scalars import as_number, as_switch

_TABLE = Path(__file__).with_name("refused_keys.tsv")
_OF_EVALUATION = ("policy.tokenizer.", "data.", "env.")  # the rest of the table belongs to training
_WITHOUT_SCHEMA = ("data_plane", "on_policy_distillation", "reward_penalties")  # sections that training would have


@dataclass(frozen=True, slots=True)
class RefusedKey:
    """The values at which a key is accepted, and what to do about another one."""

    values: tuple[Any, ...] | None  # None: any
    switches: Mapping[str, tuple[Any, ...]]  # of a section, which then has no values
    remedy: str

    def problems(self, key: str, value: Any) -> dict[str, tuple[Any, str]]:
        """What is wrong with the key's value: by key, its value and what an error says after it."""
        if self.switches and isinstance(value, Mapping):
            wrong = {name: values for name, values in self.switches.items() if not _is_one(value, name, values)}
            return {f"{key}.{name}": (value[name], self._rule(values)) for name, values in wrong.items()}
        if self.switches and value is not None:
            return {key: (value, f"must be a mapping or null. {self.remedy}")}
        if self.values is None or self.switches or _is_one({key: value}, key, self.values):
            return {}
        return {key: (value, self._rule(self.values))}

    def _rule(self, values: tuple[Any, ...]) -> str:
        return f"only {' or '.join(map(repr, values))} is supported. {self.remedy}"


def _is_one(section: Mapping[str, Any], key: str, values: tuple[Any, ...]) -> bool:
    """Whether a section's value is one of these; one that is absent is. true is not 1, and "8" is 8."""
    if key not in section:
        return True
    written = section[key]
    read = as_switch(as_number(written))
    return any(
        each == value and isinstance(each, bool) == isinstance(value, bool)
        for value in values
        for each in (written, read)
    )


def _row(values: str, remedy: str) -> RefusedKey:
    parsed = None if values == "any" else json.loads(values)
    if isinstance(parsed, dict):
        return RefusedKey((), {name: tuple(accepted) for name, accepted in parsed.items()}, remedy)
    return RefusedKey(None if parsed is None else tuple(parsed), {}, remedy)


@cache
def refused_keys(root: type[BaseModel]) -> Mapping[str, RefusedKey]:
    """The table's keys that this schema would have."""
    lines = _TABLE.read_text(encoding="utf-8").splitlines()[1:]
    rows = {key: _row(values, remedy) for key, values, remedy in (line.split("\t") for line in lines)}
    sections = field_map(root)
    return {
        key: row
        for key, row in rows.items()
        if key.split(".")[0] in (*sections, *_WITHOUT_SCHEMA)
        and ("eval" not in sections or key.startswith(_OF_EVALUATION))
    }


def names_below(root: type[BaseModel], path: Sequence[str]) -> set[str]:
    """The names of the table's keys, and of its sections, directly under a path; of a section that is accepted whole
    while it is off, its switches."""
    prefix = "".join(f"{part}." for part in path)
    rows = refused_keys(root)
    own = rows.get(prefix.removesuffix("."))
    names = {key.removeprefix(prefix).split(".")[0] for key in rows if key.startswith(prefix)}
    return names | set(own.switches if own is not None else ())


def is_refused_key(root: type[BaseModel], path: Sequence[str]) -> bool:
    """Whether the table has the key, a section of this name, or a section around it."""
    rows = refused_keys(root)
    around = (rows.get(".".join(path[:end])) for end in range(1, len(path)))
    whole = any(row is not None and (row.switches or row.values is None) for row in around)
    return whole or path[-1] in names_below(root, path[:-1])


def take_out(root: type[BaseModel], tree: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The tree without the table's keys; of these, those at a value that is not accepted, and that value; keys of the
    table's own sections that nobody knows."""
    found, refused = tree, {}
    for key, row in refused_keys(root).items():
        value = lookup(tree, key.split("."))
        if value is not None:
            found = without(found, key.split("."))
            refused |= row.problems(key, value[0])
    unknown: dict[str, Any] = {}
    for path in _own_sections(root):
        rest = lookup(found, path)
        if rest is not None:
            unknown |= flatten(rest[0], ".".join(path)) if rest[0] not in ({}, None) else {}
            found = without(found, path)
    return found, refused, unknown


def keys_without_effect(root: type[BaseModel], tree: Mapping[str, Any]) -> list[str]:
    """The table's keys in the tree that stand at another value than the one that means off, and change nothing."""
    rows = {key: row for key, row in refused_keys(root).items() if not row.switches}
    values = {key: lookup(tree, key.split(".")) for key in rows}
    return [
        key
        for key, value in values.items()
        if value is not None and not ((off := rows[key].values) and _is_one({key: value[0]}, key, off[:1]))
    ]


@cache
def _own_sections(root: type[BaseModel]) -> tuple[tuple[str, ...], ...]:
    """Sections of which the schema has nothing, the innermost first."""
    parents = {tuple(key.split(".")[:end]) for key in refused_keys(root) for end in range(1, key.count(".") + 1)}
    return tuple(sorted((path for path in parents if section_at(root, path) is None), key=len, reverse=True))
