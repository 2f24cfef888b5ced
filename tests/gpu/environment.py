"""The versions, the card, and the speed that it has without this product. Measurements, without a verdict."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from time import perf_counter

import torch

from tests.gpu.checks import Answer, Check, Fact, Machine

PACKAGES = ("torch", "triton", "transformers", "peft", "nemo-automodel", "megatron-core")
GPU_SIZE = 8192
CPU_SIZE = 256
NUM_REPEATS = 10


def checks(machine: Machine) -> Iterator[Check]:
    yield Check(name="versions and card", ask=partial(versions, machine))
    yield Check(name="speed", ask=partial(speed, machine))


def versions(machine: Machine) -> Answer:
    facts: dict[str, Fact] = {
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in PACKAGES},
        "device": machine.device,
    }
    if machine.has_gpu:
        card = torch.cuda.get_device_properties(0)
        facts |= {
            "card": card.name,
            "memory_gib": round(card.total_memory / 2**30, 1),
            "num_multiprocessors": card.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return Answer(ok=None, facts=facts)


def speed(machine: Machine) -> Answer:
    """Of a product of two large bf16 matrices, and of a copy, which reads and writes each byte."""
    size = GPU_SIZE if machine.has_gpu else CPU_SIZE
    one, other = (torch.randn(size, size, device=machine.device).bfloat16() for _ in range(2))
    source = torch.ones(16 * size * size, device=machine.device)
    target = torch.empty_like(source)
    product_seconds = seconds_of(lambda: one @ other, machine)
    copy_seconds = seconds_of(lambda: target.copy_(source), machine)
    facts = {
        "bf16_tflop_per_second": 2 * size**3 / product_seconds / 1e12,
        "copy_gb_per_second": 2 * source.nbytes / copy_seconds / 1e9,
    }
    return Answer(ok=None, facts=facts)


def seconds_of(call: Callable[[], object], machine: Machine) -> float:
    """The median of some calls, after one that is not counted."""
    call()
    return median_seconds(call, machine, NUM_REPEATS)


def median_seconds(call: Callable[[], object], machine: Machine, num_calls: int) -> float:
    seconds = []
    for _ in range(num_calls):
        synchronize(machine)
        begun = perf_counter()
        call()
        synchronize(machine)
        seconds.append(perf_counter() - begun)
    return median(seconds)


def synchronize(machine: Machine) -> None:
    if machine.has_gpu:
        torch.cuda.synchronize()
