"""Run benchmark commands in turn and compare what they print. One JSON line at the end.

    compare.py --repeats 3 --metric step_s_median \\
        "ours=python benchmarks/grpo_step_ours.py --seed {repeat}" \\
        "trl-mb16=python benchmarks/grpo_step_trl.py --micro 16 --seed {repeat}"

The commands run one at a time, in this order in the first repeat, in the reverse order in the second, and so on, so
that a slow drift of the machine falls on all. Each must end with a line of JSON. `{repeat}` is the number of the
repeat, from 0. Ratios are to the first command, repeat by repeat. A command is split like a shell's words, but there
is no shell. `foreign_cpu` is the share of the machine's busy time, while a command ran, that was not the command's:
distrust a run where it is above a few percent.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOKEN_FIELDS = ("sampled_tokens_per_step", "trained_tokens_per_step")
MEMORY_FIELD = "peak_rss_mib"
TIME_FIELDS = ("step_s_median", "gen_s_median", "train_s_median")


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    name: str
    command: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A process that has ended."""

    exit_code: int
    output: str
    errors: str
    wall_seconds: float
    cpu_seconds: float  # of its whole tree, as far as it waited for its children
    foreign_cpu: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sides", nargs="+", type=_side, metavar="NAME=COMMAND")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--metric", default="step_s_median", help="the field whose ratios are given for each repeat")
    parser.add_argument("--tolerance", type=float, default=0.05, help="of the mean numbers of tokens per step")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds a command may take")
    parser.add_argument("--log", type=Path, help="append the JSON line of every run to this file")
    arguments = parser.parse_args()
    sides: list[Side] = arguments.sides
    results: dict[str, list[dict[str, Any]]] = {side.name: [] for side in sides}
    if len(results) < len(sides):
        parser.error("every side needs a name of its own")
    for repeat in range(arguments.repeats):
        for side in sides if repeat % 2 == 0 else reversed(sides):
            result = run_side(side, repeat, arguments.timeout)
            results[side.name].append(result)
            _report(side, repeat, result, arguments.metric)
            if arguments.log is not None:
                with arguments.log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(result) + "\n")
    print(json.dumps(comparison(results, arguments.metric, arguments.tolerance)), flush=True)
    return 0


def run_side(side: Side, repeat: int, timeout: float) -> dict[str, Any]:
    """The last JSON object that the command printed, with what was measured from outside. SystemExit if it failed."""
    done = run_process(shlex.split(side.command.replace("{repeat}", str(repeat))), timeout)
    result = last_json(done.output)
    if done.exit_code != 0 or result is None:
        sys.stderr.write(done.errors[-3000:])
        raise SystemExit(f"{side.name}: exit code {done.exit_code}, {'no' if result is None else 'a'} JSON line")
    return result | {
        "name": side.name,
        "repeat": repeat,
        "wall_s": round(done.wall_seconds, 2),
        "cpu_s": round(done.cpu_seconds, 2),
        "foreign_cpu": round(done.foreign_cpu, 4),
    }


def run_process(command: Sequence[str], timeout: float) -> Finished:
    """Run to the end, or kill its process group after `timeout` seconds."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        busy, begun = _busy_seconds(), time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=errors, start_new_session=True)
        try:
            status, usage = _wait(process.pid, begun + timeout)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
        wall, busy = time.perf_counter() - begun, _busy_seconds() - busy
        cpu = usage.ru_utime + usage.ru_stime
        output.seek(0)
        errors.seek(0)
        return Finished(
            exit_code=process.returncode,
            output=output.read().decode(errors="replace"),
            errors=errors.read().decode(errors="replace"),
            wall_seconds=wall,
            cpu_seconds=cpu,
            foreign_cpu=max(0.0, busy - cpu) / busy if busy > 0 else 0.0,
        )


def last_json(text: str) -> dict[str, Any] | None:
    """The last line that is a JSON object."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            return json.loads(line)
    return None


def comparison(results: dict[str, list[dict[str, Any]]], metric: str, tolerance: float) -> dict[str, Any]:
    """Statistics of every side, and each other side against the first."""
    first, *others = results
    fields = dict.fromkeys([metric, *TIME_FIELDS, MEMORY_FIELD, *TOKEN_FIELDS, "wall_s", "cpu_s", "foreign_cpu"])
    return {
        "metric": metric,
        "repeats": len(results[first]),
        "sides": {
            name: {field: spread(values) for field in fields if (values := _values(runs, field))}
            for name, runs in results.items()
        },
        "against_first": {
            f"{name}/{first}": {
                metric: _ratios(results[name], results[first], metric),
                MEMORY_FIELD: _ratios(results[name], results[first], MEMORY_FIELD),
                "tokens": _token_agreement(results[name], results[first], tolerance),
            }
            for name in others
        },
        "largest_foreign_cpu": max(run["foreign_cpu"] for runs in results.values() for run in runs),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range, and mean and (unbiased) standard deviation."""
    return {
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
        "mean": round(statistics.fmean(values), 4),
        "std": round(statistics.stdev(values), 4) if len(values) > 1 else 0.0,
    }


def _ratios(runs: Sequence[dict[str, Any]], first: Sequence[dict[str, Any]], field: str) -> dict[str, Any] | None:
    own, base = _values(runs, field), _values(first, field)
    if len(own) != len(base) or not own or not all(base):
        return None
    each = [a / b for a, b in zip(own, base, strict=True)]
    return {"each": [round(ratio, 4) for ratio in each], **spread(each)}


def _token_agreement(
    runs: Sequence[dict[str, Any]], first: Sequence[dict[str, Any]], tolerance: float
) -> dict[str, Any]:
    """Ratios of the mean tokens a step over all repeats, and whether they are within the tolerance."""
    agreement: dict[str, Any] = {}
    for field in TOKEN_FIELDS:
        own, base = _values(runs, field), _values(first, field)
        if own and base:
            ratio = statistics.fmean(own) / statistics.fmean(base)
            agreement[field] = {"ratio": round(ratio, 4), "agrees": abs(ratio - 1) <= tolerance}
    return agreement


def _values(runs: Sequence[dict[str, Any]], field: str) -> list[float]:
    return [run[field] for run in runs if isinstance(run.get(field), (int, float))]


def _wait(pid: int, deadline: float) -> tuple[int, Any]:
    while True:
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        if ended:
            return status, usage
        if time.perf_counter() > deadline:
            os.killpg(pid, signal.SIGKILL)
            _, status, usage = os.wait4(pid, 0)
            return status, usage
        time.sleep(0.05)


def _busy_seconds() -> float:
    """Busy time of all processors since boot: everything but idle and waiting for input and output."""
    with open("/proc/stat", encoding="ascii") as file:
        user, nice, system, _, _, irq, softirq, steal = (int(word) for word in file.readline().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _report(side: Side, repeat: int, result: dict[str, Any], metric: str) -> None:
    sys.stderr.write(
        f"repeat {repeat}  {side.name}: {metric} {result.get(metric)}, {MEMORY_FIELD} {result.get(MEMORY_FIELD)}, "
        f"wall {result['wall_s']} s, foreign {result['foreign_cpu']:.1%}\n"
    )


def _side(text: str) -> Side:
    name, separator, command = text.partition("=")
    if not separator or not name or " " in name or not command.strip():
        raise argparse.ArgumentTypeError(f"{text!r}: write NAME=COMMAND")
    return Side(name=name, command=command)


if __name__ == "__main__":
    sys.exit(main())
