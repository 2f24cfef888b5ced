"""A stored row, how what stands in it is read, and the two forms of it that are not messages: question and pair.

Pure at import. A wrong row is a ValueError that names the configuration's key and where the row stands.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from nemo_rl_lora.config.errors import show

if TYPE_CHECKING:
    from nemo_rl_lora.config.data import DatasetConfig

Message = Mapping[str, Any]  # role, content, and what else the template reads
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptFormat:
    """How a question is put: `pattern` has one `{}`."""

    pattern: str = "{}"
    system: str | None = None
    key: str  # of the dataset in the configuration, for messages

    def user(self, question: str) -> Message:
        """What the user says to ask a question."""
        return {"role": "user", "content": self.pattern.format(question)}

    def with_system(self, messages: list[Message]) -> list[Message]:
        """The messages with the system prompt first, where they have none of their own."""
        if self.system is None or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self.system}, *messages]


class TooLongError(ValueError):
    """A row that is beyond the limits, which leave it out; its place and its length in tokens."""

    def __init__(self, place: str, num_tokens: int) -> None:
        super().__init__(
            f"{place} has {num_tokens} tokens, too many for policy.max_total_sequence_length or "
            f"data.max_input_seq_length."
        )
        self.place, self.num_tokens = place, num_tokens


class Question(NamedTuple):
    """What GRPO asks, before prompt_file and chat template, and the row that an environment scores."""

    question: str
    row: Mapping[str, Any]  # the built-in environments compare with its `answer`


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row as it is stored, and what it is read by. The methods' `key` is the dataset's key that an error names."""

    values: Mapping[str, Any]
    place: str  # such as "line 3 of rows.jsonl"
    section: DatasetConfig
    format: PromptFormat

    def error(self, problem: str, key: str | None = "data_path") -> ValueError:
        """The error that the row has this problem."""
        at = self.format.key if key is None else f"{self.format.key}.{key}"
        return ValueError(f"{at}: {self.place} {problem}. Correct the row.")

    def value(self, name: str, key: str = "data_path") -> Any:
        """What stands under a name. ValueError where nothing does."""
        if self.values.get(name) is None:
            raise ValueError(
                f"{self.format.key}.{key}: {self.place} has no {name!r}; its keys are "
                f"{', '.join(self.values) or 'none'}. Correct the row or the key."
            )
        return self.values[name]

    def text(self, name: str, key: str = "data_path") -> str:
        """The text under a name. ValueError where it is none, or empty."""
        value = self.value(name, key)
        if not isinstance(value, str) or not value.strip():
            raise self.error(f"has {name}={show(value)}, and a text is needed", key)
        return value

    def messages(self, name: str, key: str = "data_path") -> list[Message]:
        """The messages under a name. ValueError where their form is wrong."""
        value = self.value(name, key)
        if not isinstance(value, list) or not value:
            raise self.error(f"has {name}={show(value)}, and a list of messages is needed", key)
        for number, message in enumerate(value):
            problem = _problem_of(message)
            if problem is not None:
                raise replace(self, place=f"message {number} of {self.place}").error(problem, key)
        # a call has no text of its own, and says so the same way whether it was written as null or left out
        return [{**message, "content": None} if message.get("content") is None else message for message in value]

    def tools(self) -> list[dict[str, Any]] | None:
        """The tools of a chat, under the dataset's `tool_key`: a list of objects, or that as JSON text."""
        name = self.section.tool_key
        value = None if name is None else self.values.get(name)
        if isinstance(value, str) and value.strip():
            try:
                value = json.loads(value)
            except json.JSONDecodeError as error:
                raise self.error(f"has {name}={show(value)}, which is no JSON ({error.msg})", "tool_key") from error
        if not value:
            return None
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self.error(f"has {name}={show(value)}, and a list of objects is needed", "tool_key")
        return value

    def refuse_half_characters(self, value: Any) -> None:
        """ValueError where a text in `value`, of this row, holds half of a character, which no tokenizer takes."""
        text = json.dumps(value, ensure_ascii=False, default=str)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            problem = f"holds {ascii(text[error.start])}, half of a character that is written as two"
            raise self.error(problem, key=None) from error

    def refuse_file(self, name: str, why: str) -> None:
        """ValueError where the dataset's `prompt_file` or `system_prompt_file` is given, which has no use here."""
        value = getattr(self.section, name)
        if value is not None:
            raise ValueError(f"{self.format.key}.{name}={value!r}: has no meaning {why}. Set it to null.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two answers to one prompt, as text."""

    row: Row  # that it is of
    prompt: Sequence[Message]
    chosen: Message
    rejected: Message
    cluster: str  # pairs of one cluster are held out together
    part: str | None = None  # of the dataset, for metrics


def _problem_of(message: Any) -> str | None:
    if not isinstance(message, dict):
        return f"is {show(message)}, and an object with role and content is needed"
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        return f"has role={show(role)}, and there are {', '.join(ROLES)}"
    calls = message.get("tool_calls")
    if calls is not None and (not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls)):
        return f"({role}) has tool_calls={show(calls)}, and a list of objects is needed"
    if role == "assistant" and calls and (content is None or content == ""):
        return None
    if not isinstance(content, str) or (role == "assistant" and not content.strip()):
        return f"({role}) has content={show(content)}, and a text is needed"
    return None
