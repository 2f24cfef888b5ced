"""Where a file is read by another process of this machine without a disk in between, and directories that end with the
process that made them.

Contract: a directory has a mark inside, which names its owner and which the owner holds locked. A process that is
killed leaves its directories to the next start (`remove_leftovers`), which removes those alone whose owner is gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

logger = logging.getLogger(__name__)

OWNER_FILE = ".owner"  # "process started", the seconds of its start
_PATH = Path("/dev/shm")
_PREFIX = "nrl-"
_SAME_START_SECONDS = 2  # the clock may have been set meanwhile
# Waits for the end of a pipe that nobody writes to: it ends with the process that holds its other side.
_REMOVE_AT_END = 'exec 3<&0; { cat; rm -rf -- "$@"; } <&3 >/dev/null 2>&1 &'


def shared_memory(num_bytes: int = 0) -> Path | None:
    """The directory whose files lie in memory, where it has so much room; None: the usual one for temporary files."""
    if not os.access(_PATH, os.W_OK) or shutil.disk_usage(_PATH).free < num_bytes:
        return None
    return _PATH


@contextlib.contextmanager
def owned_directory(prefix: str = _PREFIX, parent: Path | None = None) -> Iterator[Path]:
    """A new directory with this process's mark, among the usual ones for temporary files or in another parent. Removed
    at the end of the context, or by the start after this process was killed."""
    assert prefix.startswith(_PREFIX), prefix
    path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))  # the name is short, as sockets need it
    try:
        with (path / OWNER_FILE).open("w", encoding="utf-8") as mark:
            fcntl.flock(mark, fcntl.LOCK_EX)
            mark.write(f"{os.getpid()} {psutil.Process().create_time()}\n")
            mark.flush()
            yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def removed_at_end(paths: Sequence[Path]) -> Iterator[None]:
    """Remove these at the end of the context, or at once when this process ends, however it does."""
    reading, writing = os.pipe()
    try:
        command = ["sh", "-c", _REMOVE_AT_END, "sh", *map(str, paths)]
        subprocess.run(command, stdin=reading, start_new_session=True, check=True)
        os.close(reading)
        yield
    finally:
        os.close(writing)


@contextlib.contextmanager
def shared_directory(prefix: str, num_bytes: int = 0) -> Iterator[Path]:
    """Such a directory in shared memory, removed at once when this process ends, however it does."""
    with owned_directory(prefix, shared_memory(num_bytes)) as path, removed_at_end([path]):
        yield path


def mapped_files(prefixes: tuple[str, ...]) -> list[str]:
    """Files in shared memory that this process has mapped, whose names begin so."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    paths = {line.split(maxsplit=5)[-1] for line in lines if f" {_PATH}/" in line}
    return sorted(path for path in paths if Path(path).name.startswith(prefixes) and not path.endswith(" (deleted)"))


def remove_leftovers() -> None:
    """Remove the directories of processes of this user that are gone."""
    for parent in {Path(tempfile.gettempdir()), _PATH}:
        for path in filter(_is_left, parent.glob(f"{_PREFIX}*")):
            logger.info(f"removing {path}, left by a run that was killed")
            shutil.rmtree(path, ignore_errors=True)


def _is_left(path: Path) -> bool:
    """Whether a directory has such a mark, and its owner is gone: the lock shows one in another container too."""
    try:
        if path.is_symlink() or path.stat().st_uid != os.getuid():
            return False
        with (path / OWNER_FILE).open(encoding="utf-8") as mark:
            process, started = mark.read().split()
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return abs(psutil.Process(int(process)).create_time() - float(started)) > _SAME_START_SECONDS
    except psutil.NoSuchProcess:
        return True
    except (OSError, ValueError, psutil.Error):
        return False
