"""The same bits each time on a GPU (`policy.deterministic`): torch's deterministic algorithms, and what they leave out.

Contract: `deterministic_algorithms` is entered in every process that trains or samples with torch, before CUDA starts
there. torch is asked to warn of an operation that has no deterministic form, which is then named once. Attention is an
exception: torch takes its deterministic backward pass only where it may also stop (warn_only off), so our own call of
it is made `strictly`, and torch's other fused attention is off. Not here: vLLM's kernels.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend

logger = logging.getLogger(__name__)

KEY = "policy.deterministic"
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_SIZES = ":4096:8"  # one of two values with which cuBLAS's sums repeat: eight workspaces of 4 MiB
_WITHOUT_FORM = re.compile(
    r"(?P<name>\w[\w ]*?) (?:does not have a deterministic implementation|defaults to a non-deterministic algorithm)"
)


def set_workspace() -> None:
    """Tell cuBLAS, by an environment variable of which a value of the user's own stays. Whatever starts CUDA comes
    later: a look at the memory of a GPU does. ValueError where it has started."""
    if WORKSPACE not in os.environ and torch.cuda.is_initialized():
        raise ValueError(
            f"{KEY}=True: CUDA has started in this process without {WORKSPACE}. Set it to {_SIZES} in the shell that "
            f"starts Python."
        )
    os.environ.setdefault(WORKSPACE, _SIZES)


@contextmanager
def deterministic_algorithms(on: bool, tell: Callable[[str], None] | None = None) -> Iterator[None]:
    """`tell` gets the name of each operation that has no deterministic form, once; None: the log has it. ValueError
    where CUDA has started before in this process, so that cuBLAS cannot be told."""
    if not on:
        yield
        return
    set_workspace()
    settings: Any = torch.utils.deterministic
    fills, fused = settings.fill_uninitialized_memory, _fused_attention()
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = False  # a pass over every new tensor, of which nobody reads a thing
    _set_fused_attention(False, False, False)
    try:
        with _named_once(_log if tell is None else tell):
            yield
    finally:
        _set_fused_attention(*fused)
        settings.fill_uninitialized_memory = fills
        torch.use_deterministic_algorithms(False)


@contextmanager
def strictly() -> Iterator[None]:
    """Operations in here take the deterministic form that torch otherwise only speaks of, where the key asks for it."""
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)


def repeatable(kernels: list[SDPBackend]) -> list[SDPBackend]:
    """Of torch's ways to compute attention with gradients these, or the one that repeats, where the key asks for it."""
    return [SDPBackend.MATH] if torch.are_deterministic_algorithms_enabled() else kernels


def _log(name: str) -> None:
    logger.warning(f"{KEY}=True: {name} has no deterministic form in torch; where it adds up, a run may not repeat.")


@contextmanager
def _named_once(tell: Callable[[str], None]) -> Iterator[None]:
    shown, named = warnings.showwarning, set[str]()

    def show(message: Warning | str, *arguments: Any, **more: Any) -> None:
        found = _WITHOUT_FORM.match(str(message))
        if found is None:
            shown(message, *arguments, **more)
        elif (name := found["name"]) not in named:
            named.add(name)
            tell(name)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = shown


def _fused_attention() -> tuple[bool, bool, bool]:
    cuda = torch.backends.cuda
    return cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled()


def _set_fused_attention(flash: bool, efficient: bool, cudnn: bool) -> None:
    cuda = torch.backends.cuda
    cuda.enable_flash_sdp(flash)
    cuda.enable_mem_efficient_sdp(efficient)
    cuda.enable_cudnn_sdp(cudnn)
