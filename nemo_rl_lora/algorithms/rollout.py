"""Where a GRPO step's groups come from: prompts are asked, completions scored, and surplus groups kept or dropped.

A source decides which groups a step trains on. Left out: advantages and the batch (batch.py), the engine and
its weights (a source samples from those that are served).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from nemo_rl_lora.algorithms.advantages import keep_groups
from nemo_rl_lora.algorithms.algorithm import Run
from nemo_rl_lora.algorithms.batch import rewards_of
from nemo_rl_lora.algorithms.surplus_groups import SURPLUS_FILE, SurplusGroup, as_surplus, load_surplus, save_surplus
from nemo_rl_lora.config.generation import ParityConfig
from nemo_rl_lora.config.master import GrpoMaster
from nemo_rl_lora.environments.protocol import Environment
from nemo_rl_lora.evaluation.ask import RolloutParams, ask, group_requests, total_counts, validation_sampling
from nemo_rl_lora.generation.protocol import Generation
from nemo_rl_lora.run.metrics import RolloutSample, Stopwatch
from nemo_rl_lora.types import Prompt, RolloutGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """What a step trains on. A group of an earlier policy is a SurplusGroup."""

    groups: Sequence[RolloutGroup]
    sampled: Sequence[RolloutGroup]  # for this step, whether they are trained on or not
    metrics: Mapping[str, float]
    generation_seconds: float

    @property
    def num_tokens(self) -> int:
        """Of all sampled completions."""
        return sum(len(completion.token_ids) for group in self.sampled for completion in group.completions)

    @property
    def token_ids(self) -> Iterator[tuple[int, ...]]:
        """Of each sampled completion, its prompt first."""
        for group in self.sampled:
            for completion in group.completions:
                yield (*group.prompt.token_ids, *completion.token_ids)


def validation_params(config: GrpoMaster) -> RolloutParams:
    """How completions are drawn to measure the policy."""
    return RolloutParams(
        num_completions=config.grpo.val_num_generations_per_prompt,
        sampling=validation_sampling(config.generation),
        max_sequence_length=config.policy.max_total_sequence_length,
        seed=config.grpo.seed,
        purpose="validation",
    )


def training_params(config: GrpoMaster) -> RolloutParams:
    """How completions are drawn that are trained on: from the whole distribution, at the trainer's temperature."""
    engine, params = config.generation, validation_params(config)
    return replace(
        params,
        num_completions=config.grpo.num_generations_per_prompt,
        sampling=replace(params.sampling, temperature=engine.temperature, top_p=engine.top_p, top_k=engine.top_k),
        purpose="rollout",
    )


class RolloutSource(Protocol):
    def next(self, step: int, version: int, watch: Stopwatch) -> Rollout:
        """The groups of the step after `step` complete ones, while the engine serves this version of the weights.
        Raises StopIteration where the prompts have ended."""
        ...

    def settle(self, watch: Stopwatch, *, for_sync: bool) -> None:
        """Wait until the engine is free: for new weights, or for someone else to ask it."""
        ...

    def save(self, directory: Path, step: int, *, urgent: bool) -> None:
        """Write the groups that wait for a step after `step` complete ones; all else that is drawn follows from the
        seed and the step. Urgent: wait for nothing."""
        ...

    def load(self, directory: Path) -> None:
        """Read what `save` wrote."""
        ...

    def close(self) -> None:
        """Ask the engine for nothing more."""
        ...


