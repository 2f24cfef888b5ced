"""What SFT, DPO and GRPO share: when to validate and to save, what is recorded, how a run ends and goes on.

An algorithm is a `Work`: what one step and one validation do. The loop knows no loss, no backend and no engine. What
is drawn follows from (seed, step), so a resumed run is the run that was interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from nemo_rl_lora.checkpoint import Checkpointer, ResumePoint, SaveDeadline, SaveReason, TrainingInfo
from nemo_rl_lora.config.master import MasterConfig
from nemo_rl_lora.console import TrainingConsole
from nemo_rl_lora.data.loader import RowLoader
from nemo_rl_lora.generation.protocol import GenerationFailed
from nemo_rl_lora.lora.spec import LoraSpec
from nemo_rl_lora.metrics import RolloutSample, RunLog, Stopwatch
from nemo_rl_lora.policy.protocol import Policy
from nemo_rl_lora.run_control import StopRequest
from nemo_rl_lora.step_digests import tensor_digests, token_digest
from nemo_rl_lora.types import StepOutput


class LoopSettings(Protocol):
    """What the loop reads of the `sft`, `dpo` or `grpo` section."""

    @property
    def val_period(self) -> int: ...

    @property
    def val_at_start(self) -> bool: ...

    @property
    def val_at_end(self) -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RunParts:
    """What every loop works with, put together by build/."""

    config: MasterConfig
    settings: LoopSettings
    policy: Policy
    loader: RowLoader[Any]
    num_steps: int
    checkpointer: Checkpointer
    log: RunLog
    console: TrainingConsole
    model_source: str
    base_digest: str | None
    spec: LoraSpec | None
    initial_adapter: Mapping[str, str] | None  # where a new run's adapter came from
    tokenizer: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDone:
    """What a step did. `counts` are added to the run's totals; `num_tokens` is one of them. `token_ids` are the rows
    that were drawn, read only where their digest is recorded."""

    metrics: Mapping[str, float]
    counts: Mapping[str, float]
    token_ids: Iterable[Sequence[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Validated:
    """What a validation found. `reached` says why the run may end here, where it may."""

    metrics: Mapping[str, float]
    samples: Sequence[RolloutSample] = field(default=())
    reached: str | None = None


class Work(Protocol):
    """What one algorithm does. `step` is the number of complete steps before it."""

    def train(self, step: int, watch: Stopwatch) -> StepDone:
        """Draw the next batch and train on it. Raises StopIteration where the data has ended."""
        ...

    def validate(self, step: int, watch: Stopwatch) -> Validated | None:
        """Measure the policy as it is; None where there is nothing to measure it on. `watch` is the next step's, for
        what is done here in its place."""
        ...

    def save(self, directory: Path) -> None:
        """Write what the algorithm itself has to keep into the step's directory."""
        ...

    def load(self, directory: Path) -> None:
        """Read what `save` wrote."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """How the loop ended. `checkpoint` is the newest one that it wrote."""

    outcome: str
    step: int
    checkpoint: Path | None


class TrainingLoop:
    """The loop's state: the step, the totals and the newest metrics."""

    def __init__(self, parts: RunParts, work: Work, resume: ResumePoint | None) -> None:
        self._parts, self._work = parts, work
        self._settings = parts.settings
        self._step = 0
        self._counters: dict[str, float] = {}
        self._newest: dict[str, float | None] = {}
        self._watch = Stopwatch()
        self._checkpoint: Path | None = None
        self._initial_adapter = parts.initial_adapter
        self._deadline = SaveDeadline(parts.config.checkpointing.must_save_by_seconds)
        self._longest_seconds = 0.0  # of a step with the validation and the save that came with it
        self._validated_step = -1
        if resume is not None:
            self._continue_from(resume)
        self._position = parts.loader.state()  # after the last complete step
        self._num_finished_epochs = self._count_finished_epochs()

    def run(self, stop: StopRequest) -> RunResult:
        """Run to the end of the data or of max_num_steps, or until asked to stop."""
        outcome = "completed"
        if self._step == 0 and self._settings.val_at_start and (reached := self._validate()):
            return self._result(reached)
        while self._step < self._parts.num_steps:
            started = time.monotonic()
            try:
                done = self._work.train(self._step, self._watch)
            except StopIteration:
                outcome = f"completed: no rows are left after step {self._step}"
                break
            except GenerationFailed:
                if self._parts.config.checkpointing.enabled and self._step > 0 and not self._is_saved():
                    self._save("failure")
                raise
            self._step += 1
            self._position = self._parts.loader.state()
            self._record(done)
            if self._parts.config.logger.record_digests:
                tensors = tensor_digests(self._parts.policy.save, self._parts.log.directory)
                self._parts.log.log_digests(self._step, {"tokens": token_digest(done.token_ids), **tensors})
            reached = self._validate() if self._validation_is_due() else None
            reason = self._why_save(stop, reached is not None, time.monotonic() - started)
            if reason is not None:
                self._save(reason)
            self._longest_seconds = max(self._longest_seconds, time.monotonic() - started)
            if stop.requested:
                return self._result(f"stopped by {stop.signal_name}")
            if reached is not None:
                return self._result(reached)
            if reason == "deadline":
                return self._result("stopped to be in time for checkpointing.checkpoint_must_save_by")
        if self._settings.val_at_end and self._validated_step != self._step:
            self._validate()
        if self._parts.config.checkpointing.enabled and not self._is_saved():
            self._save("end")
        return self._result(outcome)

    def _record(self, done: StepDone) -> None:
        """Write the metrics of the step."""
        self._newest = {}  # a checkpoint is ranked by what was measured at its own step
        for name, count in done.counts.items():
            self._counters[name] = self._counters.get(name, 0.0) + count
        times = self._watch.take()
        seconds = sum(times.values())
        num_tokens = done.counts["num_tokens"]
        metrics = {
            **done.metrics,
            "total_num_tokens": num_tokens,
            "tokens_per_second": num_tokens / max(seconds, 1e-9),
            **times,
            "timing/total_step_time": seconds,
        }
        self._remember("train", metrics)
        self._parts.log.log(self._step, "train", metrics)
        self._parts.console.step(self._step, metrics, seconds=seconds)

    def _validate(self) -> str | None:
        """Measure and record; why the run may end here, where it may."""
        parts, watch = self._parts, Stopwatch()
        parts.console.stage("validating")
        with watch.measure("total_validation_time"):
            found = self._work.validate(self._step, self._watch)
        if found is None:
            return None
        self._validated_step = self._step
        metrics = {**found.metrics, **watch.take()}
        self._remember("val", metrics)
        parts.log.log(self._step, "validation", metrics)
        parts.console.validation(self._step, metrics, seconds=metrics["timing/total_validation_time"])
        if found.samples:
            parts.log.log_rollouts(self._step, found.samples, split="validation")
            parts.console.samples(found.samples[: parts.config.logger.num_val_samples_to_print])
        return found.reached

    def _validation_is_due(self) -> bool:
        if self._settings.val_at_end and self._step == self._parts.num_steps:
            return True
        return bool(self._settings.val_period) and self._step % self._settings.val_period == 0

    def _why_save(self, stop: StopRequest, reached: bool, step_seconds: float) -> SaveReason | None:
        """Whether to save after this step, and why. Counts the epochs that have ended."""
        before, self._num_finished_epochs = self._num_finished_epochs, self._count_finished_epochs()
        finished_epochs = self._num_finished_epochs if self._num_finished_epochs > before else None
        if not self._parts.config.checkpointing.enabled:
            return None
        if stop.requested:
            return "signal"
        if reached:
            return "threshold"
        if self._deadline.is_near(max(step_seconds, self._longest_seconds)):
            return "deadline"
        if self._parts.checkpointer.is_due(self._step, num_finished_epochs=None):
            return "period"
        return "epoch" if self._parts.checkpointer.is_due(self._step, num_finished_epochs=finished_epochs) else None

    def _count_finished_epochs(self) -> int:
        loader = self._parts.loader
        return loader.epoch + loader.is_at_end_of_epoch

    def _is_saved(self) -> bool:
        return self._checkpoint is not None and self._checkpoint.name == f"step_{self._step}"

    def _save(self, reason: SaveReason) -> None:
        parts = self._parts
        parts.console.stage("saving")
        info = TrainingInfo(
            step=self._step,
            phase=parts.config.algorithm,
            epoch=parts.loader.epoch,
            data_position=self._position,
            counters=dict(self._counters),
            metrics=dict(self._newest),
            model_source=parts.model_source,
            base_digest=parts.base_digest,
            spec=None if parts.spec is None else asdict(parts.spec),
            initial_adapter=self._initial_adapter,
            reason=reason,
        )
        started = time.perf_counter()
        self._checkpoint = parts.checkpointer.save(info, self._write)
        seconds = time.perf_counter() - started
        self._watch.add("checkpointing", seconds)
        num_bytes = sum(path.stat().st_size for path in self._checkpoint.rglob("*") if path.is_file())
        parts.log.log(self._step, "checkpoint", {"num_bytes": num_bytes, "timing/save": seconds})

    def _write(self, directory: Path) -> None:
        policy_directory = directory / "policy"
        policy_directory.mkdir()
        self._parts.policy.save(policy_directory)
        self._parts.tokenizer.save_pretrained(policy_directory / "tokenizer")
        self._work.save(directory)

    def _continue_from(self, resume: ResumePoint) -> None:
        self._parts.policy.load(resume.path / "policy")
        self._work.load(resume.path)
        self._parts.loader.from_state(resume.info.data_position)
        self._step = resume.step
        self._checkpoint = resume.path
        self._initial_adapter = resume.info.initial_adapter
        self._counters |= resume.info.counters
        self._newest = dict(resume.info.metrics)

    def _remember(self, split: str, metrics: Mapping[str, float]) -> None:
        self._newest |= {f"{split}:{name}": value for name, value in metrics.items()}

    def _result(self, outcome: str) -> RunResult:
        return RunResult(outcome=outcome, step=self._step, checkpoint=self._checkpoint)


