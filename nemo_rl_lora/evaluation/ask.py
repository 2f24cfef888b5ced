"""Prompts are asked and their completions scored: for training rollouts, for validation and for evaluation.

Knows the verbs of an engine and of an environment, and no more. Axes: P prompts, G completions of each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from nemo_rl_lora.config.generation import EngineConfig
from nemo_rl_lora.environments.protocol import Environment
from nemo_rl_lora.generation.protocol import Generation, generate
from nemo_rl_lora.run.metrics import Stopwatch
from nemo_rl_lora.seeds import derive_seed
from nemo_rl_lora.types import CompletionGroup, GroupRequest, Prompt, RolloutGroup, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutParams:
    """How completions are drawn: every seed follows from (seed, purpose, draw, prompt, completion)."""

    num_completions: int
    sampling: SamplingParams
    max_sequence_length: int  # prompt and completion
    seed: int
    purpose: str  # "rollout", "validation" or "evaluation"


def validation_sampling(engine: EngineConfig) -> SamplingParams:
    """How completions are drawn where nothing is trained on them."""
    return SamplingParams(
        max_new_tokens=engine.max_new_tokens,
        temperature=engine.val_temperature,
        top_p=engine.val_top_p,
        top_k=engine.val_top_k,
        stop_token_ids=tuple(engine.stop_token_ids or ()),
        stop_strings=tuple(engine.stop_strings or ()),
        skip_special_tokens=engine.skip_special_tokens,
    )


def group_requests(prompts: Sequence[Prompt], params: RolloutParams, draw: str) -> list[GroupRequest]:
    """What to ask the engine for. `draw` names this draw (of a rollout: the step, and which one of the step)."""
    return [
        GroupRequest(
            prompt=prompt,
            num_completions=params.num_completions,
            seeds=tuple(
                derive_seed(params.seed, params.purpose, draw, place, prompt.index, g)
                for g in range(params.num_completions)
            ),
            sampling=_within(params, prompt),
        )
        for place, prompt in enumerate(prompts)
    ]


def _within(params: RolloutParams, prompt: Prompt) -> SamplingParams:
    room = params.max_sequence_length - len(prompt.token_ids)
    return replace(params.sampling, max_new_tokens=min(params.sampling.max_new_tokens, room))


def ask(
    generation: Generation,
    requests: Sequence[GroupRequest],
    environments: Mapping[str, Environment],
    watch: Stopwatch,
) -> tuple[list[RolloutGroup], dict[str, float]]:
    """Sample and score: the groups in the order of the requests, and what the environments counted."""
    with watch.measure("generation"):
        completed = generate(generation, requests)
    with watch.measure("reward_calculation"):
        return score(completed, environments)


def score(
    groups: Sequence[CompletionGroup], environments: Mapping[str, Environment]
) -> tuple[list[RolloutGroup], dict[str, float]]:
    """Rewards from each group's own environment, one call an environment, and the environments' counts."""
    rewards: list[list[float]] = [[0.0] * len(group.completions) for group in groups]
    counts: list[Mapping[str, float]] = []
    for name in sorted({group.prompt.environment for group in groups}):
        places = [
            (i, g)
            for i, group in enumerate(groups)
            if group.prompt.environment == name
            for g in range(len(group.completions))
        ]
        completions = [groups[i].completions[g] for i, g in places]
        scores = environments[name].score(
            [groups[i].prompt for i, _ in places],
            [completion.text for completion in completions],
            [completion.token_ids for completion in completions],
        )
        for (i, g), reward in zip(places, scores.rewards, strict=True):
            rewards[i][g] = reward
        counts.append(scores.metrics)
    scored = [
        RolloutGroup(prompt=group.prompt, completions=group.completions, rewards=tuple(row))
        for group, row in zip(groups, rewards, strict=True)
    ]
    return scored, total_counts(counts)


def total_counts(counts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The sum under each name; a name that one of them lacks counts as 0 there."""
    totals: dict[str, float] = {}
    for some in counts:
        totals |= {name: totals.get(name, 0.0) + value for name, value in some.items()}
    return totals
