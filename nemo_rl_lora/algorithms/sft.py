"""Supervised fine-tuning: conversations -> batch -> step. The loss is on the tokens that their masks name.

Left out: which tokens those are (data/conversations.py), when a run validates, saves and ends (loop.py).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from nemo_rl_lora.algorithms.algorithm import StepDone, Validated, mean_outputs
from nemo_rl_lora.algorithms.batch import collate_examples
from nemo_rl_lora.algorithms.losses.likelihood import SftLoss
from nemo_rl_lora.algorithms.tuning import Tuning, tokens_by_source, validation_spans
from nemo_rl_lora.config.master import SftMaster
from nemo_rl_lora.config.sft import SftConfig
from nemo_rl_lora.data.conversations import ConversationSet, load_conversation_sets
from nemo_rl_lora.run.console import KeyMetric
from nemo_rl_lora.run.metrics import Stopwatch
from nemo_rl_lora.types import Example


class Sft(Tuning[SftMaster, Example]):
    """Supervised fine-tuning."""

    noun = "rows"
    key_metrics = (
        KeyMetric(name="loss", higher_is_better=False),
        KeyMetric(name="val_loss", split="validation", higher_is_better=False),
        KeyMetric(name="grad_norm"),
        KeyMetric(name="num_cut_rows", label="rows cut"),
        KeyMetric(name="tokens_per_second", label="tokens/s"),
        KeyMetric(name="mfu", label="MFU"),
    )

    @property
    def loop(self) -> SftConfig:
        return self.config.sft

    def load_sets(self, tokenizer: Any) -> tuple[list[ConversationSet], list[ConversationSet]]:
        """Conversations, tokenised, with their loss masks."""
        return load_conversation_sets(
            self.config, tokenizer, only_unmask_final=self.loop.only_unmask_final, seed=self.loop.seed
        )

    def tokens_of(self, row: Example) -> tuple[int, int]:
        return len(row.token_ids), len(row.token_ids)

    @property
    def validation_metrics(self) -> tuple[str, ...]:
        names = [rows.name for rows in self.validation_sets]
        by_set = tuple(f"val_loss/{name}" for name in names) if len(names) > 1 else ()
        return ("val_loss", "num_valid_tokens", *by_set) if names else ()

    def train(self, step: int, watch: Stopwatch) -> StepDone:
        """One optimizer step on the next rows."""
        run = self.run
        with watch.measure("data_processing"):
            examples = next(run.loader)
            batch = collate_examples(examples)
        if run.phase is not None:
            lr = run.phase.lr(step, self.num_tokens, float(batch.sequence_length.sum()))
            batch = replace(batch, lr=lr)
        run.console.stage("training")
        with watch.measure("policy_training"):
            output = self.optimizer_step(batch, SftLoss())
        metrics = mean_outputs([output]) | {
            "global_valid_toks": float(batch.denominators.num_loss_tokens),
            "global_valid_seqs": float(batch.denominators.num_sequences),
            "num_cut_rows": float(sum(example.num_cut_tokens > 0 for example in examples)),
            "num_cut_tokens": float(sum(example.num_cut_tokens for example in examples)),
        }
        by_source = tokens_by_source((example.source, len(example.token_ids)) for example in examples)
        counts = {"num_tokens": float(batch.sequence_length.sum()), **by_source}
        token_ids = (example.token_ids for example in examples)
        return StepDone(metrics=metrics | by_source, counts=counts, token_ids=token_ids, outputs=[output])

    def mean_loss(self, rows: Sequence[Example]) -> float:
        """Of a learned token of these rows, with the policy as it is."""
        batch = collate_examples(rows)
        return -float(self.run.policy.logprobs(batch).double().sum()) / batch.denominators.num_loss_tokens

    def validate(self, step: int, watch: Stopwatch) -> Validated | None:
        """The mean loss of a token over the validation rows; of each set apart too where there are several."""
        if not self.validation_sets:
            return None
        losses: defaultdict[str, float] = defaultdict(float)
        tokens: Counter[str] = Counter()
        for rows in self.validation_sets:
            for span in validation_spans(len(rows), self.loop):
                batch = collate_examples(rows[span])
                losses[rows.name] -= float(self.run.policy.logprobs(batch).double().sum())
                tokens[rows.name] += batch.denominators.num_loss_tokens
        metrics = {"val_loss": sum(losses.values()) / tokens.total(), "num_valid_tokens": float(tokens.total())}
        if len(self.validation_sets) > 1:
            metrics |= {f"val_loss/{name}": losses[name] / tokens[name] for name in tokens}
        return Validated(metrics=metrics)
