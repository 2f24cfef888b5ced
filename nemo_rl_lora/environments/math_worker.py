"""Whether a completion is right, by math-verify: what `math` runs in worker processes.

A computation inside compiled code does not see the alarm: the driver's process ends this one then.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

from nemo_rl_lora.environments.math_forms import Form, completion_form, plain_form
from nemo_rl_lora.environments.worker import TookTooLong, time_limit


class Verdict(NamedTuple):
    """What became of a completion."""

    reward: float  # 0 or 1
    timed_out: bool = False
    unreadable_gold: bool = False  # the gold answer cannot be read as mathematics


TIMED_OUT = Verdict(reward=0.0, timed_out=True)


def verify(gold: str, text: str) -> Verdict:
    """Whether the last expression of `text`, or the boxed one, equals `gold`, both in the forms of math_forms.py.

    A percentage equals its number and its hundredth, too, unless the other side is a percentage as well.
    """
    from math_verify import verify as equal

    form = plain_form(gold)
    expected, gold_is_percentage = _values(Form(f"\\boxed{{{form.text}}}", form.is_percentage))
    if form.is_prose or not expected or isinstance(expected[0], str):
        return Verdict(reward=0.0, unreadable_gold=True)
    found, is_percentage = _values(completion_form(text))
    if gold_is_percentage and not is_percentage:
        expected = _with_hundredth(expected)
    if is_percentage and not gold_is_percentage:
        found = _with_hundredth(found)
    return Verdict(reward=float(equal(expected, found, timeout_seconds=None)))


def _values(form: Form) -> tuple[list[Any], bool]:
    """What math-verify reads, the number alone of a percentage, and whether it is one."""
    from math_verify import parse
    from math_verify.grader import get_pct_val

    values = parse(form.text, parsing_timeout=None)  # type: ignore[arg-type]
    number = get_pct_val(values[0]) if values else None
    return (values, form.is_percentage) if number is None else ([number], True)


def _with_hundredth(values: list[Any]) -> list[Any]:
    from sympy import Expr

    return [*values, *(value / 100 for value in values if isinstance(value, Expr))]


class Verifier:
    """What answers in a worker."""

    facts, is_async = None, False

    def __init__(self) -> None:
        logging.disable(logging.CRITICAL)
        verify("1", "1")  # imports sympy before the first clock runs

    def call(self, request: tuple[str, str, float]) -> Verdict:
        """Of a gold answer, a completion and the seconds that they may take."""
        gold, text, timeout_seconds = request
        try:
            with time_limit(timeout_seconds):
                return verify(gold, text)
        except (TookTooLong, RecursionError, MemoryError):
            return TIMED_OUT

    async def call_async(self, request: tuple[str, str, float]) -> Verdict:
        return self.call(request)
