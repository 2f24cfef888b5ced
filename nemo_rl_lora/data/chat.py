"""From messages to text: prompt file, system prompt, chat template; and from a question to a prompt's token ids.

A rendered text gets no special token that the template does not write.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from nemo_rl_lora.config.data import DatasetDefaults
from nemo_rl_lora.config.errors import show
from nemo_rl_lora.data.sources import value_of
from nemo_rl_lora.shipped_files import local_places

Message = Mapping[str, Any]  # role, content, and what else the template reads
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptFormat:
    """How a question is put: `pattern` has one `{}`."""

    pattern: str
    system: str | None
    key: str  # of the dataset in the configuration, for messages

    def user_text(self, question: str) -> str:
        return self.pattern.format(question)

    def asked(self, question: str) -> list[Message]:
        """The messages of a question."""
        return self.with_system([{"role": "user", "content": self.user_text(question)}])

    def with_system(self, messages: list[Message]) -> list[Message]:
        """The messages with the system prompt first, where they have none of their own."""
        if self.system is None or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self.system}, *messages]


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
    texts = [
        render(tokenizer, format_.asked(question), add_generation_prompt=True, place=format_.key)
        for question in questions
    ]
    return [tuple(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def render(tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool, place: str) -> str:
    """The text of the messages. Raises ValueError where the chat template refuses them; `place` is whose they are."""
    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except jinja2.TemplateError as error:
        roles = " and ".join(message["role"] for message in messages)
        raise ValueError(
            f"policy.tokenizer.chat_template: cannot render the roles {roles} of {place} ({error}). "
            f"Change the template, or set system_prompt_file to null if it takes no system message."
        ) from error


def chat_messages(raw: Mapping[str, Any], name: str, place: str, key: str) -> list[Message]:
    """The messages that a row has under `name`. ValueError where their form is wrong."""
    value = value_of(raw, name, place, key)
    if not isinstance(value, list) or not value:
        raise ValueError(f"{key}: {place} has {name}={show(value)}, and a list of messages is needed. Correct the row.")
    for number, message in enumerate(value):
        shown = f"{key}: message {number} of {place}"
        if not isinstance(message, dict):
            raise ValueError(
                f"{shown} is {show(message)}, and an object with role and content is needed. Correct the row."
            )
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(f"{shown} has role={show(role)}, and there are {', '.join(ROLES)}. Correct the row.")
        if not isinstance(content, str) or (role == "assistant" and not content.strip()):
            raise ValueError(f"{shown} ({role}) has content={show(content)}, and a text is needed. Correct the row.")
    return value


def _read(name: str, shown: str) -> str:
    places = local_places(name)
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
