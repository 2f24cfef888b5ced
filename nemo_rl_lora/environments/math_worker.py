"""The program that a verification process runs: JSON requests on stdin, JSON replies on stdout, one a line.

Request {"gold": str, "text": str, "timeout_seconds": float}; reply {"reward": 0.0 or 1.0, "timed_out": bool}. A second
reply key, "unreadable_gold", is true where the gold answer holds no expression. A computation inside compiled code
does not see the alarm: the parent process ends this one then.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from typing import Any


class _AlarmError(BaseException):
    """Not an Exception, so that no handler inside sympy swallows it."""


def verify(gold: str, text: str) -> dict[str, Any]:
    """Whether the last expression of `text`, or the boxed one, equals `gold`."""
    from math_verify import parse
    from math_verify import verify as equal

    expected = parse("\\boxed{" + gold + "}", parsing_timeout=None)  # type: ignore[arg-type]
    found = parse(text, parsing_timeout=None)  # type: ignore[arg-type]
    right = bool(expected) and equal(expected, found, timeout_seconds=None)
    return {"reward": float(right), "timed_out": False, "unreadable_gold": not expected}


def _with_alarm(request: dict[str, Any]) -> dict[str, Any]:
    signal.setitimer(signal.ITIMER_REAL, request["timeout_seconds"])
    try:
        return verify(request["gold"], request["text"])
    except (_AlarmError, RecursionError, MemoryError):
        return {"reward": 0.0, "timed_out": True, "unreadable_gold": False}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)


def main() -> None:
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints must not pass for a reply
    logging.disable(logging.CRITICAL)

    def raise_alarm(signum: int, frame: Any) -> None:
        raise _AlarmError

    signal.signal(signal.SIGALRM, raise_alarm)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    verify("1", "1")  # imports sympy before the first clock runs
    print(json.dumps({"ready": True}), file=replies, flush=True)  # noqa: T201
    for line in sys.stdin:
        print(json.dumps(_with_alarm(json.loads(line))), file=replies, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
