"""For every leaf of a configuration's schema: another value that the schema accepts, or the word that it has none.

`flippable_leaves` is what a test has to show an effect of; `refused_leaves` are the keys whose every other value
tried here is refused by name when the configuration is loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError

from nemo_rl_lora.config.schema import alternatives, leaves

NUMBERS = (1, 2, 0, 3, 0.5, 0.25, 7, 64, 128, 10_000, -1)
TEXTS = ("other", "xavier", "kaiming", "float32", "train:reward", "00:01:00:00", "none")


def flippable_leaves(config: BaseModel) -> list[tuple[str, Any]]:
    """(dotted key, a value other than the configuration's that loads), for every leaf that has one."""
    return [(key, value) for key, value in _other_values(config) if value is not None]


def refused_leaves(config: BaseModel) -> list[str]:
    """The keys for which no other value loads: those that are fixed, and those that another key determines."""
    return [key for key, value in _other_values(config) if value is None]


def _other_values(config: BaseModel) -> Iterator[tuple[str, Any]]:
    tree = config.model_dump(by_alias=True)
    for path, field in leaves(type(config)):
        current = _get(tree, path)
        candidates = [c for c in _candidates(field.annotation, current) if c != current or type(c) is not type(current)]
        yield ".".join(path), next((c for c in candidates if _loads(config, tree, path, c)), None)


def _candidates(annotation: Any, current: Any) -> Iterator[Any]:
    """Values to try, the likely ones first."""
    for kind in alternatives(annotation):
        origin = get_origin(kind)
        if origin is Literal:
            yield from (value for value in get_args(kind) if value != current)
        elif kind is bool:
            yield not current
        elif kind in (int, float):
            if isinstance(current, (int, float)) and not isinstance(current, bool):
                yield from (current + 1, current * 2, current / 2, current - 1)
            yield from NUMBERS
        elif kind is str:
            yield from TEXTS
        elif origin in (list, tuple):
            yield from ([*(current or ()), "q_proj"], [1], [7], ["other"], [0.5, 0.6])
        elif origin is dict or kind is dict:
            yield from ({"other": 1}, {"other": "1"})


def _loads(config: BaseModel, tree: dict[str, Any], path: tuple[str, ...], value: Any) -> bool:
    changed = copy.deepcopy(tree)
    node = changed
    for key in path[:-1]:
        if node.get(key) is None:
            node[key] = {}
        node = node[key]
        if not isinstance(node, dict):
            return False
    node[path[-1]] = value
    try:
        return type(config).model_validate(changed) != config
    except ValidationError:
        return False


def _get(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree
