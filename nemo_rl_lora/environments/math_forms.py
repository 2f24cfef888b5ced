"""How an answer is written before math-verify reads it: the row's, and what a completion puts into a box.

`plain_form` has the rule, by which an answer as people write it becomes one that math-verify reads as it was meant.
Nothing here computes.
"""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

_SYMBOLS = {"−": "-", "×": "\\times ", "÷": "\\div ", "π": "\\pi ", "∞": "\\infty ", "°": "^\\circ ", "≤": "\\le "}
_SYMBOLS |= {"≥": "\\ge ", "\u00a0": " ", "\u202f": " ", "\u2009": " "}
_FRACTIONS = {c: " " + unicodedata.normalize("NFKC", c).replace("\u2044", "/") for c in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"}
_FUNCTIONS = r"(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|log|exp|sqrt|max|min|gcd|lcm|mod|and|deg"
_NUMBER = r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+|\d+/\d+)"

_AROUND = re.compile(r"\$\$(.+)\$\$|\$([^$]+)\$|\\\((.+)\\\)|\\\[(.+)\\\]|\*\*(.+)\*\*", re.DOTALL)
_LAST_STOP = re.compile(r"(?<!\\)[.,;:]+$")
_CURRENCY = re.compile(r"^(-?)\s*(?:\\?\$|[€£¥₹])\s*(?=-?[\d.])")
_PERCENT = re.compile(r"(?:\s|\\ )*(?:\\?%|\bper\s?cent|\\text\{\s*per\s?cent\s*\})$")
_MIXED = re.compile(r"(?<![\w.,/^{-])(-?)(\d{1,9}) +(\d{1,9})/(\d{1,9})(?![\w/])")
_GROUPED = re.compile(r"-?\d{1,3}(?:(?:[ _]|\{,\}|\\,|,\\!)\d{3})+(?:\.\d+)?")
_SCIENTIFIC = re.compile(r"(-?\d+(?:\.\d+)?)[eE]([+-]?\d+)")
_WITH_UNIT = re.compile(rf"({_NUMBER})\s+(?!(?:{_FUNCTIONS})\b)[A-Za-z]{{3}}[A-Za-z /.-]*")
_ROOT = re.compile(r"(?:√|(?<![\\A-Za-z])sqrt)\s*(?:\(([^()]+)\)|(\w+))")
_NAMES = {"pi": "pi", "infinity": "infty"}
_NAME = re.compile(r"(?<![\\A-Za-z])(?:pi|infinity)(?![A-Za-z])")
_NO_PROSE = re.compile(r"\\(?:text\w*|math\w+|mbox|operatorname|begin|end)\{[^{}]*\}|\\[A-Za-z]+")
_WORD = re.compile(rf"(?<![A-Za-z])(?!(?:{_FUNCTIONS})(?![A-Za-z]))(?:no(?![A-Za-z])|[A-Za-z]{{3,}})")


class Form(NamedTuple):
    """What math-verify is to read."""

    text: str
    is_percentage: bool  # its sign is not in `text`

    @property
    def is_prose(self) -> bool:
        """Whether it has a word outside `\\text{}`, which math-verify would read as a product of letters. Three letters
        or more are a word, and "no"; a product's letters stand in the alphabet's order: abc, xyz."""
        words = _WORD.findall(_NO_PROSE.sub(" ", self.text))
        return any(word == "no" or word != "".join(sorted(set(word))) for word in words)


def plain_form(answer: str) -> Form:
    """An answer in one form, whichever of these it is written in.

    What counts is the last `\\boxed{}`, or what follows the last `####`, without dollar signs or the like around it, a
    full stop after it and a currency before it. `50%`, `50\\%` and `50 percent` are percentages, `1 1/2` is a mixed
    number, `1 000`, `1{,}000` and `1e3` are one thousand. A unit after a number (`7 apples`) is left out.
    """
    spans = _boxes(answer)
    text = answer[slice(*spans[-1])] if spans else answer.rpartition("####")[2]
    text, before = "".join(_SYMBOLS.get(c, c) for c in text), None
    while text != before:
        before, text = text, _LAST_STOP.sub("", text.strip().removeprefix("=")).strip()
        if around := _AROUND.fullmatch(text):
            text = next(group for group in around.groups() if group is not None)
    text = _CURRENCY.sub(r"\1", text)
    number = _PERCENT.sub("", text)
    is_percentage, text = number != text, _as_fractions(number)
    if _GROUPED.fullmatch(text):
        text = re.sub(r"[^\d.-]", "", text)
    elif found := _SCIENTIFIC.fullmatch(text):
        text = f"{found[1]} \\cdot 10^{{{int(found[2])}}}"
    elif found := _WITH_UNIT.fullmatch(text):
        text = found[1]
    text = _ROOT.sub(lambda root: f"\\sqrt{{{root[1] or root[2]}}}", text)
    return Form(_NAME.sub(lambda name: f"\\{_NAMES[name[0]]} ", text), is_percentage)


def completion_form(text: str) -> Form:
    """A completion in which every box holds a plain form; without a box its mixed numbers are written as fractions."""
    spans = _boxes(text)
    if not spans:
        return Form(_as_fractions(text).replace("\\$", "$"), False)
    parts, end, form = [], 0, Form("", False)
    for first, last in spans:
        form = plain_form(text[first:last])
        parts += [text[end:first], form.text]
        end = last
    return Form("".join([*parts, text[end:]]), form.is_percentage)


def _boxes(text: str) -> list[tuple[int, int]]:
    """Where the content of each `\\boxed{}` begins and ends; one that is never closed is none."""
    spans: list[tuple[int, int]] = []
    for opened in re.finditer(r"\\(?:f?boxed)\s*\{", text):
        depth, place = 1, opened.end()
        if spans and place <= spans[-1][1]:
            continue  # a box in a box
        while depth and place < len(text):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            place += 1
        if depth == 0:
            spans.append((opened.end(), place - 1))
    return spans


def _as_fractions(text: str) -> str:
    text = re.sub(f"[{''.join(_FRACTIONS)}]", lambda found: _FRACTIONS[found[0]], text).removeprefix(" ")

    def improper(found: re.Match[str]) -> str:
        whole, part, of = map(int, found.groups()[1:])
        return f"{found[1]}{whole * of + part}/{of}" if part < of else found[0]

    return _MIXED.sub(improper, text)
