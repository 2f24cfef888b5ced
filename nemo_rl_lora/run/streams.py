"""stdout and stderr that outlive a reader that is gone, a terminal that is closed and a disk that is full.

Contract: from the first write that fails on, what is written goes nowhere; the run that writes goes on, and one line in
the log says so. A stream that was closed before the start counts as one that failed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

logger = logging.getLogger(__name__)

_lost: list[str] = []  # a line for each stream that failed


def lost_streams() -> list[str]:
    """What was said of the streams that failed so far: a log that is opened later lacks it."""
    return list(_lost)


@contextlib.contextmanager
def lasting_streams() -> Iterator[None]:
    """sys.stdout and sys.stderr are such streams, until the end of the context."""
    before = sys.stdout, sys.stderr
    for number in range(3):  # else the next file that is opened would take the number, and what is written to it
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream: Any = getattr(sys, name)
        if stream is None:
            stream = os.fdopen(number, "w", encoding="utf-8", closefd=False)
            _say_lost(f"{name} is closed")
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # no character of a row ends a run
        setattr(sys, name, _LastingStream(stream, name))
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before


class _LastingStream:
    """A text stream whose writes do not fail."""

    def __init__(self, stream: Any, name: str) -> None:
        self._stream, self._name = stream, name

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _give_up(self, error: OSError) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())  # takes what is still in the stream's buffer, too
        os.close(nowhere)
        _say_lost(f"{self._name} can no longer be written ({error.strerror})")


def _say_lost(what: str) -> None:
    _lost.append(f"{what}: the run goes on, and its messages are in this log alone")
    logger.warning(_lost[-1])
