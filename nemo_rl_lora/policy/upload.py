"""Tensors of the host brought to a device in one copy, which nothing waits for.

Contract: whatever tensors a dataclass holds, those of dataclasses and tuples in it included, are packed into one pinned
buffer and are views of its copy afterwards. torch keeps the buffer until the copy has ended. For the CPU, and of
tensors that are on the device, nothing is copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

Held = TypeVar("Held")
_ALIGNMENT = 16  # bytes


def upload(held: Held, device: torch.device) -> Held:
    """The same with its tensors on the device."""
    elsewhere = {id(tensor): tensor for tensor in _tensors(held) if tensor.device.type != device.type}
    tensors = list(elsewhere.values())
    if not tensors:
        return held
    packed = _packed(tensors, pinned=True)
    there = packed.to(device, non_blocking=True)
    return _with(held, dict(zip(elsewhere, _views(there, tensors), strict=True)))


def _packed(tensors: Sequence[Tensor], *, pinned: bool) -> Tensor:
    packed = torch.empty(sum(map(_room, tensors)), dtype=torch.uint8, pin_memory=pinned)
    for tensor, view in zip(tensors, _views(packed, tensors), strict=True):
        view.copy_(tensor)
    return packed


def _views(packed: Tensor, tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """The place of each tensor."""
    for tensor, part in zip(tensors, packed.split([_room(tensor) for tensor in tensors]), strict=True):
        yield part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)


def _room(tensor: Tensor) -> int:
    return tensor.nbytes + -tensor.nbytes % _ALIGNMENT


def _tensors(held: Any) -> Iterator[Tensor]:
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, tuple):
        for one in held:
            yield from _tensors(one)
    elif is_dataclass(held):
        for field in fields(held):
            yield from _tensors(getattr(held, field.name))


def _with(held: Any, moved: dict[int, Tensor]) -> Any:
    if isinstance(held, Tensor):
        return moved.get(id(held), held)
    if isinstance(held, tuple):
        found = tuple(_with(one, moved) for one in held)
        return held if all(one is other for one, other in zip(found, held, strict=True)) else found
    if not is_dataclass(held) or isinstance(held, type):
        return held
    values = {field.name: getattr(held, field.name) for field in fields(held)}
    changed = {name: new for name, value in values.items() if (new := _with(value, moved)) is not value}
    return replace(held, **changed) if changed else held
