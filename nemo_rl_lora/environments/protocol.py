"""The verbs of an environment: it scores completions. It draws nothing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
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
    def check(self, prompts: Iterable[Prompt]) -> None:
        """Raise ValueError, with the row's place, where a row lacks what scoring needs. Called before training."""

    @abstractmethod
    def score(
        self, prompts: Sequence[Prompt], texts: Sequence[str], token_ids: Sequence[Sequence[int]] | None = None
    ) -> Scores:
        """Score `texts[i]`, of the tokens `token_ids[i]`, as a completion of `prompts[i]`."""

    def code_digest(self) -> str | None:
        """Of the user's code that scores; None where the code is the package's."""
        return None

    def close(self) -> None:  # noqa: B027
        """End what scoring started; most start nothing."""
