"""Direct preference optimization: pairs -> batch -> reference -> step.

Left out: what the loss is (preference_loss.py), how answers become tokens (data/preferences.py), when a run
validates, saves and ends (loop.py). A pair is two rows of a batch, chosen first, and a group: its prompt is computed
once.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nemo_rl_lora.algorithms.loop import StepDone, Validated, mean_outputs, tokens_by_source, validation_spans
from nemo_rl_lora.algorithms.losses import count_denominators, loss_inputs
from nemo_rl_lora.algorithms.preference_loss import PreferenceLoss, pair_rewards
from nemo_rl_lora.algorithms.reference_cache import ReferenceCache
from nemo_rl_lora.config.dpo import DpoConfig
from nemo_rl_lora.console import TrainingConsole
from nemo_rl_lora.data.loader import RowLoader
from nemo_rl_lora.data.preferences import PreferenceSet
from nemo_rl_lora.metrics import Stopwatch
from nemo_rl_lora.policy.protocol import Policy
from nemo_rl_lora.types import Batch, PreferencePair

REFERENCE_FILE = "reference_logprobs.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class DpoParts:
    """What the algorithm works with, put together by build/."""

    config: DpoConfig
    policy: Policy
    loader: RowLoader[PreferencePair]
    validation: Sequence[PreferenceSet]
    loss: PreferenceLoss
    console: TrainingConsole


class DpoWork:
    """A step and a validation of DPO; keeps the reference's logprobs of every pair it has seen."""

    def __init__(self, parts: DpoParts) -> None:
        self.parts = parts
        self._reference = ReferenceCache()
        self._validation_reference = ReferenceCache()  # held-out pairs have indices of their own

    def train(self, step: int, watch: Stopwatch) -> StepDone:
        """One optimizer step on the next pairs."""
        parts = self.parts
        with watch.measure("data_processing"):
            pairs = next(parts.loader)
            batch = collate_pairs(pairs)
        parts.console.stage("reference")
        with watch.measure("policy_and_reference_logprobs"):
            batch = self._with_reference(pairs, batch, self._reference)
        parts.console.stage("training")
        with watch.measure("policy_training"):
            output = parts.policy.train_step(batch, parts.loss)
        metrics = mean_outputs([output]) | {
            "num_valid_samples": float(len(pairs)),
            "global_valid_toks": float(batch.denominators.num_loss_tokens),
            "global_valid_seqs": float(batch.denominators.num_sequences),
        }
        lengths = batch.sequence_length.view(-1, 2).sum(dim=1).tolist()
        by_source = tokens_by_source((pair.source, length) for pair, length in zip(pairs, lengths, strict=True))
        counts = {"num_tokens": float(sum(lengths)), "num_pairs": float(len(pairs)), **by_source}
        token_ids = (ids for pair in pairs for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids))
        return StepDone(metrics=metrics | by_source, counts=counts, token_ids=token_ids)

    def validate(self, step: int, watch: Stopwatch) -> Validated | None:
        """Loss, accuracy and rewards over the validation pairs; accuracy by source too where there are several."""
        if not self.parts.validation:
            return None
        total = Counter[str]()
        outcomes: list[tuple[PreferencePair, float]] = []
        num_pairs = 0
        for rows in self.parts.validation:
            for span in validation_spans(len(rows), self.parts.config):
                pairs = rows[span]
                num_pairs += len(pairs)
                metrics, hits = self._measure(pairs)
                total.update({name: value * len(pairs) for name, value in metrics.items()})
                outcomes += zip(pairs, hits, strict=bool(hits))
        metrics = {name: value / num_pairs for name, value in total.items()}
        metrics |= {"num_valid_samples": float(num_pairs), "validation-default_loss": metrics["loss"]}
        return Validated(metrics=metrics | (accuracies(outcomes) if outcomes else {}))

    def save(self, directory: Path) -> None:
        """The reference's logprobs."""
        self._reference.save(directory / REFERENCE_FILE)
        self._validation_reference.save(directory / f"validation_{REFERENCE_FILE}")

    def load(self, directory: Path) -> None:
        """Read them back."""
        self._reference.load(directory / REFERENCE_FILE)
        self._validation_reference.load(directory / f"validation_{REFERENCE_FILE}")

    def _with_reference(self, pairs: Sequence[PreferencePair], batch: Batch, cache: ReferenceCache) -> Batch:
        if not self.parts.loss.needs_reference:
            return batch
        return replace(batch, reference_logprobs=cache.of(pairs, batch, self.parts.policy))

    @torch.no_grad()
    def _measure(self, pairs: Sequence[PreferencePair]) -> tuple[dict[str, float], list[float]]:
        """Loss and metrics of these pairs, and whether each is told right; nothing of that without a reference."""
        batch = self._with_reference(pairs, collate_pairs(pairs), self._validation_reference)
        logprobs = self.parts.policy.logprobs(batch)
        loss, metrics = self.parts.loss(loss_inputs(batch, logprobs))
        hits: list[float] = []
        if batch.reference_logprobs is not None:
            rewards = pair_rewards(logprobs, batch.reference_logprobs, batch.loss_mask, self.parts.config)
            hits = rewards.accuracy.tolist()
        return {"loss": float(loss)} | {name: float(value) for name, value in metrics.items()}, hits


def accuracies(outcomes: Sequence[tuple[PreferencePair, float]]) -> dict[str, float]:
    """Mean of what each pair came to (1: told right), with its 95 % interval; by source too where there are several.

    The interval is normal, from the spread of whole clusters: the pairs of one question are not independent
    (cluster-robust variance, Liang and Zeger 1986).
    """
    metrics: dict[str, float] = {}
    sources = sorted({pair.source for pair, _ in outcomes})
    for suffix, source in [("", None), *((f"/{s}", s) for s in sources if len(sources) > 1)]:
        own = [(pair.cluster, hit) for pair, hit in outcomes if source in (None, pair.source)]
        mean = sum(hit for _, hit in own) / len(own)
        residuals: defaultdict[str, float] = defaultdict(float)
        for cluster, hit in own:
            residuals[cluster] += hit - mean
        spread = 1.96 * math.sqrt(sum(residual**2 for residual in residuals.values())) / len(own)
        metrics |= {
            f"accuracy{suffix}": mean,
            f"accuracy_low{suffix}": max(mean - spread, 0.0),
            f"accuracy_high{suffix}": min(mean + spread, 1.0),
        }
    return metrics


def collate_pairs(pairs: Sequence[PreferencePair]) -> Batch:
    """Two rows per pair, the chosen answer first; the loss is on the answers. Counts the global denominators, once."""
    rows = [(pair.prompt_ids, answer) for pair in pairs for answer in (pair.chosen_ids, pair.rejected_ids)]
    prompt_length = torch.tensor([len(prompt) for prompt, _ in rows])
    sequence_length = prompt_length + torch.tensor([len(answer) for _, answer in rows])
    token_ids = torch.zeros(len(rows), int(sequence_length.max()), dtype=torch.int64)
    for row, (prompt, answer) in enumerate(rows):
        token_ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
    columns = torch.arange(token_ids.shape[1])[None]
    loss_mask = (columns >= prompt_length[:, None]) & (columns < sequence_length[:, None])
    return Batch(
        token_ids=token_ids,
        loss_mask=loss_mask,
        sequence_length=sequence_length,
        prompt_length=prompt_length,
        group_index=torch.arange(len(pairs)).repeat_interleave(2),
        denominators=count_denominators(loss_mask),
        whole_groups=True,
    )
