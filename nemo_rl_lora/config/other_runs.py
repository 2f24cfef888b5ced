"""A whole file of VeOmni, verl or theseus as a configuration, by its keys; and what a driver says of one.

Contract: a driver runs such a file as it is where the translation is whole, with nothing left to the user and no key
without a counterpart; otherwise `refusal` has the one command that translates.
"""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from nemo_rl_lora.config.errors import show
from nemo_rl_lora.config.run_draft import RunTranslation
from nemo_rl_lora.config.their_keys import Theirs
from nemo_rl_lora.config.theseus_run import TOOL as THESEUS
from nemo_rl_lora.config.theseus_run import is_theseus, theseus_run
from nemo_rl_lora.config.veomni_run import TOOL as VEOMNI
from nemo_rl_lora.config.veomni_run import is_veomni, veomni_run
from nemo_rl_lora.config.verl_run import TOOL as VERL
from nemo_rl_lora.config.verl_run import is_verl, verl_run
from nemo_rl_lora.lora.other_tools import is_of_another_tool

_TOOLS: tuple[tuple[str, Callable[[Mapping[str, Any]], bool], Callable[[Theirs], RunTranslation]], ...] = (
    (THESEUS, is_theseus, theseus_run),
    (VEOMNI, is_veomni, veomni_run),
    (VERL, is_verl, verl_run),
)
_OWN_SECTIONS = ("policy", "sft", "dpo", "grpo")
_WIDTH = 110
_MAX_REASONS = 3


def tool_of(document: Mapping[str, Any]) -> str | None:
    """Whose whole file a document is, by its keys; None where it is nobody's of these, or this product's own."""
    if any(section in document for section in _OWN_SECTIONS):
        return None
    return next((tool for tool, knows, _ in _TOOLS if knows(document)), None)


def run_of(theirs: Theirs) -> RunTranslation | None:
    """The run of another tool's whole file; None where the document is none.

    NoSuchRunError where there is no such run here, any other ValueError for a mistake in the file.
    """
    found = tool_of(theirs.document)
    return next((translated(theirs) for tool, _, translated in _TOOLS if tool == found), None)


def is_own(document: Mapping[str, Any]) -> bool:
    """Whether a document has a section that only this product's configurations, and NeMo RL's, have. `eval` is
    theseus's too."""
    if any(section in document for section in _OWN_SECTIONS):
        return True
    return "eval" in document and tool_of(document) is None and not is_of_another_tool(document)


def algorithm_of_run(run: RunTranslation) -> str:
    """The driver that the configuration is for."""
    return next(section for section in _OWN_SECTIONS if section != "policy" and section in run.tree)


def refusal(file: Path, run: RunTranslation) -> str:
    """Why a driver does not run this file as it is, and the command that translates it."""
    reasons = [*run.to_decide, *(f"{key}={show(value)} has no counterpart here" for key, value in run.left_out.items())]
    more = f"; and {len(reasons) - _MAX_REASONS} more" if len(reasons) > _MAX_REASONS else ""
    return (
        f"--config={str(file)!r}: is a {run.tool} configuration, which does not run as it is. "
        f"{'; '.join(reasons[:_MAX_REASONS])}{more}. Translate it with: {translate_command(file)}"
    )


def translate_command(file: Path) -> str:
    """The command that writes a translation beside the working directory's files."""
    output = f"{file.stem}_translated.yaml"
    return f"uv run tools/config_cli.py translate {shlex.quote(str(file))} --output {shlex.quote(output)}"


def is_adapter_alone(document: Mapping[str, Any]) -> bool:
    """Whether a document describes an adapter of another tool, and no run."""
    return not is_own(document) and is_of_another_tool(document)


def notes_of(run: RunTranslation) -> list[str]:
    """What a run of the translation says at its start, a line each."""
    quiet = [f"without effect here: {', '.join(run.without_effect)}"] if run.without_effect else []
    return [*run.differences, *quiet]


def as_yaml(file: Path, run: RunTranslation) -> str:
    """The configuration, under comments that say what it does not."""
    sections = (
        ("To decide, and to fill in where it is ???", run.to_decide),
        ("Otherwise here than there", run.differences),
        ("Without a counterpart here", [f"{key}: {show(value)}" for key, value in run.left_out.items()]),
        ("Changes no result here", [", ".join(run.without_effect)] if run.without_effect else []),
    )
    lines = [f"# {file.name}: a {run.tool} configuration, for examples/run_{algorithm_of_run(run)}.py"]
    for title, items in sections:
        lines += [f"# {title}:"] if items else []
        for item in items:
            lines += textwrap.wrap(
                item, _WIDTH, initial_indent="# - ", subsequent_indent="#   ", break_on_hyphens=False
            )
    return "\n".join(lines) + "\n" + yaml.dump(run.tree, Dumper=_PlainDumper, sort_keys=False, width=_WIDTH)


class _PlainDumper(yaml.SafeDumper):
    """YAML without references, in which two keys may have the same list."""

    def ignore_aliases(self, data: Any) -> bool:
        return True
