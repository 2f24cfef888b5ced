"""SFT, put together: conversations and the loss."""

from __future__ import annotations

from typing import Any

from nemo_rl_lora.algorithms.sft import SftParts, SftWork
from nemo_rl_lora.algorithms.sft_loss import SftLoss
from nemo_rl_lora.build.start import RunContext, describe_sets, mixture_loader
from nemo_rl_lora.config.master import SftMaster
from nemo_rl_lora.config.sft import SftConfig
from nemo_rl_lora.console import KeyMetric
from nemo_rl_lora.data.conversations import ConversationSet, load_conversation_sets
from nemo_rl_lora.data.loader import RowLoader
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
        return mixture_loader(config, self.settings, self._train)

    def describe_data(self) -> str:
        return describe_sets(self._train, self._validation, "rows")

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
