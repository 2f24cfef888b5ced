"""A capture as CUDA graphs make it, on the CPU: operations with their tensors and numbers, repeated without Python.

    replay = recorded(step)     # calls step once, as a capture does
    replay()                    # the same operations on the same memory

What the host looked at in a step cannot be repeated, so a look is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_LOOKS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero")


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        assert name not in _LOOKS, f"{name}: the host looks at a number"
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


def recorded(step: Callable[[], None]) -> Callable[[], None]:
    with _Recorder() as recorder:
        step()

    def replay() -> None:
        for func, args, kwargs, first in recorder.calls:
            if func._schema.is_mutable:
                func(*args, **kwargs)
                continue
            read = {_memory_of(one) for one in _tensors((args, kwargs))}
            made = [_memory_of(one) not in read for one in _tensors(first)]
            if any(made):  # others are views, of memory that stays
                again = _tensors(func(*args, **kwargs))
                for old, new, is_made in zip(_tensors(first), again, made, strict=True):
                    if is_made:
                        old.copy_(new)

    return replay


def _memory_of(one: Tensor) -> int:
    return 0 if one.is_mkldnn else one.untyped_storage().data_ptr()  # oneDNN's own layout, of weights


def _tensors(values: Any) -> list[Tensor]:
    return [one for one in tree_leaves(values) if isinstance(one, Tensor)]
