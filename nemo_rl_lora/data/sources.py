"""Where rows come from: local files, a dataset of the Hugging Face hub, or a generator; and prompt files.

Rows are as they are stored; what they become is the business of the catalog. Every row has a place, a line or a number,
which errors name.
"""

from __future__ import annotations

import bisect
import itertools
import re
import string
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nemo_rl_lora.config.data import FILE_SUFFIXES, DatasetConfig, DatasetDefaults
from nemo_rl_lora.data.catalog import DATASETS, HubDataset
from nemo_rl_lora.data.row_files import StoredRows, first_line, read_path
from nemo_rl_lora.data.rows import PromptFormat, Row
from nemo_rl_lora.shipped_files import local_places

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


class RowTable(Sequence[Row]):
    """Rows as they are stored. Those of Parquet files and of the hub stay in Arrow's memory until they are asked."""

    def __init__(
        self, parts: Sequence[StoredRows], section: DatasetConfig, format_: PromptFormat, *, keep_nulls: bool
    ) -> None:
        self._parts, self._section, self._format, self._keep_nulls = parts, section, format_, keep_nulls
        self._starts = list(itertools.accumulate((len(part.rows) for part in parts), initial=0))
        self.origin = f"{len(parts)} files from {parts[0].origin} on" if len(parts) > 1 else parts[0].origin

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: Any) -> Any:
        index = range(len(self))[index]
        number = bisect.bisect_right(self._starts, index) - 1
        place = index - self._starts[number]
        return self._row(self._parts[number], place, self._parts[number].rows[place])

    def __iter__(self) -> Iterator[Row]:
        return (self._row(part, place, stored) for part in self._parts for place, stored in enumerate(part.rows))

    def _row(self, part: StoredRows, place: int, stored: Any) -> Row:
        number = f"row {place}" if part.lines is None else f"line {part.lines[place]}"
        values = dict(stored if isinstance(stored, dict) else stored.as_py())  # of Arrow
        if part.has_columns and not self._keep_nulls:
            values = {name: _without_nulls(value) for name, value in values.items()}
        return Row(values=values, place=f"{number} of {part.origin}", section=self._section, format=self._format)


def read_table(section: DatasetConfig, key: str, *, keep_nulls: bool = False) -> RowTable:
    """The rows, as far as they are used, of the dataset that stands at `key`. Raises ValueError if there are none."""
    format_ = load_format(section, key)
    generate = DATASETS[section.dataset_name].generate
    found = None if section.data_path is None else _local(section.data_path)
    if generate is not None:
        rows = list(itertools.islice(generate(section, key), section.row_limit))
        parts = [StoredRows(rows, section.dataset_name, has_columns=False)]
    elif found is not None:
        parts = read_path(found, section, key)
    else:
        parts = [_read_hub(section, key)]
    table = RowTable(parts, section, format_, keep_nulls=keep_nulls)
    if not len(table):
        raise ValueError(f"{key}: {table.origin} has no rows. Give a dataset with at least one.")
    return table


def _without_nulls(value: Any) -> Any:
    """Without the keys of objects inside a column that are null: in Arrow every object has the keys of all."""
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


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


def _read_hub(section: DatasetConfig, key: str) -> StoredRows:
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
            f"{asked} could not be loaded from the Hugging Face hub ({first_line(error)}). Download it on a machine "
            f"with a network, and set {key}.data_path to its .jsonl or .parquet file."
        ) from error
    if section.row_limit is not None:
        rows = rows.select(range(min(section.row_limit, len(rows))))
    return StoredRows(rows, named.name)


def _hub_dataset(section: DatasetConfig, key: str) -> HubDataset:
    """What is asked of the hub, where nothing local has the name."""
    if section.data_path is None:
        usual = DATASETS[section.dataset_name].hub
        assert usual is not None, "checked by DatasetConfig"
        return HubDataset(name=usual.name, subset=section.subset or usual.subset, split=section.split or usual.split)
    if not _HUB_NAME.fullmatch(section.data_path) or section.data_path.endswith(FILE_SUFFIXES):
        places = " and ".join(map(str, local_places(section.data_path)))
        raise ValueError(
            f"{key}.data_path={section.data_path!r}: there is no such file or directory (looked for {places}). "
            f"Correct it."
        )
    return HubDataset(name=section.data_path, subset=section.subset, split=section.split or "train")


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
