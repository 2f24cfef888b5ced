"""Which tokens of a conversation are learned: those of the assistant's turns, and no other.

The chat template renders the whole conversation once. Where a turn begins and ends in that text is proven by rendering
the conversation up to it: both renderings must be beginnings of the whole. A template that marks the assistant's text
itself, with {% generation %} blocks, is believed instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from nemo_rl_lora.config.data import DataConfig
from nemo_rl_lora.data.chat import Tools, end_ids, last_written, render, render_any, special_id
from nemo_rl_lora.data.rows import Message
from nemo_rl_lora.types import Example


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRules:
    """What is learned of a conversation, and how long it may be."""

    learn_header: bool  # of the assistant's turns
    only_final: bool  # learn the last turn only
    bos_id: int | None  # put first unless it is there
    eos_id: int | None  # put last unless it is there, and learned
    ends: frozenset[int]  # tokens that may end a turn
    max_length: int
    marked: bool  # the template has {% generation %} blocks


def token_rules(data: DataConfig, tokenizer: Any, *, only_final: bool, max_length: int) -> TokenRules:
    """The rules of a run. Raises ValueError for a tokenizer or a template that they do not fit."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"policy.tokenizer.name={tokenizer.name_or_path!r}: this tokenizer does not say which characters a token "
            f"stands for. Use a model that has a tokenizer.json."
        )
    marked = _has_generation_block(tokenizer.chat_template)
    if marked and data.add_generation_prompt is False:
        raise ValueError(
            "data.add_generation_prompt=False: the chat template says itself what is learned, with its "
            "{% generation %} blocks. Set it to null."
        )
    return TokenRules(
        learn_header=data.add_generation_prompt is False,
        only_final=only_final,
        bos_id=special_id(tokenizer, "bos") if data.add_bos else None,
        eos_id=special_id(tokenizer, "eos") if data.add_eos else None,
        ends=end_ids(tokenizer),
        max_length=max_length,
        marked=marked,
    )


def _has_generation_block(template: str) -> bool:
    from jinja2 import Environment

    tokens = [(kind, value) for _, kind, value in Environment().lex(template) if kind != "whitespace"]
    return any(before[0] == "block_begin" and token == ("name", "generation") for before, token in pairwise(tokens))


def encode_conversation(
    tokenizer: Any, messages: Sequence[Message], rules: TokenRules, place: str, source: str = "", tools: Tools = None
) -> Example:
    """Tokens and mask of a conversation that ends with an assistant's turn; `place` is whose it is, for errors."""
    encode = _encode_as_marked if rules.marked else _encode_as_proven
    token_ids, learned = encode(tokenizer, messages, rules, place, tools)
    if True not in learned:
        what = "writes nothing of what the assistant says there. Give one that does."
        if rules.marked:
            what = (
                "has {% generation %} blocks, of which none is reached there, or they are empty. Put them around what "
            )
            what += "the assistant says."
        raise ValueError(f"policy.tokenizer.chat_template: nothing is learned of {place}, since the template {what}")
    if rules.bos_id is not None and token_ids[0] != rules.bos_id:
        token_ids, learned = [rules.bos_id, *token_ids], [False, *learned]
    if rules.eos_id is not None:
        _learn_end(tokenizer, token_ids, learned, rules)
    return Example(
        token_ids=tuple(token_ids[: rules.max_length]),
        loss_mask=tuple(learned[: rules.max_length]),
        source=source,
        num_cut_tokens=max(len(token_ids) - rules.max_length, 0),
    )


def _encode_as_proven(
    tokenizer: Any, messages: Sequence[Message], rules: TokenRules, place: str, tools: Tools
) -> tuple[list[int], list[bool]]:
    text = render(tokenizer, messages, add_generation_prompt=False, place=place, tools=tools)
    rendered = partial(render_any, tokenizer, place=place, tools=tools)
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]

    def span(turn: int) -> tuple[int, int] | None:
        """The characters of a turn, if they can be proven."""
        before = rendered(messages[:turn], add_generation_prompt=not rules.learn_header)
        through = text
        if turn < len(messages) - 1:
            through = rendered(messages[: turn + 1], add_generation_prompt=False)
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
    tokenizer: Any, messages: Sequence[Message], rules: TokenRules, place: str, tools: Tools
) -> tuple[list[int], list[bool]]:
    render(
        tokenizer, messages, add_generation_prompt=False, place=place, tools=tools
    )  # names what the template refuses
    encoding = tokenizer.apply_chat_template(
        list(messages), tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    token_ids, marks = encoding["input_ids"], [bool(mark) for mark in encoding["assistant_masks"]]
    if rules.only_final:
        # What comes before the last turn is rendered as to ask for it: what is marked after that is the last turn's.
        before = tokenizer.apply_chat_template(
            list(messages[:-1]), tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        pairs = enumerate(zip(token_ids, before["input_ids"], strict=False))
        shared = next((n for n, (one, other) in pairs if one != other), min(len(token_ids), len(before["input_ids"])))
        if any(before["assistant_masks"][shared:]):
            raise ValueError(
                f"policy.tokenizer.chat_template: which of the marked text of {place} is the last turn's cannot be "
                f"told, since the template writes the turns before it in another way where that follows. Give a "
                f"template that does not, or learn every turn: sft.only_unmask_final=false."
            )
        marks = [mark and number >= shared for number, mark in enumerate(marks)]
    return token_ids, marks


def _learn_end(tokenizer: Any, token_ids: list[int], learned: list[bool], rules: TokenRules) -> None:
    """Have the row end with the end-of-sequence token, and learn it with what the template writes before it."""
    assert rules.eos_id is not None
    last = len(learned) - 1 - learned[::-1].index(True)
    end = last_written(tokenizer, token_ids)
    if end is None or token_ids[end] != rules.eos_id:
        end = len(token_ids)
        token_ids.append(rules.eos_id)
        learned.append(True)
    learned[end] = True
    between = token_ids[last + 1 : end]
    if all(token in rules.ends or not tokenizer.decode([token]).strip() for token in between):
        learned[last + 1 : end] = [True] * len(between)


def learns_end(tokenizer: Any, example: Example, ends: frozenset[int]) -> bool | None:
    """Whether the last answer is learned with a token after it that ends a turn; None where the row was cut."""
    if example.num_cut_tokens:
        return None
    last = len(example.loss_mask) - example.loss_mask[::-1].index(True)
    place = last_written(tokenizer, example.token_ids[:last])
    return place is not None and example.token_ids[place] in ends and (place == 0 or example.loss_mask[place - 1])


def _unproven(turn: int, num_turns: int, place: str, *, last_is_proven: bool) -> str:
    remedy = "Give a template that marks the assistant's text with {% generation %} blocks"
    if last_is_proven:
        remedy += ", or learn the last turn only: sft.only_unmask_final=true"
    return (
        f"policy.tokenizer.chat_template: where turn {turn} of the assistant's {num_turns} stands in {place} cannot be "
        f"proven, since the template does not write the conversation up to there as it begins the whole. {remedy}."
    )
