"""Rows of local files: which files of a path are one split, and what stands in a file.

A file holds JSON lines or a JSON array (`.jsonl`, `.json`, also gzipped) or is a Parquet file. A directory holds a file
a split, a split's shards as the hub names them, or what `save_to_disk` of the package datasets wrote.
"""

from __future__ import annotations

import gzip
import json
import logging
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from nemo_rl_lora.config.data import FILE_SUFFIXES, DatasetConfig

logger = logging.getLogger(__name__)

_SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?:-[0-9a-f]{16})?")


class StoredRows(NamedTuple):
    """Rows of one file, or of one dataset of the package datasets."""

    rows: Sequence[Any]  # a dict each, or one of Arrow
    origin: str
    lines: Sequence[int] | None = None  # of each row, in a file of JSON lines
    has_columns: bool = True  # so that a key which a row does not have comes back as null


def read_path(path: Path, section: DatasetConfig, key: str) -> list[StoredRows]:
    """The rows, as far as they are used, of the file at a path, or of the split in a directory."""
    shown = f"{key}.data_path={section.data_path!r}"
    if section.subset is not None:
        raise ValueError(f"{key}.subset={section.subset!r}: has no meaning where data_path is local. Remove it.")
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        if (split := section.split or "train") not in splits:
            raise ValueError(
                f"{key}.split={section.split!r}: {path} has no split {split!r}, only {', '.join(splits)}. Name one of "
                f"them."
            )
        return _saved(path / split, section.row_limit, shown)
    if path.is_file() or (path / "state.json").is_file():
        if section.split is not None:
            kind = "a file" if path.is_file() else "one split that was saved to disk"
            raise ValueError(f"{key}.split={section.split!r}: has no meaning where data_path is {kind}. Remove it.")
        if path.is_dir():
            return _saved(path, section.row_limit, shown)
        if _suffix(path) is None:
            raise ValueError(f"{shown}: a file that ends with {', '.join(FILE_SUFFIXES)} is needed. Convert it.")
        _warn_of_one_shard(path, shown)
        return _read_files([path], section.row_limit, key)
    return _read_files(_of_split(path, section.split or "train", shown, key), section.row_limit, key)


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _suffix(path: Path) -> str | None:
    return next((suffix for suffix in FILE_SUFFIXES if path.name.endswith(suffix)), None)


def _row_files(directory: Path) -> dict[Path, str]:
    """The files of rows in a directory, each with its name before the suffix, in the order of their names."""
    if not directory.is_dir():
        return {}
    files = sorted(file for file in directory.iterdir() if file.is_file())
    return {file: file.name.removesuffix(suffix) for file in files if (suffix := _suffix(file)) is not None}


def _of_split(path: Path, split: str, shown: str, key: str) -> list[Path]:
    """The split's files in a directory, or in its `data` directory: one, or all shards, in their order. Last, every
    file of a directory of the split's name."""
    named = {**_row_files(path), **_row_files(path / "data")}
    shards = {
        file: found for file, stem in named.items() if (found := _SHARD.fullmatch(stem)) and found["split"] == split
    }
    whole = [file for file, stem in named.items() if stem == split]
    if shards:
        counts = {found["count"] for found in shards.values()}
        found = [int(shard["number"]) for shard in shards.values()]
        if whole or len(counts) > 1 or len({file.parent for file in shards}) > 1 or len(set(found)) < len(found):
            raise ValueError(_several(shown, split, [*whole, *shards]))
        count = int(counts.pop())
        if missing := sorted(set(range(count)) - set(found)):
            raise ValueError(
                f"{shown}: of the {count} shards of {split}, {len(missing)} are missing, the first of them number "
                f"{missing[0]:05d}. Complete the directory."
            )
        return list(shards)
    if len(whole) > 1:
        raise ValueError(_several(shown, split, whole))
    if found_below := whole or list(_row_files(path / split)):
        _warn_of_one_shard(found_below[0], shown)
        return found_below
    splits = {shard["split"] if (shard := _SHARD.fullmatch(stem)) else stem for stem in named.values()}
    splits |= {child.name for child in path.iterdir() if _row_files(child)} - {"data"}
    names = ", ".join(sorted(file.name for file in path.iterdir())[:10])
    raise ValueError(
        f"{shown}: the directory has no rows of the split {split!r}: neither {split}.jsonl or .parquet nor its shards, "
        f"only {names or 'nothing'}. "
        + (f"Set {key}.split to one of: {', '.join(sorted(splits))}." if splits else "Give a directory that has.")
    )


def _several(shown: str, split: str, files: Sequence[Path]) -> str:
    names = ", ".join(file.name for file in files[:6])
    return (
        f"{shown}: has several files that could be the split {split!r}: {names}. Give the path of one, or remove one."
    )


def _warn_of_one_shard(path: Path, shown: str) -> None:
    shard = _SHARD.fullmatch(path.name.removesuffix(_suffix(path) or ""))
    if shard and int(shard["count"]) > 1:
        logger.warning(
            f"{shown}: {path.name} is one of {int(shard['count'])} shards of {shard['split']}, and only its rows are "
            f"used. For all of them give the directory, with the split {shard['split']!r}."
        )


def _read_files(paths: Sequence[Path], limit: int | None, key: str) -> list[StoredRows]:
    parts: list[StoredRows] = []
    for path in paths:
        rest = None if limit is None else limit - sum(len(part.rows) for part in parts)
        if rest == 0:
            break
        read = _read_parquet if path.suffix == ".parquet" else _read_json
        parts.append(read(path, rest, key))
    return parts


def _saved(path: Path, limit: int | None, shown: str) -> list[StoredRows]:
    import datasets

    try:
        rows: Any = datasets.load_from_disk(str(path))
        return [StoredRows(rows if limit is None else rows.select(range(min(limit, len(rows)))), str(path))]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{shown}: {path} is no dataset that was saved to disk ({first_line(error)}). Save it again."
        ) from error


def _read_parquet(path: Path, limit: int | None, key: str) -> StoredRows:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path).read()
    except (OSError, ValueError) as error:
        raise ValueError(f"{key}.data_path: {path} is no Parquet file ({first_line(error)}). Correct it.") from error
    return StoredRows(table.slice(0, limit).to_struct_array(), str(path))


def _read_json(path: Path, limit: int | None, key: str) -> StoredRows:
    """JSON lines, or an array where the first character of the file opens one."""
    at = f"{key}.data_path"
    rows: list[dict[str, Any]] = []
    numbers: list[int] = []
    try:
        with _opened(path) as file:
            for number, line in enumerate(file, start=1):
                if len(rows) == limit:
                    break
                if not rows and line.lstrip().startswith("["):
                    items = _parsed("\n" * (number - 1) + line + file.read(), f"{at}: {path}")
                    rows = [_object(item, f"{at}: row {i} of {path}") for i, item in enumerate(items[:limit])]
                    return StoredRows(rows, str(path), has_columns=False)
                if line.strip():
                    place = f"{at}: line {number} of {path}"
                    rows.append(_object(_parsed(line, place), place))
                    numbers.append(number)
    except UnicodeDecodeError as error:
        raise ValueError(f"{at}: {path} is no text in UTF-8 ({error.reason}). Convert it.") from error
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{at}: {path} cannot be read ({first_line(error)}). Correct it.") from error
    return StoredRows(rows, str(path), numbers, has_columns=False)


def _opened(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise ValueError(f"{place} is not valid JSON ({error.msg}, {at}). Correct it.") from error


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{place} is a JSON {type(value).__name__}, and an object is needed. Correct it.")
    return value
