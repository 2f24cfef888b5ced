"""Which part of a whole tensor is this process's: of a plain tensor all of it, of a DTensor its shard.

Contract: a part is a box of the whole tensor, one range an axis. Whole tensors travel between processes as blocks of
rows (`row_blocks`), never all at once; a part takes from a block what is its own, and gives to a block what it has. A
tensor without axes counts as one row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

MAX_BLOCK_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnPart:
    """This process's part of a tensor, in its memory, and where it lies in the whole tensor."""

    local: Tensor
    ranges: tuple[slice, ...]  # of the whole tensor; one at least

    @property
    def is_empty(self) -> bool:
        """More processes than rows: some have none."""
        return self.local.numel() == 0

    def take(self, start: int, block: Tensor) -> None:
        """Copy, from the whole tensor's rows that begin at `start`, those of this part; dtype and device change."""
        if (shared := self._shared_rows(start, block)) is not None:
            own, theirs = shared
            self.local[own].copy_(block[(theirs, *self.ranges[1:])])

    def give(self, start: int, block: Tensor) -> None:
        """Copy this part's rows into the whole tensor's rows that begin at `start`."""
        if (shared := self._shared_rows(start, block)) is not None:
            own, theirs = shared
            block[(theirs, *self.ranges[1:])].copy_(self.local[own])

    def _shared_rows(self, start: int, block: Tensor) -> tuple[slice, slice] | None:
        """The rows that part and block share, as numbered in each."""
        rows = self.ranges[0]
        first, end = max(rows.start, start), min(rows.stop, start + len(block))
        if self.is_empty or first >= end:
            return None
        return slice(first - rows.start, end - rows.start), slice(first - start, end - start)


def own_part(tensor: Tensor) -> OwnPart:
    """The part of this tensor that this process has."""
    if not isinstance(tensor, DTensor):
        local, offsets = tensor.detach(), (0,) * tensor.dim()
    else:
        local, mesh = tensor.to_local().detach(), tensor.device_mesh
        shape, offsets = compute_local_shape_and_global_offset(tensor.shape, mesh, tensor.placements)
        assert tuple(local.shape) == shape, (tuple(local.shape), shape, tensor.placements)
    if local.dim() == 0:
        local, offsets = local.view(1), (0,)
    ranges = tuple(slice(offset, offset + size) for offset, size in zip(offsets, local.shape, strict=True))
    return OwnPart(local=local, ranges=ranges)


def first_holders(parts: Sequence[OwnPart]) -> list[bool]:
    """For each of these parts, which every process gives in one order: whether this is the first that holds it.

    Meshes do not tell: a tensor on a part of a mesh is the same along its other axes.
    """
    own = [tuple((rows.start, rows.stop) for rows in part.ranges) for part in parts]
    if not dist.is_initialized():
        return [True] * len(own)
    held: list[list[tuple[tuple[int, int], ...]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(held, own)
    return [all(of_rank[i] != ranges for of_rank in held[: dist.get_rank()]) for i, ranges in enumerate(own)]


def row_blocks(shape: Sequence[int], element_bytes: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of blocks of rows of a tensor of this shape; of one row where a row is larger than a block."""
    num_rows, row_bytes = (shape[0] if shape else 1), prod(shape[1:]) * element_bytes
    step = max(1, MAX_BLOCK_BYTES // max(row_bytes, 1))
    return ((start, min(start + step, num_rows)) for start in range(0, num_rows, step))


def block_shape(shape: Sequence[int], start: int, stop: int) -> tuple[int, ...]:
    """The shape of a block of these rows."""
    return (stop - start, *shape[1:])


def messages_device() -> torch.device:
    """Where a tensor must be to be sent: with NCCL on the GPU, even if the weights stay on the CPU."""
    nccl = dist.is_initialized() and "nccl" in str(dist.get_backend_config())
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
