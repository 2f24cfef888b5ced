"""What models made of the same prompts: every completion with its reward, and the figures that compare models.

Every model is asked the same prompts with the same seeds, so a difference between two of them is compared prompt by
prompt. Knows no engine and no file. Axes: P prompts, G completions of each (`eval.num_tests_per_prompt`).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from nemo_rl_lora.evaluation.ask import ask, group_requests, total_counts
from nemo_rl_lora.evaluation.estimates import Estimate, estimate, pass_at_k
from nemo_rl_lora.evaluation.task import Task
from nemo_rl_lora.generation.protocol import Generation
from nemo_rl_lora.run.metrics import Stopwatch
from nemo_rl_lora.types import GroupRequest, RolloutGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredCompletion:
    """One completion with what it was drawn from."""

    model: str
    prompt_index: int
    completion_index: int  # of its prompt's
    seed: int
    prompt: str
    completion: str
    reward: float
    num_tokens: int
    finish_reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one model made of the task."""

    completions: tuple[ScoredCompletion, ...]  # [P x G], a prompt's together
    environment_metrics: Mapping[str, float]  # counts
    generation_seconds: float
    reward_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What is reported of one model; estimates are over prompts. The last two compare it with the base, where that was
    asked too."""

    accuracy: Estimate  # mean reward
    pass_at: Mapping[int, Estimate]  # by k
    mean_num_tokens: float  # of a completion
    truncated_share: float  # of the completions
    environment_metrics: Mapping[str, float]
    generation_seconds: float
    reward_seconds: float
    gain: Estimate | None  # of accuracy over the base's, prompt by prompt
    num_changed: int | None  # completions whose text is not the base's


def ask_model(
    model: str,
    generation: Generation,
    task: Task,
    *,
    tell: Callable[[Sequence[ScoredCompletion]], None],
    stopped: Callable[[], bool],
) -> Outcome | None:
    """Sample and score every prompt, telling what came of each batch. None where `stopped` said so before the end."""
    completions: list[ScoredCompletion] = []
    counts: list[Mapping[str, float]] = []
    watch = Stopwatch()
    for begin in range(0, len(task.prompts), task.num_prompts_at_once):
        if stopped():
            return None
        prompts = task.prompts[begin : begin + task.num_prompts_at_once]
        # One call for each prompt: its seeds then do not depend on how many are asked at once.
        requests = [request for prompt in prompts for request in group_requests([prompt], task.params, "")]
        groups, counted = ask(generation, requests, task.environments, watch)
        counts.append(counted)
        batch = [line for pair in zip(requests, groups, strict=True) for line in _scored(model, *pair)]
        completions += batch
        tell(batch)
    return Outcome(
        completions=tuple(completions),
        environment_metrics=total_counts(counts),
        generation_seconds=watch.seconds("generation"),
        reward_seconds=watch.seconds("reward_calculation"),
    )


def _scored(model: str, request: GroupRequest, group: RolloutGroup) -> list[ScoredCompletion]:
    assert request.prompt.index == group.prompt.index, (request.prompt.index, group.prompt.index)
    return [
        ScoredCompletion(
            model=model,
            prompt_index=group.prompt.index,
            completion_index=g,
            seed=request.seeds[g],
            prompt=group.prompt.text,
            completion=completion.text,
            reward=reward,
            num_tokens=len(completion.token_ids),
            finish_reason=completion.finish_reason,
        )
        for g, (completion, reward) in enumerate(zip(group.completions, group.rewards, strict=True))
    ]


def summarise(
    outcome: Outcome, *, num_completions: int, k_values: Sequence[int], solved_at: float, base: Outcome | None
) -> Result:
    """The figures of a model; `base` is the base's outcome on the same task."""
    completions = outcome.completions
    rewards = _by_prompt(outcome, num_completions)
    gain, num_changed = None, None
    if base is not None:
        pairs = zip(rewards, _by_prompt(base, num_completions), strict=True)
        gain = estimate([statistics.fmean(own) - statistics.fmean(others) for own, others in pairs])
        texts = zip(completions, base.completions, strict=True)
        num_changed = sum(own.completion != other.completion for own, other in texts)
    is_solved = [[float(reward >= solved_at) for reward in row] for row in rewards]
    return Result(
        accuracy=estimate([statistics.fmean(row) for row in rewards]),
        pass_at={k: estimate([pass_at_k(row, k) for row in is_solved]) for k in k_values},
        mean_num_tokens=statistics.fmean(completion.num_tokens for completion in completions),
        truncated_share=statistics.fmean(completion.finish_reason == "length" for completion in completions),
        environment_metrics=outcome.environment_metrics,
        generation_seconds=outcome.generation_seconds,
        reward_seconds=outcome.reward_seconds,
        gain=gain,
        num_changed=num_changed,
    )


def _by_prompt(outcome: Outcome, num_completions: int) -> list[list[float]]:
    """[P][G]"""
    rewards = [completion.reward for completion in outcome.completions]
    return [rewards[begin : begin + num_completions] for begin in range(0, len(rewards), num_completions)]
