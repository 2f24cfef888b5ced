"""From a dataset's name to the rows of GRPO: what is asked (`question`) and the row that an environment scores.

`question` is the text before prompt_file and chat template; `row["answer"]` is what the built-in environments compare
with. Nothing here is random but generated rows, which are a function of the seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from nemo_rl_lora.config.data import PROMPT_DATASETS, DatasetConfig, require_rows_for
from nemo_rl_lora.data.sources import read_table, text_of, value_of

_GENERATED_SUMS = 1  # purpose of a draw, beside the seed


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    question: str
    row: Mapping[str, Any]


def load_rows(section: DatasetConfig, key: str) -> list[Row]:
    """All rows of `section`, which stands at `key` in the configuration. Raises ValueError if there are none."""
    require_rows_for("grpo", section, key)
    return list(islice(_LOADERS[section.dataset_name](section, key), section.max_num_rows))


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
    for place, raw in read_table(section, key).placed():
        question = text_of(raw, section.input_key, place, f"{key}.input_key")
        if section.output_key is None:
            yield Row(question=question, row=raw)
        else:
            answer = value_of(raw, section.output_key, place, f"{key}.output_key")
            yield Row(question=question, row={**raw, "answer": answer})


def _gsm8k(section: DatasetConfig, key: str) -> Iterator[Row]:
    for place, raw in read_table(section, key).placed():
        question = text_of(raw, "question", place, f"{key}.data_path")
        solution = text_of(raw, "answer", place, f"{key}.data_path")
        _, mark, final = solution.rpartition("####")
        if not mark:
            raise ValueError(f"{key}.data_path: {place} has no '####' before its final answer. Correct the row.")
        answer = final.strip().replace(",", "")
        yield Row(question=question, row={"question": question, "solution": solution, "answer": answer})


def _open_math_instruct(section: DatasetConfig, key: str) -> Iterator[Row]:
    output_key = section.output_key or "expected_answer"
    for place, raw in read_table(section, key).placed():
        question = text_of(raw, "problem", place, f"{key}.data_path")
        answer = value_of(raw, output_key, place, f"{key}.output_key")
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
