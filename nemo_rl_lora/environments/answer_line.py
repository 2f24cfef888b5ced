r"""Reward 1.0 where the last "Answer: ..." of a completion's end is written as the row's `answer`, else 0.0.

A row: {"question": "...", "answer": "\\frac{1}{2}"}. What DAPO trains with, and NeMo RL's `dapo_math_verify`: both
answers are brought to one spelling and compared as text, so that 0.5 is not \frac{1}{2}. The spelling is that of
Minerva (arXiv 2206.14858, appendix D.1), whose steps are taken in its order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from nemo_rl_lora.environments.math import answer_of
from nemo_rl_lora.environments.protocol import Environment, Scores
from nemo_rl_lora.types import Prompt

_END_CHARS = 300  # of a completion, in which its answer has to be
_ANSWER_LINE = re.compile(r"answer\s*:\s*([^\n]+)", re.IGNORECASE)
_REPLACED = (
    ("an ", ""),
    ("a ", ""),
    (".$", "$"),
    (r"\$", ""),
    (r"\ ", ""),
    (" ", ""),
    ("mbox", "text"),
    (r",\text{and}", ","),
    (r"\text{and}", ","),
    (r"\text{m}", r"\text{}"),
)
_UNITS = (
    *("square", "ways", "integers", "dollars", "mph", "inches", "hours", "km", "units", r"\ldots", "sue", "points"),
    *("feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges", "students"),
    *("childrentickets", "multiples", r"\text{s}", r"\text{.}", "\\text{\ns}", r"\text{}^2", r"\text{}^3"),
    *("\\text{\n}", r"\text{}", r"\mathrm{th}", r"^\circ", r"^{\circ}", r"\;", r",\!", "{,}", '"', r"\dots"),
)
_REWRITTEN = tuple(
    (re.compile(pattern), instead)
    for pattern, instead in (
        (r".*?\$(.*?)\$.*", r"$\1$"),
        (r"\\text\{(.*?)\}", r"\1"),
        (r"\\textbf\{(.*?)\}", r"\1"),
        (r"\\overline\{(.*?)\}", r"\1"),
        (r"\\boxed\{(.*)\}", r"\1"),
        (r"frac([^{])(.)", r"frac{\1}{\2}"),  # \frac12 is \frac{1}{2}
        (r"sqrt([^{])", r"sqrt{\1}"),
    )
)


class AnswerLineEnvironment(Environment):
    name = "math"

    def check(self, prompts: Iterable[Prompt]) -> None:
        for prompt in prompts:
            answer_of(prompt)

    def score(
        self, prompts: Sequence[Prompt], texts: Sequence[str], token_ids: Sequence[Sequence[int]] | None = None
    ) -> Scores:
        pairs = zip(prompts, texts, strict=True)
        return Scores(rewards=tuple(float(is_answered(answer_of(prompt), text)) for prompt, text in pairs))


def is_answered(answer: str, text: str) -> bool:
    """Whether the last answer in the end of `text` has the spelling of `answer`; without one it has not."""
    found = _ANSWER_LINE.findall(text[-_END_CHARS:])
    return bool(found) and one_spelling(found[-1]) == one_spelling(answer)


def one_spelling(answer: str) -> str:
    """What follows the last equals sign, without units, spaces and the dollars around it."""
    answer = answer.rpartition("=")[2]
    for written, instead in (*_REPLACED, *((unit, "") for unit in _UNITS)):
        answer = answer.replace(written, instead)
    for pattern, instead in _REWRITTEN:
        answer = pattern.sub(instead, answer)
    answer = answer.replace("$", "")
    digits = answer.replace(",", "")
    return digits if digits.isdigit() else answer.strip()
