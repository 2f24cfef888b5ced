"""bf16 in Triton's interpreter, which runs kernels on a CPU where TRITON_INTERPRET=1 was set before it was imported.

It computes with numpy, and keeps such numbers as integers of 16 bits. Its dot multiplies those as they are, and its
cast from fp32 cuts the last 16 bits off; a GPU multiplies numbers and rounds to nearest. Before Triton 3.7 it does not
know numpy 2.5, for which an array of one number is no integer.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_create_dot, _cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl
_patch_tensor = interpreter._patch_lang_tensor


def _as_float32(handle: TensorHandle) -> TensorHandle:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = handle.data.astype(np.uint32) << 16
    return TensorHandle(bits.view(np.float32), tl.float32)


def _dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    """A product of bf16 is exact in fp32."""
    return _create_dot(self, _as_float32(a), _as_float32(b), d, input_precision, max_num_imprecise_acc)


def _rounding_cast(self: Any, src: TensorHandle, dst_type: Any) -> TensorHandle:
    """fp32 to bf16 to the nearest, ties to even."""
    if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
        return _cast(self, src, dst_type)
    bits = src.data.view(np.uint32).astype(np.uint64)
    return TensorHandle(((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16), tl.bfloat16)


def _patch_tensor_with_index(tensor: Any, scope: Any) -> None:
    """A scalar, which the interpreter holds as an array of one number, is an integer: Triton 3.7's own line."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))


def compute_bfloat16() -> None:
    """As a GPU does, from here on."""
    assert os.environ.get("TRITON_INTERPRET") == "1", "the interpreter is off"
    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = _dot, _rounding_cast
    interpreter._patch_lang_tensor = _patch_tensor_with_index
