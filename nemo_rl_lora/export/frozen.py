"""A model's weights in another dtype, as a Hugging Face directory: what the phase after full training builds on."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path

from nemo_rl_lora.export.merged import planned_shards
from nemo_rl_lora.export.surroundings import BASE_FILES, copy_files, known_files, write_config
from nemo_rl_lora.tensors import (
    MERGEABLE,
    TensorReader,
    TensorWriter,
    row_blocks,
    stored_tensors,
    torch_dtype,
    write_index,
)


def write_frozen(source: Path, tokenizer: Path, target: Path, dtype: str) -> Mapping[str, float]:
    """Fill an empty directory with the model of another one, each weight rounded once to `dtype`, and a tokenizer. What
    the rounding changed: the largest difference, and its L2 norm relative to that of the weights."""
    shards = planned_shards(stored_tensors(source), dtype)
    largest, squared_error, squared_norm = 0.0, 0.0, 0.0
    with TensorReader() as reader:
        for shard in shards:
            with contextlib.closing(TensorWriter(target / shard.file_name, shard.tensors)) as writer:
                for entry in shard.tensors:
                    stored = entry.source
                    for start, stop in row_blocks(stored):
                        if stored.dtype not in MERGEABLE:
                            writer.write(reader.read_block(stored, start, stop))
                            continue
                        rows = reader.read_rows(stored, start, stop)
                        rounded = rows.to(torch_dtype(entry.dtype))
                        error = rounded.double() - rows.double()
                        largest = max(largest, float(error.abs().max()))
                        squared_error += float(error.square().sum())
                        squared_norm += float(rows.double().square().sum())
                        writer.write(rounded)
                writer.finish()
    write_index(target, shards)
    copy_files(source, known_files(source, *BASE_FILES), target)
    copy_files(tokenizer, known_files(tokenizer), target)
    write_config(target, json.loads((source / "config.json").read_text(encoding="utf-8")), dtype)
    return {"largest_rounding_error": largest, "relative_rounding_error": (squared_error / squared_norm) ** 0.5}
