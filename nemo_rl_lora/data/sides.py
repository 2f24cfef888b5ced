"""The training and the validation side of a run: what is held out, how a set is called, which keys have no use.

For SFT and DPO, whose sets are `RowSet`s; GRPO's prompts (prompts.py) share the checks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeVar

import numpy as np

from nemo_rl_lora.config.data import DataConfig, DatasetConfig, require_rows_for
from nemo_rl_lora.data.chat import PromptFormat, load_format
from nemo_rl_lora.data.order import held_out
from nemo_rl_lora.data.sources import RowTable, read_table

T = TypeVar("T")


class _HasLength(Protocol):
    @property
    def max_total_sequence_length(self) -> int: ...


class RunConfig(Protocol):
    """What is read of the whole configuration."""

    @property
    def data(self) -> DataConfig: ...

    @property
    def policy(self) -> _HasLength: ...


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


@dataclass(frozen=True, slots=True, kw_only=True)
class RowReader:
    """What the rows of one dataset, which stands at `key` in the configuration, are read by."""

    section: DatasetConfig
    key: str
    format: PromptFormat


def open_dataset(
    algorithm: Literal["sft", "dpo"], section: DatasetConfig, key: str, *, processor: str | None
) -> tuple[RowReader, RowTable]:
    """The rows of a dataset and how to read them. ValueError where it, or its processor, is not the algorithm's."""
    require_rows_for(algorithm, section, key)
    refuse_processor(section, key, algorithm.upper(), processor)
    return RowReader(section=section, key=key, format=load_format(section, key)), read_table(section, key)


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
    require_training(data)
    for key, section in data.sections("train"):
        rows = read(section, key)
        is_held_out = held_out(int(rows.clusters.max()) + 1, section, key, noun)[rows.clusters]
        train.append(_chosen(rows, ~is_held_out))
        if is_held_out.any():
            validation.append(_chosen(rows, is_held_out))
    for key, section in data.sections("validation"):
        refuse_held_out(section, key)
        validation.append(read(section, key))
    return _named(train), _named(validation)


def require_training(data: DataConfig) -> None:
    """ValueError where there is nothing to train on."""
    if data.train is None:
        raise ValueError("data.train=None: training needs a dataset. Set data.train.dataset_name.")


def refuse_held_out(section: DatasetConfig, key: str) -> None:
    """ValueError where a validation set is to be split."""
    if section.split_validation_size:
        raise ValueError(
            f"{key}.split_validation_size={section.split_validation_size}: only training rows can be held out for "
            f"validation. Remove it."
        )


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


def refuse_processor(section: DatasetConfig, key: str, algorithm: str, known: str | None) -> None:
    """ValueError for another processor than the algorithm's."""
    if section.processor not in (None, known):
        remedy = f"Use {known!r} or null" if known else "Set it to null"
        raise ValueError(f"{key}.processor={section.processor!r}: is no processor of {algorithm}. {remedy}.")


def _chosen(rows: RowSet[T], chosen: np.ndarray) -> RowSet[T]:
    return replace(rows, positions=rows.positions[chosen], clusters=rows.clusters[chosen])


def _named(sets: Iterable[RowSet[T]]) -> list[RowSet[T]]:
    """The sets with names of their own: the second `squad` is `squad#2`."""
    seen: Counter[str] = Counter()
    named = []
    for rows in sets:
        seen[rows.name] += 1
        number = seen[rows.name]
        named.append(rows if number == 1 else replace(rows, name=f"{rows.name}#{number}"))
    return named
