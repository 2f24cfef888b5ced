"""Look at configurations: what a file means once it is expanded, and how two files differ.

uv run tools/config_cli.py expand FILE [overrides]
uv run tools/config_cli.py compare LEFT RIGHT
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nemo_rl_lora.config.errors import ConfigError, show
from nemo_rl_lora.config.loader import algorithm_of, load_config, resolved_yaml

Command = Callable[[argparse.Namespace], int]


def add_expand(subparsers: Any) -> None:
    """`expand FILE [overrides]`: print the validated configuration with every default filled in."""
    parser = subparsers.add_parser("expand", help="print a configuration with everything inherited and filled in")
    parser.add_argument("file", type=Path)
    parser.add_argument("overrides", nargs="*", help="a.b=c, +a.b=c, ++a.b=c or ~a.b")
    parser.set_defaults(command=expand)


def expand(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.file, arguments.overrides, algorithm_of(arguments.file))
    print(resolved_yaml(config), end="")
    return 0


def add_compare(subparsers: Any) -> None:
    """`compare LEFT RIGHT`: print the keys whose values differ after expansion."""
    parser = subparsers.add_parser("compare", help="print the keys in which two configurations differ")
    parser.add_argument("left", type=Path)
    parser.add_argument("right", type=Path)
    parser.set_defaults(command=compare)


def compare(arguments: argparse.Namespace) -> int:
    left, right = _values(arguments.left), _values(arguments.right)
    for key in sorted(left.keys() | right.keys()):
        if key not in right:
            print(f"- {key}: {show(left[key])}")
        elif key not in left:
            print(f"+ {key}: {show(right[key])}")
        elif left[key] != right[key]:
            print(f"~ {key}: {show(left[key])} -> {show(right[key])}")
    return 0


def _values(file: Path) -> dict[str, Any]:
    """The values of a validated configuration by dotted key."""
    return flattened(load_config(file, [], algorithm_of(file)).model_dump(by_alias=True))


def flattened(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree as dotted keys; empty mappings are values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


COMMANDS = (add_expand, add_compare)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 for a configuration error with one line for each mistake."""
    parser = argparse.ArgumentParser(prog="config_cli.py", description=(__doc__ or "").splitlines()[0])
    subparsers = parser.add_subparsers(required=True)
    for add in COMMANDS:
        add(subparsers)
    arguments = parser.parse_args(argv)
    try:
        return arguments.command(arguments)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
