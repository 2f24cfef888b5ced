"""Group relative policy optimization: prompts -> groups -> batch -> step. One loop; knows no backend and no engine.

Left out: how a model is trained or sampled (Policy, Generation), what a loss is (losses.py), where files go
(Checkpointer, RunLog). What is drawn follows from (seed, step), so a resumed run is the run that was interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nemo_rl_lora.algorithms.advantages import advantages_from_config, keep_groups, shaped_rewards
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
from nemo_rl_lora.checkpoint import Checkpointer, ResumePoint, SaveDeadline, SaveReason, TrainingInfo
from nemo_rl_lora.config.master import GrpoMaster
from nemo_rl_lora.console import TrainingConsole
from nemo_rl_lora.data.prompts import PromptLoader, PromptSet
from nemo_rl_lora.environments.protocol import Environment
from nemo_rl_lora.generation.protocol import Generation, generate
from nemo_rl_lora.metrics import RolloutSample, RunLog, Stopwatch
from nemo_rl_lora.policy.protocol import Policy
from nemo_rl_lora.run_control import StopRequest
from nemo_rl_lora.types import Batch, RolloutGroup, StepOutput


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpoParts:
    """What the loop works with, put together by build.py."""

    config: GrpoMaster
    policy: Policy
    generation: Generation
    environments: Mapping[str, Environment]
    loader: PromptLoader
    validation: PromptSet | None
    rollout_params: RolloutParams
    validation_params: RolloutParams
    loss: PolicyLoss
    num_steps: int
    checkpointer: Checkpointer
    log: RunLog
    console: TrainingConsole
    model_source: str
    tokenizer: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpoResult:
    """How the loop ended. `checkpoint` is the newest one that it wrote."""

    outcome: str
    step: int
    checkpoint: Path | None


class GrpoTrainer:
    """The loop's state: the step, the counters, the newest metrics and the weights that the engine serves."""

    def __init__(self, parts: GrpoParts, resume: ResumePoint | None) -> None:
        self._parts = parts
        self._config = parts.config.grpo
        self._step = 0
        self._served_version = -1
        self._counters: dict[str, float] = {"num_tokens": 0.0, "num_completions": 0.0}
        self._newest: dict[str, float | None] = {}
        self._watch = Stopwatch()
        self._checkpoint: Path | None = None
        self._deadline = SaveDeadline(parts.config.checkpointing.must_save_by_seconds)
        self._longest_seconds = 0.0  # of a step with the validation and the save that came with it
        self._validated_step = -1
        if resume is not None:
            self._continue_from(resume)
        self._position = parts.loader.state()  # after the last complete step
        self._num_finished_epochs = self._count_finished_epochs()

    def train(self, stop: StopRequest) -> GrpoResult:
        """Run to the end of the data or of max_num_steps, or until asked to stop."""
        outcome = "completed"
        if self._step == 0 and self._config.val_at_start and self._validate():
            return self._result(self._threshold_outcome)
        while self._step < self._parts.num_steps:
            started = time.monotonic()
            try:
                groups, batch, rollout_metrics = self._gather()
            except StopIteration:
                outcome = f"completed: no prompts are left after step {self._step}"
                break
            with self._watch.measure("policy_training"):
                outputs = [self._parts.policy.train_step(part, self._parts.loss) for part in self._slices(batch)]
            self._step += 1
            self._position = self._parts.loader.state()
            self._record(groups, batch, rollout_metrics, outputs)
            reached = self._validate() if self._validation_is_due() else False
            reason = self._why_save(stop, reached, time.monotonic() - started)
            if reason is not None:
                self._save(reason)
            self._longest_seconds = max(self._longest_seconds, time.monotonic() - started)
            if stop.requested:
                return self._result(f"stopped by {stop.signal_name}")
            if reached:
                return self._result(self._threshold_outcome)
            if reason == "deadline":
                return self._result("stopped to be in time for checkpointing.checkpoint_must_save_by")
        if self._config.val_at_end and self._validated_step != self._step:
            self._validate()
        if self._parts.config.checkpointing.enabled and not self._is_saved():
            self._save("end")
        return self._result(outcome)

    def _gather(self) -> tuple[list[RolloutGroup], Batch, dict[str, float]]:
        """The groups that this step trains on, as a batch with everything that the loss needs."""
        parts, config = self._parts, self._config
        self._sync()
        kept: list[RolloutGroup] = []
        sampled: list[RolloutGroup] = []
        metrics: dict[str, float] = {}
        for attempt in range(config.dynamic_sampling_max_gen_batches if config.use_dynamic_sampling else 1):
            parts.console.stage("generating")
            prompts = next(parts.loader)
            with self._watch.measure("generation"):
                requests = group_requests(prompts, parts.rollout_params, f"{self._step}.{attempt}")
                completed = generate(parts.generation, requests)
            with self._watch.measure("reward_calculation"):
                groups, scores = score(completed, parts.environments)
            self._check_versions(groups)
            sampled += groups
            metrics = {name: metrics.get(name, 0.0) + value for name, value in scores.items()}
            kept += [group for group in groups if self._teaches(group)] if config.use_dynamic_sampling else groups
            if len(kept) >= config.num_prompts_per_step:
                break
        else:
            raise ValueError(
                f"grpo.dynamic_sampling_max_gen_batches={config.dynamic_sampling_max_gen_batches}: so many rollouts "
                f"gave {len(kept)} groups with unequal rewards of {config.num_prompts_per_step} needed at step "
                f"{self._step + 1}. Use prompts of fitting difficulty, or raise it."
            )
        if config.use_dynamic_sampling:
            metrics["num_gen_batches"] = attempt + 1.0
            metrics["num_discarded_groups"] = float(len(sampled) - config.num_prompts_per_step)
        kept = kept[: config.num_prompts_per_step]
        metrics |= _sampling_metrics(sampled)
        metrics["reward"] = float(rewards_of(sampled).mean())
        metrics["filtered_reward"] = float(rewards_of(kept).mean())
        return kept, self._batch(kept, metrics), metrics

    def _sync(self) -> None:
        """Give the engine the weights as they are now, unless it already has them."""
        if self._served_version == self._step:
            return
        self._parts.console.stage("syncing weights")
        mode = self._generation_config.lora_sync
        with self._watch.measure("weight_sync"):
            ref = self._parts.policy.publish(self._step, mode)
            receipt = self._parts.generation.sync_weights(ref)
        if (receipt.version, receipt.digest) != (ref.version, ref.digest):
            raise RuntimeError(
                f"policy.generation.lora_sync={mode!r}: the engine confirmed version {receipt.version} "
                f"({receipt.digest[:12]}), but version {ref.version} ({ref.digest[:12]}) was sent. "
                "No rollout was used."
            )
        self._served_version = self._step

    def _batch(self, groups: Sequence[RolloutGroup], metrics: dict[str, float]) -> Batch:
        parts, config = self._parts, self._config
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
            if parts.loss.needs_old_logprobs and len(self._slices(batch)) > 1:
                batch = replace(batch, old_logprobs=parts.policy.logprobs(batch))
        parts.console.stage("training")
        metrics |= {
            "advantages/mean": float(advantages.mean()),
            "advantages/min": float(advantages.min()),
            "advantages/max": float(advantages.max()),
        }
        return batch

    def _slices(self, batch: Batch) -> list[Batch]:
        return optimizer_slices(batch, self._parts.config.policy.train_global_batch_size)

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

    def _record(
        self,
        groups: Sequence[RolloutGroup],
        batch: Batch,
        rollout_metrics: Mapping[str, float],
        outputs: Sequence[StepOutput],
    ) -> None:
        """Write the metrics of the step."""
        self._newest = {}  # a checkpoint is ranked by what was measured at its own step
        num_tokens = float(batch.sequence_length.sum())
        self._counters["num_tokens"] += num_tokens
        self._counters["num_completions"] += len(batch.token_ids)
        times = self._watch.take()
        seconds = sum(times.values())
        times["timing/total_step_time"] = seconds
        metrics = {
            **dict(rollout_metrics),
            **_mean_outputs(outputs),
            "mean_prompt_length": float(batch.prompt_length.float().mean()),
            "total_num_tokens": num_tokens,
            "global_valid_toks": float(batch.denominators.num_loss_tokens),
            "global_valid_seqs": float(batch.denominators.num_sequences),
            "generation_tokens_per_second": rollout_metrics["num_sampled_tokens"]
            / max(times.get("timing/generation", 0.0), 1e-9),
            **times,
        }
        parts = self._parts
        self._remember("train", metrics)
        parts.log.log(self._step, "train", metrics)
        parts.log.log_rollouts(self._step, _samples(groups))
        parts.console.step(self._step, metrics, seconds=seconds)

    def _validate(self) -> bool:
        """Sample the validation prompts; whether the metric that stops the run has been reached."""
        parts, config = self._parts, self._config
        if parts.validation is None:
            return False
        self._validated_step = self._step
        self._sync()
        parts.console.stage("validating")
        num_prompts = min(len(parts.validation), config.max_val_samples or len(parts.validation))
        groups: list[RolloutGroup] = []
        metrics: dict[str, float] = {}
        watch = Stopwatch()
        with watch.measure("total_validation_time"):
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
            **watch.take(),
        }
        self._remember("val", metrics)
        parts.log.log(self._step, "validation", metrics)
        parts.log.log_rollouts(self._step, _samples(groups), split="validation")
        parts.console.validation(self._step, metrics, seconds=metrics["timing/total_validation_time"])
        parts.console.samples(_samples(groups)[: parts.config.logger.num_val_samples_to_print])
        if config.stop_at_validation_metric is None or config.stop_at_validation_threshold is None:
            return False
        if config.stop_at_validation_metric not in metrics:
            raise ValueError(
                f"grpo.stop_at_validation_metric={config.stop_at_validation_metric!r}: validation has no such metric. "
                f"Choose one of {', '.join(sorted(metrics))}."
            )
        return metrics[config.stop_at_validation_metric] >= config.stop_at_validation_threshold

    def _validation_is_due(self) -> bool:
        config = self._config
        if config.val_at_end and self._step == self._parts.num_steps:
            return True
        return bool(config.val_period) and self._step % config.val_period == 0 and self._step >= config.val_start_at

    def _why_save(self, stop: StopRequest, reached: bool, step_seconds: float) -> SaveReason | None:
        """Whether to save after this step, and why. Counts the epochs that have ended."""
        before, self._num_finished_epochs = self._num_finished_epochs, self._count_finished_epochs()
        finished_epochs = self._num_finished_epochs if self._num_finished_epochs > before else None
        if not self._parts.config.checkpointing.enabled:
            return None
        if stop.requested:
            return "signal"
        if reached:
            return "threshold"
        if self._deadline.is_near(max(step_seconds, self._longest_seconds)):
            return "deadline"
        if self._parts.checkpointer.is_due(self._step, num_finished_epochs=None):
            return "period"
        return "epoch" if self._parts.checkpointer.is_due(self._step, num_finished_epochs=finished_epochs) else None

    def _count_finished_epochs(self) -> int:
        loader = self._parts.loader
        return loader.epoch + loader.is_at_end_of_epoch

    def _is_saved(self) -> bool:
        return self._checkpoint is not None and self._checkpoint.name == f"step_{self._step}"

    def _save(self, reason: SaveReason) -> None:
        parts = self._parts
        parts.console.stage("saving")
        info = TrainingInfo(
            step=self._step,
            phase="grpo",
            epoch=parts.loader.epoch,
            data_position=self._position,
            counters=dict(self._counters),
            metrics=dict(self._newest),
            model_source=parts.model_source,
            reason=reason,
        )
        with self._watch.measure("checkpointing"):
            self._checkpoint = parts.checkpointer.save(info, self._write)

    def _write(self, directory: Path) -> None:
        policy_directory = directory / "policy"
        policy_directory.mkdir()
        self._parts.policy.save(policy_directory)
        self._parts.tokenizer.save_pretrained(policy_directory / "tokenizer")

    def _continue_from(self, resume: ResumePoint) -> None:
        self._parts.policy.load(resume.path / "policy")
        self._parts.loader.from_state(resume.info.data_position)
        self._step = resume.step
        self._checkpoint = resume.path
        self._counters |= resume.info.counters
        self._newest = dict(resume.info.metrics)

    def _remember(self, split: str, metrics: Mapping[str, float]) -> None:
        self._newest |= {f"{split}:{name}": value for name, value in metrics.items()}

    @property
    def _generation_config(self) -> Any:
        return self._parts.config.policy.generation

    @property
    def _threshold_outcome(self) -> str:
        return f"completed: {self._config.stop_at_validation_metric} reached its threshold"

    def _result(self, outcome: str) -> GrpoResult:
        return GrpoResult(outcome=outcome, step=self._step, checkpoint=self._checkpoint)


