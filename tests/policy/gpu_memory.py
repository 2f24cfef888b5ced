"""The memory of a fake GPU (tests/fake_gpu.py): tensors that live on it are counted, and above a limit there is none.

What a kernel takes while it runs is not known here, nor are an allocator's gaps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from tests.fake_gpu import FakeGpu


class GpuMemory:
    """Bytes in use, and the most of them since `reset`, of a total."""

    def __init__(self) -> None:
        self.total = 80 << 30
        self.num_refusals = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self._sum = self.peak = 0

    @property
    def used(self) -> int:
        self._storages = {key: one for key, one in self._storages.items() if not one[0].expired()}
        self._sum = sum(size for _, size in self._storages.values())
        return self._sum

    def reset(self) -> None:
        self.peak = self.used

    def note(self, value: Any) -> None:
        if not isinstance(value, FakeTensor) or value.fake_device.type != "cuda":
            return
        storage = value.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        known = self._storages.get(key)
        if known is not None and not known[0].expired():
            return
        self._storages[key] = StorageWeakRef(storage), size
        self._sum += size
        if self._sum > min(self.peak, self.total) and self.used > self.total:
            del self._storages[key]
            self.num_refusals += 1
            raise torch.OutOfMemoryError("CUDA out of memory.")
        self.peak = max(self.peak, self._sum)


@contextmanager
def counted_memory() -> Iterator[GpuMemory]:
    """Within, the tensors of the fake GPU count, and torch.cuda tells of them."""
    memory, dispatch = GpuMemory(), FakeGpu.__torch_dispatch__

    def counting(self: FakeGpu, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = dispatch(self, func, types, args, kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                memory.note(leaf)
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeGpu, "__torch_dispatch__", counting)
        patch.setattr(torch.cuda, "mem_get_info", lambda *_: (memory.total - memory.used, memory.total))
        patch.setattr(torch.cuda, "memory_allocated", lambda *_: memory.used)
        patch.setattr(torch.cuda, "memory_reserved", lambda *_: memory.used)
        patch.setattr(torch.cuda, "max_memory_allocated", lambda *_: memory.peak)
        patch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *_: memory.reset())
        patch.setattr(torch.cuda, "empty_cache", lambda: None)
        patch.setattr(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(total_memory=memory.total))
        patch.setattr(torch.cuda, "get_device_name", lambda *_: "Fake GPU")
        yield memory
