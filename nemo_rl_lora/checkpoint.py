"""Step directories: written whole or not at all, ranked, pruned, found again, and refused where they do not
fit.

Contract: `checkpoint_dir/step_N` is written as `tmp_step_N`, flushed to disk and renamed, so a directory
called step_N is complete. It holds training_info.json, config.yaml, checksums.json (sha256 of every other
file) and what the caller's `write` puts there (`policy/adapter`, `policy/optimizer`, `policy/tokenizer`). A
run continues only with a configuration that is equal outside `FREE_KEYS` and `FREE_SECTIONS` and from
undamaged files.

It does not know what a policy is, starts no thread, and prints nothing.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import IO, Any, Literal

import yaml

from nemo_rl_lora.config.checkpointing import CheckpointingConfig
from nemo_rl_lora.config.layers import SET_BY, layers_from_record
from nemo_rl_lora.config.optimizer_settings import effective_values
from nemo_rl_lora.step_files import (
    TMP_PREFIX,
    DamagedError,
    flush,
    flush_tree,
    is_full,
    probe_directory,
    read_json_file,
    remove_whole,
    verify_files,
    write_checksums,
)

logger = logging.getLogger(__name__)

INFO_FILE = "training_info.json"
CONFIG_FILE = "config.yaml"
OPTIMIZER_DIRECTORY = "policy/optimizer"
LOCK_FILE = ".lock"
FORMAT_VERSION = 1
STEP_PREFIX = "step_"
SET_ASIDE_PREFIX = "set_aside_"
_REPLACED_PREFIX = f"{TMP_PREFIX}old_"

SaveReason = Literal["period", "epoch", "end", "signal", "deadline", "threshold", "failure"]

_PERIODS = ("max_num_steps", "max_num_epochs", "val_period", "val_at_start", "val_at_end", "val_batches")
_SAVING = (
    "enabled",
    "checkpoint_dir",
    "keep_top_k",
    "save_period",
    "save_epochs",
    "save_optimizer",
    "checkpoint_must_save_by",
    "load_path",
    "on_damage",
)
# What may differ between a run and its continuation: exact dotted keys, and whole sections.
FREE_KEYS = (
    frozenset(f"{driver}.{key}" for driver in ("sft", "dpo", "grpo") for key in _PERIODS)
    | frozenset(f"checkpointing.{key}" for key in _SAVING)
    | frozenset(f"policy.{key}" for key in ("backend", "dtensor_cfg.enabled", "megatron_cfg.enabled"))
)
FREE_SECTIONS = ("logger", "cluster")

_PACKAGES = (
    "nemo-rl-lora",
    "torch",
    "transformers",
    "safetensors",
    "nemo-automodel",
    "megatron-core",
    "vllm",
)
_ABSENT = "<absent>"


class CheckpointWriteError(OSError):
    """A checkpoint could not be written. Nothing of it is left, and older ones are untouched."""


def package_versions() -> dict[str, str]:
    """Version of Python and of each installed package that decides what a checkpoint means."""
    versions = {"python": ".".join(str(part) for part in sys.version_info[:3])}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingInfo:
    """Where a run stands after `step` optimizer (rollout) steps."""

    step: int
    phase: str  # the driver: "grpo", "sft", "dpo"
    epoch: int = 0
    data_position: Mapping[str, Any] = field(default_factory=dict)  # what the loader needs to go on; JSON
    counters: Mapping[str, float] = field(default_factory=dict)  # totals since step 0, such as num_tokens
    metrics: Mapping[str, float | None] = field(default_factory=dict)  # "train:reward", "val:accuracy"
    model_source: str = ""  # where the base weights came from
    base_digest: str | None = None  # base_identity.py; None where they are not in safetensors files
    spec: Mapping[str, Any] | None = None  # of the adapter; None where all weights are trained
    initial_adapter: Mapping[str, str] | None = None  # policy.adapter.init_from, as it was found
    seeds: Mapping[str, int] = field(default_factory=dict)  # by dotted key; filled in when saved
    reason: SaveReason = "period"
    has_optimizer: bool = True
    versions: Mapping[str, str] = field(default_factory=package_versions)
    saved_at: str = ""
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumePoint:
    """A complete, undamaged step directory of an equal configuration."""

    path: Path
    info: TrainingInfo

    @property
    def step(self) -> int:
        return self.info.step


def is_finished(point: ResumePoint | None, max_steps: int) -> bool:
    """Whether the run did all its steps or reached its threshold, so that starting it again has nothing to do."""
    return point is not None and (point.step >= max_steps or point.info.reason == "threshold")


class SaveDeadline:
    """`checkpoint_must_save_by`: says when the run must save and stop."""

    def __init__(self, seconds: float | None, now: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._now = now
        self._started = now()

    def is_near(self, step_and_save_seconds: float) -> bool:
        """Whether another step and its save, which take this long, would pass the deadline."""
        if self._seconds is None:
            return False
        return self._now() - self._started + step_and_save_seconds >= self._seconds


class Checkpointer:
    """The step directories of one run."""

    def __init__(self, config: CheckpointingConfig, resolved_config: Mapping[str, Any]) -> None:
        """`resolved_config` is the whole configuration as plain data: it is saved and compared."""
        self._config = config
        self._resolved = _plain(resolved_config)
        self._directory = Path(config.checkpoint_dir)
        self._lock: IO[str] | None = None
        self._resume: ResumePoint | None = None
        self._set_aside_done = False

    @property
    def directory(self) -> Path:
        return self._directory

    def prepare(self, *, required_bytes: int = 0) -> None:
        """Make sure that checkpoints can be written, by writing; take the directory; remove unfinished saves.

        `required_bytes` is what one checkpoint needs. ValueError where the directory cannot be written, is
        too full or belongs to a run that is still alive.
        """
        if not self._config.enabled:
            return
        probe_directory(self._directory, "checkpointing.checkpoint_dir", required_bytes=required_bytes)
        self._take_lock()
        for old in self._directory.glob(f"{_REPLACED_PREFIX}*"):
            final = old.with_name(old.name.removeprefix(_REPLACED_PREFIX))
            if not final.exists():  # the run ended after it took the name away, and before it gave it to the new one
                old.rename(final)
        for stale in self._directory.glob(f"{TMP_PREFIX}*"):
            logger.warning(f"removing {stale}, left by a run that ended while it was saving")
            shutil.rmtree(stale)

    def close(self) -> None:
        """Let go of the directory."""
        if self._lock is not None:
            self._lock.close()
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
        info = _read_info(path)
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

    def best_step(self) -> Path | None:
        """The step that ranks first by `metric_name`; the newest where there is none."""
        steps = step_directories(self._directory)
        return max(steps, key=lambda entry: self._rank(*entry))[1] if steps else None

    def is_due(self, step: int, *, num_finished_epochs: int | None = None) -> bool:
        """Whether to save after `step` (from 1). `num_finished_epochs` is given where the step ended an
        epoch."""
        config = self._config
        if not config.enabled:
            return False
        if config.save_period and step % config.save_period == 0:
            return True
        return bool(config.save_epochs and num_finished_epochs and num_finished_epochs % config.save_epochs == 0)

    def save(self, info: TrainingInfo, write: Callable[[Path], None]) -> Path:
        """Write `step_N`, then remove what `keep_top_k` does not keep. `write` fills the directory it is
        given.

        CheckpointWriteError on a full disk. ValueError where this step's metrics lack `metric_name`; the
        checkpoint is kept then.
        """
        assert self._config.enabled, "save() with checkpointing.enabled=false"
        final = self._directory / f"{STEP_PREFIX}{info.step}"
        temporary = self._directory / f"{TMP_PREFIX}{STEP_PREFIX}{info.step}"
        self._set_aside_other_steps()
        logger.info(f"saving {final}")
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            write(temporary)
            if not self._config.save_optimizer:
                shutil.rmtree(temporary / OPTIMIZER_DIRECTORY, ignore_errors=True)
            self._write_records(temporary, info)
            flush_tree(temporary)
            _replace(temporary, final)
            flush(self._directory)
        except BaseException as error:
            full = is_full(error, self._directory)
            shutil.rmtree(temporary, ignore_errors=True)
            if full:
                raise self._no_space(info.step) from error
            raise
        logger.info(f"saved {final}")
        self._check_metric(info)
        self._prune()
        return final

    def _write_records(self, directory: Path, info: TrainingInfo) -> None:
        record = asdict(info)
        record["seeds"] = _seeds(self._resolved)
        record["has_optimizer"] = self._config.save_optimizer
        record["saved_at"] = info.saved_at or datetime.now(UTC).isoformat(timespec="seconds")
        record["metrics"] = {name: _finite(value) for name, value in info.metrics.items()}
        text = json.dumps(record, indent=2, allow_nan=False)
        (directory / INFO_FILE).write_text(text + "\n", encoding="utf-8")
        (directory / CONFIG_FILE).write_text(config_text(self._resolved), encoding="utf-8")
        write_checksums(directory)

    def _resume_paths(self) -> list[Path]:
        """The step to continue from, and those before it, newest first; empty for a new run."""
        load_path = self._config.load_path
        if load_path == "none":
            return []
        if load_path == "auto":
            return _newest_first(self._directory) if self._config.enabled else []
        named = Path(load_path)
        paths = _newest_first(named)
        if (number := _step_of(named)) is not None and named.is_dir():
            steps = step_directories(named.parent)
            paths = [named, *(path for step, path in reversed(steps) if step < number)]
        elif (named / INFO_FILE).is_file():
            paths = [named]
        if not paths:
            raise ValueError(
                f"checkpointing.load_path={load_path!r}: is no checkpoint: there is neither {INFO_FILE} nor "
                f"a {STEP_PREFIX}N directory. Name a step or a run, or write auto or none."
            )
        return paths

    def _refuse_other_config(self, path: Path) -> None:
        saved = yaml.safe_load((path / CONFIG_FILE).read_text(encoding="utf-8"))
        differences = config_differences(saved, self._resolved)
        if not differences:
            return
        shown = "; ".join(f"{key} was {old!r}, is {new!r}" for key, (old, new) in list(differences.items())[:8])
        more = f"; and {len(differences) - 8} more" if len(differences) > 8 else ""
        raise ValueError(
            f"checkpointing.checkpoint_dir={self._config.checkpoint_dir!r}: {path} was written with another "
            f"configuration: {shown}{more}. Set the values back to continue that run, name another "
            "checkpointing.checkpoint_dir for a new one, or set checkpointing.load_path=none to start over "
            "here (the old steps are set aside)."
        )

    def _set_aside_other_steps(self) -> None:
        """Move away the steps that are not this run's past, so that no later start mixes two runs."""
        if self._set_aside_done:
            return
        self._set_aside_done = True
        is_own = self._resume is not None and self._resume.path.resolve().parent == self._directory.resolve()
        own = self._resume.step if self._resume is not None and is_own else -1
        others = [path for step, path in step_directories(self._directory) if step > own or own < 0]
        if not others:
            return
        numbers = [
            int(p.name.removeprefix(SET_ASIDE_PREFIX)) for p in self._directory.glob(f"{SET_ASIDE_PREFIX}[0-9]*")
        ]
        place = self._directory / f"{SET_ASIDE_PREFIX}{max(numbers, default=0) + 1:03d}"
        place.mkdir()
        for path in others:
            path.rename(place / path.name)
        logger.warning(f"{len(others)} steps of an earlier run were moved to {place}")

    def _check_metric(self, info: TrainingInfo) -> None:
        name = self._config.metric_name
        if name is None or self._config.keep_top_k is None or name in info.metrics:
            return
        split = name.split(":", 1)[0] + ":"
        available = sorted(info.metrics)
        if not any(other.startswith(split) for other in available):
            logger.warning(f"step {info.step} has no {split}* metric, so it ranks last in checkpointing.keep_top_k")
            return
        raise ValueError(
            f"checkpointing.metric_name={name!r}: is no metric of step {info.step}. "
            f"Name one of: {', '.join(available)}; or null to keep the newest. (The step was saved.)"
        )

    def _prune(self) -> None:
        keep = self._config.keep_top_k
        steps = step_directories(self._directory)
        if keep is None or len(steps) <= keep:
            return
        newest = steps[-1][0]
        ranked = sorted(steps, key=lambda entry: self._rank(*entry), reverse=True)
        kept = {step for step, _ in ranked[:keep]} | {newest}
        for step, path in steps:
            if step not in kept:
                remove_whole(path)
                logger.info(f"removed {path} (checkpointing.keep_top_k={keep})")

    def _rank(self, step: int, path: Path) -> tuple[float, int]:
        """Larger is better; equal values rank by step."""
        if self._config.metric_name is None:
            return 0.0, step
        value = _read_info(path).metrics.get(self._config.metric_name)
        if value is None:
            return -math.inf, step
        return (value if self._config.higher_is_better else -value), step

    def _take_lock(self) -> None:
        if self._lock is not None:
            return
        file = (self._directory / LOCK_FILE).open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip()
            file.close()
            if owner == str(os.getpid()):
                return
            raise ValueError(
                f"checkpointing.checkpoint_dir={self._config.checkpoint_dir!r}: is in use by a run that is "
                f"still alive (process {owner}). Wait for it, end it, or name another directory."
            ) from None
        except OSError as error:
            logger.warning(f"{self._directory} cannot be locked ({error}): do not start two runs on it at once")
            file.close()
            return
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        self._lock = file

    def _no_space(self, step: int) -> CheckpointWriteError:
        free = shutil.disk_usage(self._directory).free
        newest = newest_step(self._directory)
        rest = f"The newest checkpoint is {newest}" if newest else "There is no earlier checkpoint"
        return CheckpointWriteError(
            errno.ENOSPC,
            f"checkpointing.checkpoint_dir={self._config.checkpoint_dir!r}: no space left to save step "
            f"{step} ({free:,} bytes free after its files were removed again). {rest}. Free some space, "
            "lower checkpointing.keep_top_k, or name another directory, and give the same command again to "
            "continue.",
        )


