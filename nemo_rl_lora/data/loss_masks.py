"""Which tokens of a conversation are learned: those of the assistant's turns, and no other.

The chat template renders the whole conversation once. Where a turn begins and ends in that text is proven by rendering
the conversation up to it: both renderings must be beginnings of the whole. A template that marks the assistant's text
itself, with {% generation %} blocks, is believed instead.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nemo_rl_lora.config.data import DataConfig
from nemo_rl_lora.data.chat import render
from nemo_rl_lora.data.rows import Message
from nemo_rl_lora.types import Example

logger = logging.getLogger(__name__)

_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRules:
    """What is learned of a conversation, and how long it may be."""

    learn_header: bool  # of the assistant's turns
    only_final: bool  # learn the last turn only
    bos_id: int | None  # put first unless it is there
    eos_id: int | None  # put last, and learned, unless the last answer ends with it
    max_length: int
    marked: bool  # the template has {% generation %} blocks


def token_rules(data: DataConfig, tokenizer: Any, *, only_final: bool, max_length: int) -> TokenRules:
    """The rules of a run. Raises ValueError for a tokenizer or a template that they do not fit."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"policy.tokenizer.name={tokenizer.name_or_path!r}: this tokenizer does not say which characters a token "
            f"stands for. Use a model that has a tokenizer.json."
        )
    marked = _GENERATION_BLOCK.search(tokenizer.chat_template) is not None
    if marked and data.add_generation_prompt is False:
        raise ValueError(
            "data.add_generation_prompt=False: the chat template says itself what is learned, with its "
            "{% generation %} blocks. Set it to null."
        )
    return TokenRules(
        learn_header=data.add_generation_prompt is False,
        only_final=only_final,
        bos_id=_special_id(tokenizer, "bos") if data.add_bos else None,
        eos_id=_special_id(tokenizer, "eos") if data.add_eos else None,
        max_length=max_length,
        marked=marked,
    )


def encode_conversation(
    tokenizer: Any, messages: Sequence[Message], rules: TokenRules, place: str, source: str = ""
) -> Example:
    """Tokens and mask of a conversation that ends with an assistant's turn; `place` is whose it is, for errors."""
    encode = _encode_as_marked if rules.marked else _encode_as_proven
    token_ids, learned = encode(tokenizer, messages, rules, place)
    if rules.bos_id is not None and token_ids[0] != rules.bos_id:
        token_ids, learned = [rules.bos_id, *token_ids], [False, *learned]
    if rules.eos_id is not None and _last_beside_newlines(tokenizer, token_ids) != rules.eos_id:
        token_ids, learned = [*token_ids, rules.eos_id], [*learned, True]
    return Example(
        token_ids=tuple(token_ids[: rules.max_length]),
        loss_mask=tuple(learned[: rules.max_length]),
        source=source,
        num_cut_tokens=max(len(token_ids) - rules.max_length, 0),
    )


def _encode_as_proven(
    tokenizer: Any, messages: Sequence[Message], rules: TokenRules, place: str
) -> tuple[list[int], list[bool]]:
    text = render(tokenizer, messages, add_generation_prompt=False, place=place)
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]

    def span(turn: int) -> tuple[int, int] | None:
        """The characters of a turn, if they can be proven."""
        before = render(tokenizer, messages[:turn], add_generation_prompt=not rules.learn_header, place=place)
        through = text
        if turn < len(messages) - 1:
            through = render(tokenizer, messages[: turn + 1], add_generation_prompt=False, place=place)
        is_proven = text.startswith(through) and through.startswith(before)
        return (len(before), len(through)) if is_proven else None

    spans = [span(turn) for turn in (turns[-1:] if rules.only_final else turns)]
    boundaries: list[int] = []  # characters where learned text begins, ends, begins, ...
    for number, found in enumerate(spans, start=len(turns) - len(spans) + 1):
        if found is None:
            raise ValueError(_unproven(number, len(turns), place, last_is_proven=spans[-1] is not None))
        boundaries += found
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    # A token belongs where its last character does: some tokenizers leave leading blanks out of a token's span.
    ends = [end for _, end in encoding["offset_mapping"]]
    learned = np.searchsorted(boundaries, ends, side="left") % 2 == 1
    return encoding["input_ids"], learned.tolist()


def _encode_as_marked(
    tokenizer: Any, messages: Sequence[Message], rules: TokenRules, place: str
) -> tuple[list[int], list[bool]]:
    render(tokenizer, messages, add_generation_prompt=False, place=place)  # names what the template refuses
    encoding = tokenizer.apply_chat_template(
        list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    marks = encoding["assistant_masks"]
    if rules.only_final:
        last = len(marks) - marks[::-1].index(1) if 1 in marks else 0
        first = last
        while first and marks[first - 1]:
            first -= 1
        marks = [mark and first <= position for position, mark in enumerate(marks)]
    return encoding["input_ids"], [bool(mark) for mark in marks]


def _unproven(turn: int, num_turns: int, place: str, *, last_is_proven: bool) -> str:
    remedy = "Give a template that marks the assistant's text with {% generation %} blocks"
    if last_is_proven:
        remedy += ", or learn the last turn only: sft.only_unmask_final=true"
    return (
        f"policy.tokenizer.chat_template: where turn {turn} of the assistant's {num_turns} stands in {place} cannot be "
        f"proven, since the template does not write the conversation up to there as it begins the whole. {remedy}."
    )


def _last_beside_newlines(tokenizer: Any, token_ids: Sequence[int]) -> int | None:
    """The last token that is not of newlines alone: templates write some after the end of a turn."""
    return next((token for token in reversed(token_ids) if tokenizer.decode([token]).strip("\n")), None)


def _special_id(tokenizer: Any, name: str) -> int | None:
    found = getattr(tokenizer, f"{name}_token_id")
    if found is None:
        logger.warning(f"data.add_{name}=True: the tokenizer has no {name} token, so none is added")
    return found
