"""From a phase of a run into the next one.

Contract: a phase has ended with a checkpoint. From that alone follows what the next one begins with, so that a run
which is killed on the way, and continues, crosses again and is the same run. What a crossing makes, `base_of_phase_N`
beside the steps, is there whole or not at all. The loss on fixed rows is measured on both sides.
"""

from __future__ import annotations

import errno
import gc
import json
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from nemo_rl_lora.algorithms.algorithm import Run
from nemo_rl_lora.algorithms.loop import RunResult
from nemo_rl_lora.algorithms.sft import Sft
from nemo_rl_lora.checkpoints.durable_files import keep_what_others_wrote, write_checksums, written_whole
from nemo_rl_lora.checkpoints.record import PHASE_RECORD_FILE, PHASE_WEIGHTS, read_info
from nemo_rl_lora.checkpoints.steps import CheckpointWriteError
from nemo_rl_lora.config.phases import AtEnd
from nemo_rl_lora.export.convert import ExportRequest, export
from nemo_rl_lora.export.frozen import write_frozen
from nemo_rl_lora.run.phases import PhaseStart, refuse_what_is_in_the_way
from nemo_rl_lora.types import Example

logger = logging.getLogger(__name__)

_NUM_FIXED_ROWS = 32


class PhaseShiftError(RuntimeError):
    """The loss on fixed rows is another after a crossing than before it."""


class Crossing:
    """From the end of a phase into the next one."""

    def __init__(self, start: PhaseStart, result: RunResult) -> None:
        """The phase has ended, and its weights are still there."""
        self._start, self._result, self._next = start, result, start.following[0]
        self._rows = _fixed_rows(start)
        self._loss = _mean_loss(start, self._rows)
        self._made: Mapping[str, Any] = {}

    def make(self) -> PhaseStart:
        """What the next phase begins with. Nothing else may hold the run of the phase before: its weights go first."""
        self._start.algorithm.leave()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        start, step, saved = self._start, self._result.step, self._result.checkpoint
        assert saved is not None, "a phase ends with a checkpoint"
        base = start.made_base
        if base is not None:
            logger.info(f"{start.name} ends after step {step}: {base.name} is made ({start.at_end})")
            start.checkpointer.set_aside_other_steps()
            self._made = _make_base(start.at_end, saved, start, base)
        self._next.follow(start, step, self._result.counters, saved)
        return self._next

    @property
    def step(self) -> int:
        """Complete steps of the run."""
        return self._result.step

    def confirm(self, run: Run) -> None:
        """Say what the next phase begins with; PhaseShiftError where the loss has moved too far. `run` is its own."""
        now = _mean_loss(self._next, self._rows)
        shift, bound = now - self._loss, self._start.run_config.sft.max_phase_loss_shift
        step = self._result.step
        found = {"loss_before": self._loss, "loss_after": now, "loss_shift": shift, **self._made}
        run.log.log(step, "phase", {"phase": float(self._next.index + 1), **found})
        run.console.say(
            f"{self._next.name} begins after step {step}: {what_trains(self._next)}. Loss of {len(self._rows)} fixed "
            f"rows: {self._loss:.5f} before, {now:.5f} after{_made_line(self._made)}"
        )
        if not abs(shift) <= bound:
            raise PhaseShiftError(
                f"sft.max_phase_loss_shift={bound}: the loss of {len(self._rows)} fixed rows is {now:.5f} at the "
                f"beginning of {self._next.name}, and was {self._loss:.5f} at the end of {self._start.name}. Its last "
                f"step is saved: {self._result.checkpoint}. To go on from there, allow a larger shift; in a new run, "
                f"policy.precision=float32 has none."
            )


def _fixed_rows(start: PhaseStart) -> list[Example]:
    """The rows whose loss is measured on both sides of a crossing: of validation, or else of training."""
    assert isinstance(start.algorithm, Sft), start.algorithm
    sets = start.algorithm.validation_sets or start.algorithm.train_sets
    return list(islice((rows[place] for rows in sets for place in range(len(rows))), _NUM_FIXED_ROWS))


def _mean_loss(start: PhaseStart, rows: Sequence[Example]) -> float:
    assert isinstance(start.algorithm, Sft), start.algorithm
    return start.algorithm.mean_loss(rows)


def what_trains(start: PhaseStart) -> str:
    """How many parameters a phase trains, of how many."""
    plan = start.plan
    assert plan is not None
    spec = start.spec
    what = "all weights" if spec is None else f"an adapter of dim {spec.dim}"
    total = plan.num_params + (plan.num_trainable_params if spec is not None else 0)
    return f"{what}, {plan.num_trainable_params:,} of {total:,} parameters"


def _made_line(made: Mapping[str, Any]) -> str:
    if "surviving_share" in made:
        return (
            f"; of the merged update {made['surviving_share']:.1%} survives the rounding, which adds "
            f"{made['relative_rounding_error']:.1%} of its size"
        )
    if "relative_rounding_error" in made:
        return f"; rounding changed the weights by {made['relative_rounding_error']:.2g} of their size"
    return ""


def _make_base(at_end: AtEnd, step: Path, start: PhaseStart, target: Path) -> Mapping[str, float]:
    """The directory that the next phase builds on; what rounding did, as numbers. Replaces one that this product made.

    ValueError where the name is taken by anything else; CheckpointWriteError on a full disk.
    """
    refuse_what_is_in_the_way(target)
    policy = start.config.policy

    def make_way() -> None:
        if target.is_dir():
            keep_what_others_wrote(target)

    with written_whole(target, partial(_no_space, step, target), make_way) as unfinished:
        weights = unfinished / PHASE_WEIGHTS
        if at_end == "inject":
            weights.mkdir()
            found = write_frozen(step / "policy" / "weights", step / "policy" / "tokenizer", weights, policy.precision)
        else:
            found = _merged(step, start.source.path, weights, policy.precision)
        record = {"step": read_info(step).step, "index": start.index + 1, "made_by": at_end, **found}
        (unfinished / PHASE_RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        write_checksums(unfinished)
    return found


def _no_space(step: Path, target: Path) -> CheckpointWriteError:
    return CheckpointWriteError(
        errno.ENOSPC,
        f"checkpointing.checkpoint_dir={str(target.parent)!r}: no space left to make {target.name}, what the next "
        f"phase builds on. The newest checkpoint is {step}. Free some space, or lower checkpointing.keep_top_k, and "
        "give the same command again to continue.",
    )


def _merged(step: Path, base: Path, target: Path, dtype: str) -> Mapping[str, float]:
    """A step's adapter merged into its base: in fp32, rounded once, read back."""
    request = ExportRequest(adapter=step, output=target, base_directory=base, dtype=dtype)
    (made,) = export(request)
    if made.status != "written":
        raise RuntimeError(f"{step} could not be merged: {made.problem}")
    return {key: made.report[key] for key in ("surviving_share", "relative_rounding_error") if key in made.report}
