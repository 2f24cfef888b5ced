"""The preference pairs of a DPO run: two answers to one prompt, of which one is better.

Tokens are made when a pair is asked, so that a large dataset stays text; checked_rows.py looks at them first.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np

from nemo_rl_lora.config.data import DatasetConfig
from nemo_rl_lora.data.catalog import tools_of
from nemo_rl_lora.data.chat import end_ids, ends_turn, how_to_end, render, render_any, special_id
from nemo_rl_lora.data.checked_rows import Kind, load_checked_sides, readable
from nemo_rl_lora.data.row_sets import (
    RowSet,
    RunConfig,
    longest_row,
    open_dataset,
    refuse_grpo_keys,
    refuse_sft_keys,
    shown_limits,
)
from nemo_rl_lora.data.rows import Pair, TooLongError
from nemo_rl_lora.data.seen_rows import recipe_of
from nemo_rl_lora.types import PreferencePair

logger = logging.getLogger(__name__)

PreferenceSet = RowSet[PreferencePair]
_Ids = tuple[int, ...]


def load_preference_sets(
    config: RunConfig, tokenizer: Any, *, seed: int = 0
) -> tuple[list[PreferenceSet], list[PreferenceSet]]:
    """Training sets and validation sets: what is held out of training, then `data.validation`'s. `seed` is that of
    the order in which pairs are drawn."""
    data = config.data
    refuse_sft_keys(data, "DPO", keys=("add_bos",))
    refuse_grpo_keys(config, "DPO", "leaves pairs that are too long out")
    eos_id = special_id(tokenizer, "eos") if data.add_eos else None
    ends = end_ids(tokenizer)

    def read_set(section: DatasetConfig, key: str) -> PreferenceSet:
        read, rows = open_dataset("dpo", section, key, processor=None, keep_nulls=data.keep_nulls)
        where: list[tuple[int, int]] = []  # of each pair: its row, its number in the row
        clusters: list[int] = []
        numbers: dict[str, int] = {}
        num_without = 0
        for index, _, pairs in readable(rows, read, data, key):
            num_without += not pairs
            for number, pair in enumerate(pairs):
                where.append((index, number))
                clusters.append(numbers.setdefault(pair.cluster, len(numbers)))
        if not where:
            raise ValueError(
                f"{key}: none of the {len(rows)} rows of {rows.origin} prefers one answer to another. Give other data."
            )
        if num_without:
            logger.info(f"{key}: {num_without} of {len(rows)} rows are left out, preferring no answer to another")

        def make(position: int, name: str) -> PreferencePair:
            index, number = where[position]
            pair: Pair = read(rows[index])[number]
            prompt_ids, chosen_ids, rejected_ids = _encode(tokenizer, pair, eos_id)
            num_tokens = len(prompt_ids) + max(len(chosen_ids), len(rejected_ids))
            if num_tokens > longest_row(config):
                raise TooLongError(pair.row.place, num_tokens)
            return PreferencePair(
                index=position,
                prompt_ids=prompt_ids,
                chosen_ids=chosen_ids,
                rejected_ids=rejected_ids,
                source=name if pair.part is None else f"{name}/{pair.part}",
                cluster=pair.cluster,
            )

        every = RowSet.of_all(section, key, lambda position: rows[where[position][0]], len(where), make, data=data)
        return replace(every, clusters=np.array(clusters))

    kind: Kind[PreferencePair] = Kind(
        noun="pairs",
        tokens=pair_tokens,
        has_end=lambda pair: all(ends_turn(tokenizer, ids, ends) for ids in (pair.chosen_ids, pair.rejected_ids)),
        no_end=how_to_end(tokenizer),
        recipe=recipe_of(tokenizer, data, longest_row(config)),
        too_long=f"a side being longer than {shown_limits(config)}",
    )
    return load_checked_sides(data, read_set, kind, clusters="questions", seed=seed)


def pair_tokens(pair: PreferencePair) -> tuple[_Ids, _Ids, _Ids]:
    """All tokens of a pair."""
    return pair.prompt_ids, pair.chosen_ids, pair.rejected_ids


def _encode(tokenizer: Any, pair: Pair, eos_id: int | None) -> tuple[_Ids, _Ids, _Ids]:
    """(prompt, chosen, rejected) as tokens: the prompt ends with the assistant's header, an answer as the template
    ends a turn, and with `eos_id` where that is given."""
    place = pair.row.place
    tools = tools_of(pair.row)
    pair.row.refuse_half_characters([*pair.prompt, pair.chosen, pair.rejected, tools])
    whose = {"place": place, "tools": tools}
    texts = [render_any(tokenizer, pair.prompt, add_generation_prompt=True, **whose)]
    for answer in (pair.chosen, pair.rejected):
        texts.append(render(tokenizer, [*pair.prompt, answer], add_generation_prompt=False, **whose))
    ids = [tuple(row) for row in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    prompt = ids[0]
    chosen, rejected = (_after_prompt(tokenizer, prompt, ids[i], (texts[0], texts[i]), place) for i in (1, 2))
    if chosen == rejected:
        raise pair.row.error("has two equal answers, and one must be better", key=None)
    if eos_id is None:
        return prompt, chosen, rejected
    chosen, rejected = (
        ids if ends_turn(tokenizer, ids, frozenset({eos_id})) else (*ids, eos_id) for ids in (chosen, rejected)
    )
    return prompt, chosen, rejected


def _after_prompt(tokenizer: Any, prompt: _Ids, whole: _Ids, texts: tuple[str, str], place: str) -> _Ids:
    """The tokens of an answer, as a model writes them after the tokens of the prompt. `texts`: of prompt and whole."""
    if whole[: len(prompt)] == prompt:
        return whole[len(prompt) :]
    before, text = texts
    if not text.startswith(before):
        raise ValueError(
            f"policy.tokenizer.chat_template: in {place} the tokens of the prompt are not how prompt and answer begin. "
            f"Give a template that writes the prompt's end (add_generation_prompt) as it begins an answer."
        )
    # one token would hold the end of the prompt and the beginning of the answer: a blank line, say
    answer = tuple(tokenizer(text[len(before) :], add_special_tokens=False)["input_ids"])
    if tokenizer.decode([*prompt, *answer]) != tokenizer.decode(whole):
        raise ValueError(
            f"policy.tokenizer.name={tokenizer.name_or_path!r}: in {place} it writes the end of the prompt and the "
            f"beginning of the answer as one token, and apart as another text. Remove what blanks the answer begins "
            f"with."
        )
    return answer
