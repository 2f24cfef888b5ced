"""Plain trees of mappings, lists and values, as YAML has them. Keys below keys are written with dots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value. Lists, and mappings without keys, are values."""
    if isinstance(tree, Mapping) and "_override_" in tree:
        tree = {key: value for key, value in tree.items() if key != "_override_"}
    if not isinstance(tree, Mapping) or (not tree and prefix):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def merged(base: Mapping[str, Any], update: Mapping[str, Any]) -> dict[str, Any]:
    """`update` over `base`: mappings merge key by key, anything else replaces; `_override_: true` in a mapping of
    `update` replaces the whole mapping."""
    if update.get("_override_") is True:
        return {key: stripped(value) for key, value in update.items() if key != "_override_"}
    result = dict(base)
    for key, value in update.items():
        if key == "_override_":
            continue
        below = result.get(key)
        if isinstance(value, Mapping):
            result[key] = merged(below if isinstance(below, Mapping) else {}, value)
        else:
            result[key] = value
    return result


def stripped(value: Any) -> Any:
    """The value without `_override_` marks."""
    return merged({}, value) if isinstance(value, Mapping) else value


def lookup(tree: Any, path: Sequence[str | int]) -> tuple[Any] | None:
    """What stands at a path, in a tuple of its own; None where there is nothing. Elements of a list go by number."""
    for key in path:
        if isinstance(tree, Mapping) and key in tree:
            tree = tree[key]
        elif isinstance(tree, (list, tuple)) and str(key).isdigit() and int(key) < len(tree):
            tree = tree[int(key)]
        else:
            return None
    return (tree,)


def with_value(node: Any, path: Sequence[str], value: Any) -> Any:
    """A copy of the node with the value at the path; mappings on the way are made where they are missing."""
    if not path:
        if isinstance(node, Mapping) and isinstance(value, Mapping):
            return merged(node, value)
        return stripped(value)
    key, rest = path[0], path[1:]
    if isinstance(node, list):
        return [*node[: int(key)], with_value(node[int(key)], rest, value), *node[int(key) + 1 :]]
    base = dict(node) if isinstance(node, Mapping) else {}
    return {**base, key: with_value(base.get(key), rest, value)}


def without(node: Any, path: Sequence[str]) -> Any:
    """A copy of the node without what stands at the path."""
    key, rest = path[0], path[1:]
    if isinstance(node, list):
        changed = [] if not rest else [without(node[int(key)], rest)]
        return [*node[: int(key)], *changed, *node[int(key) + 1 :]]
    if not rest:
        return {name: value for name, value in node.items() if name != key}
    return {**node, key: without(node[key], rest)}


def plain(value: Any) -> Any:
    """Tuples as lists, and text that looks like an interpolation kept as text."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, str):
        return value.replace("${", "\\${")
    return value
