"""Which part of a Hugging Face tensor a rank of vLLM holds, and where its layer keeps it.

Contract: read from vLLM's own layers, by what they say of their sizes; a layer of a kind that is not known here is held
whole. Without tensor parallelism every part is the whole tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldPart:
    """`shape` is the whole tensor's; `rows` and `columns` are those of it that the rank holds, `local` the rows of its
    layer's own tensor, or of the layer's output, that they are."""

    shape: tuple[int, ...]
    rows: tuple[int, int]
    columns: tuple[int, int]  # of a vector: (0, 1)
    local: slice


def held_part(module: nn.Module, parameter: str, part: int | None) -> HeldPart:
    """Of a parameter of a layer; `part` is the projection of a fused layer, None where it is not fused."""
    layer: Any = module
    value: Tensor = getattr(layer, parameter)
    is_matrix = parameter == "weight" and hasattr(layer, "quant_method")
    if not is_matrix and value.dim() != 1:
        return _whole(value.shape)
    if hasattr(layer, "org_vocab_size"):  # embeddings, and the head
        indices = layer.shard_indices
        rows = (indices.org_vocab_start_index, indices.org_vocab_end_index)
        shape = (layer.org_vocab_size, layer.embedding_dim)
        return HeldPart(shape=shape, rows=rows, columns=(0, shape[1]), local=slice(0, rows[1] - rows[0]))
    if not hasattr(layer, "tp_rank"):  # a norm
        return _whole(value.shape)
    num_columns = layer.input_size if is_matrix else 1
    num_rows, rows, local = _rows(layer, part)
    shape = (num_rows, num_columns) if is_matrix else (num_rows,)
    columns = (0, num_columns)
    if is_matrix and hasattr(layer, "input_size_per_partition") and layer.input_size_per_partition != layer.input_size:
        width = layer.input_size_per_partition
        columns = (layer.tp_rank * width, (layer.tp_rank + 1) * width)
    return HeldPart(shape=shape, rows=rows, columns=columns, local=local)


def _whole(shape: Sequence[int]) -> HeldPart:
    columns = (0, shape[1] if len(shape) > 1 else 1)
    return HeldPart(shape=tuple(shape), rows=(0, shape[0]), columns=columns, local=slice(0, shape[0]))


def _rows(layer: Any, part: int | None) -> tuple[int, tuple[int, int], slice]:
    """The rows of the whole projection, those of them that the rank holds, and where the layer's output has them."""
    local_sizes = [size // _num_shards(layer) for size in getattr(layer, "output_sizes", [layer.output_size])]
    index = part or 0
    start, size = sum(local_sizes[:index]), local_sizes[index]
    shard, num_rows = layer.tp_rank if _num_shards(layer) > 1 else 0, size * _num_shards(layer)
    if part and hasattr(layer, "num_kv_head_replicas"):  # several ranks may hold the same keys and values
        shard, num_rows = shard // layer.num_kv_head_replicas, num_rows // layer.num_kv_head_replicas
    return num_rows, (shard * size, (shard + 1) * size), slice(start, start + size)


def _num_shards(layer: Any) -> int:
    """Ranks that share the layer's rows."""
    return layer.output_size // getattr(layer, "output_size_per_partition", layer.output_size)
