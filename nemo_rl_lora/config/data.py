"""The `data` block: which rows are trained and validated on, and how they become prompts, conversations or pairs.

Names, shapes and limits only; nothing here opens a file.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from nemo_rl_lora.config.base import Section
from nemo_rl_lora.data.catalog import DATASETS

FILE_SUFFIXES = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz")
"""Of a file of rows."""

_KEYS_OF_SOME = frozenset(key for dataset in DATASETS.values() for key in dataset.keys)


class DatasetDefaults(Section):
    """What training and validation data share unless they say otherwise."""

    prompt_file: str | None = None
    """Text file with one `{}`, where the row's input goes (braces are doubled, as in Python's format)."""

    system_prompt_file: str | None = None
    """Text file whose content is sent as the system message of rows that have none."""

    processor: str | None = None
    """How a row is made ready, by NeMo RL's name: `math_hf_data_processor` in GRPO, `sft_processor` in SFT, or null."""

    env_name: str | None = None
    """GRPO and `evaluate`: the environment, a key of `env`, that scores completions."""


class DatasetConfig(DatasetDefaults):
    """One dataset. A key that the dataset named has no use for is refused unless it has its default value."""

    dataset_name: str
    """A dataset's name; docs/data.md lists them by algorithm."""

    rate: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1.0
    """In a list of training datasets: how often a row is drawn from this one, relative to the others' rates."""

    split: str | None = None
    """Which part of a dataset that has several."""

    subset: str | None = None
    """Which configuration of a hub dataset that has several."""

    split_validation_size: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the rows that is held out for validation; of preference pairs, the share of the questions."""

    seed: Annotated[int, Field(ge=0)] = 42
    """Seed of the held-out choice and of generated rows."""

    max_num_rows: Annotated[int, Field(ge=1)] | None = None
    """Use only the first rows."""

    max_samples: Annotated[int, Field(ge=1)] | None = None
    """NeMo RL's name of max_num_rows."""

    repeat: Annotated[int, Field(ge=1)] = 1
    """How often each row is in a pass. The copies of a GRPO prompt are sampled on their own; rows that are held out
    for validation stand there once."""

    data_path: str | None = None
    """A .jsonl, .json or .parquet file; a directory with the split's file or shards, or that `save_to_disk` wrote; or
    the name of a hub dataset. Null: the hub dataset that the name stands for."""

    input_key: str = "input"
    """The row's key that holds the prompt."""

    output_key: str | None = None
    """The row's key that holds the answer: in GRPO what is expected, which environments see as `answer`; in SFT what is
    learned (null: `output`, or OpenMathInstruct-2's `generated_solution`)."""

    chat_key: str = "messages"
    """openai_format: the row's key that holds the messages."""

    tool_key: str | None = "tools"
    """openai_format, PreferenceDataset and BinaryPreferenceDataset: the row's key that holds the tools which the chat
    template is given; a row may have none. Null: no key does."""

    prompt_key: str = "prompt"
    """BinaryPreferenceDataset, verl: the row's key that holds the prompt, a text or messages."""

    chosen_key: str = "chosen"
    """BinaryPreferenceDataset: the row's key that holds the better answer, a text or messages."""

    rejected_key: str = "rejected"
    """BinaryPreferenceDataset: the row's key that holds the worse answer, a text or messages."""

    pairs: Literal["all", "same_model", "one"] = "all"
    """gsm8k_solutions: every correct with every incorrect solution of a question, only those of two solutions from one
    model, or the first of each."""

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

    @field_validator("dataset_name")
    @classmethod
    def _name_is_known(cls, name: str) -> str:
        if name not in DATASETS:
            close = get_close_matches(name, DATASETS, n=1, cutoff=0.5)
            hint = f"Did you mean {close[0]!r}? " if close else ""
            raise ValueError(
                f"there is no such dataset. {hint}Known: {', '.join(DATASETS)}. For rows of your own use 'jsonl', "
                f"'alpaca', 'openai_format', 'PreferenceDataset' or 'BinaryPreferenceDataset' with data_path."
            )
        return name

    @model_validator(mode="after")
    def _every_key_has_a_use(self) -> DatasetConfig:
        fields, own = type(self).model_fields, DATASETS[self.dataset_name].keys
        values = {key: getattr(self, key) for key in sorted(_KEYS_OF_SOME.difference(own))}
        set_ones = {k: v for k, v in values.items() if v != fields[k].get_default(call_default_factory=True)}
        if set_ones:
            (key, value), *others = set_ones.items()
            also = f" (nor have {', '.join(f'{other}={found!r}' for other, found in others)})" if others else ""
            raise ValueError(
                f"{key}={value!r}: has no meaning with dataset_name={self.dataset_name!r}{also}, whose own keys are "
                f"{', '.join(sorted(own))}. Remove it; what another file set goes with `_override_: true` in this "
                f"block."
            )
        return self

    @property
    def row_limit(self) -> int | None:
        """How many rows are used at most."""
        return self.max_num_rows if self.max_samples is None else self.max_samples

    @model_validator(mode="after")
    def _one_limit(self) -> DatasetConfig:
        if self.max_samples is not None and self.max_num_rows not in (None, self.max_samples):
            raise ValueError(
                f"max_samples={self.max_samples}: is NeMo RL's name of max_num_rows, which is {self.max_num_rows}. "
                f"Set one of the two."
            )
        return self

    @model_validator(mode="after")
    def _needed_keys_are_given(self) -> DatasetConfig:
        dataset = DATASETS[self.dataset_name]
        if dataset.hub is None and dataset.generate is None and self.data_path is None:
            raise ValueError(f"data_path=None: dataset_name={self.dataset_name!r} needs a file. Give its path.")
        if self.dataset_name == "reasoning_gym" and self.task is None:
            raise ValueError("task=None: dataset_name='reasoning_gym' needs a task. Give one, such as 'chain_sum'.")
        if self.low > self.high:
            raise ValueError(f"low={self.low}: is above high={self.high}. Give low <= high.")
        return self


