"""The preference pairs of a DPO run: two answers to one prompt, of which one is better.

Every pair is tokenised once at the start, to check its form and length, and again when it is asked, so that a large
dataset stays text.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np

from nemo_rl_lora.config.data import DatasetConfig
from nemo_rl_lora.data.chat import render
from nemo_rl_lora.data.row_sets import (
    RowSet,
    RunConfig,
    load_sides,
    longest_row,
    open_dataset,
    refuse_grpo_keys,
    refuse_sft_keys,
)
from nemo_rl_lora.data.rows import Pair
from nemo_rl_lora.data.sources import RowTable
from nemo_rl_lora.types import PreferencePair

logger = logging.getLogger(__name__)

PreferenceSet = RowSet[PreferencePair]
_Ids = tuple[int, ...]

_CHECKED_AT_ONCE = 1024


def load_preference_sets(config: RunConfig, tokenizer: Any) -> tuple[list[PreferenceSet], list[PreferenceSet]]:
    """Training sets and validation sets: what is held out of training, then `data.validation`'s."""
    refuse_sft_keys(config.data, "DPO")
    refuse_grpo_keys(config.data, "DPO", "leaves pairs that are too long out")
    return load_sides(config.data, lambda section, key: _read(section, key, config, tokenizer), "questions")


def _read(section: DatasetConfig, key: str, config: RunConfig, tokenizer: Any) -> PreferenceSet:
    read, rows = open_dataset("dpo", section, key, processor=None)
    where: list[tuple[int, int]] = []  # of each pair: its row, its number in the row
    clusters: list[int] = []
    allowed: list[bool] = []
    numbers: dict[str, int] = {}
    found = ((index, number, pair) for index, row in enumerate(rows) for number, pair in enumerate(read(row)))
    while some := list(islice(found, _CHECKED_AT_ONCE)):
        encoded = _encode(tokenizer, [pair for *_, pair in some])
        for (index, number, pair), (prompt, chosen, rejected) in zip(some, encoded, strict=True):
            where.append((index, number))
            allowed.append(len(prompt) + max(len(chosen), len(rejected)) <= longest_row(config))
            if allowed[-1]:
                clusters.append(numbers.setdefault(pair.cluster, len(numbers)))
    _report(rows, where, allowed, config, key)

    def make(position: int, name: str) -> PreferencePair:
        index, number = where[position]
        pair: Pair = read(rows[index])[number]
        prompt_ids, chosen_ids, rejected_ids = _encode(tokenizer, [pair])[0]
        return PreferencePair(
            index=position,
            prompt_ids=prompt_ids,
            chosen_ids=chosen_ids,
            rejected_ids=rejected_ids,
            source=name if pair.part is None else f"{name}/{pair.part}",
            cluster=pair.cluster,
        )

    every = RowSet.of_all(section, len(where), make)
    return replace(every.where(np.array(allowed)), clusters=np.array(clusters))


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


def _encode(tokenizer: Any, pairs: Sequence[Pair]) -> list[tuple[_Ids, _Ids, _Ids]]:
    """(prompt, chosen, rejected) as tokens, of each pair: the prompt ends with the assistant's header, an answer as
    the template ends a turn."""
    texts = []
    for pair in pairs:
        place = pair.row.place
        texts.append(render(tokenizer, pair.prompt, add_generation_prompt=True, place=place))
        for answer in (pair.chosen, pair.rejected):
            texts.append(render(tokenizer, [*pair.prompt, answer], add_generation_prompt=False, place=place))
    ids = [tuple(row) for row in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    encoded = []
    for pair, prompt, chosen, rejected in zip(pairs, ids[::3], ids[1::3], ids[2::3], strict=True):
        if chosen[: len(prompt)] != prompt or rejected[: len(prompt)] != prompt:
            raise ValueError(
                f"policy.tokenizer.chat_template: in {pair.row.place} the tokens of the prompt are not how prompt and "
                f"answer begin. Give a template that writes the prompt's end (add_generation_prompt) as it begins an "
                f"answer."
            )
        if chosen == rejected:
            raise pair.row.error("has two equal answers, and one must be better", key=None)
        encoded.append((prompt, chosen[len(prompt) :], rejected[len(prompt) :]))
    return encoded
