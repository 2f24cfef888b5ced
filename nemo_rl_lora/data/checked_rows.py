"""Rows are tokenised and looked at before a weight is loaded: which can be used, their digest, whether a turn ends.

A set of at most `data.num_checked_rows` rows is looked at whole, and what cannot be used is left out of it. Of a larger
set the rows that the run draws first are looked at; each of its rows is then used or replaced as it is drawn (RowSet).
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np

from nemo_rl_lora.config.data import DataConfig, DatasetConfig
from nemo_rl_lora.data.loader import epoch_order
from nemo_rl_lora.data.row_sets import RowSet, load_sides
from nemo_rl_lora.data.rows import Row, TooLongError
from nemo_rl_lora.data.seen_rows import Seen, place_of, read_seen, write_seen
from nemo_rl_lora.data.sources import RowTable

logger = logging.getLogger(__name__)

T = TypeVar("T")

_AT_ONCE = 256  # rows that a thread looks at, one after another
_MAX_THREADS = 16
_SECONDS_BETWEEN_REPORTS = 10.0
_SECONDS_WORTH_KEEPING = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind(Generic[T]):
    """What an algorithm's rows are, to whoever looks at them."""

    noun: str  # in the plural
    tokens: Callable[[T], Sequence[Sequence[int] | bytes]]  # all that is trained on
    has_end: Callable[[T], bool | None]  # whether what is learned ends a turn; None where the end was cut
    no_end: str  # the remedy where it does not
    recipe: bytes  # of how they become tokens (seen_rows.py)
    too_long: str  # why a row is left out: "a side being longer than 512 tokens (...)"


def readable(table: RowTable, read: Callable[[Row], Any], data: DataConfig, key: str) -> Iterator[tuple[int, Row, Any]]:
    """(index, row, what is read of it) of every row; of those that can be read, where `data.on_bad_row` is skip."""
    problems: list[str] = []
    for index, row in enumerate(table):
        try:
            found = read(row)
        except ValueError as error:
            if data.on_bad_row == "refuse":
                raise ValueError(_refusal([str(error)], index + 1)) from error
            problems.append(str(error))
        else:
            yield index, row, found
    if problems:
        _say_skipped(problems, len(table), f"{key}: ", "rows")


def load_checked_sides(
    data: DataConfig, read: Callable[[DatasetConfig, str], RowSet[T]], kind: Kind[T], *, clusters: str, seed: int
) -> tuple[list[RowSet[T]], list[RowSet[T]]]:
    """`load_sides`, checked. `seed` is that of the order in which the run draws rows."""
    train, validation = load_sides(data, read, clusters)
    for number, rows in enumerate(train):
        order = epoch_order(seed, 0, len(rows), data.shuffle, number)
        train[number] = checked(rows, data, kind, order=order, is_trained=True)
    in_order = [checked(rows, data, kind, order=np.arange(len(rows)), is_trained=False) for rows in validation]
    return train, in_order


def data_digests(train: Sequence[RowSet[Any]], validation: Sequence[RowSet[Any]]) -> dict[str, str]:
    """The digest of each set, by the key of its dataset."""
    digests = {rows.key: rows.digest for rows in train}
    for rows in validation:
        digests[f"{rows.key} (held out)" if rows.key in digests else rows.key] = rows.digest
    return digests


def checked(rows: RowSet[T], data: DataConfig, kind: Kind[T], *, order: np.ndarray, is_trained: bool) -> RowSet[T]:
    """The set, looked at: without the rows that cannot be used, with its digest. `order` is that of the first epoch.

    ValueError for a row that cannot be used, unless `data.on_bad_row` is skip, and where none is left to train on.
    """
    whole = len(rows) <= data.num_checked_rows
    numbers = np.arange(len(rows)) if whole else order[: data.num_checked_rows]
    seen = _look(rows, numbers, data, kind)
    _report_bad(rows, seen, kind)
    _report_too_long(rows, seen, kind, is_trained=is_trained)
    _report_ends(rows, seen, kind)
    digest = hashlib.sha256(b"".join(one.digest for one in seen))
    if not whole:
        digest.update(f"{len(rows)} rows".encode())
        logger.warning(
            f"{rows.key}: of {len(rows)} {kind.noun} the {len(numbers)} that are drawn first are checked now, the "
            f"others when they are drawn (data.num_checked_rows={data.num_checked_rows})"
        )
        return replace(rows, digest=digest.hexdigest())
    usable = np.array([bool(one.digest) for one in seen], dtype=bool)
    if is_trained and not usable.any():
        raise ValueError(f"{rows.key}: none of its {len(rows)} {kind.noun} can be used. Give other data.")
    return replace(rows.where(usable), digest=digest.hexdigest())


