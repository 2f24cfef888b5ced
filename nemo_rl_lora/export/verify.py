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

from nemo_rl_lora.export.merged import ExportError, PlannedTensor, Work
from nemo_rl_lora.lora.merge import exact_weight_and_bound
from nemo_rl_lora.tensors import MERGEABLE, Shard, StoredTensor, TensorReader, file_digest, row_blocks, stored_tensors

NUM_SAMPLED_ROWS = 16
READS_BACK_OTHERWISE = "reads back otherwise than it was written. Check the disk."


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """How far merged weights are from base + adapter in fp64."""

    num_rows: int = 0
    max_abs_error: float = 0.0
    bound: float = 0.0  # for the element of the largest error
    tensor: str = ""  # that has it
    worst_ratio: float = 0.0  # the largest error over its own element's bound


def verify_merged(
    work: Work, shards: Sequence[Shard[PlannedTensor]], *, every_row: bool, on_bytes: Callable[[int], None]
) -> Accuracy:
    """Check an output's weights, and measure them."""
    directory = work.export.temporary
    for shard, file in zip(shards, work.files, strict=True):
        path = directory / file.name
        _check_header(path, shard)
        if file_digest(path) != file.sha256:
            raise ExportError(f"{path}: {READS_BACK_OTHERWISE}")
    modules, stored, accuracy = work.fitted.modules, stored_tensors(directory), Accuracy()
    with TensorReader() as base, TensorReader() as reader:
        for tensor in (tensor for shard in shards for tensor in shard.tensors):
            on_bytes(tensor.source.num_bytes)
            found = stored[tensor.name]
            if tensor.name in modules:
                a, b = work.fitted.factors(tensor.name)
                for start, stop in _row_ranges(found, every_row):
                    base_rows, rows = base.read_rows(tensor.source, start, stop), reader.read_rows(found, start, stop)
                    scale = modules[tensor.name].scale
                    exact, bound = exact_weight_and_bound(base_rows, a, b[start:stop], scale, rows.dtype)
                    accuracy = _measure(accuracy, tensor.name, rows, exact, bound)
            elif not all(_is_copy(tensor, found, span, base, reader) for span in _row_ranges(found, every_row)):
                raise ExportError(f"{directory}: {tensor.name} has no adapter and is not the base's")
    return accuracy


def _check_header(path: Path, shard: Shard[PlannedTensor]) -> None:
    """What safetensors itself finds in the file is what was planned."""
    planned = {tensor.name: (tensor.dtype, list(tensor.shape)) for tensor in shard.tensors}
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
    if every_row or tensor.num_rows <= NUM_SAMPLED_ROWS:
        yield from row_blocks(tensor)
        return
    for sample in range(NUM_SAMPLED_ROWS):
        row = (tensor.num_rows - 1) * sample // (NUM_SAMPLED_ROWS - 1)
        yield row, row + 1


def _is_copy(
    tensor: PlannedTensor, found: StoredTensor, rows: tuple[int, int], base: TensorReader, reader: TensorReader
) -> bool:
    if found.dtype not in MERGEABLE or found.dtype == tensor.source.dtype:
        return base.read_block(tensor.source, *rows) == reader.read_block(found, *rows)
    cast = reader.read_rows(found, *rows)
    return torch.equal(base.read_rows(tensor.source, *rows).to(cast.dtype), cast)


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
