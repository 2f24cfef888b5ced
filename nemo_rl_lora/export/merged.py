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
from typing import Any, Literal

import torch
from torch import Tensor

from nemo_rl_lora.export.inputs import AdapterInput
from nemo_rl_lora.lora.files import ADAPTER_FILE, adapter_tensor_name, read_adapter
from nemo_rl_lora.lora.merge import Survival, merged_weight
from nemo_rl_lora.lora.targets import AdaptedModule
from nemo_rl_lora.tensors import (
    DTYPES,
    MAX_SHARD_BYTES,
    MERGEABLE,
    Shard,
    StoredTensor,
    TensorEntry,
    TensorReader,
    TensorWriter,
    file_tensors,
    plan_shards,
    row_blocks,
    torch_dtype,
)

TMP_PREFIX = "tmp_export_"


class ExportError(Exception):
    """An export failed while it was being made. Nothing of it is left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTensor(TensorEntry):
    """A tensor of the output, and the stored one that it is made from."""

    source: StoredTensor


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
        a, b = (self._fp32(adapter_tensor_name(module, side)) for side in "AB")
        return a, b

    def _fp32(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        if isinstance(tensor, Tensor):
            return tensor
        with TensorReader() as reader:
            return reader.read_rows(tensor, 0, tensor.num_rows).to(torch.float32, copy=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenFile:
    """A weights file of an output, as it was written."""

    name: str
    num_bytes: int
    sha256: str


@dataclass(slots=True, kw_only=True)
class Export:
    """One output, from its checks to its end."""

    source: Path
    output: Path
    status: Literal["planned", "written", "finished before", "failed"] = "planned"
    problem: str | None = None
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def temporary(self) -> Path:
        return self.output.with_name(TMP_PREFIX + self.output.name)


@dataclass(slots=True, kw_only=True)
class Work:
    """An export that can be made, and what has been made of it."""

    export: Export
    adapter: AdapterInput
    fitted: Adapter  # to the base; of no module, where the adapter alone is exported
    settings: Mapping[str, Any]  # what the output depends on
    files: list[WrittenFile] = field(default_factory=list)
    num_changed: dict[str, int] = field(default_factory=dict)  # adapted weight -> elements unlike the base's
    survival: Survival = field(default_factory=Survival)  # of the update, in the dtypes that were written


def planned_shards(
    tensors: Mapping[str, StoredTensor], dtype: str | None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> Sequence[Shard[PlannedTensor]]:
    """The files that a model's tensors are written to. `dtype`, of tensors.COMPUTE_DTYPES, is that of all weights that
    can be merged; None: as each is stored."""
    planned: list[PlannedTensor] = []
    for source in tensors.values():
        stored, num_bytes = source.dtype, source.num_bytes
        if dtype is not None and source.dtype in MERGEABLE:
            stored, item_bytes = DTYPES[dtype]
            num_bytes = source.num_elements * item_bytes
        entry = PlannedTensor(name=source.name, dtype=stored, shape=source.shape, num_bytes=num_bytes, source=source)
        planned.append(entry)
    return plan_shards(planned, max_shard_bytes)


def write_merged(
    shards: Sequence[Shard[PlannedTensor]], works: Sequence[Work], on_bytes: Callable[[int], None]
) -> None:
    """Write every shard of every output. `on_bytes` hears how many bytes of the base were read."""
    with TensorReader() as reader:
        for shard in shards:
            with contextlib.ExitStack() as files:
                writers: list[tuple[Work, TensorWriter]] = []
                for work in (work for work in works if work.export.problem is None):
                    writer = TensorWriter(work.export.temporary / shard.file_name, shard.tensors, hashed=True)
                    writers.append((work, files.enter_context(contextlib.closing(writer))))
                for tensor in shard.tensors:
                    _write_tensor(reader, tensor, writers)
                    on_bytes(tensor.source.num_bytes)
                for work, writer in writers:
                    if work.export.problem is None:
                        sha256 = writer.finish()
                        work.files.append(WrittenFile(name=shard.file_name, num_bytes=shard.num_bytes, sha256=sha256))


def _write_tensor(reader: TensorReader, tensor: PlannedTensor, writers: Sequence[tuple[Work, TensorWriter]]) -> None:
    name, source = tensor.name, tensor.source
    factors = {id(work): work.fitted.factors(name) for work, _ in writers if name in work.fitted.modules}
    for start, stop in row_blocks(source):
        block = reader.read_block(source, start, stop)
        weight = torch.frombuffer(block, dtype=torch_dtype(source.dtype)) if source.dtype in MERGEABLE else None
        plain = block if tensor.dtype == source.dtype or weight is None else weight.to(torch_dtype(tensor.dtype))
        for work, writer in writers:
            if work.export.problem is not None:
                continue
            result: memoryview | Tensor = plain
            if id(work) in factors:
                assert weight is not None, source
                a, b = factors[id(work)]
                rows = weight.view(stop - start, a.shape[1])
                scale = work.fitted.modules[name].scale
                result = merged_weight(rows, a, b[start:stop], scale, dtype=torch_dtype(tensor.dtype))
                plain_rows = rows.to(result.dtype)
                changed = _num_different(result, plain_rows)
                work.survival.add(scale * (b[start:stop] @ a), result.float() - plain_rows.float())
                work.num_changed[name] = work.num_changed.get(name, 0) + changed
            if isinstance(result, Tensor) and not _is_finite(result):
                problem = f"{name} has values that are not finite in {tensor.dtype}. Choose a wider --dtype."
                work.export.problem = problem
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