def _sampling_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Lengths of everything that was sampled, whether it is trained on or not."""
    completions = [completion for group in groups for completion in group.completions]
    num_tokens = float(sum(len(completion.token_ids) for completion in completions))
    return {
        "num_sampled_tokens": num_tokens,
        "mean_completion_length": num_tokens / len(completions),
        "truncation_rate": sum(c.finish_reason == "length" for c in completions) / len(completions),
    }


def _mean_outputs(outputs: Sequence[StepOutput]) -> dict[str, float]:
    """Metrics of a rollout's optimizer steps: means; min and max where a name says so; the last learning rate."""
    metrics: dict[str, float] = {}
    for name in outputs[0].metrics:
        values = [output.metrics[name] for output in outputs]
        reduce = min if name.endswith("_min") else max if name.endswith("_max") else lambda x: sum(x) / len(x)
        metrics[name] = reduce(values)
    num_forward = sum(output.num_forward_tokens for output in outputs)
    return metrics | {
        "loss": sum(output.loss for output in outputs) / len(outputs),
        "grad_norm": sum(output.grad_norm for output in outputs) / len(outputs),
        "lr": outputs[-1].lr,
        "num_forward_tokens": float(num_forward),
        "padding_share": sum(output.num_padding_tokens for output in outputs) / max(num_forward, 1),
    }


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
