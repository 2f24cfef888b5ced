"""The `data` block: which rows are trained and validated on, and how they become prompts.

Names, shapes and limits only; nothing here opens a file.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from nemo_rl_lora.config.base import Fixed, Section

PROMPT_DATASETS: dict[str, frozenset[str]] = {
    "generated_sums": frozenset({"low", "high", "num_rows"}),
    "reasoning_gym": frozenset({"task", "size", "task_config"}),
    "jsonl": frozenset({"data_path", "split", "input_key", "output_key"}),
    "ResponseDataset": frozenset({"data_path", "split", "input_key", "output_key"}),
    "OpenMathInstruct-2": frozenset({"data_path", "split", "output_key"}),
    "gsm8k": frozenset({"data_path", "split"}),
    "GSM8K": frozenset({"data_path", "split"}),
}
"""Datasets of prompts for GRPO, and which of the keys below each has a use for."""

OTHER_DATASETS = (
    "squad",
    "tulu3_sft_mixture",
    "open_assistant",
    "openai_format",
    "HelpSteer3",
    "Tulu3Preference",
    "PreferenceDataset",
    "BinaryPreferenceDataset",
)
"""Datasets of conversations and preferences: part of the schema, refused by a driver that has no use for them."""

_KEYS_OF_SOME = frozenset().union(*PROMPT_DATASETS.values())


class DatasetDefaults(Section):
    """What training and validation data share unless they say otherwise."""

    prompt_file: str | None = None
    """Text file with one `{}`, where the row's input goes (braces are doubled, as in Python's format)."""

    system_prompt_file: str | None = None
    """Text file whose content is sent as the system message."""

    processor: str | None = None
    """How a row becomes a prompt, by NeMo RL's name; GRPO has `math_hf_data_processor`."""

    env_name: str | None = None
    """The environment, a key of `env`, that scores completions."""


class DatasetConfig(DatasetDefaults):
    """One dataset. A key that the dataset named has no use for is refused unless it has its default value."""

    dataset_name: str
    """A dataset's name; docs/environments.md lists those for GRPO."""

    split: str | None = None
    """Which part of a dataset that has several."""

    split_validation_size: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the rows that is held out for validation."""

    seed: Annotated[int, Field(ge=0)] = 42
    """Seed of the held-out choice and of generated rows."""

    max_num_rows: Annotated[int, Field(ge=1)] | None = None
    """Use only the first rows."""

    data_path: str | None = None
    """A .jsonl or .parquet file, or a directory with a file of the split's name. Null: the hub."""

    input_key: str = "input"
    """The row's key that holds the prompt."""

    output_key: str | None = None
    """The row's key that holds the expected answer; environments see it as `answer`."""

    low: int = 0
    """generated_sums: the smallest summand."""

    high: int = 99
    """generated_sums: the largest summand."""

    num_rows: Annotated[int, Field(ge=1)] = 1000
    """generated_sums: how many rows to draw."""

    task: str | None = None
    """reasoning_gym: the task, for example `chain_sum`."""

    size: Annotated[int, Field(ge=1)] = 1000
    """reasoning_gym: how many rows to draw."""

    task_config: dict[str, Any] = {}
    """reasoning_gym: the task's own settings, for example `{max_terms: 3}`."""

    repeat: Annotated[int, Fixed(1, remedy="Use grpo.max_num_epochs for more passes.")] = 1
    """How often the rows are repeated within an epoch."""

    @field_validator("dataset_name")
    @classmethod
    def _name_is_known(cls, name: str) -> str:
        names = (*PROMPT_DATASETS, *OTHER_DATASETS)
        if name not in names:
            close = get_close_matches(name, names, n=1, cutoff=0.5)
            hint = f"Did you mean {close[0]!r}? " if close else ""
            raise ValueError(
                f"there is no such dataset. {hint}Known: {', '.join(names)}. For rows of your own use 'jsonl' "
                f"with data_path."
            )
        return name

    @model_validator(mode="after")
    def _every_key_has_a_use(self) -> DatasetConfig:
        if self.dataset_name not in PROMPT_DATASETS:
            return self
        fields = type(self).model_fields
        for key in sorted(_KEYS_OF_SOME - PROMPT_DATASETS[self.dataset_name]):
            value = getattr(self, key)
            if value != fields[key].get_default(call_default_factory=True):
                useful = ", ".join(sorted(PROMPT_DATASETS[self.dataset_name]))
                raise ValueError(
                    f"{key}={value!r}: has no meaning with dataset_name={self.dataset_name!r}, whose own keys are "
                    f"{useful}. Remove it."
                )
        return self

    @model_validator(mode="after")
    def _needed_keys_are_given(self) -> DatasetConfig:
        if self.dataset_name in ("jsonl", "ResponseDataset") and self.data_path is None:
            raise ValueError(f"data_path=None: dataset_name={self.dataset_name!r} needs a file. Give its path.")
        if self.dataset_name == "reasoning_gym" and self.task is None:
            raise ValueError("task=None: dataset_name='reasoning_gym' needs a task. Give one, such as 'chain_sum'.")
        if self.low > self.high:
            raise ValueError(f"low={self.low}: is above high={self.high}. Give low <= high.")
        return self


class DataConfig(Section):
    """Training and validation data. Every key of `default` that a dataset does not set itself is merged into it."""

    max_input_seq_length: Annotated[int, Field(ge=1)] | None = None
    """Longest prompt in tokens. Null: only policy.max_total_sequence_length limits it."""

    on_long_prompt: Literal["error", "drop"] = "error"
    """What to do with a longer prompt: refuse the dataset, or leave the row out and say how many."""

    shuffle: bool = True
    """Draw a new order of the training rows for each epoch, from the seed and the epoch."""

    num_workers: Annotated[
        int, Fixed(0, 1, remedy="Rows are tokenised in the driver's process; there are no loader processes.")
    ] = 1
    """Processes that load data."""

    use_multiple_dataloader: Annotated[bool, Fixed(False, remedy="Give one training dataset.")] = False
    """Draw each batch from several datasets."""

    add_bos: bool | None = None
    """SFT: put a beginning-of-sequence token first. GRPO leaves it to the chat template and refuses the key."""

    add_eos: bool | None = None
    """SFT: put an end-of-sequence token last. GRPO completions end by themselves, so it refuses the key."""

    add_generation_prompt: bool | None = None
    """End the prompt with the header of the assistant's turn. GRPO always does and refuses false."""

    train: DatasetConfig | None = None
    """The rows to train on."""

    validation: DatasetConfig | None = None
    """The rows to validate on, besides those held out by `train.split_validation_size`."""

    default: DatasetDefaults = DatasetDefaults()
    """Keys for both datasets."""

    @model_validator(mode="before")
    @classmethod
    def _merge_default(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        default = values.get("default") or {}
        merged = dict(values)
        if values.get("default", ...) is None:
            del merged["default"]
        for key in ("train", "validation"):
            section = values.get(key)
            if isinstance(section, list):
                raise ValueError(f"data.{key}: a list of datasets is not supported. Give one dataset.")
            if isinstance(section, dict) and isinstance(default, dict):
                merged[key] = {**default, **section}
        return merged
