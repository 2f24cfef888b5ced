"""DPO, put together: preference pairs and the loss."""

from __future__ import annotations

from typing import Any

from nemo_rl_lora.algorithms.dpo import DpoParts, DpoWork
from nemo_rl_lora.algorithms.preference_loss import PreferenceLoss
from nemo_rl_lora.build.start import RunContext, describe_sets, mixture_loader
from nemo_rl_lora.config.dpo import DpoConfig
from nemo_rl_lora.config.master import DpoMaster
from nemo_rl_lora.console import KeyMetric
from nemo_rl_lora.data.loader import RowLoader
from nemo_rl_lora.data.preferences import PreferenceSet, load_preference_sets
from nemo_rl_lora.types import PreferencePair


class DpoRecipe:
    """A build.start.Recipe."""

    key_metrics = (
        KeyMetric(name="accuracy", higher_is_better=True),
        KeyMetric(name="accuracy", split="validation", higher_is_better=True),
        KeyMetric(name="loss", higher_is_better=False),
        KeyMetric(name="loss", split="validation", higher_is_better=False),
        KeyMetric(name="rewards_margin_mean", label="margin"),
        KeyMetric(name="tokens_per_second", label="tokens/s"),
    )
    temperature = 1.0

    def __init__(self, config: DpoMaster) -> None:
        self.config = config
        self._loss = PreferenceLoss(config=config.dpo)
        self._train: list[PreferenceSet] = []
        self._validation: list[PreferenceSet] = []

    @property
    def settings(self) -> DpoConfig:
        return self.config.dpo

    @property
    def logprob_rows(self) -> int:
        return self.config.dpo.val_micro_batch_size

    @property
    def needs_reference(self) -> bool:
        return self._loss.needs_reference

    def check(self) -> None:
        """Nothing beside the data."""

    def load_data(self, tokenizer: Any) -> RowLoader[PreferencePair]:
        config = self.config
        self._train, self._validation = load_preference_sets(config, tokenizer)
        return mixture_loader(config, self.settings, self._train)

    def describe_data(self) -> str:
        return describe_sets(self._train, self._validation, "pairs")

    def work(self, context: RunContext) -> DpoWork:
        return DpoWork(
            DpoParts(
                config=self.config.dpo,
                policy=context.policy,
                loader=context.loader,
                validation=self._validation,
                loss=self._loss,
                console=context.console,
            )
        )
