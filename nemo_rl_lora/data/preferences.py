"""The preference pairs of a DPO run: two answers to one prompt, of which one is better.

Every pair is tokenised once at the start, to check its form and length, and again when it is asked, so that a large
dataset stays text.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, product
from typing import Any

import numpy as np

from nemo_rl_lora.config.data import PREFERENCE_DATASETS, DatasetConfig
from nemo_rl_lora.config.errors import show
from nemo_rl_lora.data.chat import Message, chat_messages, render
from nemo_rl_lora.data.sides import (
    RowReader,
    RowSet,
    RunConfig,
    load_sides,
    longest_row,
    open_dataset,
    refuse_grpo_keys,
    refuse_sft_keys,
)
from nemo_rl_lora.data.sources import RowTable, text_of, value_of
from nemo_rl_lora.types import PreferencePair

logger = logging.getLogger(__name__)

PreferenceSet = RowSet[PreferencePair]

_CHECKED_AT_ONCE = 1024
_SOLVERS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pair:
    """Two answers to one prompt, as text."""

    prompt: Sequence[Message]
    chosen: Message
    rejected: Message
    cluster: str
    part: str | None = None  # of the dataset, for metrics


def _pairs(reader: RowReader, raw: Mapping[str, Any], place: str) -> list[_Pair]:
    """The pairs of a row; there may be none. Raises ValueError, with the row's place, where its form is wrong."""
    return _ROWS[reader.section.dataset_name](reader, raw, place)


def load_preference_sets(config: RunConfig, tokenizer: Any) -> tuple[list[PreferenceSet], list[PreferenceSet]]:
    """Training sets and validation sets: what is held out of training, then `data.validation`'s."""
    refuse_sft_keys(config.data, "DPO")
    refuse_grpo_keys(config.data, "DPO", "leaves pairs that are too long out")
    return load_sides(config.data, lambda section, key: _read(section, key, config, tokenizer), "questions")


def _read(section: DatasetConfig, key: str, config: RunConfig, tokenizer: Any) -> PreferenceSet:
    reader, table = open_dataset("dpo", section, key, processor=None)
    where: list[tuple[int, int]] = []  # of each pair: its row, its number in the row
    clusters: list[int] = []
    allowed: list[bool] = []
    numbers: dict[str, int] = {}
    for index, number, pair, longest in _measured(table, reader, tokenizer):
        where.append((index, number))
        allowed.append(longest <= longest_row(config))
        if allowed[-1]:
            clusters.append(numbers.setdefault(pair.cluster, len(numbers)))
    _report(table, where, allowed, config, key)

    def make(position: int, name: str) -> PreferencePair:
        index, number = where[position]
        place = table.place(index)
        pair = _pairs(reader, table[index], place)[number]
        prompt_ids, chosen_ids, rejected_ids = _encode(tokenizer, [(pair, place)], key)[0]
        return PreferencePair(
            index=position,
            prompt_ids=prompt_ids,
            chosen_ids=chosen_ids,
            rejected_ids=rejected_ids,
            source=name if pair.part is None else f"{name}/{pair.part}",
            cluster=pair.cluster,
        )

    return RowSet(
        name=section.dataset_name,
        rate=section.rate,
        positions=np.flatnonzero(allowed),
        clusters=np.array(clusters),
        make=make,
    )


def _measured(table: RowTable, reader: RowReader, tokenizer: Any) -> Iterator[tuple[int, int, _Pair, int]]:
    """Every pair with its row, its number in the row and the tokens of its longer side."""
    found = (
        (index, number, pair, place)
        for index, (place, raw) in enumerate(table.placed())
        for number, pair in enumerate(_pairs(reader, raw, place))
    )
    while some := list(islice(found, _CHECKED_AT_ONCE)):
        encoded = _encode(tokenizer, [(pair, place) for _, _, pair, place in some], reader.key)
        for (index, number, pair, _), (prompt, chosen, rejected) in zip(some, encoded, strict=True):
            yield index, number, pair, len(prompt) + max(len(chosen), len(rejected))


