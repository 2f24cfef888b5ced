"""The prompts of a GRPO run: rows made ready to be asked.

Every row is tokenised once at the start, to check its length, and again when it is asked, so that a large dataset
stays text.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from nemo_rl_lora.config.data import DataConfig, DatasetConfig
from nemo_rl_lora.data.chat import PromptFormat, encode, load_format
from nemo_rl_lora.data.datasets import Row, load_rows
from nemo_rl_lora.data.order import held_out
from nemo_rl_lora.data.sides import (
    RunConfig,
    refuse_held_out,
    refuse_processor,
    refuse_sft_keys,
    require_training,
)
from nemo_rl_lora.types import Prompt

logger = logging.getLogger(__name__)

_CHECKED_AT_ONCE = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthLimits:
    """Most tokens of a prompt, and of prompt and completion together."""

    max_prompt: int
    max_total: int

    def allows(self, num_tokens: int) -> bool:
        return num_tokens <= self.max_prompt and num_tokens < self.max_total


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """Rows of one dataset: those that share format and environment."""

    rows: tuple[Row, ...]
    format: PromptFormat
    environment: str


class PromptSet(Sequence[Prompt]):
    """Prompts by index. `Prompt.index` is the position here; it is stable for the same configuration."""

    def __init__(self, parts: Sequence[_Part], tokenizer: Any) -> None:
        self._parts = [part for part in parts if part.rows]
        self._tokenizer = tokenizer
        self._starts = np.cumsum([0, *(len(part.rows) for part in self._parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._starts, position, side="right")) - 1
        part = self._parts[number]
        row = part.rows[position - int(self._starts[number])]
        token_ids = encode(self._tokenizer, part.format, [row.question])[0]
        return _prompt(int(position), part, row, token_ids)

    def unencoded(self) -> Iterator[Prompt]:
        """Every prompt without its token ids, which is quick: for the environments' checks."""
        pairs = ((part, row) for part in self._parts for row in part.rows)
        for position, (part, row) in enumerate(pairs):
            yield _prompt(position, part, row, ())

    @property
    def environment_names(self) -> tuple[str, ...]:
        """The environments that score these prompts."""
        return tuple(dict.fromkeys(part.environment for part in self._parts))


def _prompt(index: int, part: _Part, row: Row, token_ids: tuple[int, ...]) -> Prompt:
    return Prompt(
        index=index,
        token_ids=token_ids,
        text=part.format.user_text(row.question),
        row=row.row,
        environment=part.environment,
    )


def load_prompt_sets(config: RunConfig, tokenizer: Any) -> tuple[PromptSet, PromptSet | None]:
    """Training and validation prompts. Validation rows are those held out of training, then `data.validation`'s."""
    data = config.data
    require_training(data)
    refuse_sft_keys(data, "GRPO")
    ((_, section),) = _one(data, "train")
    train, held_out_rows = _split(_load_part(section, "data.train"), section)
    validation = [held_out_rows]
    for key, section in _one(data, "validation"):
        refuse_held_out(section, key)
        validation.append(_load_part(section, key))
    limits = _limits(config)
    train_set = PromptSet([_within(train, limits, data, tokenizer)], tokenizer)
    validation_set = PromptSet([_within(part, limits, data, tokenizer) for part in validation], tokenizer)
    return train_set, validation_set if len(validation_set) else None


def load_prompts(section: DatasetConfig, tokenizer: Any, *, config: RunConfig, key: str) -> PromptSet:
    """All rows of one dataset, which stands at `key` of the configuration."""
    part = _within(_load_part(section, key), _limits(config), config.data, tokenizer)
    return PromptSet([part], tokenizer)


def _one(data: DataConfig, part: Literal["train", "validation"]) -> list[tuple[str, DatasetConfig]]:
    """The dataset of a side, if there is one. Raises ValueError for a list."""
    sections = data.sections(part)
    if isinstance(getattr(data, part), tuple):
        names = ", ".join(section.dataset_name for _, section in sections)
        raise ValueError(f"data.{part}=[{names}]: GRPO draws its prompts from one dataset. Give one, without a list.")
    return sections


def _load_part(section: DatasetConfig, key: str) -> _Part:
    refuse_processor(section, key, "GRPO", "math_hf_data_processor")
    if section.env_name is None:
        raise ValueError(f"{key}.env_name=None: GRPO needs an environment. Name one, for example 'math'.")
    prompt_format = load_format(section, key)
    rows = load_rows(section, key)
    return _Part(rows=tuple(rows), format=prompt_format, environment=section.env_name)


def _split(part: _Part, section: DatasetConfig) -> tuple[_Part, _Part]:
    """Training rows and held-out rows, both in the dataset's order."""
    is_held_out = held_out(len(part.rows), section, "data.train")
    kept = tuple(row for row, held in zip(part.rows, is_held_out, strict=True) if not held)
    held = tuple(row for row, held in zip(part.rows, is_held_out, strict=True) if held)
    return replace(part, rows=kept), replace(part, rows=held)


def _limits(config: RunConfig) -> LengthLimits:
    max_total = config.policy.max_total_sequence_length
    max_prompt = config.data.max_input_seq_length
    return LengthLimits(max_prompt=max_total if max_prompt is None else max_prompt, max_total=max_total)


def _within(part: _Part, limits: LengthLimits, data: DataConfig, tokenizer: Any) -> _Part:
    """The part without its too long rows, or an error, as `data.on_long_prompt` says."""
    lengths: list[int] = []
    for start in range(0, len(part.rows), _CHECKED_AT_ONCE):
        questions = [row.question for row in part.rows[start : start + _CHECKED_AT_ONCE]]
        lengths += [len(ids) for ids in encode(tokenizer, part.format, questions)]
    long = [i for i, length in enumerate(lengths) if not limits.allows(length)]
    if not long:
        return part
    key, first = part.format.key, long[0]
    if data.on_long_prompt == "error":
        raise ValueError(
            f"data.max_input_seq_length={data.max_input_seq_length!r}: {len(long)} of {len(lengths)} prompts of {key} "
            f"are longer than {limits.max_prompt} tokens or leave no room for a completion in "
            f"policy.max_total_sequence_length={limits.max_total}; the first is row {first} with {lengths[first]} "
            f"tokens, the longest has {max(lengths)}. Raise the limits, or set data.on_long_prompt=drop."
        )
    if len(long) == len(lengths):
        raise ValueError(
            f"data.on_long_prompt='drop': all {len(lengths)} prompts of {key} are longer than {limits.max_prompt} "
            f"tokens or leave no room in policy.max_total_sequence_length={limits.max_total}. Raise the limits."
        )
    logger.warning(f"{key}: {len(long)} of {len(lengths)} rows are left out, their prompts being too long")
    dropped = set(long)
    return replace(part, rows=tuple(row for i, row in enumerate(part.rows) if i not in dropped))
