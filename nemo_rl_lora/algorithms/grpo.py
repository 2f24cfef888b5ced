"""Group relative policy optimization: prompts -> groups -> batch -> step. Knows no backend and no engine.

Left out: how a model is trained or sampled (Policy, Generation), what a loss is (losses.py), when a run validates,
saves and ends (loop.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nemo_rl_lora.algorithms.advantages import advantages_from_config, keep_groups, shaped_rewards
from nemo_rl_lora.algorithms.held_groups import HELD_FILE, HeldGroup, hold, load_held, save_held, with_held_logprobs
from nemo_rl_lora.algorithms.loop import StepDone, Validated, mean_outputs
from nemo_rl_lora.algorithms.losses import PolicyLoss
from nemo_rl_lora.algorithms.rollout import (
    RolloutParams,
    collate_rollouts,
    group_index,
    group_requests,
    optimizer_slices,
    rewards_of,
    score,
)
from nemo_rl_lora.config.generation import GenerationConfig
from nemo_rl_lora.config.master import GrpoMaster
from nemo_rl_lora.console import TrainingConsole
from nemo_rl_lora.data.loader import RowLoader
from nemo_rl_lora.data.prompts import PromptSet
from nemo_rl_lora.environments.protocol import Environment
from nemo_rl_lora.generation.protocol import Generation, generate
from nemo_rl_lora.metrics import RolloutSample, RunLog, Stopwatch
from nemo_rl_lora.policy.protocol import Policy
from nemo_rl_lora.types import Batch, Prompt, RolloutGroup, SyncReceipt


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpoParts:
    """What the algorithm works with, put together by build/."""

    config: GrpoMaster
    policy: Policy
    generation: Generation
    environments: Mapping[str, Environment]
    loader: RowLoader[Prompt]
    prompts: Sequence[Prompt]  # what the loader draws from, by index
    validation: PromptSet | None
    rollout_params: RolloutParams
    validation_params: RolloutParams
    loss: PolicyLoss
    log: RunLog
    console: TrainingConsole


class GrpoWork:
    """A step and a validation of GRPO; remembers which weights the engine serves."""

    def __init__(self, parts: GrpoParts) -> None:
        self.parts = parts
        self._config = parts.config.grpo
        self._served_version = -1
        self._receipt_metrics: dict[str, float] = {}
        self._held: list[HeldGroup] = []  # for the next step, oldest first
        self._sampled: Sequence[RolloutGroup] = ()  # the newest rollout
        self._step = 0  # complete steps
        self._watch = Stopwatch()  # of the step that is being done

    def train(self, step: int, watch: Stopwatch) -> StepDone:
        """Sample groups, score them, and take the optimizer steps of their batch."""
        self._step, self._watch = step, watch
        groups, batch, metrics = self._gather()
        sampling_seconds = watch.seconds("generation")
        with watch.measure("policy_training"):
            outputs = []
            for part in self._slices(batch):
                outputs.append(self.parts.policy.train_step(part, self.parts.loss))
                self._require_parity(outputs[-1].metrics)
        self.parts.log.log_rollouts(step + 1, _samples(groups))
        metrics |= {
            **mean_outputs(outputs),
            **self._receipt_metrics,
            "mean_prompt_length": float(batch.prompt_length.float().mean()),
            "global_valid_toks": float(batch.denominators.num_loss_tokens),
            "global_valid_seqs": float(batch.denominators.num_sequences),
            "generation_tokens_per_second": metrics["num_sampled_tokens"] / max(sampling_seconds, 1e-9),
        }
        counts = {"num_tokens": float(batch.sequence_length.sum()), "num_completions": float(len(batch.token_ids))}
        token_ids = (
            (*group.prompt.token_ids, *completion.token_ids)
            for group in self._sampled
            for completion in group.completions
        )
        return StepDone(metrics=metrics, counts=counts, token_ids=token_ids)

    def validate(self, step: int, watch: Stopwatch) -> Validated | None:
        """Sample the validation prompts and score them."""
        parts, config = self.parts, self._config
        if parts.validation is None or 0 < step < config.val_start_at:
            return None
        self._step, self._watch = step, watch
        self._sync()
        num_prompts = min(len(parts.validation), config.max_val_samples or len(parts.validation))
        groups: list[RolloutGroup] = []
        metrics: dict[str, float] = {}
        for begin in range(0, num_prompts, config.val_batch_size):
            prompts = parts.validation[begin : min(begin + config.val_batch_size, num_prompts)]
            requests = group_requests(prompts, parts.validation_params, f"{begin}")
            more, scores = score(generate(parts.generation, requests), parts.environments)
            groups += more
            metrics = {name: metrics.get(name, 0.0) + value for name, value in scores.items()}
        lengths = [len(completion.token_ids) for group in groups for completion in group.completions]
        metrics |= {
            "accuracy": float(rewards_of(groups).mean()),
            "avg_length": sum(lengths) / len(lengths),
            f"pass@{config.val_num_generations_per_prompt}": sum(max(group.rewards) for group in groups) / len(groups),
        }
        return Validated(metrics=metrics, samples=_samples(groups), reached=self._reached(metrics))

    def save(self, directory: Path) -> None:
        """The groups that wait for the next step; all else that GRPO draws follows from the seed and the step."""
        if self._config.keep_surplus_groups:
            save_held(directory / HELD_FILE, self._held)

    def load(self, directory: Path) -> None:
        """Read them back."""
        self._held = load_held(directory / HELD_FILE, self.parts.prompts)

    def _reached(self, metrics: Mapping[str, float]) -> str | None:
        name, threshold = self._config.stop_at_validation_metric, self._config.stop_at_validation_threshold
        if name is None or threshold is None:
            return None
        if name not in metrics:
            raise ValueError(
                f"grpo.stop_at_validation_metric={name!r}: validation has no such metric. "
                f"Choose one of {', '.join(sorted(metrics))}."
            )
        return f"completed: {name} reached its threshold" if metrics[name] >= threshold else None

    def _gather(self) -> tuple[list[RolloutGroup], Batch, dict[str, float]]:
        """The groups that this step trains on, as a batch with everything that the loss needs."""
        config = self._config
        self._sync()
        num_groups = config.num_prompts_per_step
        held, waiting = self._held[:num_groups], self._held[num_groups:]
        num_fresh = num_groups - len(held)
        sampled, fresh, metrics = self._sample(num_fresh)
        surplus = fresh[num_fresh:]
        if config.keep_surplus_groups:
            self._held = [*waiting, *hold(surplus, self.parts.policy)]
            metrics |= {"num_reused_groups": float(len(held)), "num_held_groups": float(len(self._held))}
        if config.use_dynamic_sampling:
            num_kept = len(fresh) if config.keep_surplus_groups else num_fresh
            metrics["num_discarded_groups"] = float(len(sampled) - num_kept)
        trained = [*(one.group for one in held), *fresh[:num_fresh]]
        metrics |= _sampling_metrics(sampled)
        metrics["reward"] = float(rewards_of(sampled or trained).mean())
        metrics["filtered_reward"] = float(rewards_of(trained).mean())
        self._sampled = sampled
        return trained, self._batch(trained, held, metrics), metrics

    def _sample(self, num_needed: int) -> tuple[list[RolloutGroup], list[RolloutGroup], dict[str, float]]:
        """Roll out until so many groups can be trained on: all groups, those of them, and the environments' metrics."""
        parts, config = self.parts, self._config
        kept: list[RolloutGroup] = []
        sampled: list[RolloutGroup] = []
        metrics: dict[str, float] = {"num_gen_batches": 0.0} if config.use_dynamic_sampling else {}
        num_attempts = config.dynamic_sampling_max_gen_batches if config.use_dynamic_sampling else 1
        for attempt in range(num_attempts if num_needed > 0 else 0):
            parts.console.stage("generating")
            prompts = next(parts.loader)
            with self._watch.measure("generation"):
                requests = group_requests(prompts, parts.rollout_params, f"{self._step}.{attempt}")
                completed = generate(parts.generation, requests)
            with self._watch.measure("reward_calculation"):
                groups, scores = score(completed, parts.environments)
            self._check_versions(groups)
            sampled += groups
            metrics |= {name: metrics.get(name, 0.0) + value for name, value in scores.items()}
            kept += [group for group in groups if self._teaches(group)] if config.use_dynamic_sampling else groups
            if config.use_dynamic_sampling:
                metrics["num_gen_batches"] = attempt + 1.0
            if len(kept) >= num_needed:
                break
        if len(kept) < num_needed:
            raise ValueError(
                f"grpo.dynamic_sampling_max_gen_batches={config.dynamic_sampling_max_gen_batches}: so many rollouts "
                f"gave {len(kept)} groups with unequal rewards of {num_needed} needed at step "
                f"{self._step + 1}. Use prompts of fitting difficulty, or raise it."
            )
        return sampled, kept, metrics

    def _sync(self) -> None:
        """Give the engine the weights as they are now, unless it already has them."""
        if self._served_version == self._step:
            return
        self.parts.console.stage("syncing weights")
        mode = self._generation_config.lora_sync
        with self._watch.measure("weight_sync"):
            ref = self.parts.policy.publish(self._step, mode)
            receipt = self.parts.generation.sync_weights(ref)
        if (receipt.version, receipt.digest) != (ref.version, ref.digest):
            raise RuntimeError(
                f"policy.generation.lora_sync={mode!r}: the engine confirmed version {receipt.version} "
                f"({receipt.digest[:12]}), but version {ref.version} ({ref.digest[:12]}) was sent. "
                "No rollout was used."
            )
        self._served_version = self._step
        self._receipt_metrics = _receipt_metrics(receipt)

    def _require_parity(self, metrics: Mapping[str, float]) -> None:
        """RuntimeError where the engine's probabilities were too far from the trainer's."""
        for name in ("gen_kl_error", "token_mult_prob_error"):
            limit = getattr(self._generation_config.parity, f"max_{name}")
            if limit is not None and not metrics[name] <= limit:
                raise RuntimeError(
                    f"policy.generation.parity.max_{name}={limit:g}: step {self._step + 1} has {metrics[name]:.4g}, so "
                    f"the engine did not sample what the trainer computes. The step was not recorded. Try "
                    f"policy.generation.lora_sync=adapter or policy.precision=float32; tools/parity.py shows where the "
                    f"difference comes from."
                )

    def _batch(self, groups: Sequence[RolloutGroup], held: Sequence[HeldGroup], metrics: dict[str, float]) -> Batch:
        """The groups, of which the held ones come first, with everything that the loss needs."""
        parts, config = self.parts, self._config
        with self._watch.measure("advantage_calculation"):
            completions = [completion for group in groups for completion in group.completions]
            rewards = shaped_rewards(
                rewards_of(groups),
                config,
                completion_lengths=torch.tensor([len(completion.token_ids) for completion in completions]),
                is_truncated=torch.tensor([completion.finish_reason == "length" for completion in completions]),
            )
            advantages = advantages_from_config(rewards, group_index(groups), config)
        with self._watch.measure("data_processing"):
            batch = collate_rollouts(groups, advantages, overlong_filtering=config.overlong_filtering)
        with self._watch.measure("policy_and_reference_logprobs"):
            parts.console.stage("logprobs")
            if parts.loss.needs_reference:
                batch = replace(batch, reference_logprobs=parts.policy.reference_logprobs(batch))
            if held or (parts.loss.needs_old_logprobs and len(self._slices(batch)) > 1):
                batch = replace(batch, old_logprobs=parts.policy.logprobs(batch))
                batch = with_held_logprobs(batch, held)
        parts.console.stage("training")
        metrics |= {
            "advantages/mean": float(advantages.mean()),
            "advantages/min": float(advantages.min()),
            "advantages/max": float(advantages.max()),
        }
        return batch

    def _slices(self, batch: Batch) -> list[Batch]:
        return optimizer_slices(batch, self.parts.config.policy.train_global_batch_size)

    def _teaches(self, group: RolloutGroup) -> bool:
        rewards = rewards_of([group])
        return bool(keep_groups(rewards, torch.zeros(len(rewards), dtype=torch.int64)).any())

    def _check_versions(self, groups: Sequence[RolloutGroup]) -> None:
        """A rollout counts only if every token came from the weights that were just served."""
        for group in groups:
            for completion in group.completions:
                stale = {version for _, version in completion.versions} - {self._served_version}
                if stale:
                    raise RuntimeError(
                        f"policy.generation.backend={self._generation_config.backend!r}: a completion of prompt "
                        f"{group.prompt.index} came from weights version {sorted(stale)}, but version "
                        f"{self._served_version} was to be sampled. The rollout was not used."
                    )

    @property
    def _generation_config(self) -> GenerationConfig:
        generation = self.parts.config.policy.generation
        assert generation is not None, "checked by GrpoMaster"
        return generation


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


def _receipt_metrics(receipt: SyncReceipt) -> dict[str, float]:
    """What the last sync moved, and what it took to prove it."""
    metrics = {"sync_bytes": float(receipt.num_bytes), "timing/sync_proof": receipt.proof_seconds}
    return metrics if receipt.verdict is None else metrics | {"sync_confirmed": float(receipt.verdict == "confirmed")}


def _samples(groups: Sequence[RolloutGroup]) -> list[RolloutSample]:
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
