"""Whether a run that goes on from a checkpoint is the run that was not interrupted.

Contract: another process continues from the step, writing into a scratch directory alone, and its records are compared
with those that the uninterrupted run left: every metric but what a clock says, the token ids of every step, and every
tensor that was trained, bit for bit. The first difference is named, in the order in which a step computes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_rl_lora.checkpoints.durable_files import read_json_file, verify_files
from nemo_rl_lora.checkpoints.record import CONFIG_FILE, INFO_FILE, config_differences, read_config
from nemo_rl_lora.checkpoints.step_digests import DIGESTS_FILE, stored_digests
from nemo_rl_lora.run.metrics import is_measured, read_metrics

_SINKS = ("tensorboard", "wandb", "mlflow", "swanlab")
_NUM_LINES_SHOWN = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What a run left of its steps: metrics by (step, split), and digests by step."""

    metrics: Mapping[tuple[int, str], Mapping[str, Any]]
    digests: Mapping[int, Mapping[str, str]]


def declare(parser: argparse.ArgumentParser) -> None:
    """The step to go on from, and how far."""
    parser.add_argument("--checkpoint", required=True, help="the step to go on from: step_N")
    parser.add_argument("--steps", type=int, required=True, help="how many steps to compare")
    parser.add_argument("--record", help="the log directory of the uninterrupted run; by default it is looked for")


def main(arguments: argparse.Namespace) -> int:
    """Continue and compare; the exit code: 0 where nothing differs, 1 where something does."""
    if arguments.steps < 1:
        raise ValueError(f"--steps={arguments.steps}: must be 1 or more")
    step = Path(arguments.checkpoint)
    verify_files(step)
    begin = int(read_json_file(step, INFO_FILE)["step"])
    steps = range(begin + 1, begin + arguments.steps + 1)
    directory = Path(arguments.record) if arguments.record else _find_record(step, steps)
    expected = read_record(directory, steps, step.parent)
    with tempfile.TemporaryDirectory(prefix="verify_resume_") as scratch:
        found = read_record(_continue(step, steps[-1], Path(scratch)), steps)
    difference = first_difference(expected, found, steps)
    if difference is not None:
        sys.stdout.write(f"{difference}\nThe run that was resumed from {step} is not the run of {directory}.\n")
        return 1
    num_tensors = sum(label != "tokens" for digests in expected.digests.values() for label in digests)
    tokens = "token ids" if all("tokens" in expected.digests.get(number, {}) for number in steps) else "no token ids"
    sys.stdout.write(
        f"Steps {steps[0]} to {steps[-1]} after {step} are those of {directory}, bit for bit: "
        f"{_num_compared(expected, found)} metrics, {num_tensors} tensors, {tokens}.\n"
    )
    if len(expected.digests) < len(steps):
        sys.stdout.write("logger.record_digests=true in the run itself lets every step's tensors be compared.\n")
    return 0


def read_record(directory: Path, steps: range, saved: Path | None = None) -> Record:
    """The record in a log directory. Digests that it does not have are taken from the steps in `saved`."""
    metrics = {(line["step"], line["split"]): line for line in read_metrics(directory) if line["step"] in steps}
    digests: dict[int, dict[str, str]] = {}
    if (directory / DIGESTS_FILE).is_file():
        for text in (directory / DIGESTS_FILE).read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            digests[line.pop("step")] = line
    if saved is not None:
        for number in set(steps) - digests.keys():
            digests[number] = stored_digests(saved / f"step_{number}" / "policy")
    return Record(metrics=metrics, digests={number: digests[number] for number in steps if digests.get(number)})


def first_difference(expected: Record, found: Record, steps: range) -> str | None:
    """Where the two records part first: a sentence, or None. Of each step its tokens, its metrics, its tensors."""
    for number in steps:
        there, here = expected.digests.get(number, {}), found.digests.get(number, {})
        if "tokens" in there and there["tokens"] != here.get("tokens"):
            return f"step {number}: the token ids differ"
        if (number, "train") not in found.metrics:
            return f"step {number}: the resumed run did not do it"
        for split in ("train", "validation"):
            pair = [_compared(record.metrics.get((number, split), {})) for record in (expected, found)]
            if split == "validation" and not all(pair):
                continue  # val_at_end belongs to the last step of each run
            for name in sorted(pair[0].keys() | pair[1].keys()):
                values = [metrics.get(name, "absent") for metrics in pair]
                if values[0] != values[1]:
                    return f"step {number}, {split}: {name} was {values[0]}, and is {values[1]} after resuming"
        for label in sorted(there.keys() - {"tokens"}):
            if there[label] != here.get(label):
                return f"step {number}: {label} differs"
    return None


def _compared(line: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of a line, without what a clock or a device says."""
    return {name: value for name, value in line.items() if not is_measured(name)}


def _num_compared(expected: Record, found: Record) -> int:
    both = [key for key in expected.metrics if key in found.metrics and key[1] in ("train", "validation")]
    return sum(len(_compared(expected.metrics[key])) - 2 for key in both)  # step and split are no metrics


def _find_record(step: Path, steps: range) -> Path:
    """The log directory of a run of this configuration that passed the step without an interruption."""
    config = read_config(step)
    logs = Path(config["logger"]["log_dir"])
    passed = {*steps, steps[0] - 1} - {0}
    candidates = []
    for directory in sorted(logs.glob("exp_*")):
        if not (directory / CONFIG_FILE).is_file() or config_differences(read_config(directory), config):
            continue
        if passed <= {line["step"] for line in read_metrics(directory) if line["split"] == "train"}:
            candidates.append(directory)
    if not candidates:
        raise ValueError(
            f"--checkpoint={str(step)!r}: no run in {logs} has this configuration and did steps {min(passed)} to "
            f"{max(passed)} without an interruption. Let one pass that step, or name its log directory with --record."
        )
    return next((path for path in candidates if (path / DIGESTS_FILE).is_file()), candidates[0])


def _continue(step: Path, last: int, scratch: Path) -> Path:
    """The log directory of a process that goes on from the step until after step `last`."""
    info = read_json_file(step, INFO_FILE)
    if info.get("phase_begin") is not None:
        raise ValueError(
            f"--checkpoint={str(step)!r}: is a step of a run in phases, which this tool cannot end where it has to. "
            "Continue a copy of the directory without its later steps, and compare."
        )
    phase = info["phase"]
    command = [
        sys.executable,
        "-m",
        "nemo_rl_lora",
        phase,
        "--config",
        str(step / CONFIG_FILE),
        f"checkpointing.load_path={step.absolute()}",
        "checkpointing.enabled=false",
        "checkpointing.checkpoint_must_save_by=null",
        f"logger.log_dir={scratch}",
        "logger.record_digests=true",
        "logger.plot.enabled=false",
        *(f"logger.{sink}_enabled=false" for sink in _SINKS),
        f"{phase}.max_num_steps={last}",
    ]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        said = "\n".join(ended.stderr.strip().splitlines()[-_NUM_LINES_SHOWN:])
        raise ValueError(f"--checkpoint={str(step)!r}: could not be continued (exit code {ended.returncode}): {said}")
    return scratch / "exp_001"