class ValidationSettings(Protocol):
    """What is read of the `sft` or `dpo` section for a validation."""

    @property
    def val_batches(self) -> int: ...

    @property
    def val_global_batch_size(self) -> int: ...


def validation_spans(num_rows: int, settings: ValidationSettings) -> list[slice]:
    """The first `val_batches` batches of a set of rows; the whole set where that is 0."""
    size = settings.val_global_batch_size
    num_used = min(num_rows, settings.val_batches * size) if settings.val_batches else num_rows
    return [slice(begin, min(begin + size, num_used)) for begin in range(0, num_used, size)]


def tokens_by_source(rows: Iterable[tuple[str, int]]) -> dict[str, float]:
    """`num_tokens/<source>` from the source and the number of tokens of each row."""
    totals: dict[str, float] = {}
    for source, num_tokens in rows:
        name = f"num_tokens/{source}"
        totals[name] = totals.get(name, 0.0) + num_tokens
    return totals


def mean_outputs(outputs: Sequence[StepOutput]) -> dict[str, float]:
    """Metrics of a step's optimizer steps: means; min and max where a name says so; the last learning rate."""
    metrics: dict[str, float] = {}
    for name in outputs[0].metrics:
        values = [output.metrics[name] for output in outputs]
        reduce = min if name.endswith("_min") else max if name.endswith("_max") else lambda x: sum(x) / len(x)
        metrics[name] = reduce(values)
    num_forward = sum(output.num_forward_tokens for output in outputs)
    return metrics | {
        "loss": sum(output.loss for output in outputs) / len(outputs),
        "grad_norm": sum(output.grad_norm for output in outputs) / len(outputs),
        "lr": outputs[-1].lr,
        "num_forward_tokens": float(num_forward),
        "padding_share": sum(output.num_padding_tokens for output in outputs) / max(num_forward, 1),
    }
