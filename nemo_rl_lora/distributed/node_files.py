"""A file of one node brought to another, in pieces that travel as Ray objects; and what a node sees of a shared disk.

Contract: bytes go from node to node once, a few pieces at a time, so that the object store never holds the whole file.
Files for several processes of a node are held there by a process of their own, which needs no device (`BroughtFiles`).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from nemo_rl_lora.distributed.shared_memory import shared_directory

PIECE_BYTES = 64 * 2**20
_AT_A_TIME = 2  # one is written while the next one travels
_VERSIONS = 2  # of a file, at once: readers of the one before keep it
_SEEN_SECONDS = 10  # a network file system may remember for a while that there was nothing


def num_pieces(num_bytes: int) -> int:
    return -(-num_bytes // PIECE_BYTES)


def piece_of(path: Path, number: int) -> np.ndarray:
    """Bytes of a file, [PIECE_BYTES] uint8 or less at its end."""
    return np.fromfile(path, dtype=np.uint8, count=PIECE_BYTES, offset=number * PIECE_BYTES)


def write_piece(path: Path, number: int, piece: np.ndarray) -> None:
    """The next piece of a file; the first one begins another file, and readers of the one before keep it."""
    if not number:
        path.unlink(missing_ok=True)
    with path.open("ab") as file:
        piece.tofile(file)


def bring(number: int, send: Callable[[int], Any], take: Callable[[int, Any], None]) -> None:
    """Each of `number` pieces: `send(i)` begins its way and returns a Ray object, `take(i, object)` waits for it."""
    under_way: deque[tuple[int, Any]] = deque()
    for index in range(number):
        under_way.append((index, send(index)))
        if len(under_way) == _AT_A_TIME:
            take(*under_way.popleft())
    while under_way:
        take(*under_way.popleft())


class _Holder:
    """The process that holds what was brought to its node: in shared memory where it has this room."""

    def __init__(self, num_bytes: int) -> None:
        self._files = contextlib.ExitStack()
        self._directory = self._files.enter_context(shared_directory("nrl-brought-", num_bytes))

    def take(self, name: str, number: int, piece: np.ndarray) -> str:
        """The next piece of a file; where it lies here."""
        path = self._directory / name
        path.parent.mkdir(exist_ok=True)
        write_piece(path, number, piece)
        return str(path)

    def drop(self, path: str) -> None:
        Path(path).unlink()
        with contextlib.suppress(OSError):  # it has others
            Path(path).parent.rmdir()


class BroughtFiles:
    """Files of this node on others. Each version of a file is brought once to a node, however many ask, at once or one
    after the other. What Ray raises comes through, and another process holds that node's files from then on."""

    def __init__(self) -> None:
        self._holders: dict[str, Any] = {}
        self._there: dict[tuple[str, Path], tuple[tuple[int, int], str]] = {}  # (node, path): (version, path there)
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)  # of a node

    def path_on(self, node: str, path: Path, seconds: float) -> str:
        """Where the file lies on a node, brought there now if it is not yet; each wait has this limit."""
        with self._locks[node]:
            found, version = self._there.get((node, path)), _version(path)
            if found is not None and found[0] == version:
                return found[1]
            try:
                there = self._bring(node, path, seconds)
            except RayError:
                self._forget(node)
                raise
            self._there[(node, path)] = version, there
            return there

    def drop(self, path: Path, seconds: float) -> None:
        """Remove a file from every node that has it. A node that is gone has none."""
        for node, name in [key for key in list(self._there) if key[1] == path]:
            with self._locks[node]:
                there = self._there.pop((node, name), None)
                if there is not None:
                    try:
                        ray.get(self._holders[node].drop.remote(there[1]), timeout=seconds)
                    except RayError:
                        self._forget(node)

    def close(self) -> None:
        for node in list(self._holders):
            self._forget(node)

    def _bring(self, node: str, path: Path, seconds: float) -> str:
        size = path.stat().st_size
        if node not in self._holders:
            holder: Any = ray.remote(num_cpus=0)(_Holder)
            strategy = NodeAffinitySchedulingStrategy(node, soft=False)
            self._holders[node] = holder.options(scheduling_strategy=strategy).remote(_VERSIONS * size)
        holder, name, there = self._holders[node], f"{path.parent.name}/{path.name}", ""

        def take(index: int, pending: Any) -> None:
            nonlocal there
            there = ray.get(pending, timeout=seconds)

        bring(num_pieces(size), lambda i: holder.take.remote(name, i, piece_of(path, i)), take)
        return there

    def _forget(self, node: str) -> None:
        ray.kill(self._holders.pop(node))
        for key in [key for key in list(self._there) if key[0] == node]:
            del self._there[key]


def _version(path: Path) -> tuple[int, int]:
    """Of a file that may have been written anew."""
    found = path.stat()
    return found.st_ino, found.st_mtime_ns


def sees(path: Path) -> bool:
    """Whether this node has the path, now or within a few seconds."""
    deadline = time.monotonic() + _SEEN_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def node_id() -> str:
    """Of the node that this process runs on."""
    return ray.get_runtime_context().get_node_id()
