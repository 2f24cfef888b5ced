"""What SFT, DPO and GRPO share: when to validate, evaluate and save, what is recorded, how a run ends and goes on.

What one step and one validation do is the algorithm's. The loop knows no loss, no backend and no engine. What is drawn
follows from (seed, step), so a resumed run is the run that was interrupted.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from nemo_rl_lora.algorithms.algorithm import Algorithm, Run, StepDone
from nemo_rl_lora.algorithms.phase import Phase
from nemo_rl_lora.checkpoints.record import WITHOUT_PHASES, SaveReason
from nemo_rl_lora.checkpoints.step_digests import tensor_digests, token_digest
from nemo_rl_lora.checkpoints.steps import CheckpointWriteError, ResumePoint, SaveDeadline, has_done_all
from nemo_rl_lora.distributed.lost import ProcessesLost
from nemo_rl_lora.run.control import StopRequest
from nemo_rl_lora.run.metrics import Stopwatch

logger = logging.getLogger(__name__)

_URGENT = ("signal", "deadline", "failure")  # reasons to save at once


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """How a run ended. `is_complete`: nothing is left to do."""

    outcome: str  # "completed", "stopped by SIGINT", ...
    is_complete: bool
    step: int
    checkpoint: Path | None  # the newest
    log_directory: Path | None  # None where nothing was left to do
    counters: Mapping[str, float] = field(default_factory=dict)  # totals, such as num_tokens
    exit_code: int = 0  # 128 + the signal, where one asked the run to stop


class TrainingLoop:
    """The loop's state: the step, the totals and the newest metrics."""

    def __init__(self, run: Run, algorithm: Algorithm[Any], started: float | None = None) -> None:
        """`started`: when the run started, by time.monotonic, where it was started again since; None: now."""
        self._run, self._algorithm = run, algorithm
        self._settings = algorithm.loop
        self._checkpointing = run.config.checkpointing
        self._step = 0
        self._counters: dict[str, float] = {}
        self._newest: dict[str, float | None] = {}
        self._watch = Stopwatch()
        self._deadline = SaveDeadline(self._checkpointing.must_save_by_seconds, started=started)
        self._longest_seconds = 0.0  # of a step with the validation and the save that came with it
        self._validated_step = -1
        self._begin = WITHOUT_PHASES if run.phase is None else run.phase.begin
        if run.resume is not None:
            self._continue_from(run.resume)
        elif run.phase is not None:
            self._begin_phase(run.phase)
        self._position, self._epoch = run.loader.state(), run.loader.epoch  # after the last complete step
        self._num_finished_epochs = self._count_finished_epochs()

    @property
    def step(self) -> int:
        """Complete steps."""
        return self._step

    def run(self, stop: StopRequest) -> RunResult:
        """Run to the end of the data, of the steps or of the tokens, or until asked to stop. An error leaves the last
        complete step saved where it still can be, and says which."""
        try:
            return self._take_steps(stop)
        except Exception as error:  # of whatever kind: it is raised again
            if note := self._save_after(error):
                error.add_note(note)
            raise

    def _take_steps(self, stop: StopRequest) -> RunResult:
        outcome, reached = "completed", None
        if self._step == 0 and self._settings.val_at_start:
            reached = self._validate()
        if self._step == 0 or self._run.resume is not None:  # at its last step a run that failed may owe one
            self._evaluate(stop, is_last=reached is not None)
        if reached is not None:
            return self._result(f"completed: {reached}")
        while not self._is_over:
            started = time.monotonic()
            self._algorithm.num_tokens = self._num_tokens
            try:
                done = self._algorithm.train(self._step, self._watch)
            except StopIteration:
                outcome = f"completed: no rows are left after step {self._step}"
                break
            self._algorithm.has_moved = False
            self._step += 1
            self._position, self._epoch = self._run.loader.state(), self._run.loader.epoch
            self._record(done)
            if self._run.config.logger.record_digests:
                tensors = tensor_digests(self._run.policy.save, self._run.log.directory)
                self._run.log.log_digests(self._step, {"tokens": token_digest(done.token_ids), **tensors})
            reason = self._why_save_at_once(stop, time.monotonic() - started)
            if reason is not None:
                self._save(reason)
            reached = self._validate() if self._validation_is_due() else None
            is_last = self._is_over or reached is not None
            if reason is None or is_last:  # else the run that continues makes what is due here
                self._evaluate(stop, is_last=is_last)
            if reason is None:
                reason = self._why_save(stop, reached is not None, time.monotonic() - started)
                if reason is not None:
                    self._save(reason)
            self._longest_seconds = max(self._longest_seconds, time.monotonic() - started)
            if stop.requested:
                return self._result(f"stopped by {stop.signal_name}", is_complete=False)
            if reached is not None:
                return self._result(f"completed: {reached}")
            if reason == "deadline":
                return self._result(
                    "stopped to be in time for checkpointing.checkpoint_must_save_by", is_complete=False
                )
        if self._settings.val_at_end and self._validated_step != self._step:
            self._validate()
        self._evaluate(stop, is_last=True)
        if self._checkpointing.enabled and not self._is_saved():
            self._save("end" if self._run.phase is None or self._run.phase.is_last else "phase")
        return self._result(outcome)

    @property
    def _is_over(self) -> bool:
        """Whether all steps, or tokens, are done: of the phase, where the run has some."""
        num_steps, num_tokens = self._step - self._begin.step, self._num_tokens - self._begin.num_tokens
        return has_done_all(num_steps, num_tokens, self._run.num_steps, self._settings.max_num_tokens)

    @property
    def _num_tokens(self) -> float:
        return self._counters.get("num_tokens", 0.0)

    def _record(self, done: StepDone) -> None:
        """Write the metrics of the step."""
        self._newest = {}  # a checkpoint is ranked by what was measured at its own step
        for name, count in done.counts.items():
            self._counters[name] = self._counters.get(name, 0.0) + count
        times = self._watch.take()
        seconds = max(sum(times.values()), 1e-9)
        num_tokens = done.counts["num_tokens"]
        metrics = {
            **({} if self._run.phase is None else {"phase": float(self._begin.index + 1)}),
            **done.metrics,
            "total_num_tokens": num_tokens,
            "tokens_per_second": num_tokens / seconds,
            **self._run.utilization.metrics(
                done.outputs,
                num_tokens=num_tokens,
                step_seconds=seconds,
                training_seconds=times["timing/policy_training"],
            ),
            **times,
            "timing/total_step_time": seconds,
        }
        self._remember("train", metrics)
        self._run.log.log(self._step, "train", metrics)
        self._run.console.step(self._step, metrics, seconds=seconds)

    def _validate(self) -> str | None:
        """Measure and record; why the run may end here, where it may."""
        run, watch = self._run, Stopwatch()
        run.console.stage("validating")
        with watch.measure("total_validation_time"):
            found = self._algorithm.validate(self._step, self._watch)
        if found is None:
            return None
        self._validated_step = self._step
        metrics = {**found.metrics, **watch.take()}
        self._remember("val", metrics)
        run.log.log(self._step, "validation", metrics)
        run.console.validation(self._step, metrics, seconds=metrics["timing/total_validation_time"])
        if found.samples:
            run.log.log_rollouts(self._step, found.samples, split="validation")
            run.console.samples(found.samples[: run.config.logger.num_val_samples_to_print])
        return found.reached

    def _evaluate(self, stop: StopRequest, *, is_last: bool) -> None:
        """Make the evaluations that are due at this step and were not made yet. `is_last`: the run, or its phase, ends
        here; else, once it is to stop, the run that continues makes them."""
        run = self._run
        for evaluation in run.evaluations:
            name, watch = evaluation.name, Stopwatch()
            was_made = f"eval:{name}/accuracy" in self._newest
            is_put_off = stop.requested and not is_last
            if was_made or is_put_off or not evaluation.is_due(self._step, is_last=is_last):
                continue
            with watch.measure(f"{name}/total_evaluation_time"):
                generation = self._algorithm.serve(self._step, self._watch)
                run.console.stage(f"evaluating {name}")
                found = evaluation.measure(generation)
            seconds = watch.seconds(f"{name}/total_evaluation_time")
            metrics = {**found.metrics, **watch.take()}
            self._remember("eval", metrics)
            run.log.log(self._step, "evaluation", metrics)
            run.console.evaluation(name, self._step, metrics, seconds=seconds)
            run.log.log_rollouts(self._step, found.samples, split="evaluation")
            run.console.samples(found.samples[: run.config.logger.num_val_samples_to_print])

    def _validation_is_due(self) -> bool:
        if self._settings.val_at_end and self._is_over:
            return True
        return self._settings.val_period > 0 and self._step % self._settings.val_period == 0

    def _why_save_at_once(self, stop: StopRequest, step_seconds: float) -> SaveReason | None:
        """Why the step is to be saved before anything is measured, which may take longer than there is time."""
        if not self._checkpointing.enabled:
            return None
        if stop.requested:
            return "signal"
        return "deadline" if self._deadline.is_near(max(step_seconds, self._longest_seconds)) else None

    def _why_save(self, stop: StopRequest, reached: bool, step_seconds: float) -> SaveReason | None:
        """Whether to save after this step, and why. Counts the epochs that have ended."""
        before, self._num_finished_epochs = self._num_finished_epochs, self._count_finished_epochs()
        finished_epochs = self._num_finished_epochs if self._num_finished_epochs > before else None
        at_once = self._why_save_at_once(stop, step_seconds)
        if not self._checkpointing.enabled or at_once == "signal":
            return at_once
        if reached:
            return "threshold"
        if at_once is not None:
            return at_once
        if self._run.checkpointer.is_due(self._step, num_finished_epochs=None):
            return "period"
        return "epoch" if self._run.checkpointer.is_due(self._step, num_finished_epochs=finished_epochs) else None

    def _count_finished_epochs(self) -> int:
        loader = self._run.loader
        return loader.epoch + loader.is_at_end_of_epoch

    @property
    def _checkpoint(self) -> Path | None:
        """The newest."""
        run = self._run
        before = None if run.phase is None else run.phase.after
        return run.checkpointer.saved or (before if run.resume is None else run.resume.path)

    def _is_saved(self) -> bool:
        return self._checkpoint is not None and self._checkpoint.name == f"step_{self._step}"

    def _save(self, reason: SaveReason) -> None:
        run = self._run
        run.console.stage("saving")
        info = replace(
            run.origin,
            step=self._step,
            epoch=self._epoch,
            data_position=self._position,
            counters=dict(self._counters),
            metrics=dict(self._newest),
            reason=reason,
        )
        started = time.perf_counter()
        path = run.checkpointer.save(
            info, partial(self._write, urgent=reason in _URGENT), is_measured=reason not in _URGENT
        )
        seconds = time.perf_counter() - started
        self._watch.add("checkpointing", seconds)
        num_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        run.log.log(self._step, "checkpoint", {"num_bytes": num_bytes, "timing/save": seconds})

    def _save_after(self, error: Exception) -> str | None:
        """Save the last complete step after what ends the run, where it was not and is still whole; which one it is."""
        said_elsewhere = isinstance(error, (CheckpointWriteError, ProcessesLost))
        if not self._checkpointing.enabled or self._step == 0 or said_elsewhere:
            return None
        if not self._is_saved() and not self._algorithm.has_moved:
            try:
                self._save("failure")
            except Exception as failed:  # the log's disk may be full, and that of the checkpoints not
                if not self._is_saved():
                    logger.warning(f"step {self._step} could not be saved: {failed}")
        if self._is_saved():
            return f"Step {self._step}, the last complete one, is saved: {self._checkpoint}."
        newest = "none" if self._checkpoint is None else str(self._checkpoint)
        return f"Step {self._step}, the last complete one, could not be saved. The newest checkpoint is {newest}."

    def _write(self, directory: Path, *, urgent: bool) -> None:
        policy_directory = directory / "policy"
        policy_directory.mkdir()
        self._run.policy.save(policy_directory)
        self._run.tokenizer.save_pretrained(policy_directory / "tokenizer")
        self._algorithm.save(directory, self._step, urgent=urgent)
        if self._run.served is not None:
            self._run.served.save(directory)

    def _continue_from(self, resume: ResumePoint) -> None:
        self._run.policy.load(resume.path / "policy")
        self._algorithm.load(resume.path)
        if self._run.served is not None:
            self._run.served.load(resume.path)
        self._run.loader.from_state(resume.info.data_position)
        self._step = resume.step
        self._counters |= resume.info.counters
        self._newest = dict(resume.info.metrics)
        if any(name.startswith("val:") for name in self._newest):
            self._validated_step = resume.step

    def _begin_phase(self, phase: Phase) -> None:
        """A phase that begins now, after others or as the first."""
        if phase.goes_on_from is not None:
            self._run.policy.load(phase.goes_on_from)
        self._step = phase.begin.step
        self._counters |= phase.counters

    def _remember(self, split: str, metrics: Mapping[str, float]) -> None:
        """Of this step: for its checkpoint, or for the one that is there already."""
        named = {f"{split}:{name}": value for name, value in metrics.items()}
        self._newest |= named
        if (path := self._checkpoint) is not None and self._is_saved():
            self._run.checkpointer.add_metrics(path, named)

    def _result(self, outcome: str, *, is_complete: bool = True) -> RunResult:
        return RunResult(
            outcome=outcome,
            is_complete=is_complete,
            step=self._step,
            counters=dict(self._counters),
            checkpoint=self._checkpoint,
            log_directory=self._run.log.directory,
        )
