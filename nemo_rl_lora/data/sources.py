"""Where rows come from: a .jsonl or .parquet file, or a dataset of the Hugging Face hub.

Rows are as they are stored; what they mean is the business of datasets.py, conversations.py and preferences.py. Every
row has a place, a line or a number, which errors name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_rl_lora.config.data import DatasetConfig
from nemo_rl_lora.config.errors import show
from nemo_rl_lora.shipped_files import local_places

_SUFFIXES = (".jsonl", ".json", ".parquet")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class _HubDataset:
    name: str
    subset: str | None
    split: str


_HUB = {
    "gsm8k": _HubDataset(name="openai/gsm8k", subset="main", split="train"),
    "GSM8K": _HubDataset(name="openai/gsm8k", subset="main", split="train"),
    "OpenMathInstruct-2": _HubDataset(name="nvidia/OpenMathInstruct-2", subset=None, split="train_1M"),
    "squad": _HubDataset(name="rajpurkar/squad", subset=None, split="train"),
    "tulu3_sft_mixture": _HubDataset(name="allenai/tulu-3-sft-mixture", subset=None, split="train"),
    "HelpSteer3": _HubDataset(name="nvidia/HelpSteer3", subset="preference", split="train"),
    "Tulu3Preference": _HubDataset(name="allenai/llama-3.1-tulu-3-8b-preference-mixture", subset=None, split="train"),
}


class RowTable(Sequence[dict[str, Any]]):
    """Rows as they are stored. Those of a Parquet file and of the hub stay in Arrow's memory until they are asked."""

    def __init__(self, rows: Sequence[Any], origin: str, line_numbers: Sequence[int] | None = None) -> None:
        self._rows, self.origin, self._line_numbers = rows, origin, line_numbers

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return dict(self._rows[index])

    def place(self, index: int) -> str:
        """Where a row stands, for messages."""
        if self._line_numbers is not None:
            return f"line {self._line_numbers[index]} of {self.origin}"
        return f"row {index} of {self.origin}"

    def placed(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every row with its place."""
        for index, row in enumerate(self._rows):
            yield self.place(index), dict(row)


class _ArrowRows(Sequence[dict[str, Any]]):
    """The rows of an Arrow table."""

    def __init__(self, table: Any) -> None:
        self._table = table

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: Any) -> Any:
        return self._table.slice(index, 1).to_pylist()[0]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self._table.to_batches(max_chunksize=1000):
            yield from batch.to_pylist()


def read_table(section: DatasetConfig, key: str) -> RowTable:
    """The first `max_num_rows` rows of the dataset that stands at `key`. Raises ValueError if there are none."""
    found = None if section.data_path is None else _local(section.data_path)
    if found is not None:
        table = _read_file(_file_of(found, section, key), section.max_num_rows, key)
    else:
        table = _read_hub(section, key)
    if not len(table):
        raise ValueError(f"{key}: {table.origin} has no rows. Give a dataset with at least one.")
    return table


def value_of(raw: Mapping[str, Any], name: str, place: str, key: str) -> Any:
    """What a row has under a key. ValueError where it has nothing there."""
    if raw.get(name) is None:
        raise ValueError(
            f"{key}: {place} has no {name!r}; its keys are {', '.join(raw) or 'none'}. Correct the row or the key."
        )
    return raw[name]


def text_of(raw: Mapping[str, Any], name: str, place: str, key: str) -> str:
    """The text that a row has under a key. ValueError where it is none, or empty."""
    value = value_of(raw, name, place, key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key}: {place} has {name}={show(value)}, and a text is needed. Correct the row.")
    return value


def _local(name: str) -> Path | None:
    return next((place for place in local_places(name) if place.exists()), None)


def _file_of(path: Path, section: DatasetConfig, key: str) -> Path:
    """The file at a path, or the split's file in a directory."""
    shown = f"{key}.data_path={section.data_path!r}"
    if section.subset is not None:
        raise ValueError(f"{key}.subset={section.subset!r}: has no meaning where data_path is local. Remove it.")
    if path.is_dir():
        split = section.split or "train"
        existing = [path / f"{split}{suffix}" for suffix in _SUFFIXES if (path / f"{split}{suffix}").is_file()]
        if not existing:
            names = ", ".join(sorted(file.name for file in path.iterdir())[:10])
            raise ValueError(
                f"{shown}: the directory has no {split}.jsonl or {split}.parquet, only {names or 'nothing'}. Set "
                f"{key}.split to the name of one of its files."
            )
        return existing[0]
    if section.split is not None:
        raise ValueError(f"{key}.split={section.split!r}: has no meaning where data_path is a file. Remove it.")
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"{shown}: a .jsonl or .parquet file is needed. Convert it.")
    return path


def _read_file(path: Path, limit: int | None, key: str) -> RowTable:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.read_table(path)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{key}.data_path: {path} is no Parquet file ({_first_line(error)}). Correct it."
            ) from error
        return RowTable(_ArrowRows(table.slice(0, limit)), str(path))
    rows, numbers = [], []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if len(rows) == limit:
                    break
                if line.strip():
                    rows.append(_json_object(line, f"{key}.data_path: line {number} of {path}"))
                    numbers.append(number)
    except UnicodeDecodeError as error:
        raise ValueError(f"{key}.data_path: {path} is no text in UTF-8 ({error.reason}). Convert it.") from error
    return RowTable(rows, str(path), numbers)


def _json_object(line: str, place: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not valid JSON ({error.msg}, column {error.colno}). Correct it.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{place} is a JSON {type(value).__name__}, and an object is needed. Correct it.")
    return value


def _read_hub(section: DatasetConfig, key: str) -> RowTable:
    named = _hub_dataset(section, key)
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        rows: Any = datasets.load_dataset(named.name, named.subset, split=named.split)
    except (OSError, ValueError, DatasetsError) as error:
        # unreachable hub, unknown dataset, subset or split
        asked = f"{key}.dataset_name: {named.name}"
        if section.data_path is not None:
            asked = f"{key}.data_path={section.data_path!r}: there is no such file or directory, and it"
        raise ValueError(
            f"{asked} could not be loaded from the Hugging Face hub ({_first_line(error)}). Download it on a machine "
            f"with a network, and set {key}.data_path to its .jsonl or .parquet file."
        ) from error
    if section.max_num_rows is not None:
        rows = rows.select(range(min(section.max_num_rows, len(rows))))
    return RowTable(rows, named.name)


def _hub_dataset(section: DatasetConfig, key: str) -> _HubDataset:
    """What is asked of the hub, where nothing local has the name."""
    if section.data_path is None:
        usual = _HUB[section.dataset_name]
        return _HubDataset(name=usual.name, subset=section.subset or usual.subset, split=section.split or usual.split)
    if not _HUB_NAME.fullmatch(section.data_path) or section.data_path.endswith(_SUFFIXES):
        places = " and ".join(map(str, local_places(section.data_path)))
        raise ValueError(
            f"{key}.data_path={section.data_path!r}: there is no such file or directory (looked for {places}). "
            f"Correct it."
        )
    return _HubDataset(name=section.data_path, subset=section.subset, split=section.split or "train")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
