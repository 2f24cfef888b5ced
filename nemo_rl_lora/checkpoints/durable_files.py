"""Files of a step directory: flushed to disk, checksummed, verified, and removed so that no half is ever
found.

Contract: every error names the file, or the configuration key, and the way out. It knows nothing of what the
files hold. A directory is removed only where a mark inside says that it is unfinished and this product's; what others
put into a finished one is moved out before.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from nemo_rl_lora.tensors import file_digest

logger = logging.getLogger(__name__)

CHECKSUMS_FILE = "checksums.json"
MARK_FILE = ".nemo-rl-lora"
TMP_PREFIX = "tmp_"
REPLACED_PREFIX = f"{TMP_PREFIX}old_"  # of what has a name, while the new one gets it
KEPT_PREFIX = "kept_from_"  # of what others put into a directory that went
LOW_SPACE_BYTES = 64 * 1024


class DamagedError(ValueError):
    """A file of a step is not what was saved. `what` says how, after the file's name."""

    def __init__(self, directory: Path, name: str, what: str) -> None:
        super().__init__(
            f"{directory / name}: {what}: the checkpoint is damaged. Remove {directory} or set "
            "checkpointing.on_damage=previous to continue from the step before it, name another step with "
            "checkpointing.load_path, or start over with checkpointing.load_path=none."
        )
        self.path = directory / name
        self.what = what


def probe_directory(directory: Path, key: str, *, required_bytes: int = 0) -> None:
    """Make a directory and write into it, to learn now what would fail later. ValueError under the config's
    `key`.

    Directories that were made for a failed attempt are removed again.
    """
    missing = list[Path]()
    try:
        missing = [path for path in (directory, *directory.parents) if not path.exists()]
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:  # has no name that could be taken
            file.write(b"\0" * LOW_SPACE_BYTES)
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(directory).free
    except OSError as error:
        _remove_empty(missing)
        remedy = "Free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "Make it writable"
        raise ValueError(
            f"{key}={str(directory)!r}: cannot be written ({error.strerror}). {remedy}, or name another directory."
        ) from error
    if free < required_bytes:
        _remove_empty(missing)
        raise ValueError(
            f"{key}={str(directory)!r}: has {free:,} bytes free, and one checkpoint needs "
            f"{required_bytes:,}. Free some space, or name another directory."
        )


def write_checksums(directory: Path) -> None:
    """Write checksums.json: sha256 and size of every file in the directory."""
    sums = {name: _digest(directory / name) for name in file_names(directory)}
    (directory / CHECKSUMS_FILE).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")


def renew_checksum(directory: Path, name: str) -> None:
    """Write checksums.json anew, with what one file has now. Of the others it says what it said."""
    sums = {**read_json_file(directory, CHECKSUMS_FILE), name: _digest(directory / name)}
    replace_text(directory / CHECKSUMS_FILE, json.dumps(sums, indent=2) + "\n")


def replace_text(path: Path, text: str) -> None:
    """A new file in the place of one that may be a hard link, of which the other name keeps its contents."""
    path.unlink()
    path.write_text(text, encoding="utf-8")


def link_tree(directory: Path, unfinished: Path) -> None:
    """Fill an unfinished directory with the files of another one, as hard links: nothing is copied. OSError where the
    file system has none."""
    for path in sorted(directory.rglob("*")):
        target = unfinished / path.relative_to(directory)
        if path.is_dir() and not path.is_symlink():
            target.mkdir()
        elif path.name != MARK_FILE:
            os.link(path, target, follow_symlinks=False)


def verify_files(directory: Path, names: Iterable[str] | None = None) -> None:
    """Compare files with checksums.json, all of them or those named. DamagedError names the file that differs.

    Files that were added later are no concern of it.
    """
    sums = read_json_file(directory, CHECKSUMS_FILE)
    for name in sums if names is None else names:
        path = directory / name
        if name not in sums or not path.is_file():
            raise DamagedError(directory, name, "is missing")
        expected, found = sums[name], _digest(path)
        if found["bytes"] != expected["bytes"]:
            raise DamagedError(directory, name, f"has {found['bytes']:,} bytes instead of {expected['bytes']:,}")
        if found["sha256"] != expected["sha256"]:
            raise DamagedError(directory, name, "has other contents than when it was saved (sha256 differs)")


def refuse_damaged(directory: Path, paths: Iterable[Path], remedy: str) -> None:
    """ValueError with this remedy where one of these files of a step is not what was saved."""
    try:
        verify_files(directory, [path.relative_to(directory).as_posix() for path in paths])
    except DamagedError as error:
        raise ValueError(f"{error.path} {error.what}: it is damaged. {remedy}") from error


