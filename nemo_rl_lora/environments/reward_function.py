"""A reward function of one's own as an environment: `def reward(prompt: str, completion: str, row: dict) -> float`.

Functions as TRL and verl call them are recognised by the names of their parameters, and async ones are awaited. With
`num_workers` it runs in processes of its own, where whatever it does, `os._exit` and a hang included, is an error that
names the row, or the reward of `on_failure`. Rewards do not depend on which call ends first, and score() may be called
from several threads.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

from nemo_rl_lora.config.env import RewardFunctionConfig
from nemo_rl_lora.environments.processes import Failed, Program, Workers, in_order
from nemo_rl_lora.environments.protocol import Environment, Scores
from nemo_rl_lora.environments.reward_calls import Call, Facts, RewardFunction, Rewards, ground_truth_of
from nemo_rl_lora.types import Prompt

_AWAITED_AT_ONCE = 16
_GRACE_SECONDS = 1.0  # for an async function that blocks its process, beyond its time
_COUNTED = {"exception": "exceptions", "exit": "exits", "crash": "crashes", "timeout": "timeouts"}


class RewardFunctionEnvironment(Environment):
    """The function is imported here, in the process that will run it."""

    def __init__(self, name: str, config: RewardFunctionConfig) -> None:
        self.name, self._config = name, config
        self._key = f"env.{name}.reward_function={config.reward_function!r}"
        self._calls = (_InWorkers if config.num_workers else _InDriver)(self._key, config)
        self._facts = self._calls.facts
        try:
            self._refuse_unused_keys()
        except ValueError:
            self.close()
            raise
        self._at_once = _at_once(config, self._facts)
        self._calls.begin(self._at_once)

    def check(self, prompts: Iterable[Prompt]) -> None:
        """Which keys a function needs is known to the function alone; but verl's needs the expected answer, and TRL's
        those of its parameters."""
        if self._facts.keys:
            self._check_keys(prompts)
        for prompt in prompts if self._facts.form == "verl" else ():
            if ground_truth_of(prompt.row) is None:
                raise ValueError(
                    f"{self._key}: takes ground_truth as verl's functions do, and {prompt.named} has neither "
                    f"reward_model.ground_truth nor ground_truth nor answer. Correct the row, or set "
                    f"data.train.output_key."
                )

    def _check_keys(self, prompts: Iterable[Prompt]) -> None:
        """ValueError for a parameter that is a key of no row. Where some rows have it, the others give None."""
        missing, found = set(self._facts.keys), dict[str, None]()
        for prompt in prompts:
            missing -= prompt.row.keys()
            found |= dict.fromkeys(prompt.row)
            if not missing:
                return
        if found:
            raise ValueError(
                f"{self._key}: takes {', '.join(sorted(missing))}, and no row has such a key; they have "
                f"{', '.join(found)}. Give the parameter the name of one of them, or a default, or take **kwargs."
            )

    def code_digest(self) -> str | None:
        """Of the file that holds the function; None where it is no file."""
        file = self._facts.file
        return None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()

    def score(
        self, prompts: Sequence[Prompt], texts: Sequence[str], token_ids: Sequence[Sequence[int]] | None = None
    ) -> Scores:
        """A completion that the function gives None is worth 0 and counted as `<name>_unscored`."""
        assert len(prompts) == len(texts), (len(prompts), len(texts))
        ids = [None] * len(texts) if token_ids is None else [list(each) for each in token_ids]
        size = max(1, len(texts)) if self._facts.form == "trl" else 1
        spans = [slice(begin, begin + size) for begin in range(0, len(texts), size)]

        def call(number: int) -> Rewards | Failed:
            span = spans[number]
            return self._call(prompts[span], texts[span], ids[span])

        answers = in_order(call, len(spans), self._at_once)
        failures = dict.fromkeys(_COUNTED, 0) if self._config.on_failure != "error" else {}
        rewards: list[float | None] = []
        for answer, span in zip(answers, spans, strict=True):
            if isinstance(answer, Failed):
                num_failed = len(texts[span])
                failures[answer.kind] += num_failed
                answer = (float(self._config.on_failure),) * num_failed
            rewards += answer
        num_unscored = rewards.count(None)
        if num_unscored == len(rewards) > 1:
            raise ValueError(
                f"{self._key}: returned None for all {num_unscored} completions of a rollout. Return a number; None "
                f"says that a completion cannot be scored, and is worth 0."
            )
        metrics = {f"{self.name}_unscored": float(num_unscored)} if num_unscored else {}
        metrics |= {f"{self.name}_{_COUNTED[kind]}": float(count) for kind, count in failures.items()}
        return Scores(rewards=tuple(reward or 0.0 for reward in rewards), metrics=metrics)

    def close(self) -> None:
        self._calls.close()

    def _call(
        self, prompts: Sequence[Prompt], texts: Sequence[str], ids: Sequence[list[int] | None]
    ) -> Rewards | Failed:
        """Rewards, or a failure that `on_failure` gives a reward. ValueError for any other."""
        call = Call(
            prompts=tuple(prompt.text for prompt in prompts),
            texts=tuple(texts),
            rows=tuple(prompt.row for prompt in prompts),
            token_ids=tuple(ids),
        )
        answer = self._calls.call(call)
        if isinstance(answer, Failed) and (self._config.on_failure == "error" or answer.kind == "value"):
            raise self._error(answer, prompts, texts)
        return answer

    def _error(self, failed: Failed, prompts: Sequence[Prompt], texts: Sequence[str]) -> ValueError:
        key, place = self._key, f"{len(texts)} completions of a rollout"
        if self._facts.form != "trl" or (failed.kind == "value" and failed.index >= 0):
            place = f"{prompts[failed.index].named} and the completion {texts[failed.index][:80]!r}"
        instead = f"set env.{self.name}.on_failure to the reward of such a completion"
        if failed.kind == "value" and failed.index < 0:
            said, remedy = failed.text, "Return a list of as many numbers, or take (prompt, completion, row)."
        elif failed.kind == "value":
            said = f"{failed.text} for {place}"
            remedy = "Return a finite number, or None where a completion cannot be scored (it is worth 0)."
        elif failed.kind == "timeout":
            key = f"env.{self.name}.timeout_seconds={self._config.timeout_seconds}"
            said = f"{self._config.reward_function} took longer for {place}"
            remedy = f"Allow it more, or {instead}."
        else:
            said = f"{failed.text} for {place}"
            remedy = f"Return 0.0, or None, where a completion cannot be scored, or {instead}."
        error = ValueError(f"{key}: {said}. {remedy}")
        if failed.trace:
            error.__cause__ = RuntimeError(f"in the reward function:\n{failed.trace}")  # run.log has it, stderr not
        return error

    def _refuse_unused_keys(self) -> None:
        config, form, is_async = self._config, self._facts.form, self._facts.is_async
        key, function = f"env.{self.name}", config.reward_function
        if form == "trl":
            for field in ("num_workers", "concurrency"):
                if (getattr(config, field) or 0) > 1:
                    raise ValueError(
                        f"{key}.{field}={getattr(config, field)}: {function} takes `completions`, all of a rollout in "
                        f"one call. Set it to 1, or take (prompt, completion, row)."
                    )
        if config.timeout_seconds is not None and not config.num_workers and not is_async:
            raise ValueError(
                f"{key}.timeout_seconds={config.timeout_seconds}: {function} is no async function and would run in "
                f"the driver's process, where nothing can end it. Set {key}.num_workers to 1 or more."
            )
        if not is_async and 0 < config.num_workers < (config.concurrency or 0):
            raise ValueError(
                f"{key}.concurrency={config.concurrency}: {function} is no async function, and each of num_workers="
                f"{config.num_workers} processes runs one call of it. Raise num_workers, or leave concurrency out."
            )


def _at_once(config: RewardFunctionConfig, facts: Facts) -> int:
    """How many calls run at the same time."""
    if facts.form == "trl":
        return 1
    if config.concurrency is not None:
        return config.concurrency
    return max(config.num_workers, _AWAITED_AT_ONCE if facts.is_async else 1)


class _InWorkers:
    """Calls in processes of their own."""

    def __init__(self, key: str, config: RewardFunctionConfig) -> None:
        program = Program(
            module=RewardFunction.__module__,
            name=RewardFunction.__name__,
            arguments=(config.reward_function, key, config.timeout_seconds, True),
            key=key,
            imports=config.reward_function.rpartition(":")[0],
        )
        self._workers, self._seconds = Workers(program, config.num_workers), config.timeout_seconds
        self.facts: Facts = self._workers.facts()
        if self.facts.is_async and self._seconds is not None:
            self._seconds += _GRACE_SECONDS

    def begin(self, at_once: int) -> None:
        self._workers.admit(at_once)

    def call(self, call: Call) -> Rewards | Failed:
        return self._workers.call(call, self._seconds)

    def close(self) -> None:
        self._workers.close()


class _InDriver:
    """Calls in this process: of a plain function in the threads that ask, of an async one in a loop of its own."""

    def __init__(self, key: str, config: RewardFunctionConfig) -> None:
        self._key = key
        self._function = RewardFunction(config.reward_function, key, config.timeout_seconds, in_worker=False)
        self.facts = self._function.facts
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed, self._is_closed = asyncio.Event(), False
        self._thread: threading.Thread | None = None

    def begin(self, at_once: int) -> None:
        self._free = threading.BoundedSemaphore(at_once)
        if self.facts.is_async:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._run, args=(self._loop,), daemon=True, name="async rewards")
            self._thread.start()

    def call(self, call: Call) -> Rewards | Failed:
        with self._free:
            if self._is_closed:
                raise RuntimeError(f"{self._key}: is closed, and was called.")
            if self._loop is None:
                return self._function.call(call)
            return asyncio.run_coroutine_threadsafe(self._function.call_async(call), self._loop).result()

    def close(self) -> None:
        """Cancel what is awaited, and call no more. What does not return is left to the end of the process."""
        self._is_closed = True
        if self._loop is not None and self._thread is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._closed.set)
            self._thread.join(_GRACE_SECONDS)

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:  # which cancels what is left
            runner.run(self._until_closed())

    async def _until_closed(self) -> None:
        await self._closed.wait()
