"""The score of a completion by its reasoning-gym task: what `reasoning_gym` runs in worker processes.

A task's scorer computes what the model wrote, with sympy or Python's own `eval`: it may take for ever, or end its
process. A computation inside compiled code does not see the alarm: the driver's process ends this one then.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from nemo_rl_lora.data.reasoning_gym import Settings, make_task, task_key
from nemo_rl_lora.environments.worker import TookTooLong, time_limit


class Scored(NamedTuple):
    """What became of a completion."""

    reward: float = 0.0
    failure: Literal["error", "timeout"] | None = None


class Scorer:
    """What answers in a worker. `tasks` are made before the first clock runs, others when a row needs them."""

    facts, is_async = None, False

    def __init__(self, tasks: Mapping[str, tuple[str, Settings]]) -> None:
        logging.disable(logging.CRITICAL)
        self._tasks = {key: make_task(name, settings, "env.reasoning_gym") for key, (name, settings) in tasks.items()}

    def call(self, request: tuple[Mapping[str, Any], str, float]) -> Scored:
        """Of a row, a completion and the seconds that it may take."""
        from reasoning_gym.utils import extract_answer

        row, text, timeout_seconds = request
        name, settings = row["task"], row["task_settings"]
        if (key := task_key(name, settings)) not in self._tasks:
            self._tasks[key] = make_task(name, settings, "env.reasoning_gym")
        try:
            with time_limit(timeout_seconds):
                score = float(self._tasks[key].score_answer(extract_answer(text) or text.strip(), dict(row)))
        except (TookTooLong, MemoryError):
            return Scored(failure="timeout")
        except Exception:  # noqa: BLE001 a scorer parses what the model wrote, and may fail in any way
            return Scored(failure="error")
        return Scored(score) if math.isfinite(score) else Scored(failure="error")

    async def call_async(self, request: tuple[Mapping[str, Any], str, float]) -> Scored:
        return self.call(request)
