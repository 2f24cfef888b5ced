"""`torch` as a vendor's module may see it where there is no CUDA: the current device is the CPU, and nothing else.

Put in place of one module's `torch`, so that nothing global changes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CPU = torch.device("cpu")


class _CudaOfCpu:
    @staticmethod
    def current_device() -> torch.device:
        return _CPU

    @staticmethod
    def synchronize() -> None:
        """Nothing: no work is in flight."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


class TorchWithoutCuda:
    cuda = _CudaOfCpu()

    @staticmethod
    def device(*args: Any) -> torch.device:
        return _CPU if args and args[0] == "cuda" else torch.device(*args)

    @staticmethod
    def zeros(*size: Any, device: Any = None, **kwargs: Any) -> Tensor:
        return torch.zeros(*size, device=_CPU if device == "cuda" else device, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)
