"""Reading back what an export wrote, and judging it against fp64.

Contract: files are as planned and have the digests of what was written; each merged weight is within its bound of
`W + scale * B @ A` in fp64, on sampled rows or on all; every other weight is the base's. ExportError otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemo_rl_lora.base_identity import StoredTensor, stored_tensors
from nemo_rl_lora.checkpoints.durable_files import sha256_of
from nemo_rl_lora.export.blocks import (
    FLOATS,
    PlannedShard,
    PlannedTensor,
    WeightReader,
    WrittenFile,
    row_blocks,
    rows_and_width,
)
from nemo_rl_lora.export.merged import Adapter, ExportError
from nemo_rl_lora.lora.merge import exact_weight_and_bound

NUM_SAMPLED_ROWS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """How far merged weights are from base + adapter in fp64."""

    num_rows: int = 0
    max_abs_error: float = 0.0
    bound: float = 0.0  # for the element of the largest error
    tensor: str = ""  # that has it
    worst_ratio: float = 0.0  # the largest error over its own element's bound


def verify_merged(
    directory: Path,
    shards: Sequence[PlannedShard],
    files: Sequence[WrittenFile],
    adapter: Adapter,
    *,
    every_row: bool,
    on_bytes: Callable[[int], None],
) -> Accuracy:
    """Check an output's weights, and measure them."""
    for shard, file in zip(shards, files, strict=True):
        _check_header(directory / file.name, shard)
        check_file(directory, file)
    stored, accuracy = stored_tensors(directory), Accuracy()
    with WeightReader() as base_reader, WeightReader() as reader:
        for tensor in (tensor for shard in shards for tensor in shard.tensors):
            on_bytes(tensor.source.num_bytes)
            found = stored[tensor.name]
            if tensor.name in adapter.modules:
                a, b = adapter.factors(tensor.name)
                for start, stop in _row_ranges(found, every_row):
                    base_rows, rows = (
                        base_reader.read_rows(tensor.source, start, stop),
                        reader.read_rows(found, start, stop),
                    )
                    scale = adapter.modules[tensor.name].scale
                    exact, bound = exact_weight_and_bound(base_rows, a, b[start:stop], scale, rows.dtype)
                    accuracy = _measure(accuracy, tensor.name, rows, exact, bound)
            elif not all(_is_copy(tensor, found, span, base_reader, reader) for span in _row_ranges(found, every_row)):
                raise ExportError(f"{directory}: {tensor.name} has no adapter and is not the base's")
    return accuracy


def check_file(directory: Path, file: WrittenFile) -> None:
    """ExportError where a file does not read back as it was written."""
    if sha256_of(directory / file.name) != file.sha256:
        raise ExportError(f"{directory / file.name}: reads back otherwise than it was written. Check the disk.")


def _check_header(path: Path, shard: PlannedShard) -> None:
    """What safetensors itself finds in the file is what was planned."""
    planned = {tensor.name: (tensor.dtype, list(tensor.source.shape)) for tensor in shard.tensors}
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ExportError(f"{path}: cannot be read back ({error})") from error
    if found != planned:
        raise ExportError(f"{path}: does not hold the tensors that were to be written")


def _row_ranges(tensor: StoredTensor, every_row: bool) -> Iterator[tuple[int, int]]:
    """Blocks of all rows, or single rows from the first to the last."""
    rows, _ = rows_and_width(tensor)
    if every_row or rows <= NUM_SAMPLED_ROWS:
        yield from row_blocks(tensor)
        return
    for sample in range(NUM_SAMPLED_ROWS):
        row = (rows - 1) * sample // (NUM_SAMPLED_ROWS - 1)
        yield row, row + 1


def _is_copy(
    tensor: PlannedTensor, found: StoredTensor, span: tuple[int, int], base_reader: WeightReader, reader: WeightReader
) -> bool:
    if found.dtype not in FLOATS or found.dtype == tensor.source.dtype:
        row_bytes = found.num_bytes // max(rows_and_width(found)[0], 1)
        start, stop = span[0] * row_bytes, span[1] * row_bytes
        return base_reader.read_bytes(tensor.source, start, stop) == reader.read_bytes(found, start, stop)
    rows = reader.read_rows(found, *span)
    return torch.equal(base_reader.read_rows(tensor.source, *span).to(rows.dtype), rows)


def _measure(accuracy: Accuracy, name: str, rows: Tensor, exact: Tensor, bound: Tensor) -> Accuracy:
    error = (rows.double() - exact).abs_()
    accuracy = replace(accuracy, num_rows=accuracy.num_rows + rows.shape[0])
    largest = int(error.argmax())
    ratio = float((error / bound).max())
    if not ratio <= 1:
        raise ExportError(f"{name}: is {ratio:.3g} times as far from base + adapter in fp64 as rounding explains")
    if (value := float(error.flatten()[largest])) > accuracy.max_abs_error or not accuracy.tensor:
        limit = float(bound.flatten()[largest])
        accuracy = replace(accuracy, max_abs_error=value, bound=limit, tensor=name)
    return replace(accuracy, worst_ratio=max(accuracy.worst_ratio, ratio))
