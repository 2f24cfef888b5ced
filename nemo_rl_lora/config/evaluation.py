"""What an evaluation has beside data and environments: its models, how often it asks, and where results go.

The policy of an evaluation holds the keys that evaluation reads and no other, so that a key of training is unknown
there and refused by name.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from nemo_rl_lora.config.base import Section
from nemo_rl_lora.config.data import DataConfig
from nemo_rl_lora.config.errors import show
from nemo_rl_lora.config.generation import EngineConfig
from nemo_rl_lora.config.policy import ModelConfig

_DATA_KEYS_READ = ("validation", "default", "max_input_seq_length", "on_long_prompt", "on_bad_row", "num_checked_rows")


class EvalPolicy(ModelConfig):
    """The base model, and the engine that samples from it."""

    generation: EngineConfig = EngineConfig()
    """The engine, and how it samples: the `val_` keys."""


class EvalConfig(Section):
    """Which models are asked, how often, and what is computed from their rewards."""

    adapters: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Adapters to evaluate on the one loaded base: directories of PEFT's format, or of a step (`step_N`)."""
    include_base: bool = True
    """Evaluate the base too, so that each adapter is compared with it."""
    num_tests_per_prompt: int = Field(default=1, ge=1)
    """Completions of each prompt."""
    k_values: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(1,), min_length=1)
    """Every k of pass@k; each at most num_tests_per_prompt. NeMo RL's `k_value` is one number."""
    solved_at: float = Field(default=1.0, allow_inf_nan=False)
    """A completion counts as solved, for pass@k, where its reward is at least this. No NeMo RL key."""
    max_num_prompts: int | None = Field(default=None, ge=1)
    """Ask only the first prompts; null for all. No NeMo RL key."""
    seed: int = Field(default=42, ge=0)
    """Seed of every draw. A completion's seed follows from this, its prompt and its number, for every model alike."""
    save_path: str | None = None
    """Directory for results.json, completions.jsonl and config.yaml; null saves nothing."""

    @model_validator(mode="after")
    def _something_to_evaluate(self) -> EvalConfig:
        if not self.adapters and not self.include_base:
            raise ValueError(
                "eval.include_base=False: there is no adapter either, so nothing would be evaluated. "
                "Name adapters (eval.adapters=[DIR]), or set eval.include_base=true."
            )
        twice = next((name for name in self.adapters if self.adapters.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"eval.adapters={list(self.adapters)!r}: names {twice!r} twice. Name each adapter once.")
        return self

    @model_validator(mode="after")
    def _enough_completions_for_each_k(self) -> EvalConfig:
        largest = max(self.k_values)
        if largest > self.num_tests_per_prompt:
            raise ValueError(
                f"eval.k_values={list(self.k_values)!r}: pass@{largest} needs {largest} completions of each prompt, "
                f"and eval.num_tests_per_prompt={self.num_tests_per_prompt}. Raise that, or give smaller values."
            )
        return self


def check_evaluation_data(data: DataConfig) -> None:
    """There are prompts, and no key was set that evaluation does not read."""
    for key, field in DataConfig.model_fields.items():
        value = getattr(data, key)
        if key not in _DATA_KEYS_READ and value != field.get_default(call_default_factory=True):
            raise ValueError(
                f"data.{key}={show(value)}: is not read, since evaluation asks every prompt of data.validation once, "
                f"in its order. Remove it."
            )
    if data.validation is None:
        raise ValueError(
            "data.validation=None: there is nothing to ask. Name a dataset: data.validation.dataset_name=NAME."
        )
    if isinstance(data.validation, tuple):
        names = ", ".join(section.dataset_name for section in data.validation)
        raise ValueError(f"data.validation=[{names}]: evaluation asks one dataset. Give one, without a list.")
    if data.validation.split_validation_size:
        raise ValueError(
            f"data.validation.split_validation_size={data.validation.split_validation_size}: evaluation holds out "
            f"nothing and asks every row. Remove it."
        )


def check_evaluation_sampling(settings: EvalConfig, engine: EngineConfig) -> None:
    """Greedy decoding is not asked for several completions, or with keys that only shape a draw."""
    if engine.val_temperature > 0:
        return
    if settings.num_tests_per_prompt > 1:
        raise ValueError(
            f"policy.generation.val_temperature={engine.val_temperature!r}: always takes the likeliest token, so the "
            f"{settings.num_tests_per_prompt} completions of a prompt would be the same. Set "
            f"policy.generation.val_temperature above 0, or eval.num_tests_per_prompt=1."
        )
    for key, unset in (("val_top_p", 1.0), ("val_top_k", None)):
        value = getattr(engine, key)
        if value != unset:
            raise ValueError(
                f"policy.generation.{key}={value!r}: has no effect where the likeliest token is always taken "
                f"(policy.generation.val_temperature=0). Remove it, or raise the temperature."
            )
