"""Every dataset: its names, its own keys, where its rows come from and what they become in GRPO, SFT and DPO.

A dataset is added by one entry, with a file of its own where its rows need logic. Pure at import: the configuration
reads names and keys here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from nemo_rl_lora.data.competition_math import competition_question, dapo_question
from nemo_rl_lora.data.generated_sums import generate_sums, sum_question
from nemo_rl_lora.data.gsm8k import gsm8k_question, gsm8k_solution, marked_solutions
from nemo_rl_lora.data.open_math_instruct import open_math_question, open_math_solution
from nemo_rl_lora.data.own_rows import (
    alpaca_answer,
    alpaca_question,
    chat,
    chosen_pair,
    own_answer,
    own_question,
    ranked_pair,
    verl_question,
)
from nemo_rl_lora.data.preference_sets import help_steer_pair, tulu_pair
from nemo_rl_lora.data.reasoning_gym import generate_gym_rows, gym_question
from nemo_rl_lora.data.rows import Message, Pair, Question, Row
from nemo_rl_lora.data.squad import squad_answer

if TYPE_CHECKING:
    from nemo_rl_lora.config.data import DatasetConfig

Algorithm = Literal["grpo", "sft", "dpo"]
_KINDS = {"grpo": "prompts", "sft": "conversations", "dpo": "preference pairs"}
_SOURCE = ("data_path", "split", "subset")


class HubDataset(NamedTuple):
    """What is asked of the Hugging Face hub."""

    name: str
    subset: str | None = None
    split: str = "train"


@dataclass(frozen=True, slots=True)
class Dataset:
    """A dataset. Its rows are generated, or come from `data_path`, or from the hub if it has a place there."""

    names: tuple[str, ...]
    keys: tuple[str, ...]  # of data.train and data.validation, besides those that every dataset has
    hub: HubDataset | None = None
    generate: Callable[[DatasetConfig, str], Iterator[dict[str, Any]]] | None = None  # (section, its key)
    prompt: Callable[[Row], Question] | None = None
    conversation: Callable[[Row], list[Message]] | None = None
    pairs: Callable[[Row], list[Pair]] | None = None  # a row may have none

    def reader(self, algorithm: Algorithm) -> Callable[[Row], Any] | None:
        """What makes the algorithm's input of a row, if the dataset has any."""
        return {"grpo": self.prompt, "sft": self.conversation, "dpo": self.pairs}[algorithm]


_CATALOG = (
    Dataset(("generated_sums",), ("low", "high", "num_rows"), generate=generate_sums, prompt=sum_question),
    Dataset(("reasoning_gym",), ("task", "size", "task_config"), generate=generate_gym_rows, prompt=gym_question),
    Dataset(("openai_format",), (*_SOURCE, "chat_key", "tool_key"), conversation=chat),
    Dataset(("squad",), _SOURCE, HubDataset("rajpurkar/squad"), conversation=squad_answer),
    Dataset(("tulu3_sft_mixture",), _SOURCE, HubDataset("allenai/tulu-3-sft-mixture"), conversation=chat),
    Dataset(
        ("jsonl", "ResponseDataset"),
        (*_SOURCE, "input_key", "output_key"),
        prompt=own_question,
        conversation=own_answer,
    ),
    Dataset(("verl",), (*_SOURCE, "prompt_key"), prompt=verl_question),
    Dataset(("alpaca",), (*_SOURCE, "output_key"), prompt=alpaca_question, conversation=alpaca_answer),
    Dataset(
        ("OpenMathInstruct-2",),
        (*_SOURCE, "output_key"),
        HubDataset("nvidia/OpenMathInstruct-2", split="train_1M"),
        prompt=open_math_question,
        conversation=open_math_solution,
    ),
    Dataset(
        ("DeepScaler",),
        _SOURCE,
        HubDataset("agentica-org/DeepScaleR-Preview-Dataset"),
        prompt=competition_question,
    ),
    Dataset(("AIME2024",), _SOURCE, HubDataset("HuggingFaceH4/aime_2024"), prompt=competition_question),
    Dataset(("DAPOMath17K",), _SOURCE, HubDataset("BytedTsinghua-SIA/DAPO-Math-17k"), prompt=dapo_question),
    Dataset(("DAPOMathAIME2024",), _SOURCE, HubDataset("BytedTsinghua-SIA/AIME-2024"), prompt=dapo_question),
    Dataset(
        ("gsm8k", "GSM8K"),
        _SOURCE,
        HubDataset("openai/gsm8k", subset="main"),
        prompt=gsm8k_question,
        conversation=gsm8k_solution,
    ),
    Dataset(("PreferenceDataset",), (*_SOURCE, "tool_key"), pairs=ranked_pair),
    Dataset(
        ("BinaryPreferenceDataset",),
        (*_SOURCE, "prompt_key", "chosen_key", "rejected_key", "tool_key"),
        pairs=chosen_pair,
    ),
    Dataset(("HelpSteer3",), _SOURCE, HubDataset("nvidia/HelpSteer3", subset="preference"), pairs=help_steer_pair),
    Dataset(
        ("Tulu3Preference",),
        _SOURCE,
        HubDataset("allenai/llama-3.1-tulu-3-8b-preference-mixture"),
        pairs=tulu_pair,
    ),
    Dataset(("gsm8k_solutions",), ("data_path", "split", "pairs"), pairs=marked_solutions),
)
DATASETS = {name: dataset for dataset in _CATALOG for name in dataset.names}


def tools_of(row: Row) -> list[dict[str, Any]] | None:
    """The tools that a row's chat may call, where its dataset has any."""
    return row.tools() if "tool_key" in DATASETS[row.section.dataset_name].keys else None


def names_for(algorithm: Algorithm) -> list[str]:
    """The datasets that have rows for an algorithm."""
    return [name for name, dataset in DATASETS.items() if dataset.reader(algorithm) is not None]


def require_reader(algorithm: Algorithm, section: DatasetConfig, key: str) -> Callable[[Row], Any]:
    """What makes the algorithm's input of a row. ValueError where the dataset at `key` has no rows of that kind."""
    reader = DATASETS[section.dataset_name].reader(algorithm)
    if reader is None:
        raise ValueError(
            f"{key}.dataset_name={section.dataset_name!r}: holds no {_KINDS[algorithm]} for {algorithm.upper()}. Use "
            f"one of {', '.join(names_for(algorithm))}."
        )
    return reader
