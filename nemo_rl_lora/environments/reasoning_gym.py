"""The score that a row's task of the reasoning-gym package (data/reasoning_gym.py) gives a completion.

The answer of a completion is what stands between its last <answer> tags, or all of it. Scorers run in processes of
their own, as those of `math` do, which start when they are first needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from nemo_rl_lora.data.reasoning_gym import Settings, make_task, task_key
from nemo_rl_lora.environments.processes import Failed, Program, TimedWorkers
from nemo_rl_lora.environments.protocol import Environment, Scores
from nemo_rl_lora.environments.reasoning_gym_worker import Scored, Scorer
from nemo_rl_lora.types import Prompt


class ReasoningGymEnvironment(Environment):
    name = "reasoning_gym"

    def __init__(self, num_workers: int, timeout_seconds: float) -> None:
        self._tasks: dict[str, tuple[str, Settings]] = {}  # a process that starts makes those known by then
        program = Program(
            module=Scorer.__module__,
            name=Scorer.__name__,
            arguments=(self._tasks,),
            key="env.reasoning_gym",
            imports="reasoning-gym",
            is_quiet=True,
        )
        self._workers = TimedWorkers(program, num_workers, timeout_seconds)

    def check(self, prompts: Iterable[Prompt]) -> None:
        for prompt in prompts:
            if "task" not in prompt.row or "task_settings" not in prompt.row:
                raise ValueError(
                    f"env.reasoning_gym: {prompt.named} is not of a reasoning-gym task. Use it with "
                    f"dataset_name='reasoning_gym', or set data.train.env_name to another environment."
                )
            name, settings = prompt.row["task"], prompt.row["task_settings"]
            if (key := task_key(name, settings)) not in self._tasks:
                make_task(name, settings, "env.reasoning_gym")
                self._tasks[key] = name, settings

    def score(
        self, prompts: Sequence[Prompt], texts: Sequence[str], token_ids: Sequence[Sequence[int]] | None = None
    ) -> Scores:
        """Answers on which a scorer fails or ends its process are worth 0 and counted as `reasoning_gym_scorer_errors`,
        those on which it takes too long as `reasoning_gym_timeouts`."""
        answers = self._workers.answers([(dict(p.row), text) for p, text in zip(prompts, texts, strict=True)])
        found = [_scored(answer) for answer in answers]
        return Scores(
            rewards=tuple(each.reward for each in found),
            metrics={
                "reasoning_gym_scorer_errors": float(sum(each.failure == "error" for each in found)),
                "reasoning_gym_timeouts": float(sum(each.failure == "timeout" for each in found)),
            },
        )

    def close(self) -> None:
        self._workers.close()


def _scored(answer: Scored | Failed) -> Scored:
    if isinstance(answer, Failed):
        return Scored(failure="timeout" if answer.kind == "timeout" else "error")
    return answer
