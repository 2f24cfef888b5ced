"""From messages to text by the chat template, and from a question to a prompt's token ids.

A rendered text gets no special token that the template does not write.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jinja2

from nemo_rl_lora.data.rows import Message, PromptFormat


def encode(tokenizer: Any, format_: PromptFormat, texts: Sequence[str]) -> list[tuple[int, ...]]:
    """Token ids of what the user says, as prompts. Raises ValueError where the chat template refuses the messages."""
    chats = [format_.with_system([{"role": "user", "content": text}]) for text in texts]
    rendered = [render(tokenizer, chat, add_generation_prompt=True, place=format_.key) for chat in chats]
    return [tuple(ids) for ids in tokenizer(rendered, add_special_tokens=False)["input_ids"]]


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
