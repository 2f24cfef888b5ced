"""Keys of NeMo RL that have no effect here, from refused_keys.tsv: key, the values it may have, what to do otherwise.

Contract: such a key is known and may stand in a file at one of these values, which carry no information: NeMo RL's base
files and recipes load. They are taken out of the tree before the schema sees it, so that its classes have only what
works. Any other value is refused by name. Where sections stand in a list, the table's key is meant for each of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from nemo_rl_lora.config.schema import field_map, section_at
from nemo_rl_lora.config.tree import flatten, lookup, without

_TABLE = Path(__file__).with_name("refused_keys.tsv")
_OF_EVALUATION = ("policy.tokenizer.", "data.", "env.")  # the rest of the table belongs to training


@dataclass(frozen=True, slots=True)
class RefusedKey:
    """The values at which a key is accepted, and what to do about another one."""

    values: tuple[Any, ...]
    remedy: str

    @property
    def rule(self) -> str:
        """What an error says after key and value."""
        return f"only {' or '.join(map(repr, self.values))} is supported. {self.remedy}"


@cache
def refused_keys(root: type[BaseModel]) -> Mapping[str, RefusedKey]:
    """The table's keys that this schema would have."""
    lines = _TABLE.read_text(encoding="utf-8").splitlines()[1:]
    rows = {
        key: RefusedKey(tuple(json.loads(values)), remedy) for key, values, remedy in (x.split("\t") for x in lines)
    }
    sections = field_map(root)
    return {
        key: row
        for key, row in rows.items()
        if key.split(".")[0] in sections and ("eval" not in sections or key.startswith(_OF_EVALUATION))
    }


def names_below(root: type[BaseModel], path: Sequence[str]) -> set[str]:
    """The names of the table's keys, and of its sections, directly under a path."""
    prefix = "".join(f"{part}." for part in path if not part.isdigit())
    return {key.removeprefix(prefix).split(".")[0] for key in refused_keys(root) if key.startswith(prefix)}


def is_refused_key(root: type[BaseModel], path: Sequence[str]) -> bool:
    """Whether the table has the key, or a section of this name."""
    return path[-1] in names_below(root, path[:-1])


def take_out(root: type[BaseModel], tree: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The tree without the table's keys; of these, those at a value that is not accepted, and that value; keys of the
    table's own sections that nobody knows."""
    found, refused = tree, {}
    for path, row in ((path, row) for key, row in refused_keys(root).items() for path in _places(tree, key.split("."))):
        value = lookup(tree, path)
        if value is not None:
            found = without(found, path)
            if value[0] not in row.values:
                refused[".".join(path)] = (value[0], row.rule)
    unknown: dict[str, Any] = {}
    for path in _own_sections(root):
        rest = lookup(found, path)
        if rest is not None:
            unknown |= flatten(rest[0], ".".join(path)) if rest[0] != {} else {}
            found = without(found, path)
    return found, refused, unknown


def _places(tree: Any, path: Sequence[str]) -> Iterator[Sequence[str]]:
    """Where a key of the table may stand: at its path, or in each element of a list on the way."""
    for end in range(1, len(path)):
        (node,) = lookup(tree, path[:end]) or (None,)
        if isinstance(node, list):
            yield from ((*path[:end], str(number), *path[end:]) for number in range(len(node)))
            return
    yield path


@cache
def _own_sections(root: type[BaseModel]) -> tuple[tuple[str, ...], ...]:
    """Sections of which the schema has nothing, the innermost first."""
    parents = {tuple(key.split(".")[:end]) for key in refused_keys(root) for end in range(1, key.count(".") + 1)}
    return tuple(sorted((path for path in parents if section_at(root, path) is None), key=len, reverse=True))
