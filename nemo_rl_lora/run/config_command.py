"""Look at configurations: what a file means once it is expanded, how two files differ, what an adapter is here."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nemo_rl_lora.config.differences import ABSENT, differences
from nemo_rl_lora.config.errors import ConfigError, show
from nemo_rl_lora.config.load import algorithm_of, load_config, resolved_yaml
from nemo_rl_lora.config.translate import translate_file
from nemo_rl_lora.run.control import EXIT_CONFIG, EXIT_OK


def declare(parser: argparse.ArgumentParser) -> None:
    """Three commands, each with its files."""
    commands = parser.add_subparsers(required=True)
    add = commands.add_parser("expand", help="print a configuration with everything inherited and filled in")
    add.add_argument("file", type=Path)
    add.add_argument("overrides", nargs="*", help="a.b=c, +a.b=c, ++a.b=c or ~a.b")
    add.set_defaults(command=expand)
    add = commands.add_parser("compare", help="print the keys in which two configurations differ")
    add.add_argument("left", type=Path)
    add.add_argument("right", type=Path)
    add.set_defaults(command=compare)
    add = commands.add_parser("translate", help="print another tool's run, or an adapter, as a configuration")
    add.add_argument("file", type=Path, help="YAML of NeMo RL, VeOmni, verl or theseus, or an adapter_config.json")
    add.add_argument("--output", type=Path, help="write it to this new file instead, and say what is left to do")
    add.set_defaults(command=translate)


def main(arguments: argparse.Namespace) -> int:
    """Print; 2 for a configuration error, with one line for each mistake."""
    try:
        sys.stdout.write(arguments.command(arguments))
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_CONFIG
    return EXIT_OK


def expand(arguments: argparse.Namespace) -> str:
    """The validated configuration, with every default filled in."""
    return resolved_yaml(load_config(arguments.file, arguments.overrides, algorithm_of(arguments.file)))


def compare(arguments: argparse.Namespace) -> str:
    """The keys whose values differ after expansion, a line each."""
    left, right = (
        load_config(file, [], algorithm_of(file)).model_dump(by_alias=True)
        for file in (arguments.left, arguments.right)
    )
    lines = []
    for key, (before, after) in differences(left, right).items():
        if before is ABSENT:
            lines.append(f"+ {key}: {show(after)}\n")
        elif after is ABSENT:
            lines.append(f"- {key}: {show(before)}\n")
        else:
            lines.append(f"~ {key}: {show(before)} -> {show(after)}\n")
    return "".join(lines)


def translate(arguments: argparse.Namespace) -> str:
    """A run of VeOmni, verl or theseus as a configuration, or the adapter of any tool's file as a policy.lora block."""
    text, output = translate_file(arguments.file), arguments.output
    if output is None:
        return text
    try:
        with output.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise ConfigError(f"--output={str(output)!r}: exists. Name another file, or remove it.") from error
    except OSError as error:
        raise ConfigError(
            f"--output={str(output)!r}: cannot be written: {error.strerror}. Name another file."
        ) from error
    sys.stderr.writelines(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    return f"{output} is written.\n"
