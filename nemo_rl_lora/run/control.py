"""How a run ends: signals that ask it to stop, and what each ending means to the shell.

Contract of exit codes: 0 completed; 2 the configuration, or what it names, cannot be run (one paragraph on
stderr, no traceback); 1 a failure while running (a short message; the traceback is in run.log of the log
directory); 128 + signal after a signal, when the run has saved.

    def main() -> int:
        ...                                     # a ValueError up to here is exit code 2
        with running(log_directory) as stop:
            train(..., stop)                    # reads stop.requested after every step, saves, returns
        return stop.exit_code

    sys.exit(main_guard(main))

It saves nothing itself and does not kill anything.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

logger = logging.getLogger(__name__)

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_CONFIG = 2
EXIT_SIGNAL = 128

# One Ctrl-C may arrive twice: from the terminal, and passed on by a parent such as `uv run`.
REPEAT_SECONDS = 0.5
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class RunFailedError(RuntimeError):
    """An exception that ended a run which had started; its cause is the exception."""

    def __init__(self, message: str, log_path: Path | None) -> None:
        super().__init__(message)
        self.log_path = log_path


class StopRequest:
    """Whether the run was asked to stop, by which signal. Reading it is cheap."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._signal: signal.Signals | None = None
        self._since = 0.0

    @property
    def requested(self) -> bool:
        return self._signal is not None

    @property
    def signal_name(self) -> str | None:
        return self._signal.name if self._signal is not None else None

    @property
    def exit_code(self) -> int:
        """0, or 128 + signal."""
        return EXIT_OK if self._signal is None else EXIT_SIGNAL + self._signal

    def handle(self, number: int, frame: FrameType | None = None) -> None:
        """The signal handler. A second SIGINT raises KeyboardInterrupt; a second SIGTERM changes nothing."""
        received = signal.Signals(number)
        if self._signal is None:
            self._signal, self._since = received, self._now()
            _say_from_handler(
                f"\n{received.name}: finishing this step, then saving and stopping (Ctrl-C again stops at once).\n"
            )
        elif received is signal.SIGINT and self._now() - self._since > REPEAT_SECONDS:
            raise KeyboardInterrupt


@contextmanager
def running(log_directory: Path | None = None) -> Iterator[StopRequest]:
    """The part of a program that trains: signals ask it to stop, and its failures are no configuration
    errors.

    Messages of the package go to `log_directory/run.log` as well. An exception leaves as RunFailedError from
    it. Outside the main thread no signal handler is installed.
    """
    stop = StopRequest()
    log_path = log_directory / "run.log" if log_directory is not None else None
    with _handlers(stop), _log_file(log_path):
        try:
            yield stop
        except Exception as error:
            logger.debug("the run failed", exc_info=True)
            if log_path is not None and not _write_traceback(log_path, error):
                log_path = None
            raise RunFailedError(_one_paragraph(error), log_path) from error


def main_guard(main: Callable[[], int]) -> int:
    """Run `main` and return the exit code, with what went wrong on stderr."""
    try:
        return main()
    except RunFailedError as error:
        if error.log_path is None:
            traceback.print_exception(error.__cause__)
        where = f"\nThe traceback is in {error.log_path}." if error.log_path is not None else ""
        _say(f"The run failed: {error}{where}")
        return EXIT_FAILURE
    except KeyboardInterrupt:
        _say("Interrupted. Nothing was saved since the last checkpoint.")
        return EXIT_SIGNAL + signal.SIGINT
    except ValueError as error:
        logger.debug("refused", exc_info=True)
        _say(f"Error: {_one_paragraph(error)}")
        return EXIT_CONFIG
    except Exception as error:
        traceback.print_exc()
        _say(f"Failed before the start: {_one_paragraph(error)}")
        return EXIT_FAILURE


@contextmanager
def _handlers(stop: StopRequest) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, stop.handle) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _log_file(path: Path | None) -> Iterator[None]:
    if path is None:
        yield
        return
    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    package = logging.getLogger("nemo_rl_lora")
    package.addHandler(handler)
    try:
        yield
    finally:
        package.removeHandler(handler)
        handler.close()


def _write_traceback(path: Path, error: Exception) -> bool:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(traceback.format_exception(error)))
    except OSError:  # the disk may be what failed
        return False
    return True


def _one_paragraph(error: BaseException) -> str:
    """The message of an exception without empty lines; the exception's type where the message says too
    little."""
    message = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    lines = [line.rstrip() for line in message.splitlines() if line.strip()]
    if isinstance(error, OSError) and error.filename:
        lines.append(f"({error.filename})")
    if not lines or not isinstance(error, (ValueError, OSError)):
        lines.insert(0, f"{type(error).__name__}:" if lines else type(error).__name__)
        return " ".join(lines[:2]) + "".join("\n" + line for line in lines[2:])
    return "\n".join(lines)


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def _say_from_handler(text: str) -> None:
    # A handler may interrupt a write to the same stream, which Python's buffered streams refuse.
    os.write(2, text.encode())
