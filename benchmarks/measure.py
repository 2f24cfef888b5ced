"""What every benchmark measures with: the process it runs in, its peak memory, and the one JSON line it ends with.

Imports no torch, so that a benchmark can restart itself before torch is there.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_STATUS = Path("/proc/self/status")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One optimizer step of GRPO, as either side reports it."""

    step_seconds: float  # generation, reward, training and, for our side, the records between steps
    generation_seconds: float
    num_sampled_tokens: int  # end-of-sequence tokens included
    num_trained_tokens: int  # tokens that the loss was taken over
    reward: float  # mean over the step's completions


def restart_tuned(num_threads: int) -> None:
    """Start this process again, once, with glibc told to keep freed memory, and fix the number of threads."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(num_threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if "MALLOC_TRIM_THRESHOLD_" in os.environ:
        return
    from nemo_rl_lora.run.drivers import prepare_process  # imported only by the process that is replaced

    prepare_process()


def reset_peak() -> None:
    """Let the peak of resident memory count from here."""
    Path("/proc/self/clear_refs").write_text("5")


def release_free_memory() -> None:
    """Give what is allocated by nobody back to the kernel."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def rss_mib(*, peak: bool) -> float:
    """Resident memory of this process, mapped files included: now, or its peak since `reset_peak`."""
    key = "VmHWM:" if peak else "VmRSS:"
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(key))
    return round(int(line.split()[1]) / 1024, 1)


def versions(*packages: str) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def timed_steps(records: Sequence[StepRecord]) -> Sequence[StepRecord]:
    """All but the first step, which warms up; the first where there is no other."""
    return records[1:] or records


def step_summary(records: Sequence[StepRecord]) -> dict[str, Any]:
    """The fields that compare.py reads, over the timed steps."""
    timed = timed_steps(records)
    return {
        "step_s_median": _median([record.step_seconds for record in timed]),
        "gen_s_median": _median([record.generation_seconds for record in timed]),
        "train_s_median": _median([record.step_seconds - record.generation_seconds for record in timed]),
        "num_timed_steps": len(timed),
        "sampled_tokens_per_step": round(statistics.fmean(record.num_sampled_tokens for record in timed), 1),
        "trained_tokens_per_step": round(statistics.fmean(record.num_trained_tokens for record in timed), 1),
        "step_s": [round(record.step_seconds, 3) for record in records],
        "gen_s": [round(record.generation_seconds, 3) for record in records],
        "sampled_tokens": [record.num_sampled_tokens for record in records],
        "trained_tokens": [record.num_trained_tokens for record in records],
    }


def print_result(result: dict[str, Any]) -> None:
    """The benchmark's last line of output."""
    sys.stderr.flush()
    print(json.dumps(result), flush=True)


def _median(values: Sequence[float]) -> float:
    return round(statistics.median(values), 3)
