"""The prompts of a GRPO run: rows made ready to be asked.

Every row is tokenised once at the start, to check its length, and again when it is asked, so that a large dataset
stays text.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np

from nemo_rl_lora.config.data import DatasetConfig
from nemo_rl_lora.data.chat import encode
from nemo_rl_lora.data.row_sets import RowSet, RunConfig, load_sides, open_dataset, refuse_sft_keys
from nemo_rl_lora.data.rows import PromptFormat
from nemo_rl_lora.types import Prompt

logger = logging.getLogger(__name__)

_CHECKED_AT_ONCE = 1024


_Unencoded = tuple[Prompt, PromptFormat]  # a prompt without its token ids, and how it becomes some


class PromptSet(Sequence[Prompt]):
    """Prompts of one set of rows, or of several in a row. `Prompt.index` is the index here; it is stable for the same
    configuration."""

    def __init__(self, sets: Sequence[RowSet[_Unencoded]], tokenizer: Any) -> None:
        self._sets, self._tokenizer = sets, tokenizer
        self._starts = np.cumsum([0, *map(len, sets)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        number = int(np.searchsorted(self._starts, place, side="right")) - 1
        prompt, format_ = self._sets[number][place - int(self._starts[number])]
        return replace(prompt, index=place, token_ids=encode(self._tokenizer, format_, [prompt.text])[0])

    def unencoded(self) -> Iterator[Prompt]:
        """Every prompt without its token ids, which is quick: for the environments' checks."""
        return (replace(prompt, index=index) for index, (prompt, _) in enumerate(chain(*self._sets)))

    @property
    def environment_names(self) -> tuple[str, ...]:
        """The environments that score these prompts."""
        return tuple(dict.fromkeys(rows[0][0].environment for rows in self._sets))


def load_prompt_sets(config: RunConfig, tokenizer: Any) -> tuple[PromptSet, PromptSet | None]:
    """Training and validation prompts. Validation rows are those held out of training, then `data.validation`'s."""
    data = config.data
    refuse_sft_keys(data, "GRPO")
    for part, datasets in (("train", data.train), ("validation", data.validation)):
        if isinstance(datasets, tuple):
            names = ", ".join(section.dataset_name for section in datasets)
            raise ValueError(
                f"data.{part}=[{names}]: GRPO draws its prompts from one dataset. Give one, without a list."
            )
    train, validation = (
        PromptSet([_within(rows, config, tokenizer) for rows in side], tokenizer)
        for side in load_sides(data, _read, "rows")
    )
    return train, validation if len(validation) else None


def load_prompts(section: DatasetConfig, tokenizer: Any, *, config: RunConfig, key: str) -> PromptSet:
    """All rows of one dataset, which stands at `key` of the configuration."""
    return PromptSet([_within(_read(section, key), config, tokenizer)], tokenizer)


def _read(section: DatasetConfig, key: str) -> RowSet[_Unencoded]:
    read, rows = open_dataset("grpo", section, key, processor="math_hf_data_processor")
    environment = section.env_name
    if environment is None:
        raise ValueError(f"{key}.env_name=None: GRPO needs an environment. Name one, for example 'math'.")
    prompts: list[_Unencoded] = []
    for index, row in enumerate(rows):
        question, scored = read(row)
        text = row.format.user(question)["content"]
        prompts.append((Prompt(index=index, token_ids=(), text=text, row=scored, environment=environment), row.format))
    return RowSet.of_all(section, len(prompts), lambda position, name: prompts[position])


def _within(rows: RowSet[_Unencoded], config: RunConfig, tokenizer: Any) -> RowSet[_Unencoded]:
    """The set without its too long rows, or an error, as `data.on_long_prompt` says."""
    data, max_total = config.data, config.policy.max_total_sequence_length
    max_prompt = max_total if data.max_input_seq_length is None else data.max_input_seq_length
    format_ = rows[0][1]
    lengths: list[int] = []
    for start in range(0, len(rows), _CHECKED_AT_ONCE):
        texts = [prompt.text for prompt, _ in rows[start : start + _CHECKED_AT_ONCE]]
        lengths += map(len, encode(tokenizer, format_, texts))
    is_long = np.array(lengths) > min(max_prompt, max_total - 1)
    num_long, key = int(is_long.sum()), format_.key
    if not num_long:
        return rows
    if data.on_long_prompt == "error":
        first = int(is_long.argmax())
        raise ValueError(
            f"data.max_input_seq_length={data.max_input_seq_length!r}: {num_long} of {len(lengths)} prompts of {key} "
            f"are longer than {max_prompt} tokens or leave no room for a completion in "
            f"policy.max_total_sequence_length={max_total}; the first is row {first} with {lengths[first]} "
            f"tokens, the longest has {max(lengths)}. Raise the limits, or set data.on_long_prompt=drop."
        )
    if num_long == len(lengths):
        raise ValueError(
            f"data.on_long_prompt='drop': all {len(lengths)} prompts of {key} are longer than {max_prompt} "
            f"tokens or leave no room in policy.max_total_sequence_length={max_total}. Raise the limits."
        )
    logger.warning(f"{key}: {num_long} of {len(lengths)} rows are left out, their prompts being too long")
    return rows.where(~is_long)