def config_differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (saved value, current value), for each key that a continued run must not change."""
    written_now = layers_from_record(current.get(SET_BY, []), "the configuration")
    old, new = (effective_values(_plain(tree), written_now) for tree in (saved, current))
    return {
        key: (old.get(key, _ABSENT), new.get(key, _ABSENT))
        for key in sorted(old.keys() | new.keys())
        if not _is_free(key) and (key not in old or key not in new or old[key] != new[key])
    }


def step_of_adapter(directory: Path) -> Path | None:
    """The step that an adapter's directory is part of; None for an adapter that is no checkpoint of ours."""
    step = directory.parent.parent
    return step if (step / INFO_FILE).is_file() else None


def step_directories(directory: Path) -> list[tuple[int, Path]]:
    """(step, path) of the complete steps in a directory, oldest first."""
    return sorted((number, path) for path in directory.glob("*/") if (number := _step_of(path)) is not None)


def _step_of(path: Path) -> int | None:
    number = path.name.removeprefix(STEP_PREFIX)
    return int(number) if path.name.startswith(STEP_PREFIX) and number.isdecimal() else None


def _newest_first(directory: Path) -> list[Path]:
    return [path for _, path in reversed(step_directories(directory))]


def newest_step(directory: Path) -> Path | None:
    """The complete step directory with the highest number."""
    steps = step_directories(directory)
    return steps[-1][1] if steps else None


