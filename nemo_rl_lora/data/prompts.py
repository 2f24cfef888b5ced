"""The prompts of a run: rows made ready to be asked, and the order in which they are.

Every row is tokenised once at the start, to check its length, and again when it is asked, so that a large dataset
stays text. The order of an epoch is a pure function of (seed, epoch).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from nemo_rl_lora.config.data import DataConfig, DatasetConfig
from nemo_rl_lora.data.chat import PromptFormat, encode, load_format
from nemo_rl_lora.data.datasets import Row, load_rows
from nemo_rl_lora.types import Prompt

logger = logging.getLogger(__name__)

_EPOCH_ORDER, _HELD_OUT = 2, 3  # purposes of a draw, beside the seed
_CHECKED_AT_ONCE = 1024


class _HasLength(Protocol):
    @property
    def max_total_sequence_length(self) -> int: ...


class RunConfig(Protocol):
    """What is read of the whole configuration."""

    @property
    def data(self) -> DataConfig: ...

    @property
    def policy(self) -> _HasLength: ...


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
    _check_grpo_keys(data)
    if data.train is None:
        raise ValueError("data.train=None: training needs a dataset. Set data.train.dataset_name.")
    train, held_out = _split(_load_part(data.train, "data.train"), data.train)
    validation = [held_out]
    if data.validation is not None:
        _check_nothing_held_out(data.validation)
        validation.append(_load_part(data.validation, "data.validation"))
    limits = _limits(config)
    train_set = PromptSet([_within(train, limits, data, tokenizer)], tokenizer)
    validation_set = PromptSet([_within(part, limits, data, tokenizer) for part in validation], tokenizer)
    return train_set, validation_set if len(validation_set) else None


def load_prompts(section: DatasetConfig, tokenizer: Any, *, config: RunConfig, key: str) -> PromptSet:
    """All rows of one dataset, which stands at `key` of the configuration."""
    part = _within(_load_part(section, key), _limits(config), config.data, tokenizer)
    return PromptSet([part], tokenizer)


def epoch_order(seed: int, epoch: int, num_rows: int, shuffle: bool) -> np.ndarray:
    """The rows' order in an epoch, [num_rows] int64; the same for the same arguments."""
    if not shuffle:
        return np.arange(num_rows)
    return np.random.default_rng([seed, _EPOCH_ORDER, epoch]).permutation(num_rows)


class PromptLoader(Iterator[list[Prompt]]):
    """Batches of prompts, epoch after epoch; the rows left over at the end of an epoch are not asked in it.

    `epoch` and `offset` are the position of the next batch. With `num_epochs` it stops after so many.
    """

    def __init__(
        self, prompts: PromptSet, num_prompts: int, *, seed: int, shuffle: bool, num_epochs: int | None = None
    ) -> None:
        if not 0 < num_prompts <= len(prompts):
            raise ValueError(
                f"grpo.num_prompts_per_step={num_prompts}: the training data has {len(prompts)} rows. Give at most "
                f"so many, or more data."
            )
        self._prompts, self._num_prompts = prompts, num_prompts
        self._seed, self._shuffle, self._num_epochs = seed, shuffle, num_epochs
        self.epoch, self.offset = 0, 0
        self._order = epoch_order(seed, 0, len(prompts), shuffle)

    @property
    def num_batches_per_epoch(self) -> int:
        return len(self._prompts) // self._num_prompts

    @property
    def is_at_end_of_epoch(self) -> bool:
        """Whether the next batch begins another epoch."""
        return self.offset + self._num_prompts > len(self._prompts)

    def __next__(self) -> list[Prompt]:
        if self.offset + self._num_prompts > len(self._prompts):
            self._move_to(self.epoch + 1, 0)
        if self._num_epochs is not None and self.epoch >= self._num_epochs:
            raise StopIteration
        indices = self._order[self.offset : self.offset + self._num_prompts]
        self.offset += self._num_prompts
        return [self._prompts[int(index)] for index in indices]

    def state(self) -> dict[str, Any]:
        """The position, and what it is a position in; plain JSON values."""
        return {
            "epoch": self.epoch,
            "offset": self.offset,
            "num_rows": len(self._prompts),
            "seed": self._seed,
            "shuffle": self._shuffle,
        }

    def from_state(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position. Raises ValueError if it is one in other data."""
        for name in ("num_rows", "seed", "shuffle"):
            if state[name] != self.state()[name]:
                raise ValueError(
                    f"data.train: the checkpoint's data position is one in data with {name}={state[name]!r}, and "
                    f"now {name}={self.state()[name]!r}. Continue with the same data, or start anew."
                )
        self._move_to(int(state["epoch"]), int(state["offset"]))

    def _move_to(self, epoch: int, offset: int) -> None:
        if epoch != self.epoch:
            self._order = epoch_order(self._seed, epoch, len(self._prompts), self._shuffle)
        self.epoch, self.offset = epoch, offset


def _check_grpo_keys(data: DataConfig) -> None:
    """Refuse keys of the schema that have a meaning in SFT only."""
    for name in ("add_bos", "add_eos"):
        if getattr(data, name) is not None:
            raise ValueError(
                f"data.{name}={getattr(data, name)!r}: has no meaning in GRPO, where the chat template writes the "
                f"prompt's tokens and the policy its own. Remove it."
            )
    if data.add_generation_prompt is False:
        raise ValueError(
            "data.add_generation_prompt=False: GRPO always ends the prompt with the assistant's header. Remove it."
        )


def _check_nothing_held_out(section: DatasetConfig) -> None:
    if section.split_validation_size:
        raise ValueError(
            f"data.validation.split_validation_size={section.split_validation_size}: only training rows can be held "
            f"out for validation. Remove it."
        )


def _load_part(section: DatasetConfig, key: str) -> _Part:
    if section.processor not in (None, "math_hf_data_processor"):
        raise ValueError(
            f"{key}.processor={section.processor!r}: GRPO has 'math_hf_data_processor' only, which asks the row's "
            f"question as one user message. Use that or null."
        )
    if section.env_name is None:
        raise ValueError(f"{key}.env_name=None: GRPO needs an environment. Name one, for example 'math'.")
    prompt_format = load_format(section, key)
    rows = load_rows(section, key)
    return _Part(rows=tuple(rows), format=prompt_format, environment=section.env_name)


def _split(part: _Part, section: DatasetConfig) -> tuple[_Part, _Part]:
    """Training rows and held-out rows, both in the dataset's order."""
    num_rows = len(part.rows)
    num_held_out = round(num_rows * section.split_validation_size)
    if section.split_validation_size and not 0 < num_held_out < num_rows:
        raise ValueError(
            f"data.train.split_validation_size={section.split_validation_size}: holds out {num_held_out} of "
            f"{num_rows} rows, and at least one row must be on each side. Change it, or set it to 0."
        )
    drawn = np.random.default_rng([section.seed, _HELD_OUT]).permutation(num_rows)[:num_held_out]
    chosen = set(drawn.tolist())
    kept = tuple(row for i, row in enumerate(part.rows) if i not in chosen)
    held = tuple(row for i, row in enumerate(part.rows) if i in chosen)
    return (
        _Part(rows=kept, format=part.format, environment=part.environment),
        _Part(rows=held, format=part.format, environment=part.environment),
    )


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
    rows = tuple(row for i, row in enumerate(part.rows) if i not in dropped)
    return _Part(rows=rows, format=part.format, environment=part.environment)
