"""The converter in this process, and what it left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from tests.driver import Ended, run_command


def convert(adapter: Path, output: Path, *flags: str) -> Ended:
    """tools/convert_lora_to_hf.py, from its arguments to its exit code."""
    return run_command("export", "--adapter-ckpt", str(adapter), "--hf-ckpt-path", str(output), *flags)


def converted(adapter: Path, output: Path, *flags: str) -> Path:
    """The output of a conversion that has to succeed."""
    ended = convert(adapter, output, *flags)
    assert ended.code == 0, ended.err
    return output


def tensors_of(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a directory's safetensors files, by safetensors itself."""
    found: dict[str, Tensor] = {}
    for path in sorted(directory.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def report_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "export_report.json").read_text())


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def write_tensors(directory: Path, tensors: dict[str, Tensor]) -> None:
    """In place of the directory's weights."""
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)
