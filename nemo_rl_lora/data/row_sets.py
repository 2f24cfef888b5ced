"""Sets of rows: the training and the validation side of a run, what is held out, which keys have no use.

A `RowSet` is what SFT, DPO and GRPO (prompts.py) draw from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from nemo_rl_lora.config.data import DataConfig, DatasetConfig
from nemo_rl_lora.config.master import EvalMaster, MasterConfig
from nemo_rl_lora.data.catalog import Algorithm, require_reader
from nemo_rl_lora.data.loader import held_out
from nemo_rl_lora.data.rows import Row
from nemo_rl_lora.data.sources import RowTable, read_table

T = TypeVar("T")
RunConfig = MasterConfig | EvalMaster


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowSet(Sequence[T]):
    """Rows of one dataset, each made ready when it is asked for, so that a large dataset stays text."""

    name: str  # for metrics
    rate: float  # its weight in a mixture
    positions: np.ndarray  # [N] int64, in the dataset
    clusters: np.ndarray  # [N] int64; rows of one number are held out together
    make: Callable[[int, str], T]  # (position, name) -> the row

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.make(int(position), self.name) for position in self.positions[index]]
        return self.make(int(self.positions[index]), self.name)

    @classmethod
    def of_all(cls, section: DatasetConfig, num_rows: int, make: Callable[[int, str], T]) -> RowSet[T]:
        """All rows of a dataset, each for itself."""
        rows = np.arange(num_rows)
        return cls(name=section.dataset_name, rate=section.rate, positions=rows, clusters=rows, make=make)

    def where(self, chosen: np.ndarray) -> RowSet[T]:
        """The rows that are chosen, [N] bool."""
        return replace(self, positions=self.positions[chosen], clusters=self.clusters[chosen])


def open_dataset(
    algorithm: Algorithm, section: DatasetConfig, key: str, *, processor: str | None
) -> tuple[Callable[[Row], Any], RowTable]:
    """The rows of a dataset and what reads one. ValueError where it, or its processor, is not the algorithm's."""
    read = require_reader(algorithm, section, key)
    if section.processor not in (None, processor):
        remedy = f"Use {processor!r} or null" if processor else "Set it to null"
        raise ValueError(f"{key}.processor={section.processor!r}: is no processor of {algorithm.upper()}. {remedy}.")
    return read, read_table(section, key)


def longest_row(config: RunConfig) -> int:
    """Most tokens of a whole row."""
    limits = (config.data.max_input_seq_length, config.policy.max_total_sequence_length)
    return min(limit for limit in limits if limit is not None)


def load_sides(
    data: DataConfig, read: Callable[[DatasetConfig, str], RowSet[T]], noun: str
) -> tuple[list[RowSet[T]], list[RowSet[T]]]:
    """Training sets and validation sets: what is held out of training, then `data.validation`'s. `noun` is what
    `clusters` number."""
    train, validation = [], []
    if data.train is None:
        raise ValueError("data.train=None: training needs a dataset. Set data.train.dataset_name.")
    for key, section in data.sections("train"):
        rows = read(section, key)
        is_held_out = held_out(int(rows.clusters.max()) + 1, section, key, noun)[rows.clusters]
        train.append(rows.where(~is_held_out))
        if is_held_out.any():
            validation.append(rows.where(is_held_out))
    for key, section in data.sections("validation"):
        if section.split_validation_size:
            raise ValueError(
                f"{key}.split_validation_size={section.split_validation_size}: only training rows can be held out for "
                f"validation. Remove it."
            )
        validation.append(read(section, key))
    return _named(train), _named(validation)


def refuse_sft_keys(data: DataConfig, algorithm: str) -> None:
    """ValueError for keys that have a meaning in SFT only."""
    for name in ("add_bos", "add_eos"):
        if getattr(data, name) is not None:
            raise ValueError(
                f"data.{name}={getattr(data, name)!r}: has no meaning in {algorithm}, where the chat template alone "
                f"decides which special tokens there are. Remove it."
            )
    if data.add_generation_prompt is False:
        raise ValueError(
            f"data.add_generation_prompt=False: {algorithm} always ends the prompt with the assistant's header. "
            f"Remove it."
        )


def refuse_grpo_keys(data: DataConfig, algorithm: str, what_is_done: str) -> None:
    """ValueError for keys that have a meaning in GRPO only; `what_is_done` with rows that are too long."""
    if data.on_long_prompt != "error":
        raise ValueError(f"data.on_long_prompt={data.on_long_prompt!r}: {algorithm} {what_is_done}. Remove it.")
    for key, section in [*data.sections("train"), *data.sections("validation")]:
        if section.env_name is not None:
            raise ValueError(
                f"{key}.env_name={section.env_name!r}: has no meaning in {algorithm}, which scores nothing. Remove it."
            )


def _named(sets: Iterable[RowSet[T]]) -> list[RowSet[T]]:
    """The sets with names of their own: the second `squad` is `squad#2`."""
    seen: Counter[str] = Counter()
    named = []
    for rows in sets:
        seen[rows.name] += 1
        number = seen[rows.name]
        named.append(rows if number == 1 else replace(rows, name=f"{rows.name}#{number}"))
    return named
