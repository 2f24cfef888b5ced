"""Who set which key: the layer of a configuration that wrote it last.

Layers in their order: the base files and the schema's defaults (layer 0), quick starts, the files of the user, each
after what it inherits, and the command line. What the user set is honoured or refused by name; what was only inherited,
from a base file or a quick start, gives way in silence. A layer is named by its file.

A resolved file (`config.yaml`) records the layers under `set_by`, so that it loads again to the same decisions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from nemo_rl_lora.config.errors import ConfigError, show
from nemo_rl_lora.config.tree import flatten, merged

SET_BY = "set_by"
COMMAND_LINE = "command line"


@dataclass(frozen=True, slots=True)
class Layer:
    """A file or the command line, with the dotted keys that it wrote last. A list counts as one value."""

    name: str
    is_users: bool  # false: a quick start, whose values are inherited
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Layers:
    """The layers above the base files, the earliest first. A key that none of them has is of layer 0."""

    layers: tuple[Layer, ...] = field(default=(), compare=False)  # equal configurations are those of equal values
    without_effect: tuple[str, ...] = field(default=(), compare=False)  # keys of the user that change nothing here

    def layer_of(self, key: str) -> int:
        """The number of the last layer that wrote the key or a part of it."""
        found = (n for n, layer in enumerate(self.layers, 1) if any(_touches(written, key) for written in layer.keys))
        return max(found, default=0)

    def is_set(self, key: str) -> bool:
        """Whether the user wrote the key or a part of it."""
        return any(layer.is_users and any(_touches(k, key) for k in layer.keys) for layer in self.layers)

    def set_keys(self, prefix: str) -> list[str]:
        """The keys under a prefix that the user wrote."""
        return [
            key
            for layer in self.layers
            if layer.is_users
            for key in layer.keys
            if key == prefix or key.startswith(f"{prefix}.")
        ]

    def with_layer(self, name: str, keys: list[str], *, is_users: bool = True) -> Layers:
        """These layers with one more that wrote the keys."""
        below = (replace(layer, keys=tuple(k for k in layer.keys if k not in set(keys))) for layer in self.layers)
        return _without_empty((*below, Layer(name, is_users, tuple(keys))))

    def restricted_to(self, keys: Mapping[str, Any] | set[str]) -> Layers:
        """Only what was written at these keys."""
        return _without_empty(replace(layer, keys=tuple(k for k in layer.keys if k in keys)) for layer in self.layers)

    def without(self, keys: Iterable[str]) -> Layers:
        """These layers as if none had written these keys, or a part of one."""
        gone = list(keys)
        return _without_empty(
            replace(layer, keys=tuple(k for k in layer.keys if not any(k == g or k.startswith(f"{g}.") for g in gone)))
            for layer in self.layers
        )

    def as_record(self) -> list[dict[str, Any]]:
        """Plain data, for a resolved file."""
        return [
            {"layer": layer.name, **({} if layer.is_users else {"inherited": True}), "keys": list(layer.keys)}
            for layer in self.layers
        ]


def layers_from_record(record: Any, place: str) -> Layers:
    """The inverse of `as_record`. ConfigError where it is no such record."""
    try:
        found = [
            Layer(str(item["layer"]), not item.get("inherited", False), tuple(map(str, item["keys"])))
            for item in record
        ]
    except (TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{SET_BY}={show(record)}: {place} records here who set which key, as a list of {{layer, keys}}. Leave it "
            f"as it was written, or write {SET_BY}: [] where nothing in the file counts as set by you."
        ) from error
    return _without_empty(found)


@dataclass(frozen=True, slots=True)
class Tracked:
    """A tree, unresolved, and who wrote its leaves."""

    tree: dict[str, Any]
    layers: Layers = Layers()


def overlaid(below: Tracked, above: Tracked) -> Tracked:
    """`above` merged over `below`."""
    tree = merged(below.tree, above.tree)
    written = flatten(above.tree).keys()
    kept = below.layers.restricted_to(flatten(tree).keys() - written)
    return Tracked(tree, Layers((*kept.layers, *above.layers.layers)))


def _touches(written: str, key: str) -> bool:
    return written == key or written.startswith(f"{key}.") or key.startswith(f"{written}.")


def _without_empty(layers: Any) -> Layers:
    return Layers(tuple(layer for layer in layers if layer.keys))
