"""Rollouts that run ahead of training: a step trains on groups that were sampled and scored while earlier ones trained.

While the engine has the weights of version v (v complete steps), the groups of steps v to v + A are asked for, where A
is `grpo.async_grpo.max_trajectory_age_steps`: those of step s come from version s - A, the first ones from version 0.
Which weights a group comes from follows from its step, not from a clock, and so do its prompts and seeds: a run is a
function of its seed. With `in_flight_weight_updates` a completion may go on under newer weights; how many of its tokens
each version has is then a matter of time, and stands beside them.

One thread samples, in the order of the steps; others score what is sampled. The loss accounts for the weights' age by
the importance weight of each token (`loss_fn.use_importance_sampling_correction`).
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from nemo_rl_lora.algorithms.algorithm import Run
from nemo_rl_lora.algorithms.group_records import group_from, group_record, prompt_of, prompt_record
from nemo_rl_lora.algorithms.rollout import Rollout, rollout_metrics, training_params
from nemo_rl_lora.config.master import GrpoMaster
from nemo_rl_lora.environments.protocol import Environment
from nemo_rl_lora.evaluation.ask import group_requests, score
from nemo_rl_lora.generation.protocol import Generation, generate
from nemo_rl_lora.run.metrics import Stopwatch
from nemo_rl_lora.types import CompletionGroup, GroupRequest, Prompt, RolloutGroup

logger = logging.getLogger(__name__)
T = TypeVar("T")

AHEAD_FILE = "groups_ahead.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scored:
    groups: Sequence[RolloutGroup]
    counts: Mapping[str, float]
    generation_seconds: float
    reward_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """The groups of a step, on their way."""

    version: int  # of the weights when they were asked for
    prompts: Sequence[Prompt]
    generated: Future[Any]
    scored: Future[_Scored]


class _BusyClock:
    """How long a thing was at work, up to now."""

    def __init__(self) -> None:
        self._total, self._since = 0.0, None

    @contextmanager
    def at_work(self) -> Iterator[None]:
        self._since = time.perf_counter()
        try:
            yield
        finally:
            started, self._since = self._since, None
            self._total += time.perf_counter() - started

    def seconds(self) -> float:
        started = self._since
        return self._total + (0.0 if started is None else time.perf_counter() - started)


class _Threads:
    """Threads that take calls in their order, and do not keep the interpreter from ending, whatever a call does."""

    def __init__(self, number: int, name: str) -> None:
        self._number = number
        self._calls: SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None] = SimpleQueue()
        for _ in range(number):
            threading.Thread(target=self._work, daemon=True, name=name).start()

    def submit(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        future: Future[T] = Future()
        self._calls.put((future, function, arguments))
        return future

    def close(self) -> None:
        """Cancel what has not begun."""
        with suppress(Empty):
            while call := self._calls.get_nowait():
                call[0].cancel()
        for _ in range(self._number):
            self._calls.put(None)

    def _work(self) -> None:
        while call := self._calls.get():
            future, function, arguments = call
            future.set_running_or_notify_cancel()
            try:
                future.set_result(function(*arguments))
            except BaseException as error:  # raised where the result is asked for
                future.set_exception(error)
            del call, future  # and with them the groups


class SourceAhead:
    """A RolloutSource; see the module's contract."""

    def __init__(
        self,
        config: GrpoMaster,
        run: Run,
        generation: Generation,
        environments: Mapping[str, Environment],
        prompts: Sequence[Prompt],
    ) -> None:
        """`prompts` are those that the run's loader draws from, by index."""
        assert config.grpo.async_grpo is not None, "rollouts run ahead"
        self._run, self._generation, self._environments = run, generation, environments
        self._prompts, self._params = prompts, training_params(config)
        self._num_ahead = config.grpo.num_steps_ahead
        self._in_flight = config.grpo.async_grpo.in_flight_weight_updates
        self._asked: dict[int, _Asked] = {}  # by step
        self._again: dict[int, Sequence[Prompt]] = {}  # by step: what an interrupted run had asked
        self._late: set[int] = set()  # steps that an interrupted run had not asked for
        self._sampling, self._scoring = _Threads(1, "sampling"), _Threads(self._num_ahead + 1, "scoring")
        self._engine_clock, self._last_seen = _BusyClock(), (time.perf_counter(), 0.0)

    def next(self, step: int, version: int, watch: Stopwatch) -> Rollout:
        """Ask for the groups of later steps; wait for those of this one. RuntimeError for a completion of a version
        that it was not to come from."""
        self._asked = {later: asked for later, asked in self._asked.items() if later >= step}
        for later in range(step, min(step + self._num_ahead, self._run.num_steps - 1) + 1):
            if later not in self._asked:
                self._ask(later, version)
        self._say_what_was_late()
        if step not in self._asked:
            raise StopIteration
        asked = self._asked[step]
        self._run.console.stage("waiting for rollouts")
        with watch.measure("exposed_generation"):
            scored = asked.scored.result()
        ages, oldest = _ages(scored.groups, version), version - asked.version
        expected = range(oldest + 1) if self._in_flight else [oldest]
        if wrong := sorted(ages.keys() - set(expected)):
            raise RuntimeError(
                f"grpo.async_grpo: tokens of step {step + 1} come from weights that are {wrong} steps old, and "
                f"{list(expected)} were to be sampled. The rollout was not used."
            )
        return Rollout(
            groups=scored.groups,
            sampled=scored.groups,
            metrics={
                **rollout_metrics(scored.groups, scored.groups, scored.counts),
                **_age_metrics(ages, self._num_ahead),
                "timing/generation": scored.generation_seconds,
                "timing/reward_calculation": scored.reward_seconds,
                "timing/engine_idle": self._engine_idle_seconds(),
            },
            generation_seconds=scored.generation_seconds,
        )

    def settle(self, watch: Stopwatch, *, for_sync: bool) -> None:
        """Wait until nothing is sampled, which new weights do only without in-flight updates."""
        if for_sync and self._in_flight:
            return
        with watch.measure("exposed_generation"):
            for asked in self._asked.values():
                asked.generated.result()

    def save(self, directory: Path, step: int, *, urgent: bool) -> None:
        """What was asked for before the step after `step` complete ones. It is waited for, so that a run goes on as if
        it had never stopped, unless the save is urgent: then what is not there yet is asked again."""
        rows = []
        for later in range(step, step + self._num_ahead):
            if (asked := self._asked.get(later)) is None:
                continue
            is_there = not urgent or (asked.scored.done() and asked.scored.exception() is None)
            scored = asked.scored.result() if is_there else None
            rows.append(
                {
                    "step": later,
                    "version": asked.version,
                    "prompts": [prompt_record(prompt) for prompt in asked.prompts],
                    "groups": scored and [group_record(group) for group in scored.groups],
                    "counts": scored and dict(scored.counts),
                }
            )
        (directory / AHEAD_FILE).write_text(json.dumps(rows) + "\n", encoding="utf-8")

    def load(self, directory: Path) -> None:
        """Read what `save` wrote; groups of prompts that are no longer there are left out."""
        path = directory / AHEAD_FILE
        for row in json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []:
            found = [prompt_of(record, self._prompts) for record in row["prompts"]]
            prompts = [prompt for prompt in found if prompt is not None]
            if len(prompts) < len(found):
                continue  # of this step all are drawn anew
            if row["groups"] is None:
                self._again[row["step"]] = prompts
                continue
            groups = [group_from(record, prompt) for record, prompt in zip(row["groups"], prompts, strict=True)]
            done: Future[_Scored] = Future()
            done.set_result(_Scored(groups=groups, counts=row["counts"], generation_seconds=0.0, reward_seconds=0.0))
            self._asked[row["step"]] = _Asked(version=row["version"], prompts=prompts, generated=done, scored=done)
        if self._again:
            steps = ", ".join(str(step + 1) for step in self._again)
            logger.warning(
                f"grpo.async_grpo: the groups of step {steps} were not complete when the run stopped. Their prompts "
                f"are asked again, of newer weights than before: from here on the run is not the one that stopped."
            )
        assert self._run.resume is not None, "its directory is loaded"
        step = self._run.resume.step
        self._late = set(range(step, step + self._num_ahead)) - self._asked.keys() - self._again.keys()

    def _say_what_was_late(self) -> None:
        """Warn of the steps that would have had older weights in a run that never stopped."""
        if steps := sorted(self._late & self._asked.keys()):
            logger.warning(
                f"grpo.async_grpo: the groups of step {', '.join(str(step + 1) for step in steps)} were not asked for "
                f"before the run stopped, which was to end there, or their prompts are gone. They are asked now, of "
                f"newer weights: from here on the run is not one that never stopped."
            )
        self._late = set()

    def close(self) -> None:
        """Ask for nothing more. What is sampled now ends with the engine, what is scored with the environments, or in a
        thread of this process that nothing waits for."""
        self._sampling.close()
        self._scoring.close()

    def _ask(self, step: int, version: int) -> None:
        prompts = self._again.pop(step, None)
        if prompts is None:
            prompts = next(self._run.loader, None)
        if prompts is None:  # no rows are left
            return
        requests = group_requests(prompts, self._params, f"{step}.0")
        generated = self._sampling.submit(self._sample, requests)
        scored = self._scoring.submit(self._score, generated)
        self._asked[step] = _Asked(version=version, prompts=prompts, generated=generated, scored=scored)

    def _sample(self, requests: Sequence[GroupRequest]) -> tuple[list[CompletionGroup], float]:
        started = time.perf_counter()
        with self._engine_clock.at_work():
            groups = generate(self._generation, requests)
        return groups, time.perf_counter() - started

    def _score(self, generated: Future[tuple[list[CompletionGroup], float]]) -> _Scored:
        completed, generation_seconds = generated.result()
        started = time.perf_counter()
        groups, counts = score(completed, self._environments)
        return _Scored(
            groups=groups,
            counts=counts,
            generation_seconds=generation_seconds,
            reward_seconds=time.perf_counter() - started,
        )

    def _engine_idle_seconds(self) -> float:
        """Since this was last asked."""
        now, busy = time.perf_counter(), self._engine_clock.seconds()
        (then, busy_then), self._last_seen = self._last_seen, (now, busy)
        return max(now - then - (busy - busy_then), 0.0)


def _ages(groups: Sequence[RolloutGroup], newest: int) -> dict[int, int]:
    """Age -> how many tokens come from weights that are so many steps older than version `newest`."""
    ages: dict[int, int] = {}
    for group in groups:
        for completion in group.completions:
            for num_tokens, version in completion.versions:
                ages[newest - version] = ages.get(newest - version, 0) + num_tokens
    return ages


def _age_metrics(ages: Mapping[int, int], limit: int) -> dict[str, float]:
    total = sum(ages.values())
    return {
        "trajectory_age_mean": sum(age * count for age, count in ages.items()) / total,
        "trajectory_age_max": float(max(ages)),
        **{f"token_share_of_age_{age}": ages.get(age, 0) / total for age in range(limit + 1)},
    }
