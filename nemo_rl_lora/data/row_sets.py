"""Sets of rows: the training and the validation side of a run, what is held out, which keys have no use.

A `RowSet` is what SFT, DPO and GRPO (prompts.py) draw from.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, TypeVar

import numpy as np

from nemo_rl_lora.config.data import DataConfig, DatasetConfig
from nemo_rl_lora.config.master import EvalMaster, MasterConfig
from nemo_rl_lora.data.catalog import Algorithm, require_reader
from nemo_rl_lora.data.loader import held_out
from nemo_rl_lora.data.rows import Row, TooLongError
from nemo_rl_lora.data.sources import RowTable, read_table

logger = logging.getLogger(__name__)

T = TypeVar("T")
RunConfig = MasterConfig | EvalMaster


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowSet(Sequence[T]):
    """Rows of one dataset, each made ready when it is asked for, so that a large dataset stays text.

    One that cannot be used is replaced by the next of the set that can, where the configuration says so, and otherwise
    a ValueError. (A set that was checked whole has none.)
    """

    name: str  # for metrics
    key: str  # of the dataset in the configuration
    rate: float  # its weight in a mixture
    positions: np.ndarray  # [N] int64, in the dataset
    clusters: np.ndarray  # [N] int64; rows of one number are held out together
    make: Callable[[int, str], T]  # (position, name) -> the row; ValueError where it cannot be used
    stored: Callable[[int], Any]  # position -> the row as it is stored, and its place
    skips_bad: bool
    skips_long: bool = True
    recipe: str = ""  # all that a row is read by but the code: its section, the text of its prompt files
    digest: str = ""  # of the rows as tokenised, from `checked` on

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        first = range(len(self))[index]
        for number in chain(range(first, len(self)), range(first)):
            try:
                return self.make(int(self.positions[number]), self.name)
            except ValueError as error:
                if not (self.skips_long if isinstance(error, TooLongError) else self.skips_bad):
                    remedy = "Or continue with data.on_bad_row=skip, which uses the next row in its place."
                    raise ValueError(f"{error} {remedy}") from error
                logger.warning(f"{self.key}: the next row is used in place of one that cannot be: {error}")
        raise ValueError(f"{self.key}: none of its {len(self)} rows can be used. Give other data.")

    @classmethod
    def of_all(
        cls,
        section: DatasetConfig,
        key: str,
        row_at: Callable[[int], Row],
        num_rows: int,
        make: Callable[[int, str], T],
        *,
        data: DataConfig,
    ) -> RowSet[T]:
        """All rows of a dataset, each for itself. `row_at`: the row of a position."""
        rows = np.arange(num_rows)

        def stored(position: int) -> Any:
            row = row_at(position)
            return position, row.place, row.values

        return cls(
            name=section.dataset_name,
            key=key,
            rate=section.rate,
            positions=rows,
            clusters=rows,
            make=make,
            stored=stored,
            skips_bad=data.on_bad_row == "skip",
            recipe=repr((section, row_at(0).format)) if num_rows else "",
        )

    def where(self, chosen: np.ndarray) -> RowSet[T]:
        """The rows that are chosen, [N] bool."""
        return replace(self, positions=self.positions[chosen], clusters=self.clusters[chosen])

    def repeated(self, times: int) -> RowSet[T]:
        """The rows so many times, one pass after the other."""
        return replace(self, positions=np.tile(self.positions, times), clusters=np.tile(self.clusters, times))


def open_dataset(
    algorithm: Algorithm, section: DatasetConfig, key: str, *, processor: str | None, keep_nulls: bool = False
) -> tuple[Callable[[Row], Any], RowTable]:
    """The rows of a dataset and what reads one. ValueError where it, or its processor, is not the algorithm's."""
    read = require_reader(algorithm, section, key)
    if section.processor not in (None, processor):
        remedy = f"Use {processor!r} or null" if processor else "Set it to null"
        raise ValueError(f"{key}.processor={section.processor!r}: is no processor of {algorithm.upper()}. {remedy}.")
    return read, read_table(section, key, keep_nulls=keep_nulls)


def longest_row(config: RunConfig) -> int:
    """Most tokens of a whole row."""
    limits = (config.data.max_input_seq_length, config.policy.max_total_sequence_length)
    return min(limit for limit in limits if limit is not None)


def shown_limits(config: RunConfig) -> str:
    """`longest_row`, with the keys that it follows from."""
    return (
        f"{longest_row(config)} tokens (data.max_input_seq_length={config.data.max_input_seq_length!r}, "
        f"policy.max_total_sequence_length={config.policy.max_total_sequence_length})"
    )


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
        train.append(rows.where(~is_held_out).repeated(section.repeat))
        if is_held_out.any():
            validation.append(rows.where(is_held_out))
    for key, section in data.sections("validation"):
        if section.split_validation_size:
            raise ValueError(
                f"{key}.split_validation_size={section.split_validation_size}: only training rows can be held out for "
                f"validation. Remove it."
            )
        validation.append(read(section, key).repeated(section.repeat))
    return _named(train), _named(validation)


def refuse_sft_keys(data: DataConfig, algorithm: str, keys: Sequence[str] = ("add_bos", "add_eos")) -> None:
    """ValueError for keys that have no meaning in this algorithm."""
    for name in keys:
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


def refuse_grpo_keys(config: RunConfig, algorithm: str, what_is_done: str) -> None:
    """ValueError for keys that have a meaning for prompts only, which SFT and DPO have in evaluations alone;
    `what_is_done` with rows that are too long."""
    data, has_prompts = config.data, isinstance(config, MasterConfig) and bool(config.evaluate)
    if data.on_long_prompt != "error" and not has_prompts:
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
