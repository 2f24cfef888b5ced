"""Who may use an engine: the thread that samples, a step at a time, or one that gives it weights, between two steps.

Contract: `step` and `update` exclude each other. An update waits for no more than the step that has begun; steps wait
until no update waits. `stop` ends sampling at its next step, for good.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class SamplingStopped(RuntimeError):  # noqa: N818
    """The engine is closed while completions were sampled."""


class Turns:
    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._is_taken = self._is_stopped = False
        self._num_updates = 0  # that wait, or have the engine

    @contextmanager
    def step(self) -> Iterator[None]:
        """One step of sampling. SamplingStopped after `stop`."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_stopped or not (self._is_taken or self._num_updates))
            if self._is_stopped:
                raise SamplingStopped("generation: the engine is closed.")
            self._is_taken = True
        try:
            yield
        finally:
            self._free()

    @contextmanager
    def update(self) -> Iterator[None]:
        """The engine, for as long as this takes."""
        with self._changed:
            self._num_updates += 1
            self._changed.wait_for(lambda: not self._is_taken)
            self._is_taken = True
        try:
            yield
        finally:
            self._num_updates -= 1
            self._free()

    def stop(self) -> None:
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()

    def _free(self) -> None:
        with self._changed:
            self._is_taken = False
            self._changed.notify_all()
