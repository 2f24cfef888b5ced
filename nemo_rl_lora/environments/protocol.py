"""The verbs of an environment: it scores completions. It draws nothing and sees no token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from nemo_rl_lora.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """One finite reward for each completion; `metrics` are counts over this call."""

    rewards: tuple[float, ...]
    metrics: Mapping[str, float] = field(default_factory=dict)


class Environment(Protocol):
    @property
    def name(self) -> str:
        """The key of `env` by which a dataset selects it."""
        ...

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise ValueError, with the row's number, where a row lacks what scoring needs. Called before training."""
        ...

    def score(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> Scores:
        """Score `texts[i]` as a completion of `prompts[i]`."""
        ...

    def close(self) -> None: ...