def _report(
    table: RowTable, where: Sequence[tuple[int, int]], allowed: Sequence[bool], config: RunConfig, key: str
) -> None:
    """Say what is left out. Raises ValueError where nothing is left."""
    num_without = len(table) - len({index for index, _ in where})
    if not where:
        raise ValueError(
            f"{key}: none of the {len(table)} rows of {table.origin} prefers one answer to another. Give other data."
        )
    if num_without:
        logger.info(f"{key}: {num_without} of {len(table)} rows are left out, preferring no answer to another")
    limit, num_long = longest_row(config), len(allowed) - sum(allowed)
    limits = (
        f"{limit} tokens (data.max_input_seq_length={config.data.max_input_seq_length!r}, "
        f"policy.max_total_sequence_length={config.policy.max_total_sequence_length})"
    )
    if num_long == len(allowed):
        raise ValueError(f"{key}: all {num_long} pairs have a side longer than {limits}. Raise the limits.")
    if num_long:
        logger.warning(f"{key}: {num_long} of {len(allowed)} pairs are left out, a side being longer than {limits}")


def _encode(
    tokenizer: Any, pairs: Sequence[tuple[_Pair, str]], key: str
) -> list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """(prompt, chosen, rejected) as tokens, of each pair with its place: the prompt ends with the assistant's header,
    an answer as the template ends a turn."""
    texts = []
    for pair, place in pairs:
        texts.append(render(tokenizer, pair.prompt, add_generation_prompt=True, place=place))
        for answer in (pair.chosen, pair.rejected):
            texts.append(render(tokenizer, [*pair.prompt, answer], add_generation_prompt=False, place=place))
    ids = [tuple(row) for row in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    encoded = []
    for (_, place), prompt, chosen, rejected in zip(pairs, ids[::3], ids[1::3], ids[2::3], strict=True):
        if chosen[: len(prompt)] != prompt or rejected[: len(prompt)] != prompt:
            raise ValueError(
                f"policy.tokenizer.chat_template: in {place} the tokens of the prompt are not how prompt and answer "
                f"begin. Give a template that writes the prompt's end (add_generation_prompt) as it begins an answer."
            )
        if chosen == rejected:
            raise ValueError(f"{key}: {place} has two equal answers, and one must be better. Correct the row.")
        encoded.append((prompt, chosen[len(prompt) :], rejected[len(prompt) :]))
    return encoded


def _ranked(reader: RowReader, raw: Mapping[str, Any], place: str) -> list[_Pair]:
    key = f"{reader.key}.data_path"
    completions = value_of(raw, "completions", place, key)
    is_list = isinstance(completions, list) and all(isinstance(item, dict) for item in completions)
    if not is_list or len(completions) != 2:
        raise ValueError(
            f"{key}: {place} has completions={show(completions)}, and a list of two is needed, each with rank and "
            f"completion. Correct the row."
        )
    ranks = [value_of(item, "rank", place, key) for item in completions]
    if not all(isinstance(rank, int | float) for rank in ranks) or ranks[0] == ranks[1]:
        raise ValueError(
            f"{key}: {place} has the ranks {ranks!r}, and two different numbers are needed. Correct the row."
        )
    better, worse = sorted(completions, key=lambda item: item["rank"])
    prompt = _prompt(reader, raw, "context", place, key)
    return [_pair(reader, prompt, *(_answer(prompt, item, "completion", place, key) for item in (better, worse)))]


def _binary(reader: RowReader, raw: Mapping[str, Any], place: str) -> list[_Pair]:
    section, key = reader.section, reader.key
    prompt = _prompt(reader, raw, section.prompt_key, place, f"{key}.prompt_key")
    chosen = _answer(prompt, raw, section.chosen_key, place, f"{key}.chosen_key")
    return [_pair(reader, prompt, chosen, _answer(prompt, raw, section.rejected_key, place, f"{key}.rejected_key"))]


def _help_steer(reader: RowReader, raw: Mapping[str, Any], place: str) -> list[_Pair]:
    key = f"{reader.key}.data_path"
    preference = value_of(raw, "overall_preference", place, key)
    if not isinstance(preference, int | float):
        raise ValueError(
            f"{key}: {place} has overall_preference={preference!r}, and a number is needed. Correct the row."
        )
    prompt = _prompt(reader, raw, "context", place, key)
    first, second = (_answer(prompt, raw, name, place, key) for name in ("response1", "response2"))
    if preference == 0:
        return []
    return [_pair(reader, prompt, first, second) if preference < 0 else _pair(reader, prompt, second, first)]


def _tulu(reader: RowReader, raw: Mapping[str, Any], place: str) -> list[_Pair]:
    key = f"{reader.key}.data_path"
    shared = {"prompt": chat_messages(raw, "chosen", place, key)[:-1]}
    if not shared["prompt"]:
        raise ValueError(
            f"{key}: {place} has chosen with one message, and a prompt is needed before it. Correct the row."
        )
    prompt = _prompt(reader, shared, "prompt", place, key)
    return [
        _pair(reader, prompt, _answer(prompt, raw, "chosen", place, key), _answer(prompt, raw, "rejected", place, key))
    ]


def _solutions(reader: RowReader, raw: Mapping[str, Any], place: str) -> list[_Pair]:
    """Correct with incorrect solutions of a question, in the order in which the row has them."""
    key, pairs = f"{reader.key}.data_path", reader.section.pairs
    question = text_of(raw, "question", place, key)
    prompt = reader.format.asked(question)
    answers: dict[bool, list[tuple[str, Message]]] = {True: [], False: []}
    solutions = {solver: value_of(raw, solver, place, key) for solver in _SOLVERS}
    for solver in sorted(solutions, key=list(raw).index):
        solution = solutions[solver]
        if not isinstance(solution, dict) or not isinstance(solution.get("is_correct"), bool):
            raise ValueError(
                f"{key}: {place} has {solver}={show(solution)}, and is_correct (true or false) and solution are "
                f"needed. Correct the row."
            )
        text = text_of(solution, "solution", f"{solver} in {place}", key)
        model = solver.partition("_")[0]
        answers[solution["is_correct"]].append((model, {"role": "assistant", "content": text}))
    found = [
        _Pair(
            prompt=prompt,
            chosen=chosen,
            rejected=rejected,
            cluster=question,
            part="same_model" if model == other else "other_model",
        )
        for (model, chosen), (other, rejected) in product(answers[True], answers[False])
        if pairs != "same_model" or model == other
    ]
    return found[:1] if pairs == "one" else found


_ROWS: dict[str, Callable[[RowReader, Mapping[str, Any], str], list[_Pair]]] = {
    "PreferenceDataset": _ranked,
    "BinaryPreferenceDataset": _binary,
    "HelpSteer3": _help_steer,
    "Tulu3Preference": _tulu,
    "gsm8k_solutions": _solutions,
}
assert set(_ROWS) == set(PREFERENCE_DATASETS)


def _prompt(reader: RowReader, raw: Mapping[str, Any], name: str, place: str, key: str) -> list[Message]:
    """The messages of a prompt that is a text or messages, before a system prompt."""
    if isinstance(raw.get(name), str):
        return [{"role": "user", "content": reader.format.user_text(text_of(raw, name, place, key))}]
    if reader.section.prompt_file is not None:
        raise ValueError(
            f"{reader.key}.prompt_file={reader.section.prompt_file!r}: has no meaning where prompts are messages, as "
            f"in {place}. Set it to null."
        )
    messages = chat_messages(raw, name, place, key)
    if messages[-1]["role"] != "user":
        raise ValueError(
            f"{key}: {place} has a prompt that ends with a turn of the {messages[-1]['role']}, and the user's is "
            f"needed. Correct the row."
        )
    return messages


def _answer(prompt: Sequence[Message], raw: Mapping[str, Any], name: str, place: str, key: str) -> Message:
    """The answer that stands under `name`: a text, one message, or the whole chat, which then begins as the prompt."""
    if isinstance(raw.get(name), str):
        return {"role": "assistant", "content": text_of(raw, name, place, key)}
    *before, answer = chat_messages(raw, name, place, key)
    if answer["role"] != "assistant":
        raise ValueError(
            f"{key}: {place} has {name} that ends with a turn of the {answer['role']}, and the assistant's is needed. "
            f"Correct the row."
        )
    if before and _texts(before) != _texts(prompt):
        raise ValueError(f"{key}: {place} has {name} with another prompt than the pair's. Correct the row.")
    return answer


def _texts(messages: Sequence[Message]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in messages]


def _pair(reader: RowReader, prompt: list[Message], chosen: Message, rejected: Message) -> _Pair:
    cluster = "\n".join(message["content"] for message in prompt)
    return _Pair(prompt=reader.format.with_system(prompt), chosen=chosen, rejected=rejected, cluster=cluster)
