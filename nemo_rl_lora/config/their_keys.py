"""The keys of another tool's file, each read as what it has to be, by a reader that knows which were read.

Contract: null is the tool's default; a number or a switch may be written as text; anything else that is not of the
kind is a ValueError with the file's own key, `<key>=<value>: must be ...`. `nested` and `references_of` are for the one
place where documents are read (config/load.py). No file is read here.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any

import yaml

from nemo_rl_lora.config.errors import show
from nemo_rl_lora.config.tree import flatten, with_value
from nemo_rl_lora.scalars import as_number, as_switch

EMPTY: tuple[Any, ...] = (None, {}, [])
_BOUNDS: dict[str, tuple[Callable[[float, float], bool], str]] = {
    "least": (operator.ge, "of at least"),
    "above": (operator.gt, "above"),
    "most": (operator.le, "of at most"),
    "below": (operator.lt, "below"),
}
_REFERENCE = re.compile(r"\$\{(?:[\w.]+:)?\s*([A-Za-z_][\w.]*)")


class Theirs:
    """A document of another tool. `referenced`: the keys to which other places of the file refer."""

    def __init__(self, document: Mapping[str, Any], referenced: Collection[str] = ()) -> None:
        self.document = document
        self._referenced = referenced
        self._values = flatten(document)
        self._read = set[str]()

    def take(self, *keys: str, default: Any = None) -> Any:
        """The value of the first of these keys that is written and not null, else the tool's default."""
        found = default
        for key in reversed(keys):
            self.mark(key)
            if (value := self._at(key)) is not None:
                found = value
        return found

    def take_number(self, *keys: str, default: float | None = None, whole: bool = False, **bounds: float) -> Any:
        """The same of a number within bounds, as `number` has them."""
        value = self.take(*keys, default=default)
        return None if value is None else number(self.written(*keys), value, whole=whole, **bounds)

    def take_count(self, *keys: str, default: int | None = None, least: int = 1) -> Any:
        """The same of a whole number, from 1 on."""
        return self.take_number(*keys, default=default, least=least, whole=True)

    def take_text(self, *keys: str, default: str | None = None) -> Any:
        """The same of a text that is not empty."""
        value = self.take(*keys, default=default)
        if value is not None and (not isinstance(value, str) or not value):
            raise wrong(self.written(*keys), value, "text")
        return value

    def take_switch(self, *keys: str, default: bool | None = None) -> Any:
        """The same of true or false."""
        value = as_switch(self.take(*keys, default=default))
        if value is not None and not isinstance(value, bool):
            raise wrong(self.written(*keys), value, "true or false")
        return value

    def take_mapping(self, *keys: str) -> Any:
        """The same of keys below the key."""
        value = self.take(*keys)
        if value is not None and not isinstance(value, Mapping):
            raise wrong(self.written(*keys), value, "a mapping")
        return value

    def take_texts(self, *keys: str) -> list[str]:
        """The same of a text, or a list of texts; none where nothing is written."""
        value = self.take(*keys, default=[])
        texts = value if isinstance(value, list) else [value]
        if not all(isinstance(each, str) and each for each in texts):
            raise wrong(self.written(*keys), value, "text, or a list of texts")
        return texts

    def take_betas(self, *keys: str, default: tuple[float, float]) -> list[float]:
        """The same of an Adam's two decay rates."""
        value = self.take(*keys, default=list(default))
        if not isinstance(value, list) or len(value) != 2:
            raise wrong(self.written(*keys), value, "a list of two numbers")
        return [number(f"{self.written(*keys)}.{n}", each, least=0, below=1) for n, each in enumerate(value)]

    def written(self, *keys: str) -> str:
        """The first of these keys that the file has, or the first of all."""
        return next((key for key in keys if self._at(key) is not None), keys[0])

    def has(self, key: str) -> bool:
        """Whether something stands at or below a key that is not null."""
        return self._at(key) not in EMPTY

    def keys(self, *globs: str) -> list[str]:
        """The keys of values that one of these globs matches."""
        return [key for key in self._values if any(fnmatchcase(key, glob) for glob in globs)]

    def mark(self, key: str) -> None:
        """Count the key, and what stands below it, as read."""
        self._read |= {name for name in self._values if name == key or name.startswith(f"{key}.")}

    def unread(self) -> dict[str, Any]:
        """What nobody asked for. A section that no tool knows, and that only holds what others refer to, is left out:
        its values stand where they are referred to."""
        known = {_section(key) for key in self._read}
        return {
            key: value
            for key, value in self._values.items()
            if key not in self._read and (_section(key) in known or not self._is_referenced(key))
        }

    def switched_off(self) -> list[str]:
        """The switches `enable` and `enabled` that are false: what stands beside them has no effect there."""
        return [k for k, value in self._values.items() if value is False and k.endswith((".enable", ".enabled"))]

    def _is_referenced(self, key: str) -> bool:
        return any(key == other or key.startswith(f"{other}.") for other in self._referenced)

    def _at(self, key: str) -> Any:
        node: Any = self.document
        parts = key.split(".")
        for n, part in enumerate(parts):
            if not isinstance(node, Mapping | str | None):
                raise wrong(".".join(parts[:n]), node, "a mapping")
            node = node.get(part) if isinstance(node, Mapping) else None
        return node


def number(key: str, value: Any, *, whole: bool = False, **bounds: float) -> Any:
    """The value at this key of their file, as a number within bounds, which are named as in _BOUNDS."""
    found = as_number(value)
    is_number = isinstance(found, int if whole else int | float) and not isinstance(found, bool)
    if is_number and math.isfinite(found) and all(_BOUNDS[name][0](found, bound) for name, bound in bounds.items()):
        return found
    said = " and ".join(f"{_BOUNDS[name][1]} {bound:g}" for name, bound in bounds.items())
    raise wrong(key, value, f"a {'whole ' if whole else ''}number{f' {said}' if said else ''}")


def wrong(key: str, value: Any, kind: str) -> ValueError:
    """What is said of a value that is not of the kind."""
    return ValueError(f"{key}={show(value)}: must be {kind}. Correct it.")


def nested(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document with keys such as `training/batch_size` as keys below keys."""
    tree: dict[str, Any] = {}
    for key, value in document.items():
        tree = with_value(tree, str(key).split("/"), nested(value) if isinstance(value, Mapping) else value)
    return tree


def references_of(text: str) -> frozenset[str]:
    """The dotted keys of a YAML text to which another place of it refers, by `${key}` or as an anchor."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return frozenset()
    seen, found = dict[int, str](), set(_REFERENCE.findall(text))

    def visit(node: yaml.Node | None, key: str) -> None:
        if node is not None and id(node) in seen:
            found.add(seen[id(node)])
        elif node is not None:
            seen[id(node)] = key
            for name, below in node.value if isinstance(node, yaml.MappingNode) else ():
                visit(below, f"{key}.{_dotted(name)}" if key else _dotted(name))
            for number_of_one, below in enumerate(node.value if isinstance(node, yaml.SequenceNode) else ()):
                visit(below, f"{key}.{number_of_one}")

    visit(root, "")
    return frozenset(found)


def _dotted(name: yaml.Node) -> str:
    return str(name.value).replace("/", ".")


def _section(key: str) -> str:
    return key.partition(".")[0]
