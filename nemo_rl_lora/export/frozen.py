"""A model's weights in another dtype, as a Hugging Face directory: what the phase after full training builds on."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from nemo_rl_lora.export.inputs import BASE_FILES, known_files
from nemo_rl_lora.tensors import (
    DTYPES,
    MERGEABLE,
    TensorEntry,
    TensorReader,
    TensorWriter,
    plan_shards,
    row_blocks,
    stored_tensors,
    torch_dtype,
    write_index,
)


def write_frozen(source: Path, tokenizer: Path, target: Path, dtype: str) -> Mapping[str, float]:
    """Fill an empty directory with the model of another one, each weight rounded once to `dtype`, and a tokenizer. What
    the rounding changed: the largest difference, and its L2 norm relative to that of the weights."""
    tensors = stored_tensors(source)
    shards = plan_shards(
        TensorEntry(
            name=tensor.name,
            dtype=DTYPES[dtype].stored if tensor.dtype in MERGEABLE else tensor.dtype,
            shape=tensor.shape,
            num_bytes=tensor.num_elements * DTYPES[dtype].num_bytes if tensor.dtype in MERGEABLE else tensor.num_bytes,
        )
        for tensor in tensors.values()
    )
    largest, squared_error, squared_norm = 0.0, 0.0, 0.0
    with TensorReader() as reader:
        for shard in shards:
            with contextlib.closing(TensorWriter(target / shard.file_name, shard.tensors)) as writer:
                for entry in shard.tensors:
                    stored = tensors[entry.name]
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
    for directory, files in ((source, known_files(source, *BASE_FILES)), (tokenizer, known_files(tokenizer))):
        for path in files:
            place = target / path.relative_to(directory)
            place.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, place)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    (target / "config.json").write_text(json.dumps(config | {"dtype": dtype}, indent=2) + "\n", encoding="utf-8")
    return {"largest_rounding_error": largest, "relative_rounding_error": (squared_error / squared_norm) ** 0.5}
