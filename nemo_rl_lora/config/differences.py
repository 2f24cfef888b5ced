"""In which keys two configurations differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ABSENT = "<absent>"
"""Stands for a key that a configuration does not have."""


def differences(left: Mapping[str, Any], right: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """By dotted key, what stands left and right where the two are not equal; ABSENT where one has no such key."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted(left.keys() | right.keys()):
        before, after = left.get(key, ABSENT), right.get(key, ABSENT)
        if isinstance(before, dict) and isinstance(after, dict):
            found |= differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found[f"{prefix}{key}"] = (before, after)
    return found
