"""The files that come with the package: base files, quick starts and recipes, and the data, prompts and rewards that
they name as `examples/...`.

In a checkout they are its own; a wheel carries them inside the package (pyproject.toml, force-include).
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

_PACKAGE = Path(str(files("nemo_rl_lora"))).resolve()
_IN_WHEEL = _PACKAGE / "_shipped"

SHIPPED_ROOT = _IN_WHEEL if _IN_WHEEL.is_dir() else _PACKAGE.parent
"""The directory that holds `examples`."""


def local_places(name: str) -> list[Path]:
    """Where a path may be: relative ones below the working directory, then below SHIPPED_ROOT."""
    path = Path(name).expanduser()
    return [path] if path.is_absolute() else list(dict.fromkeys([Path.cwd() / path, SHIPPED_ROOT / path]))


def existing(path: Path, name: str) -> Path:
    """`path`, or where there is none the shipped file that `name` names; `path` where neither is a file."""
    shipped = SHIPPED_ROOT / name
    return shipped if not path.exists() and shipped.is_file() else path
