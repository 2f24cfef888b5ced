"""Numbers and switches as people write them, and bytes as they read them. One rule, for configurations and for the
files of other tools.

A whole number may be written `8`, `8.0` or `1e1`, and a number or a switch as text (`"8"`, `"1e-5"`, `"true"`), which
is what an environment variable gives. `true` is no number, and neither 1 nor "yes" is a switch: those stay as they are,
for the reader of the value to refuse.
"""

from __future__ import annotations

import re
from typing import Any

_WHOLE = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_SWITCHES = {"true": True, "false": False}


def as_number(value: Any) -> Any:
    """Text that reads as a number, as that number; a number without a fraction as an int. Anything else as it is."""
    if isinstance(value, str):
        text = value.strip()
        value = int(text) if _WHOLE.fullmatch(text) else float(text) if _NUMBER.fullmatch(text) else value
    return int(value) if isinstance(value, float) and value.is_integer() else value


def as_switch(value: Any) -> Any:
    """The text "true" or "false", in any case, as the switch. Anything else as it is."""
    return _SWITCHES.get(value.strip().lower(), value) if isinstance(value, str) else value


def scaled_bytes(num_bytes: float) -> str:
    """`790.0 MiB`, in the largest unit of which there is one; whole bytes below 1 KiB."""
    unit = "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if num_bytes < 1024:
            break
        num_bytes, unit = num_bytes / 1024, larger
    return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:,.1f} {unit}"
