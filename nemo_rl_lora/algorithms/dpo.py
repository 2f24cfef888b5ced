"""Direct preference optimization: pairs -> batch -> reference -> step.

Left out: what the loss is (losses/preference.py), how answers become tokens (data/preferences.py), when a run
validates, saves and ends (loop.py). A pair is two rows of a batch, chosen first, and a group: its prompt is computed
once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nemo_rl_lora.algorithms.algorithm import StepDone, Validated, mean_outputs
from nemo_rl_lora.algorithms.batch import collate_pairs, longest_rows
from nemo_rl_lora.algorithms.losses.policy import loss_inputs
from nemo_rl_lora.algorithms.losses.preference import PreferenceLoss, pair_rewards
from nemo_rl_lora.algorithms.reference_cache import ReferenceCache
from nemo_rl_lora.algorithms.tuning import Tuning, tokens_by_source, validation_spans
from nemo_rl_lora.config.dpo import DpoConfig
from nemo_rl_lora.config.master import DpoMaster
from nemo_rl_lora.data.preferences import PreferenceSet, load_preference_sets
from nemo_rl_lora.data.row_sets import longest_row
from nemo_rl_lora.evaluation.estimates import estimate
from nemo_rl_lora.run.console import KeyMetric
from nemo_rl_lora.run.metrics import Stopwatch
from nemo_rl_lora.types import Batch, PreferencePair

REFERENCE_FILE = "reference_logprobs.safetensors"


class Dpo(Tuning[DpoMaster, PreferencePair]):
    """Direct preference optimization; keeps the reference's logprobs of every pair it has seen."""

    noun = "pairs"
    key_metrics = (
        KeyMetric(name="accuracy", higher_is_better=True),
        KeyMetric(name="accuracy", split="validation", higher_is_better=True),
        KeyMetric(name="loss", higher_is_better=False),
        KeyMetric(name="loss", split="validation", higher_is_better=False),
        KeyMetric(name="rewards_margin_mean", label="margin"),
        KeyMetric(name="tokens_per_second", label="tokens/s"),
        KeyMetric(name="mfu", label="MFU"),
    )

    def __init__(self, config: DpoMaster) -> None:
        super().__init__(config)
        self.loss = PreferenceLoss(config=config.dpo)
        self._reference = ReferenceCache()

    @property
    def loop(self) -> DpoConfig:
        return self.config.dpo

    def load_sets(self, tokenizer: Any) -> tuple[list[PreferenceSet], list[PreferenceSet]]:
        """Pairs, tokenised."""
        return load_preference_sets(self.config, tokenizer, seed=self.loop.seed)

    def tokens_of(self, row: PreferencePair) -> tuple[int, int]:
        number = 2 * len(row.prompt_ids) + len(row.chosen_ids) + len(row.rejected_ids)
        return number, number

    def longest_batch(self, vocabulary: int) -> Batch:
        """Of pairs that share one token of a prompt."""
        pairs = torch.arange(self.config.policy.train_global_batch_size).repeat_interleave(2)
        longest = longest_row(self.config)
        return longest_rows(pairs, num_prompt_tokens=1, num_tokens=longest, vocabulary=vocabulary, whole_groups=True)

    @property
    def validation_metrics(self) -> tuple[str, ...]:
        if not self.validation_sets:
            return ()
        intervals = ("accuracy_low", "accuracy_high") if self.loss.needs_reference else ()
        return ("loss", "validation-default_loss", "num_valid_samples", *self.loss.metrics, *intervals)

    def train(self, step: int, watch: Stopwatch) -> StepDone:
        """One optimizer step on the next pairs."""
        run = self.run
        with watch.measure("data_processing"):
            pairs = next(run.loader)
            batch = collate_pairs(pairs)
        run.console.stage("reference")
        with watch.measure("policy_and_reference_logprobs"):
            batch = self._with_reference(pairs, batch)
        run.console.stage("training")
        with watch.measure("policy_training"):
            output = self.optimizer_step(batch, self.loss)
        metrics = mean_outputs([output]) | {
            "num_valid_samples": float(len(pairs)),
            "global_valid_toks": float(batch.denominators.num_loss_tokens),
            "global_valid_seqs": float(batch.denominators.num_sequences),
        }
        lengths = batch.sequence_length.view(-1, 2).sum(dim=1).tolist()
        by_source = tokens_by_source((pair.source, length) for pair, length in zip(pairs, lengths, strict=True))
        counts = {"num_tokens": float(sum(lengths)), "num_pairs": float(len(pairs)), **by_source}
        token_ids = (ids for pair in pairs for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids))
        return StepDone(metrics=metrics | by_source, counts=counts, token_ids=token_ids, outputs=[output])

    def validate(self, step: int, watch: Stopwatch) -> Validated | None:
        """Loss, accuracy and rewards over the validation pairs; accuracy by source too where there are several."""
        if not self.validation_sets:
            return None
        total = Counter[str]()
        outcomes: list[tuple[PreferencePair, float]] = []
        num_pairs = 0
        for rows in self.validation_sets:
            for span in validation_spans(len(rows), self.loop):
                pairs = rows[span]
                num_pairs += len(pairs)
                metrics, hits = self._measure(pairs)
                total.update({name: value * len(pairs) for name, value in metrics.items()})
                outcomes += zip(pairs, hits, strict=bool(hits))
        metrics = {name: value / num_pairs for name, value in total.items()}
        metrics |= {"num_valid_samples": float(num_pairs), "validation-default_loss": metrics["loss"]}
        return Validated(metrics=metrics | (accuracies(outcomes) if outcomes else {}))

    def save(self, directory: Path, step: int, *, urgent: bool) -> None:
        """The reference's logprobs."""
        self._reference.save(directory / REFERENCE_FILE)

    def load(self, directory: Path) -> None:
        """Read them back."""
        self._reference.load(directory / REFERENCE_FILE)

    def _with_reference(self, pairs: Sequence[PreferencePair], batch: Batch) -> Batch:
        if not self.loss.needs_reference:
            return batch
        return replace(batch, reference_logprobs=self._reference.of(pairs, batch, self.run.policy))

    @torch.no_grad()
    def _measure(self, pairs: Sequence[PreferencePair]) -> tuple[dict[str, float], list[float]]:
        """Loss and metrics of these pairs, and whether each is told right; nothing of that without a reference."""
        batch = self._with_reference(pairs, collate_pairs(pairs))
        logprobs = self.run.policy.logprobs(batch)
        loss, metrics = self.loss(loss_inputs(batch, logprobs))
        hits: list[float] = []
        if batch.reference_logprobs is not None:
            rewards = pair_rewards(logprobs, batch.reference_logprobs, batch.loss_mask, self.loop)
            hits = rewards.accuracy.tolist()
        return {"loss": float(loss)} | {name: float(value) for name, value in metrics.items()}, hits


def accuracies(outcomes: Sequence[tuple[PreferencePair, float]]) -> dict[str, float]:
    """Mean of what each pair came to (1: told right), with its 95 % interval; by source too where there are several.

    The pairs of one question are not independent: the interval's spread is that of whole questions.
    """
    metrics: dict[str, float] = {}
    sources = sorted({pair.source for pair, _ in outcomes})
    for suffix, source in [("", None), *((f"/{s}", s) for s in sources if len(sources) > 1)]:
        own = [(pair.cluster, hit) for pair, hit in outcomes if source in (None, pair.source)]
        accuracy = estimate([hit for _, hit in own], clusters=[cluster for cluster, _ in own])
        half_width = accuracy.half_width or 0.0
        metrics |= {
            f"accuracy{suffix}": accuracy.mean,
            f"accuracy_low{suffix}": max(accuracy.mean - half_width, 0.0),
            f"accuracy_high{suffix}": min(accuracy.mean + half_width, 1.0),
        }
    return metrics
