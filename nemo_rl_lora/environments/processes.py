"""Calls in worker processes, with a limit to each; a process that ends, or has to be ended, is replaced.

Each is a fresh interpreter (worker.py) in a session of its own, started when it is first needed and ended with whatever
it started. Any thread may call.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from queue import LifoQueue, SimpleQueue
from typing import Any, Literal, TypeVar

from nemo_rl_lora.environments.worker import Refused

T = TypeVar("T")

_GRACE_SECONDS = 0.5  # for a worker that keeps its calls' time itself
_START_SECONDS = 300.0
_END_SECONDS = 1.0  # from a closed connection to the exit code
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from nemo_rl_lora.environments.worker import main; main(int(sys.argv[2]))"
)

FailureKind = Literal["exception", "exit", "crash", "timeout", "value"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """Instead of an answer: what became of a call."""

    kind: FailureKind
    text: str  # "left with exit code 3"
    trace: str = ""
    index: int = 0  # of the completion, in a call for several
    was_shared: bool = False  # other calls were made to the process, and any of them may have ended it


_CLOSED = Failed(kind="crash", text="was ended with the run")


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What answers in a worker: `module.name(*arguments)`."""

    module: str
    name: str
    arguments: tuple[Any, ...] = ()
    key: str  # for messages
    imports: str  # what it imports first, for messages
    is_quiet: bool = False  # whether what it writes to stdout and stderr is left out


class Workers:
    """Up to `num_workers` processes, and one more for calls that have to be alone."""

    def __init__(self, program: Program, num_workers: int) -> None:
        self._places = [_Place(program) for _ in range(num_workers + 1)]
        self._alone = threading.Lock()  # for the last place
        # last in, first out: a process that was used is taken before one that was never started
        self._free: LifoQueue[_Place] = LifoQueue()
        self._end = weakref.finalize(self, _end_all, self._places, os.getpid())

    def facts(self) -> Any:
        """Of what answers; the first process is started. ValueError where it cannot be."""
        return self._places[0].process().facts

    def admit(self, num_calls: int) -> None:
        """Let so many calls in at once, spread over the processes. More than one to a process needs async ones."""
        for number in reversed(range(num_calls)):
            self._free.put(self._places[number % (len(self._places) - 1)])

    def call(self, request: Any, seconds: float | None) -> Any:
        """The answer, or Failed. A call whose process ended with several in it is made again, alone."""
        place = self._free.get()
        try:
            answer = place.process().call(request, seconds)
        finally:
            self._free.put(place)
        if not (isinstance(answer, Failed) and answer.was_shared):
            return answer
        with self._alone:
            return self._places[-1].process().call(request, seconds)

    def pids(self) -> list[int]:
        """Of the processes that run."""
        return [place.current.pid for place in self._places if place.current is not None and not place.current.is_over]

    def close(self) -> None:
        """End all, and the calls in them."""
        self._end()


def in_order(call: Callable[[int], T], num: int, at_once: int) -> list[T]:
    """[call(0), ..., call(num - 1)] from up to `at_once` threads. What the first that fails raises is raised at once.

    The threads are daemons: a call that never returns does not keep the interpreter from ending.
    """
    if min(at_once, num) <= 1:
        return [call(index) for index in range(num)]
    done: SimpleQueue[tuple[int, T | None, BaseException | None]] = SimpleQueue()
    indices = iter(range(num))
    taking, stopped = threading.Lock(), threading.Event()

    def work() -> None:
        while not stopped.is_set():
            with taking:
                index = next(indices, None)
            if index is None:
                return
            try:
                done.put((index, call(index), None))
            except BaseException as error:  # raised in the thread that waits
                done.put((index, None, error))

    answers: dict[int, Any] = {}
    try:
        for _ in range(min(at_once, num)):
            threading.Thread(target=work, daemon=True, name="scoring").start()
        while len(answers) < num:
            index, answers[index], error = done.get()
            if error is not None:
                raise error
    finally:
        stopped.set()
    return [answers[index] for index in range(num)]


