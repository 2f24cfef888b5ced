"""Read a GGUF file: its metadata, and its tensors dequantised to fp32.

Only what a small packaged model needs: version 3, little-endian, tensor types F32, F16, Q4_1 and Q8_0
(format: ggml's docs/gguf.md). It writes nothing, and knows nothing of architectures.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

_BLOCK_SIZE = 32
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """Where a tensor stands in the file. `shape` is in row-major order, as numpy and torch write it."""

    shape: tuple[int, ...]
    ggml_type: int
    offset_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFile:
    path: Path
    metadata: Mapping[str, Any]
    entries: Mapping[str, TensorEntry]

    def tensor(self, name: str) -> np.ndarray:
        """Tensor `name`, fp32."""
        entry = self.entries[name]
        if entry.ggml_type not in _DECODERS:
            raise ValueError(f"{self.path}: tensor {name} has ggml type {entry.ggml_type}, which is not read here")
        block_bytes, block_values, decode = _DECODERS[entry.ggml_type]
        num_values = int(np.prod(entry.shape))
        raw = np.fromfile(
            self.path, np.uint8, count=num_values // block_values * block_bytes, offset=entry.offset_bytes
        )
        return decode(raw.reshape(-1, block_bytes)).reshape(entry.shape)


def read_gguf(path: Path) -> GgufFile:
    """Read header and tensor directory. Raises ValueError if `path` is no GGUF file of version 3."""
    with path.open("rb") as file:
        magic, version = file.read(4), _scalar(file, "I")
        if magic != b"GGUF" or version != 3:
            raise ValueError(f"{path}: not a GGUF file of version 3 (starts with {magic!r}, version {version})")
        num_tensors, num_keys = _scalar(file, "Q"), _scalar(file, "Q")
        metadata = {_string(file): _value(file, _scalar(file, "I")) for _ in range(num_keys)}
        directory = [_directory_row(file) for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)  # the format's own default
        start = -(-file.tell() // alignment) * alignment
    entries = {
        name: TensorEntry(shape=shape, ggml_type=ggml_type, offset_bytes=start + offset)
        for name, shape, ggml_type, offset in directory
    }
    return GgufFile(path=path, metadata=metadata, entries=entries)


def _directory_row(file: BinaryIO) -> tuple[str, tuple[int, ...], int, int]:
    name = _string(file)
    fastest_first = [_scalar(file, "Q") for _ in range(_scalar(file, "I"))]
    return name, tuple(reversed(fastest_first)), _scalar(file, "I"), _scalar(file, "Q")


def _scalar(file: BinaryIO, code: str) -> Any:
    return struct.unpack("<" + code, file.read(struct.calcsize("<" + code)))[0]


def _string(file: BinaryIO) -> str:
    return file.read(_scalar(file, "Q")).decode("utf-8")


def _value(file: BinaryIO, value_type: int) -> Any:
    if value_type == _STRING:
        return _string(file)
    if value_type == _ARRAY:
        item_type, length = _scalar(file, "I"), _scalar(file, "Q")
        return [_value(file, item_type) for _ in range(length)]
    return _scalar(file, _SCALARS[value_type])


def _halves(blocks: np.ndarray, first: int) -> np.ndarray:
    """The fp16 number at byte `first` of each block, as fp32 [blocks, 1]."""
    return blocks[:, first : first + 2].copy().view("<f2").astype(np.float32)


def _decode_f32(blocks: np.ndarray) -> np.ndarray:
    return blocks.copy().view("<f4").astype(np.float32)


def _decode_f16(blocks: np.ndarray) -> np.ndarray:
    return blocks.copy().view("<f2").astype(np.float32)


def _decode_q4_1(blocks: np.ndarray) -> np.ndarray:
    """fp16 scale, fp16 minimum, 16 bytes: low nibbles are values 0 to 15, high nibbles 16 to 31."""
    nibbles = np.concatenate([blocks[:, 4:] & 0x0F, blocks[:, 4:] >> 4], axis=1)
    return nibbles.astype(np.float32) * _halves(blocks, 0) + _halves(blocks, 2)


def _decode_q8_0(blocks: np.ndarray) -> np.ndarray:
    """fp16 scale, 32 signed bytes."""
    return blocks[:, 2:].copy().view(np.int8).astype(np.float32) * _halves(blocks, 0)


# ggml type: (bytes of a block, values of a block, decoder)
_DECODERS: dict[int, tuple[int, int, Callable[[np.ndarray], np.ndarray]]] = {
    0: (4, 1, _decode_f32),
    1: (2, 1, _decode_f16),
    3: (20, _BLOCK_SIZE, _decode_q4_1),
    8: (34, _BLOCK_SIZE, _decode_q8_0),
}
