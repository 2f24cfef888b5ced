"""Which steps stay: ranked by a metric, pruned to `checkpointing.keep_top_k`, or set aside.

Contract: steps are (number, directory), oldest first, of this product alone. The newest is never pruned, and what is
set aside is kept.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Sequence
from pathlib import Path

from nemo_rl_lora.checkpoints.durable_files import DamagedError, read_json_file, remove_whole
from nemo_rl_lora.checkpoints.record import PHASE_BASE_PREFIX, PHASE_RECORD_FILE, TrainingInfo, read_info
from nemo_rl_lora.config.checkpointing import CheckpointingConfig

logger = logging.getLogger(__name__)

SET_ASIDE_PREFIX = "set_aside_"

Steps = Sequence[tuple[int, Path]]


def best_first(steps: Steps, config: CheckpointingConfig) -> list[tuple[int, Path]]:
    """Ranked by `metric_name`, or where there is none by their number; equal values rank by their number."""

    def rank(entry: tuple[int, Path]) -> tuple[float, int]:
        step, path = entry
        if config.metric_name is None:
            return 0.0, step
        value = read_info(path).metrics.get(config.metric_name)
        if value is None:
            return -math.inf, step
        return (value if config.higher_is_better else -value), step

    return sorted(steps, key=rank, reverse=True)


def prune(steps: Steps, config: CheckpointingConfig) -> None:
    """Remove what `keep_top_k` does not keep."""
    keep = config.keep_top_k
    if keep is None or len(steps) <= keep:
        return
    kept = [*best_first(steps, config)[:keep], steps[-1]]
    for step in steps:
        if step not in kept and not step[1].is_symlink():
            remove_whole(step[1])
            logger.info(f"removed {step[1]} (checkpointing.keep_top_k={keep})")


def base_beside(step: Path, name: str | None = None) -> Path | None:
    """What a step's phase builds on: beside the step, or, where that was set aside, beside the run's own steps. `name`:
    None to read it from the step's record. None where there is none, or where it is gone."""
    if name is None:
        with contextlib.suppress(DamagedError, ValueError):
            name = read_info(step).begin.base
    places = [] if name is None else [step.absolute().parent / name, step.absolute().parent.parent / name]
    return next((place.resolve() for place in places if (place / PHASE_RECORD_FILE).is_file()), None)


def base_step(path: Path) -> int | None:
    """The step that a base was made from; None where a directory is no base of a phase: its name and its record have to
    be of one phase, which those of a copy under another name are not."""
    with contextlib.suppress(DamagedError, KeyError, TypeError, ValueError, OSError):
        record = read_json_file(path, PHASE_RECORD_FILE)
        if not path.is_symlink() and path.name == f"{PHASE_BASE_PREFIX}{int(record['index']) + 1}":
            return int(record["step"])
    return None


def bases_of(directory: Path) -> dict[Path, int]:
    """The directories of a run that its phases build on, with the step that each was made from."""
    found = ((path, base_step(path)) for path in directory.glob(f"{PHASE_BASE_PREFIX}*"))
    return {path: step for path, step in found if step is not None}


def prune_bases(directory: Path, steps: Steps) -> None:
    """Remove what no step that is kept, or was set aside, builds on. The newest step is of the phase that trains."""
    bases = bases_of(directory)
    if not bases:
        return
    aside = list(directory.glob(f"{SET_ASIDE_PREFIX}*/step_*"))
    kept = {base for path in (*(path for _, path in steps), *aside) if (base := base_beside(path)) is not None}
    for path in bases:
        if path.resolve() not in kept:
            remove_whole(path)
            logger.info(f"removed {path}: no step that is kept builds on it")


def refuse_without_metric(info: TrainingInfo, config: CheckpointingConfig) -> None:
    """ValueError where a step's metrics lack the one that steps are ranked by, though they have others of its split, or
    of its evaluation."""
    name = config.metric_name
    if name is None or config.keep_top_k is None or name in info.metrics:
        return
    split = name.split("/", 1)[0] + "/" if name.startswith("eval:") else name.split(":", 1)[0] + ":"
    available = sorted(info.metrics)
    if not any(other.startswith(split) for other in available):
        logger.warning(f"step {info.step} has no {split}* metric, so it ranks last in checkpointing.keep_top_k")
        return
    raise ValueError(
        f"checkpointing.metric_name={name!r}: is no metric of step {info.step}. "
        f"Name one of: {', '.join(available)}; or null to keep the newest. (The step was saved.)"
    )


def set_aside(directory: Path, steps: Sequence[Path]) -> None:
    """Move what has the names of steps of a run away, so that no later start mixes two runs."""
    if not steps:
        return
    numbers = [path.name.removeprefix(SET_ASIDE_PREFIX) for path in directory.glob(f"{SET_ASIDE_PREFIX}[0-9]*")]
    taken = [int(number) for number in numbers if number.isdecimal()]
    place = directory / f"{SET_ASIDE_PREFIX}{max(taken, default=0) + 1:03d}"
    place.mkdir()
    for path in steps:
        path.rename(place / path.name)
    names = ", ".join(path.name for path in steps[:8])
    logger.warning(f"{len(steps)} that are no steps of this run were moved to {place}: {names}")