def config_text(resolved_config: Mapping[str, Any]) -> str:
    """A resolved configuration as YAML, keys in their order."""
    return yaml.safe_dump(_plain(resolved_config), sort_keys=False, allow_unicode=True, width=110)


def _replace(temporary: Path, final: Path) -> None:
    """Give a written directory its name; what had the name (the same step, saved before) goes."""
    old = final.with_name(f"{_REPLACED_PREFIX}{final.name}")
    if final.exists():
        final.rename(old)
    temporary.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def _read_info(directory: Path) -> TrainingInfo:
    record = read_json_file(directory, INFO_FILE)
    if record.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{directory / INFO_FILE}: has format {record.get('format_version')!r}, and this version reads "
            f"{FORMAT_VERSION}. Use the version that wrote it, or start with checkpointing.load_path=none."
        )
    try:
        return TrainingInfo(**record)
    except TypeError as error:
        raise DamagedError(directory, INFO_FILE, f"does not have the fields of a checkpoint ({error})") from error


def _seeds(value: Any, prefix: str = "") -> dict[str, int]:
    """Dotted key -> value, of every key called seed."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found: dict[str, int] = {}
    for key, item in items:
        found |= {f"{prefix}seed": item} if key == "seed" else _seeds(item, f"{prefix}{key}.")
    return found


def _is_free(key: str) -> bool:
    return key in FREE_KEYS or key.split(".", 1)[0] in FREE_SECTIONS


def _plain(value: Any) -> Any:
    """YAML's own types, so that a configuration equals what was written and read again."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(_plain(item) for item in value)
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    return str(value)


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