def keys_without_use(dataset_name: object) -> frozenset[str]:
    """Keys of a dataset block that the dataset named has no use for; empty where there is no such dataset."""
    dataset = DATASETS.get(str(dataset_name))
    return frozenset() if dataset is None else _KEYS_OF_SOME.difference(dataset.keys)


def _one_or_list(value: Any) -> str:
    return "list" if isinstance(value, list | tuple) else "one"


Datasets = Annotated[
    Annotated[DatasetConfig, Tag("one")] | Annotated[tuple[DatasetConfig, ...], Tag("list")],
    Discriminator(_one_or_list),  # so that an error is one of the form that was written
]


class DataConfig(Section):
    """Training and validation data. Every key of `default` that a dataset does not set itself is merged into it."""

    max_input_seq_length: Annotated[int, Field(ge=1)] | None = None
    """Longest input in tokens: in GRPO of a prompt, in SFT and DPO of a whole row. Null: only
    policy.max_total_sequence_length limits it."""

    on_long_prompt: Literal["error", "drop"] = "error"
    """What to do with a longer prompt, of GRPO or of `evaluate`: refuse the dataset, or leave the row out and say how
    many. SFT always cuts the end of a longer row and DPO always leaves a longer pair out; without `evaluate` both
    refuse `drop`."""

    on_bad_row: Literal["refuse", "skip"] = "refuse"
    """What to do with a row that cannot be used (its form is wrong, the chat template refuses it, it holds half of a
    character): refuse the dataset, or leave the row out and say how many."""

    num_checked_rows: Annotated[int, Field(ge=1)] = 50_000
    """How many rows of a dataset are tokenised and checked before a weight is loaded: those that are drawn first. The
    others of a larger one are checked when they are drawn."""

    on_change: Literal["refuse", "continue"] = "refuse"
    """What to do where a run is to continue on rows that are not, token for token, those it was trained on."""

    keep_nulls: bool = False
    """Keep the nulls inside columns of Parquet files, saved datasets and the hub: of a message without tool calls, say,
    where another has some. False leaves such keys out, since there every object has the keys of all."""

    shuffle: bool = True
    """Draw a new order of the training rows for each epoch, from the seed and the epoch."""

    add_bos: bool | None = None
    """SFT: true puts the tokenizer's beginning-of-sequence token first unless it is there; otherwise the chat template
    decides. DPO and GRPO always leave it to the template and refuse the key."""

    add_eos: bool | None = None
    """SFT: true puts the tokenizer's end-of-sequence token last unless the last answer ends with it, and learns it;
    otherwise the chat template decides. DPO: the same of both answers. GRPO refuses the key."""

    add_generation_prompt: bool | None = None
    """Whether the header of an assistant's turn is part of the prompt. SFT: false learns it like the answer; true or
    null does not. DPO and GRPO always end the prompt with it and refuse false."""

    train: Datasets | None = None
    """The rows to train on: a dataset or, in SFT and DPO, a list of datasets that are mixed by their rates."""

    validation: Datasets | None = None
    """The rows to validate on, besides those held out by `split_validation_size`: a dataset or a list of them."""

    default: DatasetDefaults | None = DatasetDefaults()
    """Keys for every dataset; null: none."""

    def sections(self, part: Literal["train", "validation"]) -> list[tuple[str, DatasetConfig]]:
        """The datasets of `train` or `validation`, each with the key at which it stands."""
        datasets = self.train if part == "train" else self.validation
        if datasets is None:
            return []
        if isinstance(datasets, DatasetConfig):
            return [(f"data.{part}", datasets)]
        return [(f"data.{part}.{number}", section) for number, section in enumerate(datasets)]

    @model_validator(mode="before")
    @classmethod
    def _merge_default(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        default = values.get("default") or {}
        merged = dict(values)
        if not isinstance(default, dict):
            return merged
        for key in ("train", "validation"):
            section = values.get(key)
            if isinstance(section, dict):
                merged[key] = {**default, **section}
            elif isinstance(section, list | tuple):
                merged[key] = [{**default, **item} if isinstance(item, dict) else item for item in section]
        return merged

    @model_validator(mode="after")
    def _lists_and_rates_have_a_use(self) -> DataConfig:
        for part in ("train", "validation"):
            if getattr(self, part) == ():
                raise ValueError(f"data.{part}=[]: a list of datasets needs at least one. Add one, or give null.")
        mixed = self.sections("train") if isinstance(self.train, tuple) else []
        for key, section in [*self.sections("train"), *self.sections("validation")]:
            if section.rate != 1.0 and (key, section) not in mixed:
                raise ValueError(
                    f"{key}.rate={section.rate}: has no meaning here, since rates mix a list of training datasets. "
                    f"Remove it."
                )
        return self
