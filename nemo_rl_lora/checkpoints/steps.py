"""Step directories: written whole or not at all, found again, and refused where they do not fit.

Contract: `checkpoint_dir/step_N` is written as `tmp_step_N`, flushed to disk and renamed, so a directory called step_N
is complete. Whatever else lies in checkpoint_dir, under such names too, is left alone. A step holds the records
(record.py), checksums.json (sha256 of every other file) and what the caller's `write` puts there (`policy/adapter`,
`policy/optimizer`, `policy/tokenizer`). A run continues only with an equal configuration and from undamaged files.

It does not know what a policy is, starts no thread, and prints nothing.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import BaseModel

from nemo_rl_lora.checkpoints.durable_files import (
    REPLACED_PREFIX,
    TMP_PREFIX,
    DamagedError,
    finish,
    is_unfinished,
    keep_what_others_wrote,
    link_tree,
    probe_directory,
    remove_unfinished,
    renew_checksum,
    verify_files,
    write_checksums,
    written_whole,
)
from nemo_rl_lora.checkpoints.record import (
    CONFIG_FILE,
    INFO_FILE,
    PHASE_BASE_PREFIX,
    TrainingInfo,
    add_to_metrics,
    config_differences,
    plain,
    read_config,
    read_info,
    records_step,
    write_records,
)
from nemo_rl_lora.checkpoints.retention import (
    bases_of,
    best_first,
    prune,
    prune_bases,
    refuse_without_metric,
    set_aside,
)
from nemo_rl_lora.config.checkpointing import CheckpointingConfig

logger = logging.getLogger(__name__)

OPTIMIZER_DIRECTORY = "policy/optimizer"
LOCK_FILE = ".lock"
STEP_PREFIX = "step_"
_NUM_DIFFERENCES_SHOWN = 8


class CheckpointWriteError(OSError):
    """A checkpoint could not be written. Nothing of it is left, and older ones are untouched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumePoint:
    """A complete, undamaged step directory of an equal configuration."""

    path: Path
    info: TrainingInfo

    @property
    def step(self) -> int:
        return self.info.step


def is_finished(point: ResumePoint | None, max_steps: int, max_tokens: int | None = None) -> bool:
    """Whether the run did all its steps or tokens, or reached its threshold: starting it again has nothing to do. Of a
    run with phases, whether the phase of that step did."""
    if point is None:
        return False
    begin = point.info.begin
    num_tokens = point.info.counters.get("num_tokens", 0.0) - begin.num_tokens
    did_all = has_done_all(point.step - begin.step, num_tokens, max_steps, max_tokens)
    return did_all or point.info.reason == "threshold"


def has_done_all(num_steps: int, num_tokens: float, max_steps: int, max_tokens: int | None) -> bool:
    """Whether a run, or a phase of one, is over after so many steps and tokens."""
    return num_steps >= max_steps or (max_tokens is not None and num_tokens >= max_tokens)


class SaveDeadline:
    """`checkpoint_must_save_by`: says when the run must save and stop."""

    def __init__(
        self, seconds: float | None, now: Callable[[], float] = time.monotonic, *, started: float | None = None
    ) -> None:
        """`started`: when the run started, by the clock `now`; None: now."""
        self._seconds = seconds
        self._now = now
        self._started = now() if started is None else started

    def is_near(self, step_and_save_seconds: float) -> bool:
        """Whether another step and its save, which take this long, would pass the deadline."""
        if self._seconds is None:
            return False
        return self._now() - self._started + step_and_save_seconds >= self._seconds


