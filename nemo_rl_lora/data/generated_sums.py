"""Sums of two numbers, drawn from the seed, each from `low` to `high`. A row: {"a": 3, "b": 4, "answer": 7}."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from nemo_rl_lora.data.rows import Question, Row

if TYPE_CHECKING:
    from nemo_rl_lora.config.data import DatasetConfig

_GENERATED_SUMS = 1  # purpose of a draw, beside the seed


def generate_sums(section: DatasetConfig, key: str) -> Iterator[dict[str, Any]]:
    import numpy as np

    random = np.random.default_rng([section.seed, _GENERATED_SUMS])
    pairs = random.integers(section.low, section.high, size=(section.num_rows, 2), endpoint=True)
    for a, b in pairs.tolist():
        yield {"a": a, "b": b, "answer": a + b}


def sum_question(row: Row) -> Question:
    return Question(f"What is {row.values['a']} + {row.values['b']}? Reply with the number only.", row.values)
