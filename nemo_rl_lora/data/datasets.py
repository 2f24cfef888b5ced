"""From a dataset's name to its rows: what is asked (`question`) and the row that an environment scores.

`question` is the text before prompt_file and chat template; `row["answer"]` is what the built-in environments compare
with. Nothing here is random but generated rows, which are a function of the seed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nemo_rl_lora.config.data import PROMPT_DATASETS, DatasetConfig

_GENERATED_SUMS = 1  # purpose of a draw, beside the seed


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    question: str
    row: Mapping[str, Any]


def load_rows(section: DatasetConfig, key: str) -> list[Row]:
    """All rows of `section`, which stands at `key` in the configuration. Raises ValueError if there are none."""
    if section.dataset_name not in _LOADERS:
        raise ValueError(
            f"{key}.dataset_name={section.dataset_name!r}: holds no prompts for GRPO. Use one of "
            f"{', '.join(PROMPT_DATASETS)}."
        )
    rows = []
    for row in _LOADERS[section.dataset_name](section, key):
        if len(rows) == section.max_num_rows:
            break
        rows.append(row)
    if not rows:
        source = section.data_path or section.dataset_name
        raise ValueError(f"{key}: {source} has no rows. Give a dataset with at least one.")
    return rows


def _generated_sums(section: DatasetConfig, key: str) -> Iterator[Row]:
    random = np.random.default_rng([section.seed, _GENERATED_SUMS])
    pairs = random.integers(section.low, section.high, size=(section.num_rows, 2), endpoint=True)
    for a, b in pairs.tolist():
        question = f"What is {a} + {b}? Reply with the number only."
        yield Row(question=question, row={"a": a, "b": b, "answer": a + b})


def _reasoning_gym(section: DatasetConfig, key: str) -> Iterator[Row]:
    from nemo_rl_lora.environments.reasoning_gym import generate_rows

    assert section.task is not None
    settings = {"seed": section.seed, "size": section.size, **section.task_config}
    for row in generate_rows(section.task, settings, key):
        yield Row(question=row["question"], row=row)


def _own_rows(section: DatasetConfig, key: str) -> Iterator[Row]:
    for place, raw in _read_files(section, key):
        question = _text(raw, section.input_key, place, f"{key}.input_key")
        if section.output_key is None:
            yield Row(question=question, row=raw)
        else:
            answer = _value(raw, section.output_key, place, f"{key}.output_key")
            yield Row(question=question, row={**raw, "answer": answer})


def _gsm8k(section: DatasetConfig, key: str) -> Iterator[Row]:
    for place, raw in _files_or_hub(section, key, "openai/gsm8k", "main", "train"):
        question = _text(raw, "question", place, f"{key}.data_path")
        solution = _text(raw, "answer", place, f"{key}.data_path")
        _, mark, final = solution.rpartition("####")
        if not mark:
            raise ValueError(f"{key}.data_path: {place} has no '####' before its final answer. Correct the row.")
        answer = final.strip().replace(",", "")
        yield Row(question=question, row={"question": question, "solution": solution, "answer": answer})


def _open_math_instruct(section: DatasetConfig, key: str) -> Iterator[Row]:
    output_key = section.output_key or "expected_answer"
    for place, raw in _files_or_hub(section, key, "nvidia/OpenMathInstruct-2", None, "train_1M"):
        question = _text(raw, "problem", place, f"{key}.data_path")
        answer = _value(raw, output_key, place, f"{key}.output_key")
        yield Row(question=question, row={"question": question, "answer": answer})


_LOADERS: dict[str, Callable[[DatasetConfig, str], Iterator[Row]]] = {
    "generated_sums": _generated_sums,
    "reasoning_gym": _reasoning_gym,
    "jsonl": _own_rows,
    "ResponseDataset": _own_rows,
    "OpenMathInstruct-2": _open_math_instruct,
    "gsm8k": _gsm8k,
    "GSM8K": _gsm8k,
}
assert set(_LOADERS) == set(PROMPT_DATASETS)

# (the row's place, for messages; the row)
_Raw = tuple[str, dict[str, Any]]


def _files_or_hub(section: DatasetConfig, key: str, name: str, subset: str | None, split: str) -> Iterable[_Raw]:
    if section.data_path is not None:
        return _read_files(section, key)
    return _read_hub(name, subset, section.split or split, key)


def _read_files(section: DatasetConfig, key: str) -> Iterator[_Raw]:
    path = _file_of(section, key)
    if path.suffix == ".parquet":
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(path)
        yield from ((f"row {i} of {path}", raw) for i, raw in enumerate(table.to_pylist()))
        return
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"line {number} of {path}", _json_object(line, f"{key}.data_path: line {number} of {path}")


def _file_of(section: DatasetConfig, key: str) -> Path:
    assert section.data_path is not None
    path = Path(section.data_path).expanduser()
    shown = f"{key}.data_path={section.data_path!r}"
    if not path.exists():
        raise ValueError(f"{shown}: there is no such file or directory (looked for {path.absolute()}). Correct it.")
    if path.is_dir():
        split = section.split or "train"
        found = [path / f"{split}{suffix}" for suffix in (".jsonl", ".parquet")]
        existing = [file for file in found if file.is_file()]
        if not existing:
            names = ", ".join(sorted(file.name for file in path.iterdir())[:10])
            raise ValueError(
                f"{shown}: the directory has no {split}.jsonl or {split}.parquet, only {names or 'nothing'}. Set "
                f"{key}.split to the name of one of its files."
            )
        return existing[0]
    if section.split is not None:
        raise ValueError(f"{key}.split={section.split!r}: has no meaning where data_path is a file. Remove it.")
    if path.suffix not in (".jsonl", ".json", ".parquet"):
        raise ValueError(f"{shown}: a .jsonl or .parquet file is needed. Convert it.")
    return path


def _read_hub(name: str, subset: str | None, split: str, key: str) -> Iterator[_Raw]:
    import datasets

    try:
        rows = datasets.load_dataset(name, subset, split=split)
    except (OSError, ValueError) as error:  # unreachable hub, unknown split
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{key}.dataset_name: {name} could not be loaded from the Hugging Face hub ({reason}). Download it on a "
            f"machine with a network, and set {key}.data_path to its .jsonl or .parquet file."
        ) from error
    for index, raw in enumerate(rows):
        yield f"row {index} of {name}", dict(raw)


def _json_object(line: str, place: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not valid JSON ({error.msg}, column {error.colno}). Correct it.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{place} is a JSON {type(value).__name__}, and an object is needed. Correct it.")
    return value


def _value(raw: Mapping[str, Any], name: str, place: str, key: str) -> Any:
    if raw.get(name) is None:
        raise ValueError(
            f"{key}: {place} has no {name!r}; its keys are {', '.join(raw) or 'none'}. Correct the row or the key."
        )
    return raw[name]


def _text(raw: Mapping[str, Any], name: str, place: str, key: str) -> str:
    value = _value(raw, name, place, key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key}: {place} has {name}={value!r}, and a text is needed. Correct the row.")
    return value
