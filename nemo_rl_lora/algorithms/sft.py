"""Supervised fine-tuning: conversations -> batch -> step. The loss is on the tokens that their masks name.

Left out: which tokens those are (data/conversations.py), when a run validates, saves and ends (loop.py).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nemo_rl_lora.algorithms.loop import StepDone, Validated, mean_outputs, tokens_by_source, validation_spans
from nemo_rl_lora.algorithms.losses import count_denominators
from nemo_rl_lora.algorithms.sft_loss import SftLoss
from nemo_rl_lora.config.sft import SftConfig
from nemo_rl_lora.console import TrainingConsole
from nemo_rl_lora.data.conversations import ConversationSet
from nemo_rl_lora.data.loader import RowLoader
from nemo_rl_lora.metrics import Stopwatch
from nemo_rl_lora.policy.protocol import Policy
from nemo_rl_lora.types import Batch, Example


@dataclass(frozen=True, slots=True, kw_only=True)
class SftParts:
    """What the algorithm works with, put together by build/."""

    config: SftConfig
    policy: Policy
    loader: RowLoader[Example]
    validation: Sequence[ConversationSet]
    loss: SftLoss
    console: TrainingConsole


class SftWork:
    """A step and a validation of SFT."""

    def __init__(self, parts: SftParts) -> None:
        self.parts = parts

    def train(self, step: int, watch: Stopwatch) -> StepDone:
        """One optimizer step on the next rows."""
        parts = self.parts
        with watch.measure("data_processing"):
            examples = next(parts.loader)
            batch = collate_examples(examples)
        if batch.denominators.num_loss_tokens == 0:
            raise ValueError(
                f"policy.max_total_sequence_length: none of the {len(examples)} rows of step {step + 1} has a token to "
                "learn within the limit. Raise it (or data.max_input_seq_length), or leave out the long rows."
            )
        parts.console.stage("training")
        with watch.measure("policy_training"):
            output = parts.policy.train_step(batch, parts.loss)
        metrics = mean_outputs([output]) | {
            "global_valid_toks": float(batch.denominators.num_loss_tokens),
            "global_valid_seqs": float(batch.denominators.num_sequences),
            "num_cut_rows": float(sum(example.num_cut_tokens > 0 for example in examples)),
            "num_cut_tokens": float(sum(example.num_cut_tokens for example in examples)),
        }
        by_source = tokens_by_source((example.source, len(example.token_ids)) for example in examples)
        counts = {"num_tokens": float(batch.sequence_length.sum()), **by_source}
        token_ids = (example.token_ids for example in examples)
        return StepDone(metrics=metrics | by_source, counts=counts, token_ids=token_ids)

    def validate(self, step: int, watch: Stopwatch) -> Validated | None:
        """The mean loss of a token over the validation rows; of each set apart too where there are several."""
        parts = self.parts
        if not parts.validation:
            return None
        losses: defaultdict[str, float] = defaultdict(float)
        tokens: Counter[str] = Counter()
        for rows in parts.validation:
            for span in validation_spans(len(rows), parts.config):
                batch = collate_examples(rows[span])
                losses[rows.name] -= float(parts.policy.logprobs(batch).double().sum())
                tokens[rows.name] += batch.denominators.num_loss_tokens
        metrics = {"val_loss": sum(losses.values()) / max(tokens.total(), 1), "num_valid_tokens": float(tokens.total())}
        if len(parts.validation) > 1:
            metrics |= {f"val_loss/{name}": losses[name] / max(tokens[name], 1) for name in tokens}
        return Validated(metrics=metrics)

    def save(self, directory: Path) -> None:
        """Nothing: the position in the data is all."""

    def load(self, directory: Path) -> None:
        """Nothing."""


def collate_examples(examples: Sequence[Example]) -> Batch:
    """One row per example, right-padded; counts the global denominators, once."""
    lengths = torch.tensor([len(example.token_ids) for example in examples])
    token_ids = torch.zeros(len(examples), int(lengths.max()), dtype=torch.int64)
    loss_mask = torch.zeros_like(token_ids, dtype=torch.bool)
    for row, example in enumerate(examples):
        token_ids[row, : len(example.token_ids)] = torch.tensor(example.token_ids)
        loss_mask[row, : len(example.loss_mask)] = torch.tensor(example.loss_mask)
    loss_mask[:, 0] = False  # nothing predicts the first token
    return Batch(
        token_ids=token_ids,
        loss_mask=loss_mask,
        sequence_length=lengths,
        prompt_length=torch.where(loss_mask.any(dim=1), loss_mask.int().argmax(dim=1), lengths),
        group_index=torch.arange(len(examples)),
        denominators=count_denominators(loss_mask),
    )
