"""Whether Triton's kernels run on this machine: its GPU, and what Triton needs to compile what starts them.

Contract: asks for what is there, and imports no Triton.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

LEAST_CAPABILITY = (8, 0)  # Ampere: the first with bfloat16, which flash attention asks for too


def kernel_problem() -> str | None:
    """Why no kernel runs in this process, as the end of a sentence; None where they do."""
    if not torch.cuda.is_available():
        return "there is no CUDA device: plain torch products are used"
    if not is_recent():
        major, minor = torch.cuda.get_device_capability()
        least = ".".join(map(str, LEAST_CAPABILITY))
        return (
            f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}, below {least}: plain torch "
            f"products are used"
        )
    return triton_problem()


@cache
def is_recent() -> bool:
    """Whether this process's GPU is of Ampere or later."""
    return torch.cuda.get_device_capability() >= LEAST_CAPABILITY


@cache
def triton_problem() -> str | None:
    """What Triton lacks here; None where it has all."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if not has_python_headers():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        return f"the headers of Python {version}, which Triton needs, are not installed"
    if not any(map(shutil.which, c_compilers())):
        return f"Triton needs a C compiler, and there is no {' or '.join(c_compilers())}"
    return None


def has_python_headers() -> bool:
    return (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file()


def c_compilers() -> list[str]:
    """Programs of which Triton takes one."""
    return [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
