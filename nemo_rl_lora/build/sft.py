"""SFT, put together: conversations and the loss."""

from __future__ import annotations

from typing import Any

from nemo_rl_lora.algorithms.sft import SftParts, SftWork
from nemo_rl_lora.algorithms.sft_loss import SftLoss
from nemo_rl_lora.build.start import RunContext
from nemo_rl_lora.config.master import SftMaster
from nemo_rl_lora.config.sft import SftConfig
from nemo_rl_lora.console import KeyMetric
from nemo_rl_lora.data.conversations import ConversationSet, load_conversation_sets
from nemo_rl_lora.data.order import RowLoader
from nemo_rl_lora.types import Example


class SftRecipe:
    """A build.start.Recipe."""

    key_metrics = (
        KeyMetric(name="loss", higher_is_better=False),
        KeyMetric(name="val_loss", split="validation", higher_is_better=False),
        KeyMetric(name="grad_norm"),
        KeyMetric(name="num_cut_rows", label="rows cut"),
        KeyMetric(name="tokens_per_second", label="tokens/s"),
    )
    temperature = 1.0
    needs_reference = False

    def __init__(self, config: SftMaster) -> None:
        self.config = config
        self._train: list[ConversationSet] = []
        self._validation: list[ConversationSet] = []

    @property
    def settings(self) -> SftConfig:
        return self.config.sft

    @property
    def logprob_rows(self) -> int:
        return self.config.sft.val_micro_batch_size

    def check(self) -> None:
        """Nothing beside the data."""

    def load_data(self, tokenizer: Any) -> RowLoader[Example]:
        config = self.config
        self._train, self._validation = load_conversation_sets(
            config, tokenizer, only_unmask_final=config.sft.only_unmask_final
        )
        return RowLoader(
            self._train,
            config.policy.train_global_batch_size,
            key="policy.train_global_batch_size",
            seed=config.sft.seed,
            shuffle=config.data.shuffle,
            num_epochs=config.sft.max_num_epochs,
            rates=[rows.rate for rows in self._train],
        )

    def describe_data(self) -> str:
        train = ", ".join(f"{len(rows)} of {rows.name}" for rows in self._train)
        return f"{train} to train on, {sum(map(len, self._validation))} rows for validation"

    def work(self, context: RunContext) -> SftWork:
        return SftWork(
            SftParts(
                config=self.config.sft,
                policy=context.policy,
                loader=context.loader,
                validation=self._validation,
                loss=SftLoss(),
                console=context.console,
            )
        )
