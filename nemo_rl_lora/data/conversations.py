"""The conversations of an SFT run: rows of chats, or of questions and answers, made ready to be learned.

Every row's form is checked at the start and its tokens are made when it is asked, so that a large dataset stays text.
The first row of each sequence of roles is tokenised at the start, to show that the chat template suits it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from nemo_rl_lora.config.data import CONVERSATION_DATASETS, DatasetConfig
from nemo_rl_lora.data.chat import Message, chat_messages
from nemo_rl_lora.data.learned_tokens import TokenRules, encode_conversation, token_rules
from nemo_rl_lora.data.sides import (
    RowReader,
    RowSet,
    RunConfig,
    load_sides,
    longest_row,
    open_dataset,
    refuse_grpo_keys,
)
from nemo_rl_lora.data.sources import RowTable, text_of, value_of
from nemo_rl_lora.types import Example

ConversationSet = RowSet[Example]


def load_conversation_sets(
    config: RunConfig, tokenizer: Any, *, only_unmask_final: bool
) -> tuple[list[ConversationSet], list[ConversationSet]]:
    """Training sets and validation sets: what is held out of training, then `data.validation`'s."""
    refuse_grpo_keys(config.data, "SFT", "cuts the end of a row that is too long")
    rules = token_rules(config.data, tokenizer, only_final=only_unmask_final, max_length=longest_row(config))
    return load_sides(config.data, lambda section, key: _read(section, key, tokenizer, rules), "rows")


def _messages(reader: RowReader, raw: Mapping[str, Any], place: str) -> list[Message]:
    """The conversation of a row. Raises ValueError, with the row's place, where there is nothing to learn."""
    messages = reader.format.with_system(_ROWS[reader.section.dataset_name](reader, raw, place))
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        problem = "has no turn of the assistant, so there is nothing to learn"
    elif roles[0] == "assistant":
        problem = "begins with a turn of the assistant, which answers nothing"
    elif roles[-1] != "assistant":
        problem = f"ends with a turn of the {roles[-1]}, which nothing answers"
    else:
        return messages
    raise ValueError(f"{reader.key}: {place} {problem}. Correct the row.")


def _read(section: DatasetConfig, key: str, tokenizer: Any, rules: TokenRules) -> ConversationSet:
    reader, table = open_dataset("sft", section, key, processor="sft_processor")
    _check_rows(table, reader, tokenizer, rules)

    def make(position: int, name: str) -> Example:
        place = table.place(position)
        tokens = encode_conversation(tokenizer, _messages(reader, table[position], place), rules, place)
        return Example(
            token_ids=tokens.token_ids, loss_mask=tokens.loss_mask, source=name, num_cut_tokens=tokens.num_cut
        )

    rows = np.arange(len(table))
    return RowSet(name=section.dataset_name, rate=section.rate, positions=rows, clusters=rows, make=make)


def _check_rows(table: RowTable, reader: RowReader, tokenizer: Any, rules: TokenRules) -> None:
    seen: set[tuple[str, ...]] = set()
    for place, raw in table.placed():
        messages = _messages(reader, raw, place)
        roles = tuple(message["role"] for message in messages)
        if roles not in seen:
            seen.add(roles)
            encode_conversation(tokenizer, messages, rules, place)


def _chat(reader: RowReader, raw: Mapping[str, Any], place: str) -> list[Message]:
    section, key = reader.section, reader.key
    if section.prompt_file is not None:
        raise ValueError(
            f"{key}.prompt_file={section.prompt_file!r}: has no meaning with dataset_name={section.dataset_name!r}, "
            f"whose rows are whole chats. Set it to null."
        )
    return chat_messages(raw, section.chat_key, place, f"{key}.chat_key")


def _own_rows(reader: RowReader, raw: Mapping[str, Any], place: str) -> list[Message]:
    section, key = reader.section, reader.key
    question = text_of(raw, section.input_key, place, f"{key}.input_key")
    return _answered(reader, question, text_of(raw, section.output_key or "output", place, f"{key}.output_key"))


def _gsm8k(reader: RowReader, raw: Mapping[str, Any], place: str) -> list[Message]:
    key = f"{reader.key}.data_path"
    return _answered(reader, text_of(raw, "question", place, key), text_of(raw, "answer", place, key))


def _open_math_instruct(reader: RowReader, raw: Mapping[str, Any], place: str) -> list[Message]:
    question = text_of(raw, "problem", place, f"{reader.key}.data_path")
    answer = text_of(raw, reader.section.output_key or "generated_solution", place, f"{reader.key}.output_key")
    return _answered(reader, question, answer)


def _squad(reader: RowReader, raw: Mapping[str, Any], place: str) -> list[Message]:
    section, key = reader.section, f"{reader.key}.data_path"
    if section.system_prompt_file is not None:
        raise ValueError(
            f"{reader.key}.system_prompt_file={section.system_prompt_file!r}: has no meaning with squad, whose context "
            f"is the system message. Set it to null."
        )
    answers = value_of(raw, "answers", place, key)
    texts = answers.get("text") if isinstance(answers, dict) else None
    if not isinstance(texts, list) or not texts or not isinstance(texts[0], str) or not texts[0].strip():
        raise ValueError(f"{key}: {place} has answers={answers!r}, and answers.text needs a text. Correct the row.")
    context = {"role": "system", "content": text_of(raw, "context", place, key)}
    return [context, *_answered(reader, text_of(raw, "question", place, key), texts[0])]


def _answered(reader: RowReader, question: str, answer: str) -> list[Message]:
    return [
        {"role": "user", "content": reader.format.user_text(question)},
        {"role": "assistant", "content": answer},
    ]


_ROWS: dict[str, Callable[[RowReader, Mapping[str, Any], str], list[Message]]] = {
    "openai_format": _chat,
    "tulu3_sft_mixture": _chat,
    "squad": _squad,
    "jsonl": _own_rows,
    "ResponseDataset": _own_rows,
    "OpenMathInstruct-2": _open_math_instruct,
    "gsm8k": _gsm8k,
    "GSM8K": _gsm8k,
}
assert set(_ROWS) == set(CONVERSATION_DATASETS)