class Checkpointer:
    """The step directories of one run."""

    def __init__(
        self,
        config: CheckpointingConfig,
        resolved_config: Mapping[str, Any],
        schema: type[BaseModel] | None = None,
    ) -> None:
        """`resolved_config` is the whole configuration as plain data: it is saved and compared. With its `schema`,
        steps of a version that did not have some of its keys continue where those have their defaults."""
        self._config = config
        self._resolved = plain(resolved_config)
        self._schema = schema
        self._directory = Path(config.checkpoint_dir)
        self._lock: FileLock | None = None
        self._resume: ResumePoint | None = None
        self._set_aside_done = False
        self.saved: Path | None = None  # the newest step that this run saved

    def check(self, *, required_bytes: int = 0) -> None:
        """ValueError where `prepare` would raise one; the directory is not taken."""
        if not self._config.enabled:
            return
        probe_directory(self._directory, "checkpointing.checkpoint_dir", required_bytes=required_bytes)
        if self._lock is None and (self._directory / LOCK_FILE).exists():
            self._take_lock()
            self.close()

    def prepare(self, *, required_bytes: int = 0) -> None:
        """Make sure that checkpoints can be written, by writing; take the directory; remove unfinished saves.

        `required_bytes` is what one checkpoint needs. ValueError where the directory cannot be written, is
        too full or belongs to a run that is still alive.
        """
        if not self._config.enabled:
            return
        self.check(required_bytes=required_bytes)
        self._take_lock()
        for stale in filter(is_unfinished, self._directory.glob(f"{TMP_PREFIX}*")):
            final = stale.with_name(stale.name.removeprefix(REPLACED_PREFIX))
            is_named = _step_of(final) is not None or final.name.startswith(PHASE_BASE_PREFIX)
            if stale.name.startswith(REPLACED_PREFIX) and is_named and not os.path.lexists(final):
                finish(stale, final)  # the run ended after it took the name away, and before it gave it to the new one
            else:
                logger.warning(f"removing {stale}, left by a run that ended while it was saving")
                remove_unfinished(stale)
        for path in self._directory.glob(f"{STEP_PREFIX}*"):
            if (number := _step_of(path)) is not None and not records_step(path, number):
                logger.warning(f"{path} has the name of a checkpoint and is none: it is left alone")

    def close(self) -> None:
        """Let go of the directory."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def find_resume(self) -> ResumePoint | None:
        """The step to continue from, or None for a new run. Reads only.

        ValueError where the checkpoint is damaged (and `on_damage` does not allow the one before it), belongs to
        another configuration, or `load_path` names nothing.
        """
        candidates = self._resume_paths()
        if self._config.on_damage == "stop":
            candidates = candidates[:1]
        for number, path in enumerate(candidates, 1):
            try:
                return self._open(path)
            except DamagedError as error:
                if number == len(candidates):
                    raise
                logger.warning(
                    f"{error.path} {error.what}: the checkpoint is damaged, and checkpointing.on_damage=previous "
                    "continues from the step before it"
                )
        return None

    def _open(self, path: Path) -> ResumePoint:
        verify_files(path, (INFO_FILE, CONFIG_FILE))
        info = read_info(path)
        self._refuse_other_config(path)
        verify_files(path)
        self._resume = ResumePoint(path=path, info=info)
        return self._resume

    def refuse_without_optimizer(self, point: ResumePoint) -> None:
        """ValueError where a step was saved without optimizer state: going on would not be the same run."""
        if not point.info.has_optimizer:
            raise ValueError(
                f"checkpointing.load_path={self._config.load_path!r}: {point.path} was saved with "
                "checkpointing.save_optimizer=false and cannot be continued. Name a step that has its optimizer state "
                "with checkpointing.load_path, or set checkpointing.load_path=none to start over."
            )

    def refuse_other_base(self, point: ResumePoint, base_digest: str | None) -> None:
        """ValueError where a step was trained on other base weights than those that are there now."""
        trained_on = point.info.base_digest
        if trained_on is not None and trained_on != base_digest:
            raise ValueError(
                f"checkpointing.load_path={self._config.load_path!r}: {point.path} was trained on other base weights "
                f"({point.info.model_source}; digest {trained_on[:12]}, now {(base_digest or 'none')[:12]}). Put those "
                "back to continue that run, or name another checkpointing.checkpoint_dir for a new one."
            )

    def refuse_other_data(
        self, point: ResumePoint, digests: Mapping[str, str], num_rows: Sequence[int], *, go_on: bool
    ) -> None:
        """ValueError where a step was trained on other rows than those that are there now; with `go_on`, a warning.
        `num_rows` are those of the training sets, all that a step of an older version knows."""
        before = point.info.data_digests
        changed = {key: (old[:12], digests[key][:12]) for key, old in before.items() if digests.get(key, old) != old}
        old_rows = point.info.data_position.get("num_rows", list(num_rows))
        if not before and old_rows != list(num_rows):
            changed = {"data.train": (f"of {old_rows} rows", f"of {list(num_rows)} rows")}
        said = [
            f"{key}: the rows, as tokenised, are not those of {point.path} (digest {old}, now {new}): the file, a "
            "prompt file, the tokenizer or its chat template has changed."
            for key, (old, new) in changed.items()
        ]
        if said and not go_on:
            raise ValueError(
                "\n".join(said)
                + " Put it back to continue that run, set data.on_change=continue to go on with the rows "
                "as they are now, or set checkpointing.load_path=none to start over."
            )
        for line in said:
            logger.warning(f"{line} data.on_change=continue goes on with the rows as they are now")

    def say_other_rewards(self, point: ResumePoint, digests: Mapping[str, str]) -> None:
        """Warn where completions are scored by another file than before."""
        before = point.info.reward_digests
        for key in sorted(before.keys() & digests.keys()):
            if before[key] != digests[key]:
                logger.warning(
                    f"{key}.reward_function: the file has changed since {point.path} was saved (digest "
                    f"{before[key][:12]}, now {digests[key][:12]}), so rewards from here on may not compare"
                )

    def best_step(self) -> Path | None:
        """The step that ranks first by `metric_name`; the newest where there is none."""
        ranked = best_first(step_directories(self._directory), self._config)
        return ranked[0][1] if ranked else None

    def is_due(self, step: int, *, num_finished_epochs: int | None = None) -> bool:
        """Whether to save after `step` (from 1). `num_finished_epochs` is given where the step ended an epoch."""
        config = self._config
        if not config.enabled:
            return False
        if config.save_period and step % config.save_period == 0:
            return True
        return bool(config.save_epochs and num_finished_epochs and num_finished_epochs % config.save_epochs == 0)

    def save(self, info: TrainingInfo, write: Callable[[Path], None], *, is_measured: bool = True) -> Path:
        """Write `step_N`, then remove what `keep_top_k` does not keep. `write` fills the directory it is given.

        CheckpointWriteError on a full disk. ValueError where this step's metrics lack `metric_name`, unless it is saved
        before it `is_measured`; the checkpoint is kept then.
        """
        assert self._config.enabled, "save() with checkpointing.enabled=false"
        final = self._directory / f"{STEP_PREFIX}{info.step}"
        self.set_aside_other_steps()
        logger.info(f"saving {final}")

        def make_way() -> None:
            if records_step(final, info.step) and not final.is_symlink():
                keep_what_others_wrote(final)
            elif os.path.lexists(final):
                set_aside(self._directory, [final])

        with written_whole(final, partial(self._no_space, info.step), make_way) as unfinished:
            write(unfinished)
            if not self._config.save_optimizer:
                shutil.rmtree(unfinished / OPTIMIZER_DIRECTORY, ignore_errors=True)
            write_records(unfinished, info, self._resolved, has_optimizer=self._config.save_optimizer)
            write_checksums(unfinished)
        self.saved = final
        logger.info(f"saved {final}")
        if is_measured:
            refuse_without_metric(info, self._config)
        prune(step_directories(self._directory), self._config)
        prune_bases(self._directory, step_directories(self._directory))
        return final

    def add_metrics(self, path: Path, metrics: Mapping[str, float | None]) -> None:
        """Add what was measured after a step was saved to its record, where it is one of this directory. The step is
        replaced as by a save, by one of the same files; where that fails it stays as it is, with a warning."""
        if not self._config.enabled or path.is_symlink() or path.resolve().parent != self._directory.resolve():
            return
        try:
            with written_whole(path) as unfinished:
                link_tree(path, unfinished)
                add_to_metrics(unfinished, metrics)
                renew_checksum(unfinished, INFO_FILE)
        except OSError as error:
            logger.warning(f"{path}: what was measured after it was saved could not be added to it ({error})")

    def _resume_paths(self) -> list[Path]:
        """The step to continue from, and those before it, newest first; empty for a new run."""
        load_path = self._config.load_path
        if load_path == "none":
            return []
        if load_path == "auto":
            return _newest_first(self._directory) if self._config.enabled else []
        named = Path(load_path)
        paths = _newest_first(named)
        if (number := _step_of(named)) is not None and records_step(named, number):
            steps = step_directories(named.parent)
            paths = [named, *(path for step, path in reversed(steps) if step < number)]
        elif records_step(named):
            paths = [named]
        if not paths:
            raise ValueError(
                f"checkpointing.load_path={load_path!r}: is no checkpoint: there is neither an {INFO_FILE} of this "
                f"product nor a {STEP_PREFIX}N directory with one. Name a step or a run, or write auto or none."
            )
        return paths

    def _refuse_other_config(self, path: Path) -> None:
        found = config_differences(read_config(path), self._resolved, self._schema)
        if not found:
            return
        shown = [f"{key} was {old!r}, is {new!r}" for key, (old, new) in found.items()][:_NUM_DIFFERENCES_SHOWN]
        more = f"; and {len(found) - len(shown)} more" if len(found) > len(shown) else ""
        raise ValueError(
            f"checkpointing.checkpoint_dir={self._config.checkpoint_dir!r}: {path} was written with another "
            f"configuration: {'; '.join(shown)}{more}. Set the values back to continue that run, name another "
            "checkpointing.checkpoint_dir for a new one, or set checkpointing.load_path=none to start over "
            "here (the old steps are set aside)."
        )

    def set_aside_other_steps(self) -> None:
        """Before the first save: the steps that are not this run's past go out of its way, and what its phases made."""
        if self._set_aside_done:
            return
        self._set_aside_done = True
        is_own = self._resume is not None and self._resume.path.resolve().parent == self._directory.resolve()
        own = self._resume.step if self._resume is not None and is_own else -1
        steps = [path for step, path in step_directories(self._directory) if step > own]
        set_aside(self._directory, [*steps, *(path for path, step in bases_of(self._directory).items() if step > own)])

    def _take_lock(self) -> None:
        """Hold the directory as long as this process lives; the kernel lets go of it when the process is killed."""
        if self._lock is not None:
            return
        path = self._directory / LOCK_FILE
        if os.path.lexists(path) and not _is_lock(path):
            logger.warning(
                f"{path} is no lock of this product's, and is left alone: do not start two runs here at once"
            )
            return
        lock = FileLock(path, blocking=False, thread_local=False, is_singleton=True, fallback_to_soft=False)
        try:
            lock.acquire()
        except Timeout:
            raise ValueError(
                f"checkpointing.checkpoint_dir={self._config.checkpoint_dir!r}: is in use by a run that is "
                f"still alive (process {path.read_text(encoding='utf-8').strip()}). Wait for it, end it, or name "
                "another directory."
            ) from None
        except OSError as error:
            logger.warning(f"{self._directory} cannot be locked ({error}): do not start two runs on it at once")
            return
        path.write_text(str(os.getpid()), encoding="utf-8")
        self._lock = lock

    def _no_space(self, step: int) -> CheckpointWriteError:
        free = shutil.disk_usage(self._directory).free
        steps = _newest_first(self._directory)
        rest = f"The newest checkpoint is {steps[0]}" if steps else "There is no earlier checkpoint"
        return CheckpointWriteError(
            errno.ENOSPC,
            f"checkpointing.checkpoint_dir={self._config.checkpoint_dir!r}: no space left to save step "
            f"{step} ({free:,} bytes free after its files were removed again). {rest}. Free some space, "
            "lower checkpointing.keep_top_k, or name another directory, and give the same command again to "
            "continue.",
        )


def step_directories(directory: Path) -> list[tuple[int, Path]]:
    """(step, path) of the complete steps in a directory, oldest first; one that only has the name is none."""
    named = ((number, path) for path in directory.glob("*/") if (number := _step_of(path)) is not None)
    return sorted((number, path) for number, path in named if records_step(path, number))


def _newest_first(directory: Path) -> list[Path]:
    return [path for _, path in reversed(step_directories(directory))]


def _step_of(path: Path) -> int | None:
    number = path.name.removeprefix(STEP_PREFIX)
    return int(number) if number.isdecimal() and path.name == f"{STEP_PREFIX}{int(number)}" else None


def _is_lock(path: Path) -> bool:
    """Whether a file is what a run has left in the place of its lock: nothing, or a process's number."""
    try:
        return not path.is_symlink() and path.read_text(encoding="utf-8").strip().isdecimal() | (
            not path.stat().st_size
        )
    except (OSError, ValueError):
        return False
