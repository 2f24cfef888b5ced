"""From messages to text by the chat template; and which tokens end a turn.

A rendered text gets no special token that the template does not write.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from typing import Any, Literal

from nemo_rl_lora.data.rows import Message

logger = logging.getLogger(__name__)

Tools = list[dict[str, Any]] | None  # that a chat may call, as the template gets them


def render(
    tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool, place: str, tools: Tools = None
) -> str:
    """The text of the messages. Raises ValueError where the chat template refuses them, or leaves out what they have of
    tools or what anyone but the assistant says; `place` is whose they are."""
    _require_tools_are_read(tokenizer, messages, tools, place)
    text_of = partial(
        render_any, tokenizer, add_generation_prompt=add_generation_prompt, place=place, tools=tools
    )  # (messages) -> text
    text = text_of(messages)
    marks = {number: f"x{number}x" for number, message in enumerate(messages) if message["role"] != "assistant"}
    marked = text_of(
        [{**m, "content": f"{m['content']} {marks[n]}"} if n in marks else m for n, m in enumerate(messages)]
    )
    for number, mark in marks.items():
        if marked.count(mark) <= text.count(mark):
            raise _left_out(f"all messages of the role {messages[number]['role']}", place)
    return text


def render_any(
    tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool, place: str, tools: Tools = None
) -> str:
    """As `render`, whatever the template leaves out: for parts of what was rendered whole."""
    try:
        return tokenizer.apply_chat_template(
            list(messages), tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # a template may do anything with what a row holds
        roles = " and ".join(str(message["role"]) for message in messages)
        raise ValueError(
            f"policy.tokenizer.chat_template: cannot render the roles {roles} of {place} ({error}). "
            f"Change the template, or set system_prompt_file to null if it takes no system message."
        ) from error


def _require_tools_are_read(tokenizer: Any, messages: Sequence[Message], tools: Tools, place: str) -> None:
    if tools and not re.search(r"\btools\b", tokenizer.chat_template):
        raise _left_out("the tools", place)
    if any(message.get("tool_calls") for message in messages) and "tool_calls" not in tokenizer.chat_template:
        raise _left_out("the tool_calls", place)


def _left_out(what: str, place: str) -> ValueError:
    return ValueError(
        f"policy.tokenizer.chat_template: does not write {what} of {place}. Give a template that does "
        f"(policy.tokenizer.chat_template=default is the model's own), or leave them out of the data "
        f"(system_prompt_file=null)."
    )


def reads_clock(tokenizer: Any) -> bool:
    """Whether the chat template writes what time it is."""
    return "strftime_now" in (tokenizer.chat_template or "")


def stop_clock(tokenizer: Any, moment: str) -> None:
    """Have the chat template read this time, in ISO 8601, whenever it renders: rows do not depend on the day."""
    logger.info(
        f"policy.tokenizer.chat_template: reads the clock, which stands at {moment} in this run and its resumes"
    )
    clock = datetime.fromisoformat(moment)
    tokenizer.apply_chat_template = partial(tokenizer.apply_chat_template, strftime_now=clock.strftime)


def end_ids(tokenizer: Any) -> frozenset[int]:
    """Tokens that may end a turn: the special ones, but for the one that begins a text."""
    added = (number for number, token in tokenizer.added_tokens_decoder.items() if token.special)
    begin = {tokenizer.bos_token_id} - {tokenizer.eos_token_id}
    return frozenset({*tokenizer.all_special_ids, *added} - begin)


def last_written(tokenizer: Any, token_ids: Sequence[int]) -> int | None:
    """The place of the last token that is not of newlines alone: templates write some after the end of a turn."""
    places = range(len(token_ids) - 1, -1, -1)
    return next((place for place in places if tokenizer.decode([token_ids[place]]).strip("\n")), None)


def ends_turn(tokenizer: Any, token_ids: Sequence[int], ends: frozenset[int]) -> bool:
    """Whether the last token, but for newlines, ends a turn."""
    place = last_written(tokenizer, token_ids)
    return place is not None and token_ids[place] in ends


def special_id(tokenizer: Any, name: Literal["bos", "eos"]) -> int | None:
    """The token that data.add_bos or data.add_eos asks for."""
    found = getattr(tokenizer, f"{name}_token_id")
    if found is None:
        logger.warning(f"data.add_{name}=True: the tokenizer has no {name} token, so none is added")
    return found


def how_to_end(tokenizer: Any, *, marked: bool = False) -> str:
    """What to do where no turn's end is learned."""
    template = "give a template that ends the assistant's turn with a special token"
    if marked:
        template = "let the template's {% generation %} blocks hold the end of the assistant's turn"
    if tokenizer.eos_token is None:
        return f"{template[0].upper()}{template[1:]}."
    return f"Set data.add_eos=true, which adds {tokenizer.eos_token!r} and learns it, or {template}."
