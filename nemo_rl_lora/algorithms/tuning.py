"""What SFT and DPO share: sets of rows, mixed into batches, and held-out sets to measure on."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, Generic, TypeVar

from nemo_rl_lora.algorithms.algorithm import Algorithm, M
from nemo_rl_lora.config.loop import TuningConfig
from nemo_rl_lora.data.checked_rows import data_digests
from nemo_rl_lora.data.loader import RowLoader
from nemo_rl_lora.data.row_sets import RowSet

T = TypeVar("T")


class Tuning(Algorithm[M], Generic[M, T]):
    """An algorithm that learns rows of data; `noun` is what it calls them."""

    noun: str
    train_sets: list[RowSet[T]]
    validation_sets: list[RowSet[T]]

    @property
    @abstractmethod
    def loop(self) -> TuningConfig: ...

    @property
    def logprob_rows(self) -> int:
        return self.loop.val_micro_batch_size

    @abstractmethod
    def load_sets(self, tokenizer: Any) -> tuple[list[RowSet[T]], list[RowSet[T]]]:
        """Training and validation sets. ValueError names the first thing that is wrong."""

    def load_data(self, tokenizer: Any) -> RowLoader[T]:
        """Batches of `train_global_batch_size` rows out of all sets, by their rates."""
        self.train_sets, validation_sets = self.load_sets(tokenizer)
        self.validation_sets = [rows for rows in validation_sets if len(rows)]
        return RowLoader(
            self.train_sets,
            self.config.policy.train_global_batch_size,
            key="policy.train_global_batch_size",
            seed=self.loop.seed,
            shuffle=self.config.data.shuffle,
            num_epochs=self.loop.max_num_epochs,
            rates=[rows.rate for rows in self.train_sets],
        )

    def data_digests(self) -> dict[str, str]:
        return data_digests(self.train_sets, self.validation_sets)

    def describe_data(self) -> str:
        named = ", ".join(f"{len(rows)} of {rows.name}" for rows in self.train_sets)
        return f"{named} to train on, {sum(map(len, self.validation_sets))} {self.noun} for validation"


def validation_spans(num_rows: int, settings: TuningConfig) -> list[slice]:
    """The first `val_batches` batches of a set of rows; the whole set where that is 0."""
    size = settings.val_global_batch_size
    num_used = min(num_rows, settings.val_batches * size) if settings.val_batches else num_rows
    return [slice(begin, min(begin + size, num_used)) for begin in range(0, num_used, size)]


def tokens_by_source(rows: Iterable[tuple[str, int]]) -> dict[str, float]:
    """`num_tokens/<source>` from the source and the number of tokens of each row."""
    totals: dict[str, float] = {}
    for source, num_tokens in rows:
        name = f"num_tokens/{source}"
        totals[name] = totals.get(name, 0.0) + num_tokens
    return totals
