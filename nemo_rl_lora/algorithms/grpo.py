"""Group relative policy optimization: prompts -> groups -> batch -> step. Knows no backend and no engine.

Left out: which groups a step gets (rollout.py), how a model is trained or sampled (Policy, Generation), what a loss is
(algorithms/losses/policy.py), when a run validates, saves and ends (loop.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nemo_rl_lora.algorithms.ahead import SourceAhead
from nemo_rl_lora.algorithms.algorithm import Algorithm, Run, StepDone, Validated, mean_outputs
from nemo_rl_lora.algorithms.batch import (
    collate_rollouts,
    longest_rows,
    optimizer_slices,
    rewards_of,
    rollout_advantages,
)
from nemo_rl_lora.algorithms.losses.policy import make_policy_loss
from nemo_rl_lora.algorithms.rollout import (
    RolloutSource,
    SynchronousSource,
    refuse_disparity,
    samples_of,
    validation_params,
)
from nemo_rl_lora.algorithms.served import ServedPolicy
from nemo_rl_lora.algorithms.surplus_groups import SurplusGroup, with_old_logprobs
from nemo_rl_lora.config.grpo import GrpoConfig
from nemo_rl_lora.config.master import GrpoMaster
from nemo_rl_lora.data.checked_rows import data_digests
from nemo_rl_lora.data.loader import RowLoader
from nemo_rl_lora.data.prompts import PromptSet, load_prompt_sets, longest_prompt
from nemo_rl_lora.environments.protocol import Environment
from nemo_rl_lora.environments.registry import check_prompts, code_digests, make_environments
from nemo_rl_lora.evaluation.ask import ask, group_requests, total_counts
from nemo_rl_lora.evaluation.estimates import pass_at_k
from nemo_rl_lora.generation.protocol import Generation
from nemo_rl_lora.run.console import KeyMetric
from nemo_rl_lora.run.metrics import Stopwatch
from nemo_rl_lora.types import Batch, Prompt, RolloutGroup, StepOutput, SyncReceipt


class Grpo(Algorithm[GrpoMaster]):
    """GRPO."""

    key_metrics = (
        KeyMetric(name="reward", higher_is_better=True),
        KeyMetric(name="accuracy", split="validation", higher_is_better=True),
        KeyMetric(name="loss"),
        KeyMetric(name="gen_kl_error"),
        KeyMetric(name="mean_completion_length", label="length"),
        KeyMetric(name="generation_tokens_per_second", label="sampled tokens/s"),
        KeyMetric(name="mfu", label="MFU"),
    )
    source: RolloutSource  # from `attach` on
    _served: ServedPolicy
    _train: PromptSet  # from `load_data` on
    _validation: PromptSet | None
    environments: Mapping[str, Environment]

    def __init__(self, config: GrpoMaster) -> None:
        super().__init__(config)
        self.loss = make_policy_loss(config.loss_fn)
        self.validation_params = validation_params(config)

    @property
    def loop(self) -> GrpoConfig:
        return self.config.grpo

    @property
    def logprob_rows(self) -> int:
        return self.config.policy.logprob_rows

    @property
    def temperature(self) -> float:
        return self.config.generation.temperature

    def load_data(self, tokenizer: Any) -> RowLoader[Prompt]:
        """Prompts, and the environments that they name, which have found every row complete.

        With dynamic sampling a draw takes `batch_multiplier` times the prompts of a step.
        """
        config = self.config
        self._train, self._validation = load_prompt_sets(config, tokenizer, seed=config.grpo.seed)
        loader = RowLoader(
            [self._train],
            math.ceil(config.grpo.num_prompts_per_step * config.grpo.batch_multiplier),
            key="grpo.num_prompts_per_step",
            seed=config.grpo.seed,
            shuffle=config.data.shuffle,
            num_epochs=config.grpo.max_num_epochs,
        )
        sets = [prompts for prompts in (self._train, self._validation) if prompts is not None]
        names = [name for prompts in sets for name in prompts.environment_names]
        self.environments = make_environments(names, config.env)
        for prompts in sets:
            check_prompts(self.environments, prompts.unencoded())
        return loader

    def tokens_of(self, row: Prompt) -> tuple[int, int]:
        """Of a group; with dynamic sampling of one that is trained on, as many of the loader's as there are."""
        loop, room = self.loop, self.config.policy.max_total_sequence_length - len(row.token_ids)
        completions = loop.num_generations_per_prompt / loop.batch_multiplier
        longest = min(self.config.generation.max_new_tokens, room)
        return int(completions * (len(row.token_ids) + 1)), int(completions * (len(row.token_ids) + longest))

    def longest_batch(self, vocabulary: int) -> Batch:
        """Of groups with the longest completions, and the longest prompts that leave room for them."""
        config, limit = self.config, self.config.policy.max_total_sequence_length
        num_new = min(config.generation.max_new_tokens, limit - 1)
        num_prompt_tokens = min(longest_prompt(config), limit - num_new)
        return longest_rows(
            torch.arange(config.policy.train_global_batch_size) // self.loop.num_generations_per_prompt,
            num_prompt_tokens=num_prompt_tokens,
            num_tokens=num_prompt_tokens + num_new,
            vocabulary=vocabulary,
        )

    def data_digests(self) -> dict[str, str]:
        return data_digests(self._train.sets, [] if self._validation is None else self._validation.sets)

    def reward_digests(self) -> dict[str, str]:
        return code_digests(self.environments)

    def describe_data(self) -> str:
        num_validation = 0 if self._validation is None else len(self._validation)
        return (
            f"{len(self._train)} training prompts, {num_validation} for validation, scored by "
            f"{', '.join(self._train.environment_names)}"
        )

    @property
    def validation_metrics(self) -> tuple[str, ...]:
        if self._validation is None:
            return ()
        return "accuracy", "avg_length", f"pass@{self.loop.val_num_generations_per_prompt}"

    def attach(self, run: Run) -> None:
        super().attach(run)
        assert run.served is not None, "GRPO samples"
        self._served = run.served
        source = SourceAhead if self.loop.num_steps_ahead else SynchronousSource
        self.source = source(self.config, run, run.served.generation, self.environments, self._train)

    def detach(self) -> None:
        self.source.close()

    def train(self, step: int, watch: Stopwatch) -> StepDone:
        """Sample groups, score them, and take the optimizer steps of their batch, which have one learning rate: NeMo
        RL's schedulers count rollouts."""
        receipt = self._sync(step, watch)
        rollout = self.source.next(step, receipt.version, watch)
        self.has_moved = self.loop.keep_surplus_groups  # which are those of the next step now
        with watch.measure("advantage_calculation"):
            advantages = rollout_advantages(rollout.groups, self.loop)
        with watch.measure("data_processing"):
            batch = collate_rollouts(rollout.groups, advantages, overlong_filtering=self.loop.overlong_filtering)
        batch = replace(self._with_logprobs(batch, rollout.groups, watch), lr=self.run.lr_at(step))
        self.run.console.stage("training")
        with watch.measure("policy_training"):
            outputs = [self._optimizer_step(part, step) for part in self._slices(batch)]
        self.run.log.log_rollouts(step + 1, samples_of(rollout.groups))
        metrics = {
            **rollout.metrics,
            "advantages/mean": float(advantages.mean()),
            "advantages/min": float(advantages.min()),
            "advantages/max": float(advantages.max()),
            **mean_outputs(outputs),
            **_receipt_metrics(receipt),
            "mean_prompt_length": float(batch.prompt_length.float().mean()),
            "global_valid_toks": float(batch.denominators.num_loss_tokens),
            "global_valid_seqs": float(batch.denominators.num_sequences),
            "generation_tokens_per_second": rollout.num_tokens / max(rollout.generation_seconds, 1e-9),
        }
        counts = {"num_tokens": float(batch.sequence_length.sum()), "num_completions": float(len(batch.token_ids))}
        return StepDone(metrics=metrics, counts=counts, token_ids=rollout.token_ids, outputs=outputs)

    def validate(self, step: int, watch: Stopwatch) -> Validated | None:
        """Sample the validation prompts and score them."""
        config, prompts = self.loop, self._validation
        if prompts is None or 0 < step < config.val_start_at:
            return None
        generation = self.serve(step, watch)
        num_prompts = min(len(prompts), config.max_val_samples or len(prompts))
        groups: list[RolloutGroup] = []
        counts: list[Mapping[str, float]] = []
        for begin in range(0, num_prompts, config.val_batch_size):
            batch = prompts[begin : min(begin + config.val_batch_size, num_prompts)]
            requests = group_requests(batch, self.validation_params, f"{begin}")
            more, counted = ask(generation, requests, self.environments, Stopwatch())
            groups += more
            counts.append(counted)
        lengths = [len(completion.token_ids) for group in groups for completion in group.completions]
        k = config.val_num_generations_per_prompt
        metrics = {
            **total_counts(counts),
            "accuracy": float(rewards_of(groups).mean()),
            "avg_length": sum(lengths) / len(lengths),
            f"pass@{k}": sum(pass_at_k(group.rewards, k) for group in groups) / len(groups),
        }
        return Validated(metrics=metrics, samples=samples_of(groups), reached=self._reached(metrics))

    def save(self, directory: Path, step: int, *, urgent: bool) -> None:
        self.source.save(directory, step, urgent=urgent)

    def load(self, directory: Path) -> None:
        self.source.load(directory)

    def close(self) -> None:
        """End the environments."""
        for environment in self.environments.values():
            environment.close()

    def serve(self, step: int, watch: Stopwatch) -> Generation:
        """Wait for what is sampled ahead, too."""
        self._sync(step, watch)
        self.source.settle(watch, for_sync=False)
        return self._served.generation

    def _sync(self, step: int, watch: Stopwatch) -> SyncReceipt:
        """Give the engine the weights of this step, unless it already has them; its receipt, of version `step`."""
        if (current := self._served.receipt_of(step)) is not None:
            return current
        self.run.console.stage("syncing weights")
        self.source.settle(watch, for_sync=True)
        with watch.measure("weight_sync"):
            return self._served.sync(step)

    def _with_logprobs(self, batch: Batch, groups: Sequence[RolloutGroup], watch: Stopwatch) -> Batch:
        """The batch of these groups with the reference's and the old logprobs, where the loss needs them."""
        policy, loss = self.run.policy, self.loss
        with watch.measure("policy_and_reference_logprobs"):
            self.run.console.stage("logprobs")
            if loss.needs_reference:
                batch = replace(batch, reference_logprobs=policy.reference_logprobs(batch))
            is_older = any(isinstance(group, SurplusGroup) for group in groups)
            if is_older or (loss.needs_old_logprobs and len(self._slices(batch)) > 1):
                batch = with_old_logprobs(batch, policy.logprobs(batch), groups)
        return batch

    def _slices(self, batch: Batch) -> list[Batch]:
        return optimizer_slices(batch, self.config.policy.train_global_batch_size)

    def _optimizer_step(self, part: Batch, step: int) -> StepOutput:
        output = self.optimizer_step(part, self.loss)
        refuse_disparity(output.metrics, self.config.generation.parity, step)
        return output

    def _reached(self, metrics: Mapping[str, float]) -> str | None:
        name, threshold = self.loop.stop_at_validation_metric, self.loop.stop_at_validation_threshold
        if name is None or threshold is None:
            return None
        return f"{name} reached its threshold" if metrics[name] >= threshold else None


def _receipt_metrics(receipt: SyncReceipt) -> dict[str, float]:
    """What the last sync moved, and what it took to prove it."""
    metrics = {"sync_bytes": float(receipt.num_bytes), "timing/sync_proof": receipt.proof_seconds}
    return metrics if receipt.verdict is None else metrics | {"sync_confirmed": float(receipt.verdict == "confirmed")}
