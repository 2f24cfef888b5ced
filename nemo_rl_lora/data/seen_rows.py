"""What was seen of rows when they were tokenised, kept on disk: a second start does not tokenise them again.

A file is named by everything that decides what is seen: the stored rows, the tokenizer, the template, the clock that it
reads, the `data` block, the text of the prompt files, the limits, and the code. Nothing is kept of what took no time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from nemo_rl_lora.data.rows import TooLongError
from nemo_rl_lora.models.source import cache_directory

logger = logging.getLogger(__name__)

_PACKAGES = ("transformers", "tokenizers", "jinja2")


@dataclass(frozen=True, slots=True)
class Seen:
    """A row that was looked at: its digest and whether it ends a turn, or why it cannot be used."""

    digest: bytes = b""
    has_end: bool | None = None
    problem: str | None = None
    too_long: TooLongError | None = None


def recipe_of(tokenizer: Any, *settings: Any) -> bytes:
    """The digest of how rows become tokens: the tokenizer, its template, and settings whose repr says all of them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    keywords = getattr(tokenizer.apply_chat_template, "keywords", {})
    parts = (
        sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str(),
        tokenizer.chat_template,
        {name: getattr(value, "__self__", value) for name, value in keywords.items()},  # of the clock: its moment
        tokenizer.special_tokens_map,
        _code(),
        settings,
    )
    return hashlib.sha256("\n".join(map(repr, parts)).encode(errors="backslashreplace")).digest()


@cache
def _code() -> str:
    """Of this room's source, and the versions of what it calls."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest() + repr([metadata.version(name) for name in _PACKAGES])


def place_of(recipe: bytes, rows: Iterable[Any]) -> Path:
    """Where is kept what is seen of these stored rows by this recipe."""
    digest = hashlib.sha256(recipe)
    for row in rows:
        digest.update(json.dumps(row, default=str).encode())
        digest.update(b"\n")
    return cache_directory() / "rows" / f"{digest.hexdigest()}.json"


def read_seen(place: Path) -> list[Seen] | None:
    """What is kept there; None where nothing is that can be read."""
    try:
        stored = json.loads(place.read_text(encoding="utf-8"))
        return [
            Seen(bytes.fromhex(digest), has_end, problem, None if long is None else TooLongError(*long))
            for digest, has_end, problem, long in stored
        ]
    except (OSError, ValueError, TypeError):
        return None


def write_seen(place: Path, seen: Iterable[Seen]) -> None:
    """Keep it, where the disk lets us."""
    stored = [
        (one.digest.hex(), one.has_end, one.problem, one.too_long and (one.too_long.place, one.too_long.num_tokens))
        for one in seen
    ]
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        written = place.with_suffix(f".{os.getpid()}")
        written.write_text(json.dumps(stored), encoding="utf-8")
        written.replace(place)
    except OSError as error:
        logger.info(f"{place.parent} keeps nothing of the rows that were checked ({error})")
