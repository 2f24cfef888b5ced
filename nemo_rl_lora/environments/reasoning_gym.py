"""Rows and rewards of the reasoning-gym package: any of its tasks, seeded, scored by the task's own scorer.

A row: {"question": "4 + 3 =", "answer": "7", "metadata": {...}, "task": "chain_sum", "task_settings": {"seed": 42,
"size": 1000}}. The answer of a completion is what stands between its last <answer> tags, or all of it.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from nemo_rl_lora.data.rows import Question, Row
from nemo_rl_lora.environments.protocol import Environment, Scores
from nemo_rl_lora.types import Prompt

if TYPE_CHECKING:
    from nemo_rl_lora.config.data import DatasetConfig


class ReasoningGymEnvironment(Environment):
    name = "reasoning_gym"

    def __init__(self) -> None:
        self._tasks: dict[str, Any] = {}

    def check(self, prompts: Iterable[Prompt]) -> None:
        for prompt in prompts:
            if "task" not in prompt.row or "task_settings" not in prompt.row:
                raise ValueError(
                    f"env.reasoning_gym: {prompt.named} is not of a reasoning-gym task. Use it with "
                    f"dataset_name='reasoning_gym', or set data.train.env_name to another environment."
                )
            self._task_of(prompt)

    def score(
        self, prompts: Sequence[Prompt], texts: Sequence[str], token_ids: Sequence[Sequence[int]] | None = None
    ) -> Scores:
        """Answers on which a scorer fails are worth 0 and counted as `reasoning_gym_scorer_errors`."""
        scores = [self._score(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
        num_errors = float(sum(score is None for score in scores))
        return Scores(
            rewards=tuple(score or 0.0 for score in scores), metrics={"reasoning_gym_scorer_errors": num_errors}
        )

    def close(self) -> None:
        self._tasks.clear()

    def _score(self, prompt: Prompt, text: str) -> float | None:
        from reasoning_gym.utils import extract_answer

        answer = extract_answer(text) or text.strip()
        try:
            score = float(self._task_of(prompt).score_answer(answer, dict(prompt.row)))
        except Exception:  # noqa: BLE001 a scorer parses what the model wrote, and may fail in any way
            return None
        return score if math.isfinite(score) else None

    def _task_of(self, prompt: Prompt) -> Any:
        name, settings = prompt.row["task"], prompt.row["task_settings"]
        key = name + json.dumps(settings, sort_keys=True, default=str)
        if key not in self._tasks:
            self._tasks[key] = make_task(name, settings, "env.reasoning_gym")
        return self._tasks[key]


def make_task(name: str, settings: Mapping[str, Any], key: str) -> Any:
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
