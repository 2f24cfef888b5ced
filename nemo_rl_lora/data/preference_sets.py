"""Preference sets of the hub with a form of their own: HelpSteer3 and the mixture of Tulu 3."""

from __future__ import annotations

from dataclasses import replace

from nemo_rl_lora.data.own_rows import answer, asked, pair
from nemo_rl_lora.data.rows import Pair, Row


def help_steer_pair(row: Row) -> list[Pair]:
    """A row: {"context": [messages], "response1": "...", "response2": "...", "overall_preference": -2}; negative
    prefers the first, and 0 makes no pair."""
    preference = row.value("overall_preference")
    if not isinstance(preference, int | float):
        raise row.error(f"has overall_preference={preference!r}, and a number is needed")
    prompt = asked(row, "context")
    first, second = (answer(row, prompt, name) for name in ("response1", "response2"))
    if preference == 0:
        return []
    return [pair(row, prompt, first, second) if preference < 0 else pair(row, prompt, second, first)]


def tulu_pair(row: Row) -> list[Pair]:
    """A row: {"chosen": [messages], "rejected": [messages]}, two chats that begin with the same prompt."""
    shared = row.messages("chosen")[:-1]
    if not shared:
        raise row.error("has chosen with one message, and a prompt is needed before it")
    prompt = asked(replace(row, values={"prompt": shared}), "prompt")
    return [pair(row, prompt, answer(row, prompt, "chosen"), answer(row, prompt, "rejected"))]
