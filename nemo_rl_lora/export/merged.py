"""Merged weights of one adapter or of many, written in one pass over the base.

Contract: the base is read once, a block of rows at a time, and every output gets its block of it before the next is
read. Weights without an adapter keep their bytes, or are cast where another dtype is asked for. An output whose numbers
leave the range of its dtype is given up without disturbing the others. Directories are made and renamed elsewhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from nemo_rl_lora.base_identity import StoredTensor, file_tensors
from nemo_rl_lora.export.blocks import (
    FLOATS,
    PlannedShard,
    PlannedTensor,
    ShardWriter,
    WeightReader,
    WrittenFile,
    read_fp32,
    row_blocks,
    rows_and_width,
)
from nemo_rl_lora.lora.files import ADAPTER_FILE, adapter_tensor_name, read_adapter
from nemo_rl_lora.lora.merge import merged_weight
from nemo_rl_lora.lora.targets import AdaptedModule


class ExportError(Exception):
    """An export failed while it was being made. Nothing of it is left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """A fitted adapter. Tensors in safetensors stay on disk until they are needed; PEFT's older format is held."""

    modules: Mapping[str, AdaptedModule]  # by weight name
    tensors: Mapping[str, StoredTensor | Tensor]

    @classmethod
    def on_disk(cls, weights_file: Path, modules: Mapping[str, AdaptedModule]) -> Adapter:
        if weights_file.name == ADAPTER_FILE:
            return cls(modules=modules, tensors=file_tensors(weights_file))
        return cls(modules=modules, tensors=read_adapter(weights_file.parent)[0])

    def factors(self, weight: str) -> tuple[Tensor, Tensor]:
        """A [dim, in] and B [out, dim] of a weight, fp32."""
        module = self.modules[weight].name
        found = [self.tensors[adapter_tensor_name(module, side)] for side in "AB"]
        a, b = (tensor if isinstance(tensor, Tensor) else read_fp32(tensor) for tensor in found)
        return a, b


@dataclass(slots=True, kw_only=True)
class MergedOutput:
    """A directory that receives merged weights, and what happened to it."""

    directory: Path
    adapter: Adapter
    files: list[WrittenFile] = field(default_factory=list)
    num_changed: dict[str, int] = field(default_factory=dict)  # adapted weight -> elements unlike the base's
    problem: str | None = None


def write_merged(
    shards: Sequence[PlannedShard], outputs: Sequence[MergedOutput], on_bytes: Callable[[int], None]
) -> None:
    """Write every shard of every output. `on_bytes` hears how many bytes of the base were read."""
    with WeightReader() as reader:
        for shard in shards:
            with contextlib.ExitStack() as files:
                live = [output for output in outputs if output.problem is None]
                writers = [(output, ShardWriter(output.directory, shard)) for output in live]
                for _, writer in writers:
                    files.callback(writer.close)
                for tensor in shard.tensors:
                    _write_tensor(reader, tensor, writers)
                    on_bytes(tensor.source.num_bytes)
                for output, writer in writers:
                    if output.problem is None:
                        output.files.append(writer.finish())


def _write_tensor(
    reader: WeightReader, tensor: PlannedTensor, writers: Sequence[tuple[MergedOutput, ShardWriter]]
) -> None:
    name, source = tensor.name, tensor.source
    factors = {id(o): o.adapter.factors(name) for o, _ in writers if name in o.adapter.modules and o.problem is None}
    row_bytes = source.num_bytes // max(rows_and_width(source)[0], 1)
    for start, stop in row_blocks(source):
        block = reader.read_bytes(source, start * row_bytes, stop * row_bytes)
        weight = torch.frombuffer(block, dtype=FLOATS[source.dtype]) if source.dtype in FLOATS else None
        plain = block if tensor.dtype == source.dtype or weight is None else weight.to(FLOATS[tensor.dtype])
        for output, writer in writers:
            if output.problem is not None:
                continue
            result: memoryview | Tensor = plain
            if id(output) in factors:
                assert weight is not None, source
                a, b = factors[id(output)]
                rows = weight.view(stop - start, a.shape[1])
                scale = output.adapter.modules[name].scale
                result = merged_weight(rows, a, b[start:stop], scale, dtype=FLOATS[tensor.dtype])
                changed = _num_different(result, rows.to(result.dtype))
                output.num_changed[name] = output.num_changed.get(name, 0) + changed
            if isinstance(result, Tensor) and not _is_finite(result):
                output.problem = f"{name} has values that are not finite in {tensor.dtype}. Choose a wider --dtype."
                continue
            writer.write(result)


def _num_different(one: Tensor, other: Tensor) -> int:
    """Elements whose bits differ; of integers, which torch counts six times as fast as it compares floats."""
    integers = _INTEGERS[one.dtype.itemsize]
    return int(torch.count_nonzero(one.view(integers) - other.view(integers)))


def _is_finite(tensor: Tensor) -> bool:
    """By the extremes, which NaN reaches too: twenty times as fast as to ask every element."""
    return bool(torch.stack(tensor.aminmax()).isfinite().all())


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
