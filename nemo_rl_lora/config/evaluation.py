"""What an evaluation has beside data and environments: what is asked, how often, and where results go. Of the
evaluation driver (`eval`), and of evaluations during a run (`evaluate`).

The policy of the driver holds the keys that evaluation reads and no other, so that a key of training is unknown there
and refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from pydantic import Field, model_validator

from nemo_rl_lora.config.base import Section, matching
from nemo_rl_lora.config.data import DataConfig, DatasetConfig
from nemo_rl_lora.config.errors import show
from nemo_rl_lora.config.generation import EngineConfig
from nemo_rl_lora.config.policy import ModelConfig

_NAME = r"(?!timing$)[A-Za-z0-9][\w.\-]*"
_NAME_RULE = (
    "stands in the names of metrics, so it has letters, digits, '_', '-' and '.' alone, and is not 'timing'. Write "
    "gsm8k, for example."
)

_DATA_KEYS_READ = ("validation", "default", "max_input_seq_length", "on_long_prompt", "on_bad_row", "num_checked_rows")


class EvalPolicy(ModelConfig):
    """The base model, and the engine that samples from it."""

    generation: EngineConfig = EngineConfig()
    """The engine, and how it samples: the `val_` keys."""


class AskedConfig(Section):
    """How often prompts are asked, and what is computed from the rewards."""

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


class EvalConfig(AskedConfig):
    """Which models are asked, how often, and what is computed from their rewards."""

    adapters: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Adapters to evaluate on the one loaded base: directories of PEFT's format, or of a step (`step_N`)."""
    include_base: bool = True
    """Evaluate the base too, so that each adapter is compared with it."""
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


class EvaluateConfig(AskedConfig):
    """An evaluation during a run, of the policy as it is. No NeMo RL key."""

    name: Annotated[str, matching(_NAME, _NAME_RULE)]
    """Its results are the metrics `<name>/accuracy`, `<name>/pass@k`, ...; `checkpointing.metric_name` ranks by them
    as `eval:<name>/accuracy`."""
    every: int = Field(ge=1)
    """Evaluate after every so many steps."""
    at_start: bool = False
    """Evaluate before the first step too."""
    at_end: bool = True
    """Evaluate after the last step too; of an SFT run in phases after the last step of each."""
    data: DatasetConfig
    """The prompts, and the environment that scores their completions: a dataset as `data.validation` of the evaluation
    driver has it. `data.default` holds for it too, but for `processor`."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Longest completion; null is policy.generation.max_new_tokens."""
    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """0 takes the likeliest token."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw from the likeliest tokens that together hold this probability."""
    top_k: int | None = Field(default=None, ge=1)
    """Draw from this many likeliest tokens; null for all."""


def with_data_default(entries: Any, default: Any) -> Any:
    """The entries of `evaluate` as they were written, with what `data.default` has for their datasets."""
    if not isinstance(entries, list | tuple) or not isinstance(default, dict):
        return entries
    shared = {key: value for key, value in default.items() if key != "processor"}  # that is training's
    return [
        {**entry, "data": {**shared, **entry["data"]}}
        if isinstance(entry, dict) and isinstance(entry.get("data"), dict)
        else entry
        for entry in entries
    ]


def evaluate_problems(entries: Sequence[EvaluateConfig]) -> Iterator[str]:
    """What is wrong with the evaluations of a run, beside the environments that they name."""
    names = [entry.name for entry in entries]
    for number, entry in enumerate(entries):
        key, dataset = f"evaluate.{number}", entry.data
        if (first := names.index(entry.name)) < number:
            yield f"{key}.name={entry.name!r}: evaluate.{first} has this name. Give each its own."
        if dataset.split_validation_size:
            yield (
                f"{key}.data.split_validation_size={dataset.split_validation_size}: an evaluation holds out nothing "
                f"and asks every row. Remove it."
            )
        if dataset.rate != 1.0:
            yield f"{key}.data.rate={dataset.rate}: rates mix training datasets, and this one is asked. Remove it."
        yield from _too_few_completions(entry, key)
        draw = (("top_p", entry.top_p, 1.0), ("top_k", entry.top_k, None))
        yield from _greedy_problems(entry, key, f"{key}.temperature", entry.temperature, draw)


def check_asked(settings: EvalConfig, engine: EngineConfig) -> None:
    """Every k has its completions; greedy decoding is not asked for several, or with keys that only shape a draw."""
    draw = (("val_top_p", engine.val_top_p, 1.0), ("val_top_k", engine.val_top_k, None))
    key, temperature = "policy.generation.val_temperature", engine.val_temperature
    problems = [
        *_too_few_completions(settings, "eval"),
        *_greedy_problems(settings, "eval", key, temperature, draw),
    ]
    if problems:
        raise ValueError("\n".join(problems))


def _too_few_completions(settings: AskedConfig, key: str) -> Iterator[str]:
    largest = max(settings.k_values)
    if largest > settings.num_tests_per_prompt:
        yield (
            f"{key}.k_values={list(settings.k_values)!r}: pass@{largest} needs {largest} completions of each prompt, "
            f"and {key}.num_tests_per_prompt={settings.num_tests_per_prompt}. Raise that, or give smaller values."
        )


def _greedy_problems(
    settings: AskedConfig, key: str, temperature_key: str, temperature: float, draw: Sequence[tuple[str, Any, Any]]
) -> Iterator[str]:
    """`draw`: the keys beside the temperature's that shape a draw, with what they have and what means nothing."""
    if temperature > 0:
        return
    if settings.num_tests_per_prompt > 1:
        yield (
            f"{temperature_key}={temperature!r}: always takes the likeliest token, so the "
            f"{settings.num_tests_per_prompt} completions of a prompt would be the same. Set {temperature_key} above "
            f"0, or {key}.num_tests_per_prompt=1."
        )
    section = temperature_key.rpartition(".")[0]
    yield from (
        f"{section}.{name}={value!r}: has no effect where the likeliest token is always taken ({temperature_key}=0). "
        f"Remove it, or raise the temperature."
        for name, value, unset in draw
        if value != unset
    )


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
