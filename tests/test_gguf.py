import struct

import numpy as np
import pytest

from nemo_rl_lora.gguf import read_gguf


def _text(value):
    return struct.pack("<Q", len(value.encode())) + value.encode()


def _write(path, tensors, metadata=b"", num_keys=0):
    """tensors: name -> (shape with the fastest axis first, ggml type, bytes)."""
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), num_keys) + metadata
    body = b""
    for name, (shape, ggml_type, raw) in tensors.items():
        header += _text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
        header += struct.pack("<IQ", ggml_type, len(body))
        body += raw + bytes(-len(raw) % 32)
    path.write_bytes(header + bytes(-len(header) % 32) + body)


def test_q4_1_block_is_scale_times_nibble_plus_minimum(tmp_path):
    packed = bytes((7 * i + 3) % 256 for i in range(16))
    _write(tmp_path / "a.gguf", {"w": ((32, 1), 3, struct.pack("<ee", 0.5, -2.0) + packed)})
    by_hand = [(byte & 15) * 0.5 - 2.0 for byte in packed] + [(byte >> 4) * 0.5 - 2.0 for byte in packed]
    assert read_gguf(tmp_path / "a.gguf").tensor("w").tolist() == [by_hand]


def test_q8_0_block_is_scale_times_signed_byte(tmp_path):
    values = [-128, 127, *range(-15, 15)]
    _write(tmp_path / "a.gguf", {"w": ((32,), 8, struct.pack("<e32b", 0.25, *values))})
    assert read_gguf(tmp_path / "a.gguf").tensor("w").tolist() == [0.25 * v for v in values]


def test_second_tensor_is_found_and_shapes_are_row_major(tmp_path):
    first, second = np.arange(3, dtype="<f4"), np.arange(6, dtype="<f2")
    _write(tmp_path / "a.gguf", {"x": ((3,), 0, first.tobytes()), "y": ((3, 2), 1, second.tobytes())})
    gguf = read_gguf(tmp_path / "a.gguf")
    assert gguf.tensor("x").tolist() == [0, 1, 2]
    assert gguf.tensor("y").tolist() == [[0, 1, 2], [3, 4, 5]]


def test_metadata_holds_strings_numbers_and_arrays(tmp_path):
    metadata = _text("s") + struct.pack("<I", 8) + _text("é")
    metadata += _text("n") + struct.pack("<If", 6, 0.5)
    metadata += _text("a") + struct.pack("<IIQ2i", 9, 5, 2, -1, 7)
    _write(tmp_path / "a.gguf", {}, metadata, 3)
    assert read_gguf(tmp_path / "a.gguf").metadata == {"s": "é", "n": 0.5, "a": [-1, 7]}


def test_other_file_and_other_tensor_type_are_refused(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"PK\x03\x04" + bytes(60))
    with pytest.raises(ValueError, match="not a GGUF file"):
        read_gguf(tmp_path / "a.gguf")
    _write(tmp_path / "b.gguf", {"w": ((256,), 14, bytes(210))})
    with pytest.raises(ValueError, match="ggml type 14"):
        read_gguf(tmp_path / "b.gguf").tensor("w")
