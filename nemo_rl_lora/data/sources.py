"""Where rows come from: a .jsonl or .parquet file, a dataset of the Hugging Face hub, or a generator; and prompt files.

Rows are as they are stored; what they become is the business of the catalog. Every row has a place, a line or a number,
which errors name.
"""

from __future__ import annotations

import itertools
import json
import re
import string
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nemo_rl_lora.config.data import DatasetConfig, DatasetDefaults
from nemo_rl_lora.data.catalog import DATASETS, HubDataset
from nemo_rl_lora.data.rows import PromptFormat, Row
from nemo_rl_lora.shipped_files import local_places

_SUFFIXES = (".jsonl", ".json", ".parquet")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")

_Stored = tuple[Sequence[Any], str, Sequence[int] | None]  # rows, where they are from, their lines in a text file


class RowTable(Sequence[Row]):
    """Rows as they are stored. Those of a Parquet file and of the hub stay in Arrow's memory until they are asked."""

    def __init__(self, stored: _Stored, section: DatasetConfig, format_: PromptFormat) -> None:
        self._rows, self.origin, self._lines = stored
        self._section, self._format = section, format_

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._row(index, self._rows[index])

    def __iter__(self) -> Iterator[Row]:
        return itertools.starmap(self._row, enumerate(self._rows))

    def _row(self, index: int, stored: Any) -> Row:
        number = f"row {index}" if self._lines is None else f"line {self._lines[index]}"
        values = stored if isinstance(stored, dict) else stored.as_py()  # of Arrow
        return Row(values=dict(values), place=f"{number} of {self.origin}", section=self._section, format=self._format)


def read_table(section: DatasetConfig, key: str) -> RowTable:
    """The first `max_num_rows` rows of the dataset that stands at `key`. Raises ValueError if there are none."""
    format_ = load_format(section, key)
    generate = DATASETS[section.dataset_name].generate
    found = None if section.data_path is None else _local(section.data_path)
    if generate is not None:
        stored = (list(itertools.islice(generate(section, key), section.max_num_rows)), section.dataset_name, None)
    elif found is not None:
        stored = _read_file(_file_of(found, section, key), section.max_num_rows, key)
    else:
        stored = _read_hub(section, key)
    table = RowTable(stored, section, format_)
    if not len(table):
        raise ValueError(f"{key}: {table.origin} has no rows. Give a dataset with at least one.")
    return table


def load_format(section: DatasetDefaults, key: str) -> PromptFormat:
    """Read prompt_file and system_prompt_file. Raises ValueError for a missing file or not exactly one `{}`."""
    pattern, system = "{}", None
    if section.prompt_file is not None:
        shown = f"{key}.prompt_file={section.prompt_file!r}"
        pattern = _read_text(section.prompt_file, shown)
        _check_pattern(pattern, shown)
    if section.system_prompt_file is not None:
        system = _read_text(section.system_prompt_file, f"{key}.system_prompt_file={section.system_prompt_file!r}")
    return PromptFormat(pattern=pattern, system=system, key=key)


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


def _read_file(path: Path, limit: int | None, key: str) -> _Stored:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.read_table(path)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{key}.data_path: {path} is no Parquet file ({_first_line(error)}). Correct it."
            ) from error
        return table.slice(0, limit).to_struct_array(), str(path), None
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
    return rows, str(path), numbers


def _json_object(line: str, place: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not valid JSON ({error.msg}, column {error.colno}). Correct it.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{place} is a JSON {type(value).__name__}, and an object is needed. Correct it.")
    return value


def _read_hub(section: DatasetConfig, key: str) -> _Stored:
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
    return rows, named.name, None


def _hub_dataset(section: DatasetConfig, key: str) -> HubDataset:
    """What is asked of the hub, where nothing local has the name."""
    if section.data_path is None:
        usual = DATASETS[section.dataset_name].hub
        assert usual is not None, "checked by DatasetConfig"
        return HubDataset(name=usual.name, subset=section.subset or usual.subset, split=section.split or usual.split)
    if not _HUB_NAME.fullmatch(section.data_path) or section.data_path.endswith(_SUFFIXES):
        places = " and ".join(map(str, local_places(section.data_path)))
        raise ValueError(
            f"{key}.data_path={section.data_path!r}: there is no such file or directory (looked for {places}). "
            f"Correct it."
        )
    return HubDataset(name=section.data_path, subset=section.subset, split=section.split or "train")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _read_text(name: str, shown: str) -> str:
    places = local_places(name)
    for place in places:
        if place.is_file():
            return place.read_text(encoding="utf-8").rstrip("\n")
    raise ValueError(f"{shown}: there is no such file (looked for {' and '.join(map(str, places))}). Correct it.")


def _check_pattern(pattern: str, shown: str) -> None:
    remedy = "Write {} once, where the question goes, and double any other brace: {{ }}."
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(pattern) if field is not None]
    except ValueError as error:
        raise ValueError(f"{shown}: its braces do not match ({error}). {remedy}") from error
    if fields not in ([""], ["0"]):
        found = ", ".join("{" + field + "}" for field in fields) or "none"
        raise ValueError(f"{shown}: one placeholder {{}} is needed, found {found}. {remedy}")
