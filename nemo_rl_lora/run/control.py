"""How a run ends: signals that ask it to stop, and what each ending means to the shell.

Contract of exit codes: 0 completed; 2 the configuration, or what it names, cannot be run (one paragraph on
stderr, no traceback); 1 a failure while running (a short message; the traceback is in run.log of the log
directory); 128 + signal after a signal, when the run has saved, or where it had not begun to train.

    def main() -> int:
        ...                                     # a ValueError up to here is exit code 2
        with running(log_directory) as stop:
            train(..., stop)                    # reads stop.requested after every step, saves, returns
        return stop.exit_code

    sys.exit(main_guard(main))

It saves nothing itself and does not kill anything.
"""

from __future__ import annotations

import _thread
import errno
import logging
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from nemo_rl_lora.config.errors import ConfigError
from nemo_rl_lora.config.master import EvalMaster, MasterConfig
from nemo_rl_lora.run.memory import what_takes_less
from nemo_rl_lora.run.streams import lasting_streams, lost_streams

logger = logging.getLogger(__name__)

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_CONFIG = 2
EXIT_SIGNAL = 128

STARTED = "NEMO_RL_LORA_STARTED"  # `process:seconds`, from a process to what it replaces itself with

# One Ctrl-C may arrive twice: from the terminal, and passed on by a parent such as `uv run`.
REPEAT_SECONDS = 0.5
_ANSWER_SECONDS = 0.2
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class RunFailedError(RuntimeError):
    """An exception that ended a run which had started; its cause is the exception."""

    def __init__(self, message: str, log_path: Path | None) -> None:
        super().__init__(message)
        self.log_path = log_path


class RunLostError(RuntimeError):
    """A run has lost processes or its engine. The message is the paragraph that the user sees."""

    def __init__(self, message: str, *, starts_again: bool) -> None:
        super().__init__(message)
        self.starts_again = starts_again


class StoppedAtOnceError(KeyboardInterrupt):
    """A signal ended a command that had nothing to save. Like its base, no `except Exception` takes it."""

    def __init__(self, number: int, *, was_said: bool = False) -> None:
        self.exit_code, self.was_said = EXIT_SIGNAL + number, was_said
        name = signal.Signals(number).name
        super().__init__(f"{name}: ended at once: nothing had to be saved.")


class StopRequest:
    """Whether the run was asked to stop, by which signal. Reading it is cheap."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._signal: signal.Signals | None = None
        self._since = 0.0
        self._is_starting = False

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

    @contextmanager
    def starting(self) -> Iterator[None]:
        """While the run is put together: a signal ends it at once."""
        self._is_starting = True
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:  # a library may turn the one into the other
            if self._signal is None:
                raise
            raise self._stopped(self._signal) from error
        finally:
            self._is_starting = False
        if self._signal is not None:
            raise self._stopped(self._signal)

    def _stopped(self, number: signal.Signals) -> StoppedAtOnceError:
        stopped = StoppedAtOnceError(number, was_said=True)
        logger.warning(stopped)
        return stopped

    def handle(self, number: int, frame: FrameType | None = None) -> None:
        """The signal handler. A second SIGINT raises KeyboardInterrupt; a second SIGTERM or SIGHUP changes nothing."""
        received = signal.Signals(number)
        if self._signal is None:
            self._signal, self._since = received, self._now()
            if self._is_starting:
                raise KeyboardInterrupt
            # What the handler interrupts may hold a lock of the log: another thread says it, waited for a moment.
            said = threading.Event()
            _thread.start_new_thread(_say_stopping, (received.name, said))
            said.wait(_ANSWER_SECONDS)
        elif received is signal.SIGINT and self._now() - self._since > REPEAT_SECONDS:
            raise KeyboardInterrupt


@contextmanager
def running(
    log_directory: Path | None = None, config: MasterConfig | EvalMaster | None = None
) -> Iterator[StopRequest]:
    """The part of a program that trains: signals ask it to stop, and its failures are no configuration
    errors, but for a ConfigError.

    Messages of the package go to `log_directory/run.log` as well. An exception leaves as RunFailedError from
    it. Outside the main thread no signal handler is installed.
    """
    stop = StopRequest()
    log_path = log_directory / "run.log" if log_directory is not None else None
    with _handlers(stop.handle, _SIGNALS), _log_file(log_path):
        try:
            yield stop
        except ConfigError:  # what only the cluster could show
            raise
        except Exception as error:
            logger.debug("the run failed", exc_info=True)
            if log_path is not None and not _write_traceback(log_path, error):
                log_path = None
            raise RunFailedError(_one_paragraph(error, config), log_path) from error


def _say_stopping(name: str, said: threading.Event) -> None:
    logger.warning(f"{name}: finishing this step, then saving and stopping (Ctrl-C again stops at once).")
    said.set()


def main_guard(main: Callable[[], int]) -> int:
    """Run `main` and return the exit code, with what went wrong on stderr."""
    with lasting_streams(), _handlers(_stop_at_once, (signal.SIGTERM, signal.SIGHUP)):
        return _guarded(main)


def _guarded(main: Callable[[], int]) -> int:
    try:
        return main()
    except StoppedAtOnceError as error:
        if not error.was_said:
            _say(str(error))
        return error.exit_code
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
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:  # nobody else makes such a name
            _say(f"Error: {error.filename!r}: is too long a name for a file. Shorten it.")
            return EXIT_CONFIG
        traceback.print_exc()
        _say(f"Failed before the start: {_one_paragraph(error)}")
        return EXIT_FAILURE


def _stop_at_once(number: int, frame: FrameType | None) -> None:
    raise StoppedAtOnceError(number)


@contextmanager
def _handlers(handle: Callable[[int, FrameType | None], None], numbers: Sequence[signal.Signals]) -> Iterator[None]:
    """These signals are handled so, but for a SIGHUP that is ignored, as under nohup."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    taken = [number for number in numbers if not (ignored and number is signal.SIGHUP)]
    previous = {number: signal.signal(number, handle) for number in taken}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _LogFile(logging.FileHandler):
    """Says once where it cannot be written, in place of a traceback for every message."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        _say(f"{self.baseFilename} can no longer be written ({sys.exc_info()[1]}): messages are shown here alone.")
        logging.getLogger("nemo_rl_lora").removeHandler(self)


@contextmanager
def _log_file(path: Path | None) -> Iterator[None]:
    if path is None:
        yield
        return
    handler = _LogFile(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    package = logging.getLogger("nemo_rl_lora")
    for line in lost_streams():
        handler.handle(logging.makeLogRecord({"name": __name__, "levelname": "WARNING", "msg": line}))
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


def _one_paragraph(error: BaseException, config: MasterConfig | EvalMaster | None = None) -> str:
    """The message of an exception without empty lines; the exception's type where the message says too
    little; where memory is what was missing, which of the configuration's keys take less."""
    message = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    lines = [line.rstrip() for line in message.splitlines() if line.strip()]
    if isinstance(error, OSError) and error.filename:
        lines.append(f"({error.filename})")
    if not lines or not isinstance(error, (ValueError, OSError, RunLostError)):
        lines[:1] = [f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__]
    return "\n".join([*lines, *what_takes_less(error, config), *getattr(error, "__notes__", ())])


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
