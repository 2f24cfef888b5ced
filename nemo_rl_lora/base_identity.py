"""What base weights are, whichever files they stand in: a digest over names, shapes, dtypes and sampled bytes.

Here too is what this product knows of safetensors' headers.

Contract: the digest is that of the tensors of a Hugging Face directory, sorted by name, so it does not depend on how
they are sharded, nor on where the directory is. Only headers and samples are read: a changed value in a tensor above
64 KiB is found if it lies in one of 16 evenly spread pages of 4 KiB, and other weights differ everywhere. Imports no
torch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
METADATA = "__metadata__"
LENGTH_BYTES = 8
PAGE_BYTES = 4096
NUM_PAGES = 16
_MAX_HEADER_BYTES = 100 * 10**6  # the format's own limit
_WAY_OUT = "Copy or download it again."


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor in a safetensors file."""

    name: str
    path: Path
    dtype: str  # safetensors' own name: BF16, F32, ...
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file
    num_bytes: int

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


def base_digest(directory: Path) -> str | None:
    """SHA-256 of the weights of a Hugging Face directory; None where they are not in safetensors files."""
    tensors = stored_tensors(directory)
    return digest_of_stored(tensors) if tensors else None


def digest_of_stored(tensors: Mapping[str, StoredTensor]) -> str:
    """The same of tensors whose headers have been read."""
    digest = hashlib.sha256()
    files: dict[Path, IO[bytes]] = {}
    try:
        for name in sorted(tensors):
            tensor = tensors[name]
            digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
            if tensor.path not in files:
                files[tensor.path] = tensor.path.open("rb", buffering=0)
            for start, size in _samples(tensor.num_bytes):
                files[tensor.path].seek(tensor.offset + start)
                digest.update(files[tensor.path].read(size))
    finally:
        for file in files.values():
            file.close()
    return digest.hexdigest()


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of the directory's model, in the order of the files and of their bytes; empty without safetensors.

    ValueError where a file is missing or not whole.
    """
    index = directory / INDEX_FILE
    if (directory / SINGLE_FILE).is_file() or not index.is_file():
        return file_tensors(directory / SINGLE_FILE) if (directory / SINGLE_FILE).is_file() else {}
    try:
        weight_map: Mapping[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index}: cannot be read ({error}). {_WAY_OUT}") from error
    found: dict[str, StoredTensor] = {}
    for name in sorted(set(weight_map.values())):
        found |= file_tensors(directory / name)
    if absent := sorted(set(weight_map) - set(found)):
        raise ValueError(f"{index}: names {absent[0]}, which {weight_map[absent[0]]} does not hold. {_WAY_OUT}")
    return found


def file_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, in the order of their bytes. ValueError where it is missing or not whole."""
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(LENGTH_BYTES), "little")
            if header_bytes > _MAX_HEADER_BYTES:
                raise ValueError("it does not begin with a header")
            header: dict[str, Any] = json.loads(file.read(header_bytes))
        header.pop(METADATA, None)
        start = LENGTH_BYTES + header_bytes
        tensors = [_stored(path, name, entry, start) for name, entry in header.items()]
    except FileNotFoundError:
        raise ValueError(f"{path}: is missing. {_WAY_OUT}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: cannot be read as safetensors ({error}). {_WAY_OUT}") from error
    expected = max((tensor.offset + tensor.num_bytes for tensor in tensors), default=start)
    if (size := path.stat().st_size) != expected:
        raise ValueError(f"{path}: has {size:,} bytes instead of {expected:,}. {_WAY_OUT}")
    return {tensor.name: tensor for tensor in sorted(tensors, key=lambda tensor: tensor.offset)}


def header_bytes(entries: Iterable[tuple[str, str, Sequence[int], int]]) -> bytes:
    """How a safetensors file of these tensors begins: (name, dtype, shape, number of bytes) in their order."""
    header: dict[str, Any] = {METADATA: {"format": "pt"}}
    end = 0
    for name, dtype, shape, num_bytes in entries:
        first, end = end, end + num_bytes
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [first, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)  # the data begins aligned
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def _stored(path: Path, name: str, entry: Mapping[str, Any], start: int) -> StoredTensor:
    first, end = entry["data_offsets"]
    return StoredTensor(
        name=name,
        path=path,
        dtype=entry["dtype"],
        shape=tuple(entry["shape"]),
        offset=start + first,
        num_bytes=end - first,
    )


def _samples(num_bytes: int) -> list[tuple[int, int]]:
    """(start, size) of what is hashed of a tensor: all of it, or pages from its first to its last bytes."""
    if num_bytes <= NUM_PAGES * PAGE_BYTES:
        return [(0, num_bytes)]
    last = num_bytes - PAGE_BYTES
    return [(last * page // (NUM_PAGES - 1), PAGE_BYTES) for page in range(NUM_PAGES)]
