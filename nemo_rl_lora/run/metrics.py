"""The records of a run: its log directory, metrics.jsonl, the sinks beside it, and a stopwatch.

Contract: `log_dir/exp_NNN` is the next free number; config.yaml holds the resolved configuration;
metrics.jsonl holds one JSON object a line, flushed at once: `{"step": 3, "split": "train", "loss": 0.02,
...}`. A value that is not finite becomes null. Tensorboard and the other sinks show a metric as
`<split>/<name>`, and `timing/<name>` as `timing/<split>/<name>`.

It averages nothing and keeps no history. Curves are drawn from metrics.jsonl by the function that it is given.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import math
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from nemo_rl_lora.checkpoints.step_digests import DIGESTS_FILE
from nemo_rl_lora.config.logger import LoggerConfig
from nemo_rl_lora.run.gpus import GpuMonitor, sample_gpus
from nemo_rl_lora.run.memory import from_phase

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
CONFIG_FILE = "config.yaml"
ROLLOUTS_FILE = "rollouts.md"
RUN_LOG_FILE = "run.log"
# "ray": the machines, under NeMo RL's name
Split = Literal["train", "validation", "evaluation", "checkpoint", "phase", "restart", "ray"]
TIMING = "timing/"

_EXPERIMENT = re.compile(r"exp_(\d+)")
_INSTALL = {
    "wandb": "Install it with `uv sync --extra wandb`",
    "mlflow": "Install it with `uv pip install mlflow`",
    "swanlab": "Install it with `uv pip install swanlab`",
}
_MAX_TEXT = 4000


@dataclass(frozen=True, slots=True, kw_only=True)
class Sink:
    """Somewhere that metrics are shown beside metrics.jsonl: what takes those of a step, and what ends it."""

    log: Callable[[int, dict[str, float]], object]
    close: Callable[[], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutSample:
    """One completion to read, as the environment scored it."""

    prompt: str
    completion: str
    reward: float
    finish_reason: str


class Stopwatch:
    """Seconds by name. `measure` may be entered several times under one name; the seconds add up. An error about memory
    from in there says that name."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            with from_phase(name):
                yield
        finally:
            self.add(name, time.perf_counter() - started)

    def add(self, name: str, seconds: float) -> None:
        """Count seconds that were measured elsewhere."""
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def seconds(self, name: str) -> float:
        """Seconds under this name since the last take."""
        return self._seconds.get(name, 0.0)

    def take(self) -> dict[str, float]:
        """`timing/<name>` -> seconds since the last take, ready for `RunLog.log`."""
        taken = {TIMING + name: seconds for name, seconds in self._seconds.items()}
        self._seconds = {}
        return taken


def check_sinks(config: LoggerConfig) -> None:
    """ValueError where a sink is enabled whose package is not installed. Imports nothing."""
    for name, install in _INSTALL.items():
        if getattr(config, f"{name}_enabled") and importlib.util.find_spec(name) is None:
            raise ValueError(
                f"logger.{name}_enabled=True: the package {name} is not installed. {install}, or set "
                f"logger.{name}_enabled=false."
            )