class SynchronousSource:
    """Samples when it is asked, from the weights of that step.

    Dynamic sampling (DAPO) drops groups whose rewards are all equal and rolls out more. What it then has too much is
    dropped, or kept for the next step (`grpo.keep_surplus_groups`).
    """

    def __init__(
        self,
        config: GrpoMaster,
        run: Run,
        generation: Generation,
        environments: Mapping[str, Environment],
        prompts: Sequence[Prompt],
    ) -> None:
        """`prompts` are those that the run's loader draws from, by index."""
        self._config, self._run = config, run
        self._generation, self._environments = generation, environments
        self.params, self._prompts = training_params(config), prompts
        self._surplus: list[SurplusGroup] = []  # for the next step, oldest first

    def next(self, step: int, version: int, watch: Stopwatch) -> Rollout:
        """Surplus groups first, then fresh ones. RuntimeError for a completion of any other version."""
        config = self._config.grpo
        num_groups = config.num_prompts_per_step
        reused, waiting = self._surplus[:num_groups], self._surplus[num_groups:]
        num_fresh = num_groups - len(reused)
        sampled, kept, counts = self._sample(step, version, num_fresh, watch)
        if config.keep_surplus_groups:
            self._surplus = [*waiting, *as_surplus(kept[num_fresh:], self._run.policy)]
            counts |= {"num_reused_groups": float(len(reused)), "num_held_groups": float(len(self._surplus))}
        if config.use_dynamic_sampling:
            num_kept = len(kept) if config.keep_surplus_groups else num_fresh
            counts["num_discarded_groups"] = float(len(sampled) - num_kept)
        groups = [*reused, *kept[:num_fresh]]
        return Rollout(
            groups=groups,
            sampled=sampled,
            metrics=rollout_metrics(sampled, groups, counts),
            generation_seconds=watch.seconds("generation"),
        )

    def settle(self, watch: Stopwatch, *, for_sync: bool) -> None:
        """It is free between two calls of `next`."""

    def close(self) -> None:
        """Nothing is asked between two calls of `next`."""

    def save(self, directory: Path, step: int, *, urgent: bool) -> None:
        if self._config.grpo.keep_surplus_groups:
            save_surplus(directory / SURPLUS_FILE, self._surplus)

    def load(self, directory: Path) -> None:
        self._surplus = load_surplus(directory / SURPLUS_FILE, self._prompts)

    def _sample(
        self, step: int, version: int, num_needed: int, watch: Stopwatch
    ) -> tuple[list[RolloutGroup], list[RolloutGroup], dict[str, float]]:
        """Roll out until so many groups can be trained on: all groups, those of them, and what was counted."""
        config, run = self._config.grpo, self._run
        kept: list[RolloutGroup] = []
        sampled: list[RolloutGroup] = []
        counts: list[Mapping[str, float]] = []  # of each rollout
        max_rollouts = config.dynamic_sampling_max_gen_batches if config.use_dynamic_sampling else 1
        while len(kept) < num_needed and len(counts) < max_rollouts:
            run.console.stage("generating")
            requests = group_requests(next(run.loader), self.params, f"{step}.{len(counts)}")
            groups, more = ask(self._generation, requests, self._environments, watch)
            self._refuse_other_versions(groups, version)
            sampled += groups
            counts.append(more)
            kept += [group for group in groups if _teaches(group)] if config.use_dynamic_sampling else groups
        if len(kept) < num_needed:
            raise ValueError(
                f"grpo.dynamic_sampling_max_gen_batches={max_rollouts}: so many rollouts gave {len(kept)} groups with "
                f"unequal rewards of {num_needed} needed at step {step + 1}. Use prompts of fitting difficulty, or "
                f"raise it."
            )
        num_rollouts = {"num_gen_batches": float(len(counts))} if config.use_dynamic_sampling else {}
        return sampled, kept, num_rollouts | total_counts(counts)

    def _refuse_other_versions(self, groups: Sequence[RolloutGroup], version: int) -> None:
        """A rollout counts only if every token came from the weights that are served."""
        for group in groups:
            for completion in group.completions:
                stale = {sampled_from for _, sampled_from in completion.versions} - {version}
                if stale:
                    raise RuntimeError(
                        f"policy.generation.backend={self._config.generation.backend!r}: a completion of prompt "
                        f"{group.prompt.index} came from weights version {sorted(stale)}, but version {version} was "
                        f"to be sampled. The rollout was not used."
                    )


def _teaches(group: RolloutGroup) -> bool:
    """Whether its rewards differ; where they are all equal every advantage is 0."""
    rewards = rewards_of([group])
    return bool(keep_groups(rewards, torch.zeros(len(rewards), dtype=torch.int64)).any())


def rollout_metrics(
    sampled: Sequence[RolloutGroup], groups: Sequence[RolloutGroup], counts: Mapping[str, float]
) -> dict[str, float]:
    """Of what was sampled for a step, of the groups that it trains on, and what was counted on the way."""
    return {
        **counts,
        **_sampling_metrics(sampled),
        "reward": float(rewards_of(sampled or groups).mean()),
        "filtered_reward": float(rewards_of(groups).mean()),
    }


def _sampling_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Lengths of everything that was sampled, whether it is trained on or not."""
    completions = [completion for group in groups for completion in group.completions]
    if not completions:
        return {"num_sampled_tokens": 0.0}
    num_tokens = float(sum(len(completion.token_ids) for completion in completions))
    return {
        "num_sampled_tokens": num_tokens,
        "mean_completion_length": num_tokens / len(completions),
        "truncation_rate": sum(c.finish_reason == "length" for c in completions) / len(completions),
    }


def refuse_disparity(metrics: Mapping[str, float], limits: ParityConfig, step: int) -> None:
    """RuntimeError where the engine's probabilities of what it sampled were too far from the trainer's."""
    for name, limit in (
        ("gen_kl_error", limits.max_gen_kl_error),
        ("token_mult_prob_error", limits.max_token_mult_prob_error),
    ):
        if limit is not None and not metrics[name] <= limit:
            raise RuntimeError(
                f"policy.generation.parity.max_{name}={limit:g}: step {step + 1} has {metrics[name]:.4g}, so "
                f"the engine did not sample what the trainer computes. The step was not recorded. Try "
                f"policy.generation.lora_sync=adapter or policy.precision=float32; tools/parity.py shows where the "
                f"difference comes from."
            )


def samples_of(groups: Sequence[RolloutGroup]) -> list[RolloutSample]:
    """One completion of each group, the first, to read."""
    return [
        RolloutSample(
            prompt=group.prompt.text,
            completion=group.completions[0].text,
            reward=group.rewards[0],
            finish_reason=group.completions[0].finish_reason,
        )
        for group in groups
    ]
