"""The speed of one GPU: training and decoding of real shapes, beside TRL + PEFT, transformers and published rates.

    uv run --group bench benchmarks/gpu_speed.py [--only sft_8b,decoding] [--out DIRECTORY] [--budget SECONDS] [--cpu]

A line for each measurement as soon as it is known, gpu_speed.json with all of them, and one line of JSON at the end.
Weights are random and nothing is downloaded. MFU is (4 FLOP a frozen weight and token, and 6 T q a layer in attention)
x tokens/s / the card's dense bf16 peak; gpu/shapes.py has the formula, gpu/timing.py the cards. The most important come
first, since --budget cuts the end. --cpu runs the same code on toy shapes: its numbers say nothing.

The exit code is 1 where a measurement failed, 2 where there is no GPU. Too little memory, time that is up and a package
that is not installed are reasons, not failures.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from measure import print_result, versions

ROOT = Path(__file__).resolve().parents[1]
BUDGET_SECONDS = 300  # and the measurement that runs then: at most six minutes
PACKAGES = ("torch", "triton", "transformers", "nemo-automodel", "megatron-core", "trl", "peft", "liger-kernel")
# by name: the module that has a function of this name, which lists the measurements; in the order of importance
MEASUREMENTS = {
    "sft_8b": "gpu.trl_sft",
    "grpo_4b": "gpu.training",
    "decoding": "gpu.decoding",
    "sft_small": "gpu.training",
    "kernels": "gpu.training",
    "megatron": "gpu.training",
}


def main(arguments: Sequence[str] | None = None) -> int:
    begun = time.monotonic()
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    options = read_options(arguments)
    prepare_environment(cpu=options.cpu)
    from tests.gpu.checks import Machine, without_gpu
    from tools.gpu_check import Report, ask_all, has_gpu

    if not options.cpu and not has_gpu():
        print("benchmarks/gpu_speed.py: torch finds no GPU. --cpu runs the same code without one.", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    report = Report(options.out / "gpu_speed.json")
    with tempfile.TemporaryDirectory() as root, without_gpu() if options.cpu else nullcontext():
        machine = Machine(device="cpu" if options.cpu else "cuda", root=Path(root))
        ask_all(report, options.only, partial(measurements_of, machine=machine), begun=begun, budget=options.budget)
    print_result(
        {
            "num_measurements": len(report.entries),
            "num_failed": len(report.failed),
            "seconds": round(time.monotonic() - begun, 1),
            "device": device_name(options.cpu),
            "versions": versions(*PACKAGES),
        }
    )
    return 1 if report.failed else 0


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    from tools.gpu_check import names_among

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ",".join(MEASUREMENTS)
    known = partial(names_among, MEASUREMENTS, "a measurement", "Measurements")
    parser.add_argument("--only", type=known, default=tuple(MEASUREMENTS), metavar="NAMES", help=f"of {names}")
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIRECTORY", help="where gpu_speed.json goes")
    parser.add_argument(
        "--budget", type=float, default=BUDGET_SECONDS, metavar="SECONDS", help="after these no measurement begins"
    )
    parser.add_argument("--cpu", action="store_true", help="the same code on toy shapes, on a machine without a GPU")
    return parser.parse_args(arguments)


def prepare_environment(*, cpu: bool) -> None:
    """What has to be set before torch is imported: no model hub and no progress bars, one GPU (transformers' Trainer
    would take all), and its memory in segments that grow, as one model follows another."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if cpu:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    else:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def measurements_of(name: str, machine: Any) -> Iterator[Any]:
    yield from getattr(import_module(MEASUREMENTS[name]), name)(machine)


def device_name(cpu: bool) -> str:
    import torch

    return "cpu" if cpu else torch.cuda.get_device_name()


if __name__ == "__main__":
    sys.exit(main())