class TimedWorkers(Workers):
    """Processes that take one call at a time each and keep its time themselves; no more than there are cores."""

    def __init__(self, program: Program, num_workers: int, timeout_seconds: float) -> None:
        self._num_at_once = max(1, min(num_workers, len(os.sched_getaffinity(0))))
        self._timeout_seconds = timeout_seconds
        super().__init__(program, self._num_at_once)
        self.admit(self._num_at_once)

    def answers(self, requests: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The answer to each request, or Failed. What answers gets the seconds of a call as the request's last part."""
        seconds = self._timeout_seconds
        return in_order(
            lambda index: self.call((*requests[index], seconds), seconds + _GRACE_SECONDS),
            len(requests),
            self._num_at_once,
        )


class _Place:
    """A process, or none yet, or one that is to be replaced."""

    def __init__(self, program: Program) -> None:
        self.current: _Process | None = None
        self._program = program
        self._starting = threading.Lock()
        self._is_closed = False

    def process(self) -> _Process:
        """One that is ready. ValueError where it cannot be started."""
        with self._starting:
            if self.current is not None and not self.current.is_over:
                return self.current
            self.current = process = _Process(self._program)
            if self._is_closed:  # close() may have looked before the line above
                process.end(_CLOSED)
                raise RuntimeError(f"{self._program.key}: is closed, and was called.")
            process.wait_until_ready(self._program)
            return process

    def close(self) -> None:
        self._is_closed = True
        if self.current is not None:
            self.current.end(_CLOSED)


def _end_all(places: Sequence[_Place], owner: int) -> None:
    if os.getpid() == owner:  # in a fork the processes are not its own
        for place in places:
            place.close()


class _Process:
    """One worker process, from its start to its end."""

    def __init__(self, program: Program) -> None:
        self._connection, theirs = Pipe()
        self._pending: dict[int, Future[Any]] = {}
        self._numbers = itertools.count()
        self._sending, self._state = threading.Lock(), threading.Lock()
        self._how: Failed | None = None
        self.facts: Any = None
        output = subprocess.DEVNULL if program.is_quiet else None
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-c", _PROGRAM, json.dumps(sys.path), str(theirs.fileno())],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self.pid = self._process.pid

    def wait_until_ready(self, program: Program) -> None:
        """ValueError where it refuses, ends, or takes too long."""
        try:
            self._connection.send((program.module, program.name, program.arguments))
            is_in_time = self._connection.poll(_START_SECONDS)
            first = self._connection.recv() if is_in_time else None
        except (EOFError, OSError):
            raise ValueError(
                f"{program.key}: a process of its own {self.end().text} while it imported {program.imports}. Correct "
                f"what is imported."
            ) from None
        if isinstance(first, Refused):
            self.end(_CLOSED)
            error = ValueError(first.problem)
            for note in first.notes:
                error.add_note(note)
            raise error
        if not is_in_time:
            self.end(_CLOSED)
            raise ValueError(
                f"{program.key}: a process of its own was not ready after {_START_SECONDS:.0f} s, in which it imported "
                f"{program.imports}. Import less, or do what takes long in the first call."
            )
        self.facts = first
        threading.Thread(target=self._receive, daemon=True, name="worker replies").start()

    @property
    def is_over(self) -> bool:
        with self._state:
            return self._how is not None or self._has_exited()

    def call(self, request: Any, seconds: float | None) -> Any:
        """The answer, or Failed; beyond `seconds` the process is ended."""
        number, future = next(self._numbers), Future[Any]()
        with self._state:
            if self._how is not None:  # it ended by another call, or with the run
                return replace(self._how, was_shared=self._how is not _CLOSED)
            self._pending[number] = future
        try:
            with self._sending:
                self._connection.send((number, request))
            return future.result(seconds)
        except TimeoutError:
            self.end(Failed(kind="timeout", text="took longer"))
        except OSError:  # it does not read any more
            self.end()
        return future.result()

    def end(self, why: Failed | None = None) -> Failed:
        """End it and what it started; its calls get Failed. How it ended: `why`, or as its exit code says."""
        with self._state:
            if self._how is None:
                if why is None:
                    self._wait_for_exit()
                os.killpg(self.pid, signal.SIGKILL)  # until it is waited for, its number is nobody else's
                code = self._process.wait()
                assert self._process.stdin is not None
                self._process.stdin.close()
                self._how = why or _failed(code)
                calls = list(self._pending.values())
                self._pending.clear()
                for call in calls:
                    call.set_result(replace(self._how, was_shared=len(calls) > 1))
            return self._how

    def _receive(self) -> None:
        """Give the replies to their calls, until the process ends."""
        try:
            while True:
                number, answer = self._connection.recv()
                with self._state:
                    call = self._pending.pop(number, None)
                if call is not None:
                    call.set_result(answer)
        except (EOFError, OSError):
            return
        finally:
            self.end()
            with self._sending:  # else the rest of a request could go to whoever gets the number of the descriptor next
                self._connection.close()

    def _wait_for_exit(self) -> None:
        """Its connection is closed, so it is about to exit: its own exit code is worth a moment."""
        until = time.monotonic() + _END_SECONDS
        while not self._has_exited() and time.monotonic() < until:
            time.sleep(0.005)

    def _has_exited(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _failed(code: int) -> Failed:
    if code >= 0:
        return Failed(kind="exit", text=f"left with exit code {code}")
    return Failed(kind="crash", text=f"was ended by {signal.Signals(-code).name}")
