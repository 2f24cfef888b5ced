"""Reward 1.0 where a completion's boxed or last mathematical expression equals the row's `answer` (math-verify).

A row: {"question": "...", "answer": "\\frac{1}{2}"}; math_forms.py says how answers may be written. Verification runs
in processes of its own, which import no torch, start when they are first needed and are ended when one completion takes
longer than its time.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence

from nemo_rl_lora.config.errors import show
from nemo_rl_lora.environments.math_worker import TIMED_OUT, Verdict, Verifier
from nemo_rl_lora.environments.processes import Failed, Program, TimedWorkers
from nemo_rl_lora.environments.protocol import Environment, Scores
from nemo_rl_lora.types import Prompt

logger = logging.getLogger(__name__)

_PLAIN_NUMBER = re.compile(r"-?\d+(\.\d+)?")
_MOST_READ_FIRST = 5_000  # different answers that are no plain numbers; 9 ms each
_MOST_SHOWN = 5


class MathEnvironment(Environment):
    name = "math"

    def __init__(self, num_workers: int, timeout_seconds: float) -> None:
        program = Program(
            module=Verifier.__module__, name=Verifier.__name__, key="env.math", imports="math-verify", is_quiet=True
        )
        self._workers = TimedWorkers(program, num_workers, timeout_seconds)

    def check(self, prompts: Iterable[Prompt]) -> None:
        """Warns of rows whose answer cannot be read, no completion of which is ever right; ValueError for a row without
        an answer, or where no answer can be read."""
        places: dict[str, list[str]] = {}  # of the rows that have an answer
        num_rows = 0
        for prompt in prompts:
            gold, num_rows = answer_of(prompt), num_rows + 1
            if not _PLAIN_NUMBER.fullmatch(gold):
                places.setdefault(gold, []).append(prompt.named)
        read = list(places)[:_MOST_READ_FIRST]
        if len(read) < len(places):
            logger.info(f"env.math: {len(read)} of {len(places)} different answers are read at the start")
        verdicts = self._verify(read, [""] * len(read))
        unreadable = [gold for gold, each in zip(read, verdicts, strict=True) if each.unreadable_gold or each.timed_out]
        num_unreadable = sum(len(places[gold]) for gold in unreadable)
        if not num_unreadable:
            return
        shown = "; ".join(f"{places[gold][0]} has {show(gold)}" for gold in unreadable[:_MOST_SHOWN])
        problem = (
            f"env.math: {num_unreadable} of {num_rows} rows have an answer that cannot be read as mathematics, so that "
            f"no completion of theirs is ever right: {shown}{'; ...' if len(unreadable) > _MOST_SHOWN else ''}. Write "
            f"a number or LaTeX, with words inside \\text{{}}, or score with a reward of your own."
        )
        if num_unreadable == num_rows:
            raise ValueError(problem)
        logger.warning(problem)

    def score(
        self, prompts: Sequence[Prompt], texts: Sequence[str], token_ids: Sequence[Sequence[int]] | None = None
    ) -> Scores:
        verdicts = self._verify([answer_of(prompt) for prompt in prompts], texts)
        return Scores(
            rewards=tuple(verdict.reward for verdict in verdicts),
            metrics={
                "math_verify_timeouts": float(sum(verdict.timed_out for verdict in verdicts)),
                "math_unreadable_answers": float(sum(verdict.unreadable_gold for verdict in verdicts)),
            },
        )

    def close(self) -> None:
        self._workers.close()

    def _verify(self, golds: Sequence[str], texts: Sequence[str]) -> list[Verdict]:
        answers = self._workers.answers(list(zip(golds, texts, strict=True)))
        return [TIMED_OUT if isinstance(answer, Failed) else answer for answer in answers]


def answer_of(prompt: Prompt) -> str:
    """The answer that a row expects. ValueError where it has none."""
    answer = prompt.row.get("answer")
    if answer is None or not (text := str(answer).strip()):
        raise ValueError(
            f"env.math: {prompt.named} has answer={answer!r}. Correct the row, or set data.train.output_key to the key "
            f"that holds the expected answer."
        )
    return text
