"""Tensors in safetensors files, a block at a time: read from one file, written to another, never whole in memory.

Contract: memory is that of a block (`BLOCK_ELEMENTS`, or a row where that is longer), whatever the tensor's size. Files
are read, not mapped, so that what was read does not stay resident. Bytes of a file written depend on its tensors alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

import torch
from torch import Tensor

from nemo_rl_lora.base_identity import SINGLE_FILE, StoredTensor, header_bytes

BLOCK_ELEMENTS = 1 << 20  # fp32 copies of it stay in a processor's cache
FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
"""The dtypes in which a tensor can be merged or cast, by safetensors' names. Others are copied as bytes."""

FLOAT_NAMES = {dtype: name for name, dtype in FLOATS.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTensor:
    """A tensor of the output, and the stored one that it is made from."""

    source: StoredTensor
    dtype: str

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def num_bytes(self) -> int:
        if self.dtype == self.source.dtype:
            return self.source.num_bytes
        return self.source.num_elements * FLOATS[self.dtype].itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedShard:
    """A safetensors file to write: its name, its tensors in their order, its header."""

    file_name: str
    tensors: tuple[PlannedTensor, ...]

    @property
    def header(self) -> bytes:
        return header_bytes((t.name, t.dtype, t.source.shape, t.num_bytes) for t in self.tensors)

    @property
    def num_bytes(self) -> int:
        return len(self.header) + sum(tensor.num_bytes for tensor in self.tensors)


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenFile:
    """A file of an output, as it was written."""

    name: str
    num_bytes: int
    sha256: str


def plan_shards(tensors: Sequence[PlannedTensor], max_shard_bytes: int) -> tuple[PlannedShard, ...]:
    """Tensors in their order, as many to a file as fit; one that is larger has a file of its own."""
    groups: list[list[PlannedTensor]] = [[]]
    used = 0
    for tensor in tensors:
        if groups[-1] and used + tensor.num_bytes > max_shard_bytes:
            groups.append([])
            used = 0
        groups[-1].append(tensor)
        used += tensor.num_bytes
    return tuple(
        PlannedShard(
            file_name=SINGLE_FILE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors",
            # wide elements first: then every tensor begins at a multiple of its element's size
            tensors=tuple(sorted(group, key=lambda tensor: -_item_bytes(tensor))),
        )
        for number, group in enumerate(groups, start=1)
    )


def _item_bytes(tensor: PlannedTensor) -> int:
    return tensor.num_bytes // max(tensor.source.num_elements, 1)


def index_text(shards: Sequence[PlannedShard]) -> str | None:
    """model.safetensors.index.json; None where there is one file only."""
    if len(shards) == 1:
        return None
    total = sum(tensor.num_bytes for shard in shards for tensor in shard.tensors)
    weight_map = {tensor.name: shard.file_name for shard in shards for tensor in shard.tensors}
    document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(document, indent=2) + "\n"


class WeightReader:
    """Reads stored tensors by rows or by bytes. What is returned is valid until the next read into the same buffer."""

    def __init__(self) -> None:
        self._files: dict[Path, IO[bytes]] = {}
        self._buffer = bytearray()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def read_bytes(self, tensor: StoredTensor, start: int, stop: int) -> memoryview:
        """Bytes [start, stop) of a tensor."""
        if tensor.path not in self._files:
            self._files[tensor.path] = tensor.path.open("rb", buffering=0)
        if len(self._buffer) < stop - start:
            self._buffer = bytearray(stop - start)
        view = memoryview(self._buffer)[: stop - start]
        num_read = 0
        while num_read < len(view):
            got = os.preadv(self._files[tensor.path].fileno(), [view[num_read:]], tensor.offset + start + num_read)
            if got == 0:
                raise OSError(f"{tensor.path} ended within {tensor.name}: it changed while it was read")
            num_read += got
        return view

    def read_rows(self, tensor: StoredTensor, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor of a float dtype, [rows, elements of a row]."""
        dtype, (_, width) = FLOATS[tensor.dtype], rows_and_width(tensor)
        row_bytes = width * dtype.itemsize
        data = self.read_bytes(tensor, start * row_bytes, stop * row_bytes)
        return torch.frombuffer(data, dtype=dtype).view(stop - start, width)


def read_fp32(tensor: StoredTensor) -> Tensor:
    """A whole small tensor, as fp32 of its own."""
    with WeightReader() as reader:
        rows, _ = rows_and_width(tensor)
        return reader.read_rows(tensor, 0, rows).to(torch.float32, copy=True)


def rows_and_width(tensor: StoredTensor) -> tuple[int, int]:
    """A tensor as a matrix: its first axis, and all others."""
    rows = tensor.shape[0] if tensor.shape else 1
    return rows, tensor.num_elements // max(rows, 1)


def row_blocks(tensor: StoredTensor) -> Iterator[tuple[int, int]]:
    """(start, stop) of the row blocks of a tensor, the same for every run."""
    rows, width = rows_and_width(tensor)
    step = max(1, BLOCK_ELEMENTS // max(width, 1))
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


class ShardWriter:
    """Writes one planned file from blocks in order. Flushed to disk when it is closed."""

    def __init__(self, directory: Path, shard: PlannedShard) -> None:
        self._shard = shard
        self._file = (directory / shard.file_name).open("wb", buffering=0)
        self._digest = hashlib.sha256()
        self._num_bytes = 0
        self.write(memoryview(shard.header))

    def write(self, block: memoryview | Tensor) -> None:
        """The next bytes of the file."""
        view = block if isinstance(block, memoryview) else block.contiguous().view(torch.uint8).numpy().data.cast("B")
        self._digest.update(view)
        self._num_bytes += len(view)
        while view:
            view = view[self._file.write(view) :]

    def finish(self) -> WrittenFile:
        assert self._num_bytes == self._shard.num_bytes, (self._num_bytes, self._shard.num_bytes)
        os.fsync(self._file.fileno())
        return WrittenFile(name=self._shard.file_name, num_bytes=self._num_bytes, sha256=self._digest.hexdigest())

    def close(self) -> None:
        self._file.close()
