"""From a question to token ids: prompt file, system prompt, chat template, tokenizer.

The text ends with the header of the assistant's turn, and gets no special token that the template does not write.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from nemo_rl_lora.config.data import DatasetDefaults

_REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptFormat:
    """How a question is put: `pattern` has one `{}`."""

    pattern: str
    system: str | None
    key: str  # of the dataset in the configuration, for messages

    def user_text(self, question: str) -> str:
        return self.pattern.format(question)


def load_format(section: DatasetDefaults, key: str) -> PromptFormat:
    """Read prompt_file and system_prompt_file. Raises ValueError for a missing file or not exactly one `{}`."""
    pattern, system = "{}", None
    if section.prompt_file is not None:
        shown = f"{key}.prompt_file={section.prompt_file!r}"
        pattern = _read(section.prompt_file, shown)
        _check_pattern(pattern, shown)
    if section.system_prompt_file is not None:
        system = _read(section.system_prompt_file, f"{key}.system_prompt_file={section.system_prompt_file!r}")
    return PromptFormat(pattern=pattern, system=system, key=key)


def encode(tokenizer: Any, format_: PromptFormat, questions: Sequence[str]) -> list[tuple[int, ...]]:
    """Token ids of each question. Raises ValueError where the chat template refuses the messages."""
    texts = [_render(tokenizer, format_, question) for question in questions]
    return [tuple(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def _render(tokenizer: Any, format_: PromptFormat, question: str) -> str:
    messages = [{"role": "user", "content": format_.user_text(question)}]
    if format_.system is not None:
        messages.insert(0, {"role": "system", "content": format_.system})
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except jinja2.TemplateError as error:
        roles = " and ".join(message["role"] for message in messages)
        raise ValueError(
            f"policy.tokenizer.chat_template: cannot render the roles {roles} of {format_.key} ({error}). "
            f"Change the template, or set system_prompt_file to null if it takes no system message."
        ) from error


def _read(name: str, shown: str) -> str:
    """A path is relative to the working directory, then to the repository: recipes name files of the repository."""
    path = Path(name).expanduser()
    places = [path] if path.is_absolute() else [Path.cwd() / path, _REPOSITORY / path]
    for place in places:
        if place.is_file():
            return place.read_text(encoding="utf-8").rstrip("\n")
    raise ValueError(f"{shown}: there is no such file (looked for {' and '.join(map(str, places))}). Correct it.")


def _check_pattern(pattern: str, shown: str) -> None:
    remedy = "Write {} once, where the question goes, and double any other brace: {{ }}."
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(pattern) if field is not None]
    except ValueError as error:
        raise ValueError(f"{shown}: its braces do not match ({error}). {remedy}") from error
    if fields not in ([""], ["0"]):
        found = ", ".join("{" + field + "}" for field in fields) or "none"
        raise ValueError(f"{shown}: one placeholder {{}} is needed, found {found}. {remedy}")
