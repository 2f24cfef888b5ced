"""The order in which rows are drawn, epoch after epoch, from one dataset or a mixture; and which rows are held out.

Every draw is a pure function of the seed and its place, so a position is a few counts and a resume replays nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from nemo_rl_lora.config.data import DatasetConfig

T = TypeVar("T")

_EPOCH_ORDER, _HELD_OUT, _SET_OF_DRAW = 2, 3, 4  # purposes of a draw, beside the seed
_DRAWS_OF_A_BLOCK = 4096


def epoch_order(seed: int, epoch: int, num_rows: int, shuffle: bool, set_number: int = 0) -> np.ndarray:
    """The rows' order in an epoch, [num_rows] int64; the same for the same arguments."""
    if not shuffle:
        return np.arange(num_rows)
    others = [set_number] if set_number else []
    return np.random.default_rng([seed, _EPOCH_ORDER, epoch, *others]).permutation(num_rows)


def held_out(num_items: int, section: DatasetConfig, key: str, noun: str = "rows") -> np.ndarray:
    """Which of the items `split_validation_size` holds out, [num_items] bool; drawn from the section's seed."""
    share = section.split_validation_size
    num_held_out = round(num_items * share)
    if share and not 0 < num_held_out < num_items:
        raise ValueError(
            f"{key}.split_validation_size={share}: holds out {num_held_out} of {num_items} {noun}, and at least one "
            f"must be on each side. Change it, or set it to 0."
        )
    drawn = np.random.default_rng([section.seed, _HELD_OUT]).permutation(num_items)[:num_held_out]
    return np.isin(np.arange(num_items), drawn)


class RowLoader(Iterator[list[T]]):
    """Batches of rows, epoch after epoch; draws left over at the end of an epoch are not made.

    Of several sets, each draw picks one with a probability proportional to its rate; a set's own rows come in its own
    epoch order, and begin anew when they are used up. `epoch` and `offset` (draws) are the position of the next batch.
    With `num_epochs` it stops after so many. `key` is what the configuration calls `num_rows`, the rows of a batch.
    """

    def __init__(
        self,
        sets: Sequence[Sequence[T]],
        num_rows: int,
        *,
        key: str,
        seed: int,
        shuffle: bool,
        num_epochs: int | None = None,
        rates: Sequence[float] | None = None,
    ) -> None:
        self._total = sum(map(len, sets))
        if not 0 < num_rows <= self._total:
            raise ValueError(
                f"{key}={num_rows}: the training data has {self._total} rows. Give at most so many, or more data."
            )
        self._sets, self._num_rows = list(sets), num_rows
        self._seed, self._shuffle, self._num_epochs = seed, shuffle, num_epochs
        self._rates = [1.0] * len(sets) if rates is None else list(rates)
        assert len(self._rates) == len(sets), (self._rates, len(sets))
        cumulative = np.cumsum(self._rates)
        self._shares = cumulative / cumulative[-1]  # where each set's part of [0, 1) ends
        self.epoch, self.offset = 0, 0
        self._num_taken = [0] * len(sets)  # of each set, over all epochs
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # set -> (its epoch, its order)
        self._block: tuple[int, np.ndarray] | None = None  # (number, uniform draws)

    @property
    def num_batches_per_epoch(self) -> int:
        return self._total // self._num_rows

    @property
    def is_at_end_of_epoch(self) -> bool:
        """Whether the next batch begins another epoch."""
        return self.offset + self._num_rows > self._total

    def mean_of_a_batch(self, number: Callable[[T], float]) -> float:
        """What a batch has of something on average, by up to 1,000 rows of each set, spread over it."""
        shares = np.diff(self._shares, prepend=0.0)
        means = [np.mean([number(rows[i]) for i in range(0, len(rows), -(-len(rows) // 1000))]) for rows in self._sets]
        return self._num_rows * float(np.dot(shares, means))

    def __next__(self) -> list[T]:
        if self.is_at_end_of_epoch:
            self.epoch, self.offset = self.epoch + 1, 0
            if len(self._sets) == 1:
                self._num_taken = [self.epoch * self._total]
        if self._num_epochs is not None and self.epoch >= self._num_epochs:
            raise StopIteration
        self.offset += self._num_rows
        return [self._next_row() for _ in range(self._num_rows)]

    def state(self) -> dict[str, Any]:
        """The position, and what it is a position in; plain JSON values."""
        return {
            "epoch": self.epoch,
            "offset": self.offset,
            "num_taken": list(self._num_taken),
            "num_rows": [len(rows) for rows in self._sets],
            "rates": self._rates,
            "seed": self._seed,
            "shuffle": self._shuffle,
        }

    def from_state(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position. ValueError for a position in another order.

        A set that has another number of rows now, which `data.on_change` allows, stays in its epoch, at its place.
        """
        for name in ("rates", "seed", "shuffle"):
            if state[name] != self.state()[name]:
                raise ValueError(
                    f"data.train: the checkpoint's data position is one in data with {name}={state[name]!r}, and "
                    f"now {name}={self.state()[name]!r}. Continue with the same data, or start anew."
                )
        self.epoch, self.offset = int(state["epoch"]), int(state["offset"])
        self._num_taken = []
        for count, before, rows in zip(state["num_taken"], state["num_rows"], self._sets, strict=True):
            epoch, place = divmod(int(count), before)
            self._num_taken.append(epoch * len(rows) + min(place, len(rows)))

    def _next_row(self) -> T:
        number = self._set_of_draw(sum(self._num_taken))
        rows = self._sets[number]
        epoch, position = divmod(self._num_taken[number], len(rows))
        self._num_taken[number] += 1
        return rows[int(self._order(number, epoch)[position])]

    def _set_of_draw(self, draw: int) -> int:
        if len(self._sets) == 1:
            return 0
        block, place = divmod(draw, _DRAWS_OF_A_BLOCK)
        if self._block is None or self._block[0] != block:
            uniform = np.random.default_rng([self._seed, _SET_OF_DRAW, block]).random(_DRAWS_OF_A_BLOCK)
            self._block = (block, uniform)
        return int(np.searchsorted(self._shares, self._block[1][place], side="right"))

    def _order(self, number: int, epoch: int) -> np.ndarray:
        if number not in self._orders or self._orders[number][0] != epoch:
            order = epoch_order(self._seed, epoch, len(self._sets[number]), self._shuffle, number)
            self._orders[number] = (epoch, order)
        return self._orders[number][1]
