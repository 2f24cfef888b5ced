"""The program of a worker process: it answers calls that come over a connection, and imports no torch by itself.

First comes (module, name, arguments): `module.name(*arguments)` is what answers, and its `facts` are the first reply.
Then come (number, request) pairs, to each of which the reply is (number, answer). It ends with the process that started
it, from within a call that never returns, too.
"""

from __future__ import annotations

import asyncio
import faulthandler
import fcntl
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any, Protocol


class Answering(Protocol):
    """What a worker makes of its first message."""

    facts: Any  # what the other side has to know of it
    is_async: bool  # whether calls are awaited, several at once

    def call(self, request: Any) -> Any: ...

    async def call_async(self, request: Any) -> Any: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """The first reply where what should answer could not be made."""

    problem: str
    notes: tuple[str, ...]


def main(descriptor: int) -> None:
    """Answer until the other end is closed."""
    connection = Connection(descriptor)
    os.set_inheritable(descriptor, False)
    _end_with_the_starter()
    faulthandler.enable()
    signal.signal(signal.SIGINT, _ignore)  # Ctrl-C is the starter's to handle; programs that a call runs get it again
    module, name, arguments = connection.recv()
    try:
        answering: Answering = getattr(import_module(module), name)(*arguments)
    except ValueError as error:
        connection.send(Refused(problem=str(error), notes=tuple(getattr(error, "__notes__", ()))))
        return
    connection.send(answering.facts)
    if answering.is_async:
        asyncio.run(_answer_at_once(connection, answering))
    else:
        _answer_in_turn(connection, answering)


def _answer_in_turn(connection: Connection, answering: Answering) -> None:
    while True:
        try:
            number, request = connection.recv()
        except (EOFError, OSError):
            return
        connection.send((number, answering.call(request)))


async def _answer_at_once(connection: Connection, answering: Answering) -> None:
    loop, closed = asyncio.get_running_loop(), asyncio.Event()
    tasks: set[asyncio.Task[None]] = set()

    async def answer(number: int, request: Any) -> None:
        connection.send((number, await answering.call_async(request)))

    def receive() -> None:
        try:
            number, request = connection.recv()
        except (EOFError, OSError):
            closed.set()
            loop.remove_reader(connection)
            return
        task = loop.create_task(answer(number, request))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    loop.add_reader(connection, receive)
    await closed.wait()


class TookTooLong(BaseException):  # noqa: N818
    """A call that is answered in turn is over its time. Not an Exception, so that no handler inside sympy swallows
    it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """TookTooLong after so many seconds, once Python's own code runs."""
    signal.signal(signal.SIGALRM, _raise_alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)


def _raise_alarm(signum: int, frame: Any) -> None:
    raise TookTooLong


def _ignore(*_: Any) -> None:
    pass


def _end_with_the_starter() -> None:
    """The starter holds the other end of stdin and never writes. When it is gone, the kernel sends SIGIO, which ends
    this process whatever it does; a thread that waits for that would not run while C code holds the interpreter."""
    lifeline = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
