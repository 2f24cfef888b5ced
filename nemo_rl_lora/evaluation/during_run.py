"""Evaluations during a run (`evaluate`): the policy as it is, asked by the run's engine, as metrics.

Contract: what is asked and drawn is that of the evaluation driver, so that a step's numbers are those which the driver
finds for its checkpoint: every seed follows from (the evaluation's seed, prompt, number), at every step alike. Knows no
policy: whoever calls has an engine that serves the weights of the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from nemo_rl_lora.config.evaluation import EvaluateConfig
from nemo_rl_lora.config.master import MasterConfig
from nemo_rl_lora.environments.registry import code_digests
from nemo_rl_lora.evaluation.ask import validation_sampling
from nemo_rl_lora.evaluation.estimates import Estimate
from nemo_rl_lora.evaluation.results import Result, ask_model, summarise
from nemo_rl_lora.evaluation.task import Task, load_task
from nemo_rl_lora.generation.protocol import Generation
from nemo_rl_lora.run.console import KeyMetric
from nemo_rl_lora.run.metrics import TIMING, RolloutSample


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """What an evaluation found, and some completions to read: the first of each prompt."""

    metrics: Mapping[str, float]
    samples: Sequence[RolloutSample]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """An entry of `evaluate`, its prompts loaded and checked."""

    settings: EvaluateConfig
    task: Task

    @property
    def name(self) -> str:
        return self.settings.name

    @property
    def metric_names(self) -> tuple[str, ...]:
        """What it measures at every step at which it is made."""
        of_k = (f"pass@{k}" for k in self.settings.k_values)
        return tuple(f"{self.name}/{metric}" for metric in ("accuracy", *of_k, "mean_num_tokens", "truncated_share"))

    def is_due(self, step: int, *, is_last: bool) -> bool:
        """Whether to evaluate after `step` complete steps; `is_last`: the run, or its phase, ends there."""
        settings = self.settings
        if step == 0 and settings.at_start:
            return True
        return (is_last and settings.at_end) or (step > 0 and step % settings.every == 0)

    def measure(self, generation: Generation) -> Evaluated:
        """Ask the engine every prompt, and score what it answers."""
        asked = self.settings
        outcome = ask_model(self.name, generation, self.task, tell=lambda _: None, stopped=lambda: False)
        assert outcome is not None, "nothing stops it"
        result = summarise(
            outcome,
            num_completions=asked.num_tests_per_prompt,
            k_values=asked.k_values,
            solved_at=asked.solved_at,
            base=None,
        )
        samples = [
            RolloutSample(
                prompt=completion.prompt,
                completion=completion.completion,
                reward=completion.reward,
                finish_reason=completion.finish_reason,
            )
            for completion in outcome.completions
            if completion.completion_index == 0
        ]
        return Evaluated(metrics=_metrics(self.name, result), samples=samples)

    def describe(self) -> str:
        """For a plan."""
        settings = self.settings
        also = [when for when, is_so in (("the start", settings.at_start), ("the end", settings.at_end)) if is_so]
        at = f" and at {' and '.join(also)}" if also else ""
        steps = "every step" if settings.every == 1 else f"every {settings.every} steps"
        return f"{self.name} ({settings.data.dataset_name}) {steps}{at}: {self.task.describe()}"


def _metrics(name: str, result: Result) -> dict[str, float]:
    estimates = {"accuracy": result.accuracy, **{f"pass@{k}": value for k, value in result.pass_at.items()}}
    return {
        **{f"{name}/{metric}": value for key, found in estimates.items() for metric, value in _both(key, found)},
        f"{name}/mean_num_tokens": result.mean_num_tokens,
        f"{name}/truncated_share": result.truncated_share,
        **{f"{name}/{metric}": count for metric, count in result.environment_metrics.items()},
        f"{TIMING}{name}/generation": result.generation_seconds,
        f"{TIMING}{name}/reward_calculation": result.reward_seconds,
    }


def _both(key: str, found: Estimate) -> list[tuple[str, float]]:
    """The mean, and half its interval where there is one."""
    return [(key, found.mean), *([] if found.half_width is None else [(f"{key}_half_width", found.half_width)])]


class Evaluations(tuple[Evaluation, ...]):
    """Those of a run, in the order in which they are written."""

    __slots__ = ()

    @property
    def metric_names(self) -> tuple[str, ...]:
        return tuple(name for evaluation in self for name in evaluation.metric_names)

    @property
    def key_metrics(self) -> tuple[KeyMetric, ...]:
        """What the console shows of them."""
        return tuple(
            KeyMetric(name=f"{evaluation.name}/{metric}", split="evaluation", higher_is_better=True)
            for evaluation in self
            for metric in ("accuracy", *(f"pass@{k}" for k in evaluation.settings.k_values if k > 1))
        )

    def reward_digests(self) -> dict[str, str]:
        """Of the user's code that scores, by the key that names it."""
        return code_digests(
            {name: found for evaluation in self for name, found in evaluation.task.environments.items()}
        )

    def close(self) -> None:
        """End what their environments started."""
        with ExitStack() as closing:
            for evaluation in self:
                closing.callback(evaluation.task.close)


def load_evaluations(config: MasterConfig, tokenizer: Any) -> Evaluations:
    """Read and check every row of every evaluation. ValueError says what is wrong with each of them."""
    loaded: list[Evaluation] = []
    problems: list[str] = []
    for number, settings in enumerate(config.evaluate):
        try:
            task = _load(settings, f"evaluate.{number}.data", tokenizer, config)
        except ValueError as error:
            problems.append(str(error))
        else:
            loaded.append(Evaluation(settings=settings, task=task))
    if problems:
        raise ValueError("\n".join(problems))
    return Evaluations(loaded)


def _load(settings: EvaluateConfig, key: str, tokenizer: Any, config: MasterConfig) -> Task:
    engine = config.policy.generation
    assert engine is not None, "filled in by MasterConfig"
    sampling = replace(
        validation_sampling(engine),
        max_new_tokens=settings.max_new_tokens or engine.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
    )
    return load_task(settings.data, key, tokenizer, config=config, asked=settings, engine=engine, sampling=sampling)
