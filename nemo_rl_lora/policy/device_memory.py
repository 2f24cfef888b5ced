"""The memory of this process's device: what is free, and what a computation takes of it at most.

Contract: a GPU's is what CUDA and torch's allocator say. A CPU refuses nothing until the kernel ends a process, so its
free memory is what the machine and the process's control groups have left, and what a computation takes is what torch's
allocator hands out in it: not what the C library or a product's scratch space keeps beside.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from torch._C._profiler import _ExperimentalConfig
from torch.autograd import profiler_legacy as profiler

GPU_SPARE = 0.05  # of a GPU's memory, left to what is not torch's and to its allocator's gaps
_CONTROL_GROUPS = Path("/sys/fs/cgroup")
_NO_LIMIT = 2**60  # bytes: version 1 writes a number above it where there is none


def describe(device: torch.device) -> str:
    """The device and its memory: "NVIDIA H100 80GB HBM3 with 79 GiB", "CPU with 16 GiB"."""
    if device.type == "cuda":
        name, total = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    else:
        limits = (limit for limit, _ in _limits_and_use())
        name, total = "CPU", min(psutil.virtual_memory().total, *limits, _NO_LIMIT)
    return f"{name} with {round(total / 2**30)} GiB"


def free_bytes(device: torch.device) -> int:
    """What this process, and those that share the device with it, can still take."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return free + unused - int(GPU_SPARE * total)
    left = (limit - used for limit, used in _limits_and_use())
    return max(0, min(psutil.virtual_memory().available, *left, _NO_LIMIT))


def peak_bytes(device: torch.device, run: Callable[[], object]) -> int:
    """What was allocated at most while it ran, beyond what was before."""
    if device.type != "cuda":
        return _peak_on_cpu(run)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


@contextmanager
def held(device: torch.device, num_bytes: int) -> Iterator[None]:
    """So much of a GPU's memory is taken, with what is left free; of a CPU's nothing is."""
    if device.type == "cuda":
        num_bytes += int(GPU_SPARE * torch.cuda.mem_get_info()[1])
        taken = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        yield
        del taken
    else:
        yield


def forget(device: torch.device) -> None:
    """Give back what nothing uses, and begin to count the peak anew."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak_on_cpu(run: Callable[[], object]) -> int:
    """By the events of torch's allocator. Its legacy profiler has them without another library's start and messages."""
    settings = (profiler.ProfilerState.CPU, False, True, False, False, False, _ExperimentalConfig())
    profiler._enable_profiler_legacy(profiler.ProfilerConfig(*settings))
    try:
        run()
    finally:
        threads = profiler._disable_profiler_legacy()
    taken = peak = 0
    for event in (event for thread in threads for event in thread if event.kind() == "memory_alloc"):
        taken += event.cpu_memory_usage()
        peak = max(peak, taken)
    return peak


def _limits_and_use(root: Path = _CONTROL_GROUPS, own: Path = Path("/proc/self/cgroup")) -> list[tuple[int, int]]:
    """(limit, use) in bytes of each control group around this process that has a limit; files that can be dropped from
    memory do not count as use."""
    found = []
    for directory, (limit_name, use_name, dropped_name) in _groups(root, own):
        try:
            limit = (directory / limit_name).read_text().strip()
            use = int((directory / use_name).read_text())
            counts = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # the root group has none of them
            continue
        if limit != "max" and int(limit) < _NO_LIMIT:
            found.append((int(limit), max(0, use - int(counts.get(dropped_name, 0)))))
    return found


def _groups(root: Path, own: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Directories of this process's control groups and of those around it, with the names of their files. A container
    may show its own group as the root, whatever path the kernel gives."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = root / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        inner = top / path.lstrip("/")
        yield from ((directory, names) for directory in (inner, *inner.parents) if directory.is_relative_to(top))
