"""The prompts of a GRPO run: rows made ready to be asked.

Tokens are made when a prompt is asked, so that a large dataset stays text; checked_rows.py looks at them first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from nemo_rl_lora.config.data import DatasetConfig
from nemo_rl_lora.data.chat import render
from nemo_rl_lora.data.checked_rows import Kind, checked, load_checked_sides, readable
from nemo_rl_lora.data.row_sets import RowSet, RunConfig, open_dataset, refuse_sft_keys
from nemo_rl_lora.data.rows import TooLongError
from nemo_rl_lora.data.seen_rows import recipe_of
from nemo_rl_lora.types import Prompt


class PromptSet(Sequence[Prompt]):
    """Prompts of one set of rows, or of several in a row. `Prompt.index` is the index here; it is stable for the same
    configuration."""

    def __init__(self, sets: Sequence[RowSet[Prompt]], unencoded: Mapping[str, Sequence[Prompt]]) -> None:
        """`unencoded` are the prompts of a dataset's rows without their token ids, by the key of the dataset."""
        self.sets, self._unencoded = sets, unencoded
        self._starts = np.cumsum([0, *map(len, sets)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        number = int(np.searchsorted(self._starts, place, side="right")) - 1
        return replace(self.sets[number][place - int(self._starts[number])], index=place)

    def unencoded(self) -> Iterator[Prompt]:
        """Every prompt without its token ids, which is quick: for the environments' checks."""
        found = (self._unencoded[rows.key][position] for rows in self.sets for position in rows.positions)
        return (replace(prompt, index=index) for index, prompt in enumerate(found))

    @property
    def environment_names(self) -> tuple[str, ...]:
        """The environments that score these prompts."""
        return tuple(dict.fromkeys(self._unencoded[rows.key][0].environment for rows in self.sets))


@dataclass(slots=True)
class _Reader:
    """Reads datasets, and keeps their prompts without token ids."""

    config: RunConfig
    tokenizer: Any
    unencoded: dict[str, list[Prompt]] = field(default_factory=dict)

    def read(self, section: DatasetConfig, key: str) -> RowSet[Prompt]:
        """The rows of the dataset at `key`."""
        config, data = self.config, self.config.data
        read, table = open_dataset("grpo", section, key, processor="math_hf_data_processor", keep_nulls=data.keep_nulls)
        environment = section.env_name
        if environment is None:
            raise ValueError(f"{key}.env_name=None: GRPO needs an environment. Name one, for example 'math'.")
        prompts = self.unencoded[key] = []
        rows = []
        for index, row, (question, scored) in readable(table, read, data, key):
            text = row.format.user(question)["content"]
            prompts.append(
                Prompt(index=index, token_ids=(), text=text, row=scored, environment=environment, place=row.place)
            )
            rows.append(row)
        longest = min(longest_prompt(config), config.policy.max_total_sequence_length - 1)

        def make(position: int, name: str) -> Prompt:
            prompt, row = prompts[position], rows[position]
            row.refuse_half_characters([prompt.text, prompt.row])
            chat = row.format.with_system([{"role": "user", "content": prompt.text}])
            text = render(self.tokenizer, chat, add_generation_prompt=True, place=row.place)
            ids = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            if len(ids) > longest:
                raise TooLongError(row.place, len(ids))
            return replace(prompt, token_ids=ids)

        every = RowSet.of_all(section, key, rows.__getitem__, len(prompts), make, data=data)
        return replace(every, skips_long=data.on_long_prompt == "drop")

    @property
    def kind(self) -> Kind[Prompt]:
        """For the check: a prompt is what is asked and what its completions are scored by."""
        return Kind(
            noun="prompts",
            tokens=lambda prompt: (
                prompt.token_ids,
                json.dumps(prompt.row, sort_keys=True, default=str).encode(),
            ),
            has_end=lambda prompt: True,
            no_end="",
            recipe=recipe_of(self.tokenizer, self.config.data, self.config.policy.max_total_sequence_length),
            too_long=f"being longer than {longest_prompt(self.config)} tokens or leaving no room for a "
            f"completion in policy.max_total_sequence_length={self.config.policy.max_total_sequence_length}",
        )


def load_prompt_sets(config: RunConfig, tokenizer: Any, *, seed: int = 0) -> tuple[PromptSet, PromptSet | None]:
    """Training and validation prompts. Validation rows are those held out of training, then `data.validation`'s. `seed`
    is that of the order in which prompts are drawn."""
    data = config.data
    refuse_sft_keys(data, "GRPO")
    for part, datasets in (("train", data.train), ("validation", data.validation)):
        if isinstance(datasets, tuple):
            names = ", ".join(section.dataset_name for section in datasets)
            raise ValueError(
                f"data.{part}=[{names}]: GRPO draws its prompts from one dataset. Give one, without a list."
            )
    reader = _Reader(config, tokenizer)
    sides = load_checked_sides(data, reader.read, reader.kind, clusters="rows", seed=seed)
    train, validation = (PromptSet(side, reader.unencoded) for side in sides)
    return train, validation if len(validation) else None


def load_prompts(section: DatasetConfig, tokenizer: Any, *, config: RunConfig, key: str) -> PromptSet:
    """All rows of one dataset, which stands at `key` of the configuration."""
    reader = _Reader(config, tokenizer)
    rows = reader.read(section, key).repeated(section.repeat)
    order = np.arange(len(rows))
    return PromptSet([checked(rows, config.data, reader.kind, order=order, is_trained=True)], reader.unencoded)


def longest_prompt(config: RunConfig) -> int:
    """Most tokens of a prompt, where it leaves room for a completion."""
    limit = config.data.max_input_seq_length
    return config.policy.max_total_sequence_length if limit is None else limit
