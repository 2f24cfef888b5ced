"""The conversations of an SFT run: rows of chats, or of questions and answers, made ready to be learned.

A row's tokens are made when it is asked, so that a large dataset stays text; checked_rows.py looks at them first.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nemo_rl_lora.config.data import DatasetConfig
from nemo_rl_lora.data.catalog import tools_of
from nemo_rl_lora.data.chat import how_to_end
from nemo_rl_lora.data.checked_rows import Kind, load_checked_sides
from nemo_rl_lora.data.loss_masks import encode_conversation, learns_end, token_rules
from nemo_rl_lora.data.row_sets import RowSet, RunConfig, longest_row, open_dataset, refuse_grpo_keys, shown_limits
from nemo_rl_lora.data.rows import Message, Row, TooLongError
from nemo_rl_lora.data.seen_rows import recipe_of
from nemo_rl_lora.types import Example

ConversationSet = RowSet[Example]


def load_conversation_sets(
    config: RunConfig, tokenizer: Any, *, only_unmask_final: bool, seed: int = 0
) -> tuple[list[ConversationSet], list[ConversationSet]]:
    """Training sets and validation sets: what is held out of training, then `data.validation`'s. `seed` is that of
    the order in which rows are drawn."""
    data = config.data
    refuse_grpo_keys(config, "SFT", "cuts the end of a row that is too long")
    rules = token_rules(data, tokenizer, only_final=only_unmask_final, max_length=longest_row(config))

    def read_set(section: DatasetConfig, key: str) -> ConversationSet:
        read, rows = open_dataset("sft", section, key, processor="sft_processor", keep_nulls=data.keep_nulls)

        def make(position: int, name: str) -> Example:
            row = rows[position]
            tools = tools_of(row)
            row.refuse_half_characters(tools)
            found = encode_conversation(tokenizer, _checked(row, read(row)), rules, row.place, source=name, tools=tools)
            if True not in found.loss_mask:
                raise TooLongError(row.place, len(found.token_ids) + found.num_cut_tokens)
            return found

        return RowSet.of_all(section, key, rows.__getitem__, len(rows), make, data=data)

    kind: Kind[Example] = Kind(
        noun="rows",
        tokens=lambda example: (example.token_ids, example.loss_mask),
        has_end=lambda example: learns_end(tokenizer, example, rules.ends),
        no_end=how_to_end(tokenizer, marked=rules.marked),
        recipe=recipe_of(tokenizer, data, sorted(rules.ends), replace(rules, ends=frozenset())),
        too_long=f"nothing of their answers being within {shown_limits(config)}",
    )
    return load_checked_sides(data, read_set, kind, clusters="rows", seed=seed)


def _checked(row: Row, conversation: list[Message]) -> list[Message]:
    """The conversation, with a system prompt. ValueError where there is nothing to learn."""
    row.refuse_half_characters(conversation)
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
