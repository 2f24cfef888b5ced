"""SIGKILL a training run again and again, at random moments and inside saves, and prove that nothing was lost.

uv run benchmarks/kill_runs.py --kills 30 --in-save 5 --directory DIR sft [a.b=c ...]

Every life of the run is a process of its own, forked from one that has imported what a driver imports, and starts the
driver by its own entry with the same command. After each kill every step on disk is whole and none is missing; the next
life continues from the newest one and leaves no debris; and at the end adapter, moments and metrics are those of a run
that nobody killed. Prints one JSON line a kill, and exits 1 at the first thing that is not so.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch  # before the driver's main, which would start the process again to set it up

from nemo_rl_lora.checkpoints.durable_files import verify_files
from nemo_rl_lora.checkpoints.step_digests import stored_digests
from nemo_rl_lora.checkpoints.steps import step_directories
from nemo_rl_lora.run import cli
from nemo_rl_lora.run.metrics import METRICS_FILE, is_measured, read_metrics

assert torch.__version__
IMPORTED_ONCE = (
    "nemo_rl_lora.run.start",
    "nemo_rl_lora.policy.dtensor.policy",
    "nemo_automodel._transformers.auto_model",
)
POLL_SECONDS = 0.002
LIFE_SECONDS = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A driver's command, in directories of its own."""

    algorithm: str
    overrides: tuple[str, ...]
    root: Path

    @property
    def steps(self) -> Path:
        return self.root / "steps"

    def start(self, max_num_steps: int) -> int:
        """The id of a process that runs the driver."""
        arguments = [
            *self.overrides,
            f"checkpointing.checkpoint_dir={self.steps}",
            "checkpointing.save_period=1",
            f"logger.log_dir={self.root / 'logs'}",
            "logger.plot.enabled=false",
            f"{self.algorithm}.max_num_steps={max_num_steps}",
        ]
        if (child := os.fork()) != 0:
            return child
        self.root.mkdir(parents=True, exist_ok=True)
        output = os.open(self.root / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = 1
        try:
            code = cli.run(self.algorithm, program=self.algorithm, argv=arguments)
        finally:
            sys.stdout.flush()
            os._exit(code)

    def logs(self) -> list[Path]:
        return sorted((self.root / "logs").glob("exp_*"))

    def newest(self) -> int:
        """The newest complete step; 0 where there is none."""
        steps = step_directories(self.steps)
        return steps[-1][0] if steps else 0

    def debris(self) -> list[str]:
        return sorted(path.name for path in self.steps.glob("tmp_*"))


def wait(child: int, until: Callable[[], bool]) -> None:
    """Until this holds; RuntimeError where the process ended or took too long before."""
    deadline = time.monotonic() + LIFE_SECONDS
    while not until():
        if os.waitpid(child, os.WNOHANG)[0] or time.monotonic() > deadline:
            raise RuntimeError("the run ended, or did not come so far; its output is in output.txt")
        time.sleep(POLL_SECONDS)


def kill_once(run: Run, draw: random.Random, *, in_save: bool, save_seconds: float) -> dict[str, Any]:
    """One life: started, killed, and what it left."""
    before, num_logs = run.newest(), len(run.logs())
    child = run.start(10**6)
    try:
        wait(child, lambda: len(run.logs()) > num_logs)
        left_over = run.debris()  # the start has cleared the directory by now, and a save is far
        if in_save:
            wait(child, lambda: bool(list(run.steps.glob("tmp_step_*"))))
            time.sleep(draw.uniform(0, save_seconds))
        else:
            is_early = draw.random() < 0.2  # while weights are loaded
            wait(child, lambda: is_early or bool(lines_of(run.logs()[-1])))
            time.sleep(draw.uniform(0, 6 * save_seconds))
    finally:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    log = run.logs()[-1]
    messages = (log / "run.log").read_text(encoding="utf-8").splitlines() if (log / "run.log").is_file() else []
    saves = [line for line in messages if " saving " in line or " saved " in line]
    trained = [line["step"] for line in lines_of(log) if line["split"] == "train"]
    for _, path in step_directories(run.steps):
        verify_files(path)
    found = {
        "from_step": before,
        "first_step": trained[0] if trained else None,
        "newest_step": run.newest(),
        "inside_save": bool(saves) and " saving " in saves[-1],
        "left_by_the_kill": run.debris(),
    }
    wrong = [
        *(["debris of the life before"] if left_over else []),
        *(["an older newest step"] if run.newest() < before else []),
        *(["another first step"] if trained and trained[0] != before + 1 else []),
        *(["a step that was saved is missing"] if trained and run.newest() < trained[-1] - 1 else []),
    ]
    if wrong:
        raise RuntimeError(f"{', '.join(wrong)}: {found}, left over {left_over}")
    return found


def lines_of(log: Path) -> list[dict[str, Any]]:
    """The metrics so far; none where the process was killed before it opened the file."""
    return read_metrics(log) if (log / METRICS_FILE).is_file() else []


def compare(run: Run, whole: Run, last: int) -> dict[str, Any]:
    """The run that was killed beside one that was not. RuntimeError names the first difference."""
    for one in (run, whole):
        _, status = os.waitpid(one.start(last), 0)
        if status != 0:
            raise RuntimeError(f"the run to step {last} ended with {os.waitstatus_to_exitcode(status)}")
    digests = [stored_digests(one.steps / f"step_{last}" / "policy") for one in (run, whole)]
    if different := [name for name, digest in digests[1].items() if digests[0].get(name) != digest]:
        raise RuntimeError(f"step {last}: {different[0]} is not that of a run that was not killed")
    metrics = [_metrics(one) for one in (run, whole)]
    for step in range(1, last + 1):
        if metrics[0].get(step) != metrics[1][step]:
            raise RuntimeError(f"step {step}: {metrics[0].get(step)} is not {metrics[1][step]}")
    if run.debris():
        raise RuntimeError(f"debris: {run.debris()}")
    return {"last_step": last, "tensors_compared": len(digests[1]), "steps_compared": last}


def _metrics(run: Run) -> dict[int, dict[str, Any]]:
    """By step, the metrics that no clock says; a step that was done again counts by its last time."""
    lines = [line for log in run.logs() for line in lines_of(log) if line["split"] == "train"]
    return {line["step"]: {name: value for name, value in line.items() if not is_measured(name)} for line in lines}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, required=True)
    parser.add_argument("--in-save", type=int, required=True, help="how many of them at least are inside a save")
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-seconds", type=float, default=0.3, help="about how long a save takes here")
    parser.add_argument("algorithm", choices=["sft", "dpo", "grpo"])
    parser.add_argument("overrides", nargs="*", default=[])
    arguments = parser.parse_intermixed_args()
    for name in IMPORTED_ONCE:
        importlib.import_module(name)
    draw = random.Random(arguments.seed)
    overrides = tuple(arguments.overrides)
    run = Run(algorithm=arguments.algorithm, overrides=overrides, root=arguments.directory / "killed")
    num_inside = 0
    for number in range(arguments.kills):
        remaining = arguments.kills - number
        in_save = arguments.in_save - num_inside >= remaining or draw.random() < 0.4
        found = kill_once(run, draw, in_save=in_save, save_seconds=arguments.save_seconds)
        num_inside += found["inside_save"]
        print(json.dumps({"kill": number + 1, **found}), flush=True)
    if num_inside < arguments.in_save:
        raise RuntimeError(f"{num_inside} of {arguments.kills} kills were inside a save; lower --save-seconds")
    whole = Run(algorithm=arguments.algorithm, overrides=overrides, root=arguments.directory / "whole")
    print(json.dumps({"kills": arguments.kills, "inside_save": num_inside, **compare(run, whole, run.newest() + 2)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
