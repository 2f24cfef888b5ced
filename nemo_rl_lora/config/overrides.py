"""Command-line overrides in Hydra's grammar, applied to a plain tree.

`a.b=c` changes a key that the tree or the schema has, `+a.b=c` adds one that the tree has not, `++a.b=c` does either,
`~a.b` deletes. Values keep their interpolations: they are resolved with the tree, afterwards. Whether the result is
valid is the schema's business.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from pydantic import BaseModel

from nemo_rl_lora.config.errors import ConfigError, not_mappings, show, unknown_key
from nemo_rl_lora.config.layers import COMMAND_LINE, Tracked
from nemo_rl_lora.config.refused_keys import is_refused_key
from nemo_rl_lora.config.schema import types_at
from nemo_rl_lora.config.tree import flatten, lookup, with_value, without

_GRAMMAR = "Write key=value, +key=value, ++key=value or ~key"
_HOME = re.compile(r"(\+{0,2}[\w.]+)=(~/[^\"\\]*)")


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str], root: type[BaseModel]) -> dict[str, Any]:
    """A new tree with the overrides applied in order. ConfigError where one does not parse or does not fit."""
    for text in overrides:
        tree = _apply(tree, _parsed(text), root)
        if problems := not_mappings(root, tree):
            raise ConfigError("\n".join(problems))
    return tree


def overridden(tracked: Tracked, overrides: Sequence[str], root: type[BaseModel]) -> Tracked:
    """The overrides applied as the last layer. What `~key` deletes is of no layer any more."""
    tree = apply_overrides(tracked.tree, overrides, root)
    written = set[str]()
    for override in map(_parsed, overrides):
        key = override.key_or_group
        written |= {key} if override.is_delete() else flatten(override.value(), key).keys()
    keys = [
        key
        for key, value in flatten(tree).items()
        if key in written or (isinstance(value, list) and any(name.startswith(f"{key}.") for name in written))
    ]
    return Tracked(tree, tracked.layers.restricted_to(flatten(tree)).with_layer(COMMAND_LINE, keys))


def _parsed(text: str) -> Override:
    in_home = _HOME.fullmatch(text)  # the shell expands no ~ within a word, and the grammar has none in a value
    try:
        override = OverridesParser.create().parse_override('{}="{}"'.format(*in_home.groups()) if in_home else text)
    except HydraException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{text}: this override cannot be read ({reason}). {_quoted(text) or _GRAMMAR}.") from error
    if not override.key_or_group:
        raise ConfigError(f"{text}: this override names no key. {_GRAMMAR}.")
    if override.package is not None:
        raise ConfigError(f"{text}: overrides have no package ('@'). {_GRAMMAR}.")
    if override.is_sweep_override():
        key, _, value = text.partition("=")
        raise ConfigError(f"{text}: one run takes one value. For a list write {key}=[{value}].")
    return override


def _quoted(text: str) -> str | None:
    """How to write an override whose value the grammar does not take as it is; None where that is not the fault."""
    key, _, value = text.partition("=")
    if not re.fullmatch(r"\+{0,2}[\w.]+", key) or not value or value[0] in "[{" or {'"', "'"} & set(value):
        return None
    return f"Put the value in quotes of its own: '{key}=\"{value}\"'"


def _apply(tree: dict[str, Any], override: Override, root: type[BaseModel]) -> dict[str, Any]:
    path = tuple(override.key_or_group.split("."))
    found = lookup(tree, path)
    present, current = found is not None, found[0] if found else None
    value = override.value()
    if override.is_delete():
        if not present:
            raise ConfigError(f"~{'.'.join(path)}: there is nothing to delete. {_neighbours(tree, path)}")
        if value is not None and value != current:
            raise ConfigError(
                f"~{'.'.join(path)}={show(value)}: the value is {show(current)}. Leave the value out to delete it."
            )
        return without(tree, path)
    if override.is_add() and present and not isinstance(value, (Mapping, list)):
        raise ConfigError(
            f"+{'.'.join(path)}={show(value)}: the key exists, with the value {show(current)}. "
            "Leave the '+' out to change it, or write '++'."
        )
    is_change = not (override.is_add() or override.is_force_add())
    if is_change and not present and not types_at(root, path) and not is_refused_key(root, path):
        raise ConfigError(unknown_key(root, path, show(value)))
    _check_indices(tree, path, show(value))
    return with_value(tree, path, value)


def _check_indices(tree: Any, path: tuple[str, ...], value: str) -> None:
    """ConfigError where the path leads past the end of a list."""
    for position, key in enumerate(path):
        if isinstance(tree, list) and not (key.isdigit() and int(key) < len(tree)):
            place = ".".join(path[:position])
            raise ConfigError(
                f"{'.'.join(path)}={value}: {place} is a list of {len(tree)} elements, counted from 0. "
                f"Give the whole list: {place}=[...]."
            )
        (tree,) = lookup(tree, (key,)) or (None,)


def _neighbours(tree: Mapping[str, Any], path: tuple[str, ...]) -> str:
    """What stands beside the path, for an error."""
    while path:
        path = path[:-1]
        (node,) = lookup(tree, path) or (None,)
        if isinstance(node, Mapping):
            return f"Keys of {'.'.join(path) or 'the top level'}: {', '.join(sorted(map(str, node)))}."
    return "The configuration is empty."
