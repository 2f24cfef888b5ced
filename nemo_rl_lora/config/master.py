"""The whole configuration of a run, one class per driver, and the rules that cross its sections."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import PrivateAttr, model_validator

from nemo_rl_lora.config.adapter_start import check_adapter_start
from nemo_rl_lora.config.base import Section
from nemo_rl_lora.config.checkpointing import CheckpointingConfig
from nemo_rl_lora.config.cluster import ClusterConfig
from nemo_rl_lora.config.data import DataConfig, DatasetConfig
from nemo_rl_lora.config.dpo import DpoConfig
from nemo_rl_lora.config.env import EnvConfig
from nemo_rl_lora.config.errors import did_you_mean
from nemo_rl_lora.config.evaluation import (
    EvalConfig,
    EvalPolicy,
    EvaluateConfig,
    check_asked,
    check_evaluation_data,
    evaluate_problems,
    with_data_default,
)
from nemo_rl_lora.config.generation import GenerationConfig
from nemo_rl_lora.config.grpo import GrpoConfig, check_rollout_against_loss
from nemo_rl_lora.config.layers import Layers
from nemo_rl_lora.config.logger import LoggerConfig
from nemo_rl_lora.config.lora import lora_spec_from_policy
from nemo_rl_lora.config.loss_fn import LossFnConfig
from nemo_rl_lora.config.policy import PolicyConfig
from nemo_rl_lora.config.sft import SftConfig

Algorithm = Literal["sft", "dpo", "grpo"]
Driver = Literal[Algorithm, "eval"]


class _Loaded(Section):
    """A whole configuration, which knows who set what (config/layers.py). Equality is that of the values."""

    _layers: Layers = PrivateAttr(default=Layers())

    @property
    def layers(self) -> Layers:
        """The layers that wrote its keys; none where it was not loaded from a file."""
        return self._layers

    def with_layers(self, layers: Layers) -> Self:
        """The same configuration, written by these layers."""
        copy = self.model_copy()
        copy._layers = layers
        return copy

    def is_set(self, key: str) -> bool:
        """Whether the user wrote the dotted key, in a file or on the command line."""
        return self._layers.is_set(key)


class MasterConfig(_Loaded):
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
    env: EnvConfig = EnvConfig()
    """The environments that score completions."""
    evaluate: tuple[EvaluateConfig, ...] = ()
    """Evaluations during the run. No NeMo RL key."""

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with a reference."""
        return False

    @property
    def starts_with_adapter(self) -> bool:
        """Whether an adapter is trained from the first step on."""
        return lora_spec_from_policy(self.policy) is not None

    @model_validator(mode="after")
    def _adapter_can_start(self) -> MasterConfig:
        check_adapter_start(
            self.policy.adapter, has_adapter=self.starts_with_adapter, needs_reference=self.needs_reference
        )
        return self

    @model_validator(mode="after")
    def _something_to_train_on(self) -> MasterConfig:
        if self.data.train is None:
            raise ValueError(
                "data.train=None: there is nothing to train on. Name a dataset: data.train.dataset_name=NAME."
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _what_evaluations_inherit(cls, values: Any) -> Any:
        """`data.default`, and the engine's defaults where the algorithm itself samples nothing."""
        if not isinstance(values, dict) or not values.get("evaluate"):
            return values
        data, policy = values.get("data"), values.get("policy")
        inherited = dict(values)
        if isinstance(data, dict):
            inherited["evaluate"] = with_data_default(values["evaluate"], data.get("default"))
        if isinstance(policy, dict) and policy.get("generation") is None and cls.algorithm != "grpo":
            inherited["policy"] = {**policy, "generation": {}}
        return inherited

    @model_validator(mode="after")
    def _evaluations_can_be_asked_and_scored(self) -> MasterConfig:
        problems = [
            *evaluate_problems(self.evaluate),
            *(
                problem
                for number, entry in enumerate(self.evaluate)
                if (problem := _environment_problem(f"evaluate.{number}.data", entry.data, self.env)) is not None
            ),
        ]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @model_validator(mode="after")
    def _generation_where_it_is_used(self) -> MasterConfig:
        generates = self.algorithm == "grpo"
        if generates and self.policy.generation is None:
            raise ValueError(
                "policy.generation=None: GRPO samples completions and needs an engine. "
                "Inherit examples/configs/grpo_math_1B.yaml, or set policy.generation.backend=auto."
            )
        if not generates and self.policy.generation is not None and not self.evaluate:
            raise ValueError(
                f"policy.generation.backend={self.policy.generation.backend!r}: {self.algorithm.upper()} samples "
                "nothing without `evaluate`. Remove the policy.generation section."
            )
        if not generates and self.policy.logprob_batch_size is not None:
            raise ValueError(
                f"policy.logprob_batch_size={self.policy.logprob_batch_size}: {self.algorithm.upper()} cuts passes "
                f"without gradient by {self.algorithm}.val_micro_batch_size. Set that, and remove this key."
            )
        return self


class SftMaster(MasterConfig):
    """Supervised fine-tuning."""

    algorithm: ClassVar[Algorithm] = "sft"

    sft: SftConfig = SftConfig()
    """The SFT loop."""

    @property
    def starts_with_adapter(self) -> bool:
        phases = self.sft.phases
        return phases[0].train == "lora" if phases else super().starts_with_adapter


class DpoMaster(MasterConfig):
    """Direct preference optimization."""

    algorithm: ClassVar[Algorithm] = "dpo"

    dpo: DpoConfig = DpoConfig()
    """The DPO loop and its loss."""

    @property
    def needs_reference(self) -> bool:
        return self.dpo.preference_loss_weight > 0


class GrpoMaster(MasterConfig):
    """Group relative policy optimization."""

    algorithm: ClassVar[Algorithm] = "grpo"

    grpo: GrpoConfig = GrpoConfig()
    """The GRPO loop and its advantages."""
    loss_fn: LossFnConfig = LossFnConfig()
    """The policy-gradient loss."""

    @property
    def generation(self) -> GenerationConfig:
        """The engine, and how it samples."""
        assert self.policy.generation is not None, "checked by _generation_where_it_is_used"
        return self.policy.generation

    @property
    def needs_reference(self) -> bool:
        return self.loss_fn.reference_policy_kl_penalty != 0

    @model_validator(mode="after")
    def _rollout_fits_the_loss(self) -> GrpoMaster:
        check_rollout_against_loss(self.grpo, self.loss_fn, self.policy.train_global_batch_size)
        return self

    @model_validator(mode="after")
    def _environments_exist(self) -> GrpoMaster:
        for key, dataset in [*self.data.sections("train"), *self.data.sections("validation")]:
            _check_environment(key, dataset, self.env)
        return self


class EvalMaster(_Loaded):
    """Evaluation of a model, or of adapters on it. Nothing is trained."""

    policy: EvalPolicy
    """The base model, and the engine that samples from it."""
    data: DataConfig
    """The prompts: `validation`."""
    env: EnvConfig = EnvConfig()
    """The environments that score completions."""
    eval: EvalConfig = EvalConfig()
    """Which models are asked, how often, and what is computed."""

    @model_validator(mode="after")
    def _can_be_asked_and_scored(self) -> EvalMaster:
        check_evaluation_data(self.data)
        check_asked(self.eval, self.policy.generation)
        for key, dataset in self.data.sections("validation"):
            _check_environment(key, dataset, self.env)
        return self


def _check_environment(key: str, dataset: DatasetConfig, env: EnvConfig) -> None:
    """The dataset at this key names an environment that exists."""
    if (problem := _environment_problem(key, dataset, env)) is not None:
        raise ValueError(problem)


def _environment_problem(key: str, dataset: DatasetConfig, env: EnvConfig) -> str | None:
    if dataset.env_name in env.names:
        return None
    return (
        f"{key}.env_name={dataset.env_name!r}: no environment scores these completions. "
        f"{did_you_mean(dataset.env_name or '', env.names)}"
        f"Choose one of {', '.join(env.names)}, or add your own: env.NAME.reward_function=FILE.py:FUNCTION."
    )


MASTERS: dict[Driver, type[SftMaster] | type[DpoMaster] | type[GrpoMaster] | type[EvalMaster]] = {
    "sft": SftMaster,
    "dpo": DpoMaster,
    "grpo": GrpoMaster,
    "eval": EvalMaster,
}
