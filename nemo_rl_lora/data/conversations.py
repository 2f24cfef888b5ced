"""The conversations of an SFT run: rows of chats, or of questions and answers, made ready to be learned.

Every row's form is checked at the start and its tokens are made when it is asked, so that a large dataset stays text.
The first row of each sequence of roles is tokenised at the start, to show that the chat template suits it.
"""

from __future__ import annotations

from typing import Any

from nemo_rl_lora.config.data import DatasetConfig
from nemo_rl_lora.data.loss_masks import TokenRules, encode_conversation, token_rules
from nemo_rl_lora.data.row_sets import RowSet, RunConfig, load_sides, longest_row, open_dataset, refuse_grpo_keys
from nemo_rl_lora.data.rows import Message, Row
from nemo_rl_lora.types import Example

ConversationSet = RowSet[Example]


def load_conversation_sets(
    config: RunConfig, tokenizer: Any, *, only_unmask_final: bool
) -> tuple[list[ConversationSet], list[ConversationSet]]:
    """Training sets and validation sets: what is held out of training, then `data.validation`'s."""
    refuse_grpo_keys(config.data, "SFT", "cuts the end of a row that is too long")
    rules = token_rules(config.data, tokenizer, only_final=only_unmask_final, max_length=longest_row(config))
    return load_sides(config.data, lambda section, key: _read(section, key, tokenizer, rules), "rows")


def _read(section: DatasetConfig, key: str, tokenizer: Any, rules: TokenRules) -> ConversationSet:
    read, rows = open_dataset("sft", section, key, processor="sft_processor")
    seen: set[tuple[str, ...]] = set()
    for row in rows:
        messages = _checked(row, read(row))
        roles = tuple(message["role"] for message in messages)
        if roles not in seen:
            seen.add(roles)
            encode_conversation(tokenizer, messages, rules, row.place)

    def make(position: int, name: str) -> Example:
        row = rows[position]
        return encode_conversation(tokenizer, _checked(row, read(row)), rules, row.place, source=name)

    return RowSet.of_all(section, len(rows), make)


def _checked(row: Row, conversation: list[Message]) -> list[Message]:
    """The conversation, with a system prompt. ValueError where there is nothing to learn."""
    messages = row.format.with_system(conversation)
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        problem = "has no turn of the assistant, so there is nothing to learn"
    elif roles[0] == "assistant":
        problem = "begins with a turn of the assistant, which answers nothing"
    elif roles[-1] != "assistant":
        problem = f"ends with a turn of the {roles[-1]}, which nothing answers"
    else:
        return messages
    raise row.error(problem, key=None)
