"""Look at configurations: what a file means once it is expanded, how two files differ, what an adapter is here."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_rl_lora.config.differences import ABSENT, differences
from nemo_rl_lora.config.errors import ConfigError, show
from nemo_rl_lora.config.load import algorithm_of, load_config, resolved_yaml
from nemo_rl_lora.config.translate import translate_file


def add_expand(subparsers: Any) -> None:
    """`expand FILE [overrides]`: print the validated configuration with every default filled in."""
    parser = subparsers.add_parser("expand", help="print a configuration with everything inherited and filled in")
    parser.add_argument("file", type=Path)
    parser.add_argument("overrides", nargs="*", help="a.b=c, +a.b=c, ++a.b=c or ~a.b")
    parser.set_defaults(command=expand)


def expand(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.file, arguments.overrides, algorithm_of(arguments.file))
    sys.stdout.write(resolved_yaml(config))
    return 0


def add_compare(subparsers: Any) -> None:
    """`compare LEFT RIGHT`: print the keys whose values differ after expansion."""
    parser = subparsers.add_parser("compare", help="print the keys in which two configurations differ")
    parser.add_argument("left", type=Path)
    parser.add_argument("right", type=Path)
    parser.set_defaults(command=compare)


def compare(arguments: argparse.Namespace) -> int:
    left, right = (
        load_config(file, [], algorithm_of(file)).model_dump(by_alias=True)
        for file in (arguments.left, arguments.right)
    )
    for key, (before, after) in differences(left, right).items():
        if before is ABSENT:
            sys.stdout.write(f"+ {key}: {show(after)}\n")
        elif after is ABSENT:
            sys.stdout.write(f"- {key}: {show(before)}\n")
        else:
            sys.stdout.write(f"~ {key}: {show(before)} -> {show(after)}\n")
    return 0


def add_translate(subparsers: Any) -> None:
    """`translate FILE`: print the adapter of a NeMo RL, PEFT, VeOmni, verl or theseus file as a policy.lora block."""
    parser = subparsers.add_parser("translate", help="print the adapter that a file describes as a policy.lora block")
    parser.add_argument("file", type=Path, help="YAML of NeMo RL, VeOmni, verl or theseus, or an adapter_config.json")
    parser.set_defaults(command=print_translation)


def print_translation(arguments: argparse.Namespace) -> int:
    sys.stdout.write(translate_file(arguments.file))
    return 0


COMMANDS = (add_expand, add_compare, add_translate)


def config_main(doc: str | None, argv: Sequence[str] | None = None, program: str | None = None) -> int:
    """Exit code 0, or 2 for a configuration error with one line for each mistake."""
    parser = argparse.ArgumentParser(
        prog=program, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    subparsers = parser.add_subparsers(required=True)
    for add in COMMANDS:
        add(subparsers)
    arguments = parser.parse_args(argv)
    try:
        return arguments.command(arguments)
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 2