def read_json_file(directory: Path, name: str) -> dict[str, Any]:
    """A JSON object among the files of a step. DamagedError where it is missing or damaged."""
    try:
        content = json.loads((directory / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DamagedError(directory, name, "is missing") from None
    except (OSError, ValueError) as error:
        raise DamagedError(directory, name, f"cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise DamagedError(directory, name, "holds no JSON object")
    return content


def file_names(directory: Path) -> list[str]:
    """The files of a directory and of those in it, but for the mark."""
    files = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    return sorted(name for name in files if name != MARK_FILE)


def _digest(path: Path) -> dict[str, Any]:
    return {"sha256": file_digest(path), "bytes": path.stat().st_size}


def flush_tree(directory: Path) -> None:
    """Flush a directory and all that is in it to disk."""
    for path in directory.rglob("*"):
        flush(path)
    flush(directory)


def flush(path: Path) -> None:
    """Flush a file, or the names in a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def written_whole(
    final: Path, on_full_disk: Callable[[], Exception] | None = None, make_way: Callable[[], None] | None = None
) -> Iterator[Path]:
    """An unfinished directory to fill. After the block it is flushed and gets the name `final`, from what may have it;
    where anything fails it is removed. `on_full_disk`: what to raise then where the disk is full. `make_way` is called
    before the name is given."""
    unfinished = final.with_name(f"{TMP_PREFIX}{final.name}")
    try:
        unfinished = make_unfinished(unfinished)
        yield unfinished
        flush_tree(unfinished)
        if make_way is not None:
            make_way()
        put_in_place(unfinished, final, REPLACED_PREFIX)
        flush(final.parent)
    except BaseException as error:
        is_for_space = is_full(error, final.parent)  # which the removal may give back
        with contextlib.suppress(OSError):
            remove_unfinished(unfinished)
        if is_for_space and on_full_disk is not None:
            raise on_full_disk() from error
        raise


def make_unfinished(path: Path) -> Path:
    """A new directory that is marked as unfinished; where its name is taken, under the next one that is free."""
    path = _free(path)
    path.mkdir(parents=True)
    try:
        _mark(path, path)
    except OSError:  # a full disk
        shutil.rmtree(path)
        raise
    return path


def is_unfinished(path: Path) -> bool:
    """Whether a directory is what this product began and did not finish; a copy under another name is its maker's."""
    try:
        return not path.is_symlink() and (path / MARK_FILE).read_text(encoding="utf-8") == _mark_of(path)
    except (OSError, ValueError):
        return False


def remove_unfinished(path: Path) -> None:
    """Remove such a directory; nothing where it is none."""
    if is_unfinished(path):
        _remove(path)


def _remove(path: Path) -> None:
    """The mark goes last: what a kill leaves can be removed the next time."""
    for inside in path.iterdir():
        if inside.is_dir() and not inside.is_symlink():
            shutil.rmtree(inside)
        elif inside.name != MARK_FILE:
            inside.unlink()
    shutil.rmtree(path)


def put_in_place(temporary: Path, final: Path, old_prefix: str) -> None:
    """Give an unfinished directory its name. What had the name, which has to be this product's, is called
    `<old_prefix><name>` meanwhile, and then goes."""
    old = _rename_unfinished(final, f"{old_prefix}{final.name}") if final.exists() else None
    finish(temporary, final)
    if old is not None:
        _remove(old)


def finish(unfinished: Path, final: Path) -> None:
    """Give an unfinished directory its name, and take the mark away."""
    unfinished.rename(final)
    (final / MARK_FILE).unlink()


def remove_whole(path: Path) -> None:
    """Remove a directory with checksums so that no half of it is ever found under its name. What others put into it
    stays beside it."""
    keep_what_others_wrote(path)
    _remove(_rename_unfinished(path, f"{TMP_PREFIX}removed_{path.name}"))


def keep_what_others_wrote(directory: Path, written: Iterable[str] | None = None) -> None:
    """Move the files of a directory that are not `written`, None: by its checksums.json, to `kept_from_<name>` beside
    it, with a warning. To be called before the directory goes."""
    if written is None:
        written = ()
        with contextlib.suppress(DamagedError):
            written = read_json_file(directory, CHECKSUMS_FILE)
    others = _written_by_others(directory, {directory / name for name in (*written, CHECKSUMS_FILE, MARK_FILE)})
    if not others:
        return
    place = _free(directory.with_name(f"{KEPT_PREFIX}{directory.name}"))
    for path in others:
        target = place / path.relative_to(directory)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    names = ", ".join(path.relative_to(directory).as_posix() for path in others[:8])
    logger.warning(f"{directory}: what it held besides its own files was moved to {place}: {names}")


def _written_by_others(directory: Path, written: set[Path]) -> list[Path]:
    """What lies in a directory and is neither written nor leads to what is, nor an empty directory."""
    on_the_way = {parent for path in written for parent in path.parents}
    found, to_look_into = list[Path](), [directory]
    while to_look_into:
        for path in sorted(to_look_into.pop().iterdir()):
            is_directory = path.is_dir() and not path.is_symlink()
            if is_directory and path in on_the_way:
                to_look_into.append(path)
            elif any(not inside.is_dir() for inside in path.rglob("*")) if is_directory else path not in written:
                found.append(path)
    return found


def _rename_unfinished(path: Path, name: str) -> Path:
    renamed = _free(path.with_name(name))
    with contextlib.suppress(OSError):  # on a disk without a block for it
        _mark(path, renamed)
    path.rename(renamed)
    return renamed


def _free(path: Path) -> Path:
    """The path, or with a number behind it where others have the name."""
    names = (path, *(path.with_name(f"{path.name}_{number}") for number in range(2, 10_000)))
    return next(one for one in names if not os.path.lexists(one))


def _mark(directory: Path, named: Path) -> None:
    (directory / MARK_FILE).write_text(_mark_of(named), encoding="utf-8")


def _mark_of(named: Path) -> str:
    return f"{named.name}: unfinished, written by nemo-rl-lora, which removes it\n"


def _remove_empty(directories: Iterable[Path]) -> None:
    for path in directories:
        try:
            path.rmdir()
        except OSError:
            return


def is_full(error: BaseException, directory: Path) -> bool:
    """Whether a write failed for want of space; libraries hide the errno in errors of their own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(cause):
            return True
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, RuntimeError):
        return shutil.disk_usage(directory).free < LOW_SPACE_BYTES
    return False
