"""Reward 1.0 where the last integer of a completion is the row's `answer`, otherwise 0.0.

A row: {"a": 3, "b": 4, "answer": 7}. Thousands separators and decimals are not understood: "1,024" ends in 24.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from nemo_rl_lora.environments.protocol import Environment, Scores
from nemo_rl_lora.types import Prompt

_INTEGER = re.compile(r"-?\d+")


class LastNumberEnvironment(Environment):
    name = "last_number"

    def check(self, prompts: Iterable[Prompt]) -> None:
        for prompt in prompts:
            _expected(prompt)

    def score(
        self, prompts: Sequence[Prompt], texts: Sequence[str], token_ids: Sequence[Sequence[int]] | None = None
    ) -> Scores:
        pairs = zip(prompts, texts, strict=True)
        return Scores(rewards=tuple(float(last_integer(text) == _expected(prompt)) for prompt, text in pairs))


def last_integer(text: str) -> int | None:
    """The last integer in `text`. Python limits the digits that it converts, so a run of more is no number here."""
    digits = _INTEGER.findall(text)
    return int(digits[-1]) if digits and len(digits[-1]) < 4000 else None


def _expected(prompt: Prompt) -> int:
    answer = prompt.row.get("answer")
    if isinstance(answer, int) and not isinstance(answer, bool):
        return answer
    text = str(answer).strip().replace(",", "")
    if not _INTEGER.fullmatch(text):
        raise ValueError(
            f"env.last_number: {prompt.named} has answer={answer!r}, which is no integer. Correct the row, set "
            f"data.train.output_key, or score with another environment (data.train.env_name)."
        )
    return int(text)
