"""The whole configuration of a run, one class per algorithm, and the rules that cross its sections."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import model_validator

from nemo_rl_lora.config.base import Section
from nemo_rl_lora.config.checkpointing import CheckpointingConfig
from nemo_rl_lora.config.cluster import ClusterConfig
from nemo_rl_lora.config.data import DataConfig
from nemo_rl_lora.config.dpo import DpoConfig
from nemo_rl_lora.config.env import EnvConfig
from nemo_rl_lora.config.errors import suggestion
from nemo_rl_lora.config.grpo import GrpoConfig, check_rollout_against_loss
from nemo_rl_lora.config.logger import LoggerConfig
from nemo_rl_lora.config.loss_fn import LossFnConfig
from nemo_rl_lora.config.policy import PolicyConfig
from nemo_rl_lora.config.sft import SftConfig

Algorithm = Literal["sft", "dpo", "grpo"]


class MasterConfig(Section):
    """What every algorithm has."""

    algorithm: ClassVar[Algorithm]

    policy: PolicyConfig
    """The model, its optimizer, its backend and its adapter."""
    data: DataConfig
    """Training and validation data."""
    checkpointing: CheckpointingConfig = CheckpointingConfig()
    """Where checkpoints go and which are kept."""
    logger: LoggerConfig = LoggerConfig()
    """Where metrics go."""
    cluster: ClusterConfig = ClusterConfig()
    """How many processes train."""

    @model_validator(mode="after")
    def _something_to_train_on(self) -> MasterConfig:
        if self.data.train is None:
            raise ValueError(
                "data.train=None: there is nothing to train on. Name a dataset: data.train.dataset_name=NAME."
            )
        return self

    @model_validator(mode="after")
    def _generation_where_it_is_used(self) -> MasterConfig:
        generates = self.algorithm == "grpo"
        if generates and self.policy.generation is None:
            raise ValueError(
                "policy.generation=None: GRPO samples completions and needs an engine. "
                "Inherit examples/configs/grpo_math_1B.yaml, or set policy.generation.backend=auto."
            )
        if not generates and self.policy.generation is not None:
            raise ValueError(
                f"policy.generation.backend={self.policy.generation.backend!r}: {self.algorithm.upper()} samples "
                "nothing. Remove the policy.generation section."
            )
        return self


class SftMaster(MasterConfig):
    """Supervised fine-tuning."""

    algorithm: ClassVar[Algorithm] = "sft"

    sft: SftConfig = SftConfig()
    """The SFT loop."""


class DpoMaster(MasterConfig):
    """Direct preference optimization."""

    algorithm: ClassVar[Algorithm] = "dpo"

    dpo: DpoConfig = DpoConfig()
    """The DPO loop and its loss."""


class GrpoMaster(MasterConfig):
    """Group relative policy optimization."""

    algorithm: ClassVar[Algorithm] = "grpo"

    grpo: GrpoConfig = GrpoConfig()
    """The GRPO loop and its advantages."""
    loss_fn: LossFnConfig = LossFnConfig()
    """The policy-gradient loss."""
    env: EnvConfig = EnvConfig()
    """The environments that score completions."""

    @model_validator(mode="after")
    def _rollout_fits_the_loss(self) -> GrpoMaster:
        check_rollout_against_loss(self.grpo, self.loss_fn, self.policy.train_global_batch_size)
        return self

    @model_validator(mode="after")
    def _environments_exist(self) -> GrpoMaster:
        for split, dataset in (("train", self.data.train), ("validation", self.data.validation)):
            if dataset is None or dataset.env_name in self.env.names:
                continue
            similar = suggestion(dataset.env_name or "", self.env.names)
            question = f"Did you mean {similar!r}? " if similar else ""
            raise ValueError(
                f"data.{split}.env_name={dataset.env_name!r}: no environment scores these completions. {question}"
                f"Choose one of {', '.join(self.env.names)}, or add your own: "
                "env.NAME.reward_function=FILE.py:FUNCTION."
            )
        return self


MASTERS: dict[Algorithm, type[SftMaster] | type[DpoMaster] | type[GrpoMaster]] = {
    "sft": SftMaster,
    "dpo": DpoMaster,
    "grpo": GrpoMaster,
}
