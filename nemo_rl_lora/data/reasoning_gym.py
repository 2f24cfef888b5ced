"""Tasks and rows of the reasoning-gym package: any of its tasks, seeded.

A row: {"question": "4 + 3 =", "answer": "7", "metadata": {...}, "task": "chain_sum", "task_settings": {"seed": 42,
"size": 1000}}.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from nemo_rl_lora.data.rows import Question, Row

if TYPE_CHECKING:
    from nemo_rl_lora.config.data import DatasetConfig

Settings = Mapping[str, Any]


def task_key(name: str, settings: Settings) -> str:
    """One for each task with its settings."""
    return name + json.dumps(settings, sort_keys=True, default=str)


def make_task(name: str, settings: Settings, key: str) -> Any:
    """The package's dataset for a task. Raises ValueError for an unknown task or a setting that it refuses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # of a package that reasoning-gym imports
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    if name not in DATASETS:
        close = get_close_matches(name, DATASETS, n=3)
        hint = f"Did you mean {' or '.join(map(repr, close))}?" if close else "Its gallery lists them."
        raise ValueError(f"{key}.task={name!r}: is none of the {len(DATASETS)} tasks of reasoning-gym. {hint}")
    try:
        return reasoning_gym.create_dataset(name, **settings)
    except (TypeError, ValueError, AssertionError) as error:
        known = ", ".join(sorted(vars(DATASETS[name][1]()))) or "none"
        raise ValueError(
            f"{key}.task_config={dict(settings)!r}: {name} refuses it ({error}). Its settings are {known}."
        ) from error


def generate_gym_rows(section: DatasetConfig, key: str) -> Iterator[dict[str, Any]]:
    """The rows of the section's task, in order."""
    assert section.task is not None, "checked by DatasetConfig"
    settings = {"seed": section.seed, "size": section.size, **section.task_config}
    task = make_task(section.task, settings, key)
    for index in range(len(task)):
        yield {**task[index], "task": section.task, "task_settings": settings}


def gym_question(row: Row) -> Question:
    return Question(row.values["question"], row.values)
