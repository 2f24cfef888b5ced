"""The verbs of an environment: it scores completions. It draws nothing and sees no token."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from nemo_rl_lora.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """One finite reward for each completion; `metrics` are counts over this call."""

    rewards: tuple[float, ...]
    metrics: Mapping[str, float] = field(default_factory=dict)


class Environment(ABC):
    name: str  # the key of `env` by which a dataset selects it

    @abstractmethod
    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise ValueError, with the row's number, where a row lacks what scoring needs. Called before training."""

    @abstractmethod
    def score(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> Scores:
        """Score `texts[i]` as a completion of `prompts[i]`."""

    def close(self) -> None:  # noqa: B027
        """End what scoring started; most start nothing."""