def _look(rows: RowSet[T], numbers: np.ndarray, data: DataConfig, kind: Kind[T]) -> list[Seen]:
    """What is seen of these rows, in their order; to the first that cannot be used, where that is an error.

    Tokenizers let other threads run while they work, and templates do not.
    """

    recipe = kind.recipe + rows.recipe.encode(errors="backslashreplace")
    place = place_of(recipe, (rows.stored(int(position)) for position in rows.positions[numbers]))
    if (known := read_seen(place)) is not None and len(known) == len(numbers):
        return known

    def look(some: np.ndarray) -> list[Seen]:
        return [_seen(rows, int(number), kind) for number in some]

    parts = [numbers[begin : begin + _AT_ONCE] for begin in range(0, len(numbers), _AT_ONCE)]
    num_threads = min(len(os.sched_getaffinity(0)), _MAX_THREADS, len(parts))
    found: list[Seen] = []
    started = reported = time.monotonic()
    with ThreadPoolExecutor(max(num_threads, 1)) as pool:
        for part in pool.map(look, parts) if num_threads > 1 else map(look, parts):
            found += part
            problems = [one.problem for one in part if one.problem is not None]
            if problems and data.on_bad_row == "refuse":
                pool.shutdown(cancel_futures=True)
                raise ValueError(_refusal(problems, len(found)))
            if time.monotonic() - reported > _SECONDS_BETWEEN_REPORTS:
                reported = time.monotonic()
                logger.info(f"{rows.key}: {len(found)} of {len(numbers)} {kind.noun} are checked")
    if time.monotonic() - started > _SECONDS_WORTH_KEEPING:
        write_seen(place, found)
    return found


def _seen(rows: RowSet[T], number: int, kind: Kind[T]) -> Seen:
    try:
        row = rows.make(int(rows.positions[number]), rows.name)
    except TooLongError as error:
        return Seen(too_long=error)
    except ValueError as error:
        return Seen(problem=str(error))
    return Seen(digest=tokens_digest(kind.tokens(row)), has_end=kind.has_end(row))


def tokens_digest(parts: Sequence[Sequence[int] | bytes]) -> bytes:
    """Of token ids, masks and bytes, each apart from the next."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else np.asarray(part, dtype=np.int64).tobytes()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.digest()[:16]


def _refusal(problems: Sequence[str], num_rows: int) -> str:
    """The error of the first row that cannot be used, and the way to do without such rows."""
    if len(problems) == num_rows:
        return problems[0]
    return (
        f"{problems[0]} Or leave such rows out, with data.on_bad_row=skip: of the {num_rows} looked at so far, "
        f"{len(problems)} cannot be used."
    )


def _report_bad(rows: RowSet[T], seen: Sequence[Seen], kind: Kind[T]) -> None:
    problems = [one.problem for one in seen if one.problem is not None]
    if problems:
        _say_skipped(problems, len(seen), f"{rows.key}: ", kind.noun)


def _say_skipped(problems: Sequence[str], num_rows: int, label: str, noun: str) -> None:
    if len(problems) == num_rows:
        raise ValueError(f"{problems[0]} None of the {num_rows} {noun} can be used, so there is nothing to skip to.")
    logger.warning(
        f"{label}{len(problems)} of {num_rows} {noun} are left out (data.on_bad_row='skip'). The first: {problems[0]}"
    )


def _report_too_long(rows: RowSet[T], seen: Sequence[Seen], kind: Kind[T], *, is_trained: bool) -> None:
    """Say what is left out for its length. ValueError where that is an error, or nothing is left to train on."""
    long = [one.too_long for one in seen if one.too_long is not None]
    if not long:
        return
    counted = f"{len(long)} of {len(seen)} {kind.noun}"
    if not rows.skips_long:
        first, longest = long[0], max(error.num_tokens for error in long)
        raise ValueError(
            f"data.on_long_prompt='error': {counted} of {rows.key} cannot be asked, {kind.too_long}; the first is "
            f"{first.place} with {first.num_tokens} tokens, the longest has {longest}. Raise the limits, or set "
            f"data.on_long_prompt=drop."
        )
    if len(long) < len(seen):
        logger.warning(f"{rows.key}: {counted} are left out, {kind.too_long}")
    elif is_trained:
        raise ValueError(f"{rows.key}: all {len(long)} {kind.noun} are left out, {kind.too_long}. Raise the limits.")
    else:
        logger.warning(
            f"{rows.key}: all {len(long)} {kind.noun} are left out, {kind.too_long}, so this validation gives no number"
        )


def _report_ends(rows: RowSet[T], seen: Sequence[Seen], kind: Kind[T]) -> None:
    told = [one.has_end for one in seen if one.has_end is not None]
    num_without = told.count(False)
    if num_without:
        logger.warning(
            f"{rows.key}: in {num_without} of {len(told)} {kind.noun} nothing that is learned ends the assistant's "
            f"turn, so a model trained on them may never stop. {kind.no_end}"
        )
    elif not told and any(one.digest for one in seen):
        logger.warning(
            f"{rows.key}: the end of every answer is cut off, so a model trained on them may never stop. Raise "
            f"policy.max_total_sequence_length or data.max_input_seq_length."
        )