class RunLog:
    """The log directory of one run."""

    def __init__(self, config: LoggerConfig, resolved_yaml: str, draw: Callable[[Path], object] | None = None) -> None:
        """Make `exp_NNN`. ValueError where the directory cannot be written or a sink's package is missing.

        `draw` gets the directory every `logger.plot.period` training steps.
        """
        check_sinks(config)
        self._config = config
        self._draw = draw
        self._warned: set[str] = set()
        self._step = 0
        self._lock = threading.Lock()
        self.directory = _make_directory(config.log_dir, resolved_yaml)
        self._file = (self.directory / METRICS_FILE).open("a", encoding="utf-8")
        self._sinks = _open_sinks(config, self.directory, resolved_yaml)
        self._gpus: GpuMonitor | None = None
        if config.monitor_gpus and sample_gpus():
            self._gpus = GpuMonitor(config.gpu_monitoring, lambda sample: self.log(self._step, "ray", sample))

    def log(self, step: int, split: Split, metrics: Mapping[str, Any]) -> None:
        """Record the metrics of a step: numbers (or tensors of one element), by their name without the
        split."""
        values = {name: float(value) for name, value in metrics.items()}
        self._warn_not_finite(step, values)
        line = {"step": step, "split": split}
        line |= {name: _json_number(value) for name, value in values.items()}
        shown = {shown_name(split, name): value for name, value in values.items()}
        with self._lock:
            self._step = max(self._step, step)
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
            for sink in self._sinks:
                sink.log(step, shown)
        period = self._config.plot.period
        if self._draw is not None and split == "train" and period and step % period == 0:
            self._draw(self.directory)

    def log_digests(self, step: int, digests: Mapping[str, str]) -> None:
        """Append a step's digests to digests.jsonl."""
        with (self.directory / DIGESTS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **digests}) + "\n")

    def log_rollouts(self, step: int, samples: Sequence[RolloutSample], *, split: Split = "train") -> None:
        """Append some completions to rollouts.md, as `logger.rollout_samples` says."""
        config = self._config.rollout_samples
        if not config.num_per_step or (split == "train" and step % config.period != 0):
            return
        path = self.directory / ROLLOUTS_FILE
        if path.exists() and path.stat().st_size >= config.max_megabytes * 1e6:
            if ROLLOUTS_FILE not in self._warned:
                logger.info(
                    f"{path} has logger.rollout_samples.max_megabytes={config.max_megabytes}: no more is written"
                )
            self._warned.add(ROLLOUTS_FILE)
            return
        with path.open("a", encoding="utf-8") as file:
            for number, sample in enumerate(samples[: config.num_per_step], 1):
                file.write(rollout_text(step, split, number, sample))

    def close(self) -> None:
        """Flush and close every sink. May be called twice."""
        if self._file.closed:
            return
        if self._gpus is not None:
            self._gpus.close()
        for close in (self._file.close, *(sink.close for sink in self._sinks)):
            with suppress(OSError):  # on a full disk; the line that did not fit has ended the run
                close()

    def _warn_not_finite(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if not math.isfinite(value) and name not in self._warned:
                self._warned.add(name)
                logger.warning(f"metric {name} is {value} in step {step}; {METRICS_FILE} has null for it")


def is_measured(name: str) -> bool:
    """Whether a metric says what a clock or a device measured, so that the same run again has another value."""
    return name.startswith(TIMING) or "_per_second" in name or name in ("mfu", "peak_gpu_gib")


def shown_name(split: str, name: str) -> str:
    """The name under which sinks show a metric."""
    if name.startswith(TIMING):
        return f"{TIMING}{split}/{name.removeprefix(TIMING)}"
    return f"{split}/{name}"


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The lines of a log directory's metrics.jsonl; a last line that was cut off is left out."""
    lines = (directory / METRICS_FILE).read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def rollout_text(step: int, split: str, number: int, sample: RolloutSample) -> str:
    """A rollout as Markdown; texts stand indented, so that nothing in them is markup."""
    return (
        f"## Step {step}, {split}, sample {number}: reward {sample.reward:g} ({sample.finish_reason})\n\n"
        f"Prompt:\n\n{_indented(sample.prompt)}\n\nCompletion:\n\n{_indented(sample.completion)}\n\n"
    )


def _indented(text: str) -> str:
    if len(text) > _MAX_TEXT:
        text = f"{text[:_MAX_TEXT]} [... {len(text) - _MAX_TEXT:,} more characters]"
    return "\n".join("    " + line for line in text.splitlines()) or "    (empty)"


def _json_number(value: float) -> float | int | None:
    if not math.isfinite(value):
        return None
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


def _make_directory(log_dir: str, resolved_yaml: str) -> Path:
    directory: Path | None = None
    try:
        directory = _next_directory(Path(log_dir))
        (directory / CONFIG_FILE).write_text(resolved_yaml, encoding="utf-8")
    except OSError as error:
        if directory is not None:
            shutil.rmtree(directory, ignore_errors=True)
        raise ValueError(
            f"logger.log_dir={log_dir!r}: cannot be written ({error.strerror}). Make it writable, free some "
            "space, or name another directory."
        ) from error
    return directory


def _next_directory(parent: Path) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    numbers = [int(match[1]) for path in parent.iterdir() if (match := _EXPERIMENT.fullmatch(path.name))]
    number = max(numbers, default=0) + 1
    while True:
        directory = parent / f"exp_{number:03d}"
        try:
            directory.mkdir()
        except FileExistsError:  # another run took the number in between
            number += 1
            continue
        return directory


def _open_sinks(config: LoggerConfig, directory: Path, resolved_yaml: str) -> list[Sink]:
    openers = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow, "swanlab": _swanlab}
    chosen = [opened for name, opened in openers.items() if getattr(config, f"{name}_enabled")]
    return [opened(config, directory, resolved_yaml) for opened in chosen]


def _tensorboard(config: LoggerConfig, directory: Path, resolved_yaml: str) -> Sink:
    from torch.utils.tensorboard.writer import SummaryWriter

    writer = SummaryWriter(str(directory / (config.tensorboard.log_dir or "tensorboard")))

    def log(step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return Sink(log=log, close=writer.close)


def _wandb(config: LoggerConfig, directory: Path, resolved_yaml: str) -> Sink:
    section, settings = config.wandb, yaml.safe_load(resolved_yaml)
    run = importlib.import_module("wandb").init(
        project=section.project, name=section.name, entity=section.entity, dir=str(directory), config=settings
    )
    return Sink(log=lambda step, metrics: run.log(metrics, step=step), close=run.finish)


def _mlflow(config: LoggerConfig, directory: Path, resolved_yaml: str) -> Sink:
    mlflow, section = importlib.import_module("mlflow"), config.mlflow
    if section.tracking_uri:
        mlflow.set_tracking_uri(section.tracking_uri)
    if section.experiment_name:
        mlflow.set_experiment(section.experiment_name)
    mlflow.start_run(run_name=section.run_name)
    mlflow.log_text(resolved_yaml, CONFIG_FILE)
    return Sink(log=lambda step, metrics: mlflow.log_metrics(metrics, step=step), close=mlflow.end_run)


def _swanlab(config: LoggerConfig, directory: Path, resolved_yaml: str) -> Sink:
    swanlab, section = importlib.import_module("swanlab"), config.swanlab
    logdir, settings = str(directory / "swanlab"), yaml.safe_load(resolved_yaml)
    swanlab.init(project=section.project, experiment_name=section.name, logdir=logdir, config=settings)
    return Sink(log=lambda step, metrics: swanlab.log(metrics, step=step), close=swanlab.finish)
