"""Products with a factor of low rank, as Triton kernels: the three that a LoRA layer and its gradients are made of.

    project   h = scale * x W^T          x [T, N], W [R, N]: a sum over the width, into the rank
    expand    y = base + scale * h W^T   h [T, R], W [N, R]: out of the rank, over the base in one pass
    reduce    G = scale * h^T x          h [T, R], x [T, N]: a sum over the tokens, which is a factor's gradient

Sums are in fp32, and each result rounds once, to its own dtype; fp32 products are IEEE fp32, never TF32. `project` and
`reduce` may split their sum into parts, as a function of shapes alone, and add those in their order: no atomics, so
that runs repeat bit for bit. There is one configuration for each kernel, dtype and size of rank, and nothing is tuned
by timing. None was chosen by a measurement: they fit in the 99 KiB of shared memory that every GPU since Ampere has.

This module knows no autograd (adapter.py). It is imported where a kernel runs, since Triton is there on Linux alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

Name = Literal["project", "expand", "reduce"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """How many tokens, columns and ranks a program takes at a time."""

    tokens: int
    width: int
    rank: int
    warps: int
    stages: int

    def arguments(self) -> dict[str, int]:
        """As a kernel takes them."""
        return {
            "BLOCK_TOKENS": self.tokens,
            "BLOCK_WIDTH": self.width,
            "BLOCK_RANK": self.rank,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


# tokens, width, rank, warps, stages by the size of the rank (`bucket`), where every operand has 16 bits
_NARROW: dict[Name, dict[int, tuple[int, int, int, int, int]]] = {
    "project": {
        16: (64, 128, 16, 4, 4),
        32: (64, 128, 32, 4, 4),
        64: (64, 64, 64, 4, 4),
        128: (64, 64, 128, 4, 3),
        256: (64, 32, 256, 8, 4),
    },
    "expand": {
        16: (64, 128, 16, 4, 2),
        32: (64, 128, 32, 4, 2),
        64: (64, 128, 64, 4, 2),
        128: (64, 128, 64, 4, 2),
        256: (64, 128, 64, 4, 2),
    },
    "reduce": {
        16: (64, 128, 16, 4, 4),
        32: (64, 128, 32, 4, 4),
        64: (64, 128, 64, 4, 3),
        128: (64, 128, 128, 8, 3),
        256: (32, 64, 256, 8, 3),
    },
}
# and where one has 32, since an fp32 product in IEEE arithmetic holds its operands in registers
_WIDE: dict[Name, dict[int, tuple[int, int, int, int, int]]] = {
    "project": {
        16: (32, 32, 16, 4, 3),
        32: (32, 32, 32, 4, 3),
        64: (32, 32, 64, 4, 3),
        128: (32, 16, 128, 8, 3),
        256: (32, 16, 256, 8, 3),
    },
    "expand": {
        16: (32, 64, 16, 4, 2),
        32: (32, 64, 32, 4, 2),
        64: (32, 64, 32, 4, 2),
        128: (32, 64, 32, 4, 2),
        256: (32, 64, 32, 4, 2),
    },
    "reduce": {
        16: (32, 64, 16, 4, 3),
        32: (32, 64, 32, 4, 3),
        64: (16, 64, 64, 4, 3),
        128: (16, 32, 128, 8, 3),
        256: (16, 32, 256, 8, 3),
    },
}
BUCKETS = tuple(_NARROW["project"])
_ENOUGH_PROGRAMS = 128  # about one for each multiprocessor of a large GPU: with fewer, a sum is split
_MOST_SPLITS = 16
_BLOCKS_OF_A_SPLIT = 4  # at least
_SUM_BLOCK = 1024


def configuration(name: Name, rank: int, *, wide: bool) -> Configuration:
    """The one of a kernel for a rank. `wide`: an operand is fp32."""
    tokens, width, block, warps, stages = (_WIDE if wide else _NARROW)[name][bucket(rank)]
    return Configuration(tokens=tokens, width=width, rank=block, warps=warps, stages=stages)


def bucket(rank: int) -> int:
    """The least power of two that holds this rank, of those that a program can have; the largest for higher ranks."""
    return next((size for size in BUCKETS if size >= rank), BUCKETS[-1])


def project(x: Tensor, w: Tensor, scale: float, *, dtype: torch.dtype) -> Tensor:
    """scale * x W^T [T, R]; x [T, N] has columns side by side, w [R, N] any strides and the dtype of the product."""
    (num_tokens, width), rank = x.shape, len(w)
    c = configuration("project", rank, wide=_is_wide(x, w))
    token_blocks, rank_blocks = _num_blocks(num_tokens, c.tokens), _num_blocks(rank, c.rank)
    num_splits, columns_of_split = _splits(width, c.width, token_blocks * rank_blocks)
    parts, total = _room_for(num_splits, (num_tokens, rank), dtype, x.device)
    _launch(
        project_kernel,
        (token_blocks, num_splits, rank_blocks),
        x,
        w,
        parts,
        num_tokens,
        width,
        rank,
        scale,
        x.stride(0),
        w.stride(0),
        w.stride(1),
        columns_of_split,
        **c.arguments(),
    )
    return _added(parts, total)


def expand(
    h: Tensor, w: Tensor, scale: float, *, base: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """base + scale * h W^T [T, N], written over base; without one, a new tensor of this dtype.

    h [T, R] is of w's dtype and, as base, has columns side by side; w [N, R] has any strides.
    """
    (num_tokens, rank), width = h.shape, len(w)
    out = torch.empty(num_tokens, width, dtype=dtype, device=h.device) if base is None else base
    c = configuration("expand", rank, wide=_is_wide(h, out))
    _launch(
        expand_kernel,
        (_num_blocks(num_tokens, c.tokens) * _num_blocks(width, c.width),),
        h,
        w,
        out,
        num_tokens,
        width,
        rank,
        scale,
        h.stride(0),
        w.stride(0),
        w.stride(1),
        out.stride(0),
        HAS_BASE=base is not None,
        **c.arguments(),
    )
    return out


def reduce(h: Tensor, x: Tensor, scale: float, *, transposed: bool = False) -> Tensor:
    """scale * h^T x [R, N] in fp32; `transposed`: [N, R].

    h [T, R] and x [T, N] have columns side by side, and h the dtype of the product.
    """
    (num_tokens, rank), width = h.shape, x.shape[1]
    c = configuration("reduce", rank, wide=_is_wide(h, x))
    width_blocks, rank_blocks = _num_blocks(width, c.width), _num_blocks(rank, c.rank)
    num_splits, tokens_of_split = _splits(num_tokens, c.tokens, width_blocks * rank_blocks)
    shape = (width, rank) if transposed else (rank, width)
    parts, total = _room_for(num_splits, shape, torch.float32, x.device)
    _launch(
        reduce_kernel,
        (width_blocks, num_splits, rank_blocks),
        h,
        x,
        parts,
        num_tokens,
        width,
        rank,
        scale,
        h.stride(0),
        x.stride(0),
        *((1, rank) if transposed else (width, 1)),
        tokens_of_split,
        **c.arguments(),
    )
    return _added(parts, total)


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    kernel[grid](*arguments, **constants)


def _num_blocks(length: int, block: int) -> int:
    return -(-length // block)


def _is_wide(*operands: Tensor) -> bool:
    return any(operand.dtype == torch.float32 for operand in operands)


def _splits(length: int, block: int, num_programs: int) -> tuple[int, int]:
    """Into how many parts a sum of this length is split, and how long each is, in whole blocks."""
    most = min(_MOST_SPLITS, _num_blocks(length, _BLOCKS_OF_A_SPLIT * block), _ENOUGH_PROGRAMS // max(num_programs, 1))
    part = _num_blocks(_num_blocks(length, max(most, 1)), block) * block
    return (_num_blocks(length, part) if part else 1), part


def _room_for(
    num_splits: int, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Where the parts of a sum go, and the sum: the same, where there is one part."""
    total = torch.empty(shape, dtype=dtype, device=device)
    return (total if num_splits == 1 else total.new_empty(num_splits, *shape, dtype=torch.float32)), total


def _added(parts: Tensor, total: Tensor) -> Tensor:
    if parts is not total:
        size = total.numel()
        _launch(sum_kernel, (_num_blocks(size, _SUM_BLOCK),), parts, total, len(parts), size, BLOCK=_SUM_BLOCK)
    return total


@triton.jit(do_not_specialize=["num_tokens"])
def project_kernel(
    x,
    w,
    out,
    num_tokens,
    width,
    rank,
    scale,
    x_stride,
    w_rank_stride,
    w_width_stride,
    columns_of_split,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    """out[split, t, r] = scale * the sum of x[t, n] w[r, n] over the columns n of the split."""
    tokens = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    split = tl.program_id(1)
    ranks = tl.program_id(2) * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
    is_token, is_rank = tokens < num_tokens, ranks < rank
    x_rows = x + tokens.to(tl.int64)[:, None] * x_stride
    w_rows = w + ranks[None, :] * w_rank_stride
    total = tl.zeros((BLOCK_TOKENS, BLOCK_RANK), dtype=tl.float32)
    begin = split * columns_of_split
    for first in tl.range(begin, tl.minimum(begin + columns_of_split, width), BLOCK_WIDTH):
        columns = first + tl.arange(0, BLOCK_WIDTH)
        is_column = columns < width
        left = tl.load(x_rows + columns[None, :], mask=is_token[:, None] & is_column[None, :], other=0.0)
        right = tl.load(
            w_rows + columns[:, None] * w_width_stride, mask=is_column[:, None] & is_rank[None, :], other=0.0
        )
        total = tl.dot(left.to(right.dtype), right, total, input_precision="ieee")
    rows = split.to(tl.int64) * num_tokens + tokens
    at = out + rows[:, None] * rank + ranks[None, :]
    tl.store(at, (total * scale).to(out.dtype.element_ty), mask=is_token[:, None] & is_rank[None, :])


@triton.jit(do_not_specialize=["num_tokens"])
def expand_kernel(
    h,
    w,
    out,
    num_tokens,
    width,
    rank,
    scale,
    h_stride,
    w_width_stride,
    w_rank_stride,
    out_stride,
    HAS_BASE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    """out[t, n] = scale * the sum of h[t, r] w[n, r], plus what is there where `out` holds a base."""
    num_blocks = tl.cdiv(width, BLOCK_WIDTH)
    tokens = tl.program_id(0) // num_blocks * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    columns = tl.program_id(0) % num_blocks * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    is_token, is_column = tokens < num_tokens, columns < width
    is_inside = is_token[:, None] & is_column[None, :]
    rows = tokens.to(tl.int64)[:, None]
    at = out + rows * out_stride + columns[None, :]
    if HAS_BASE:
        base = tl.load(at, mask=is_inside, other=0.0)
    total = tl.zeros((BLOCK_TOKENS, BLOCK_WIDTH), dtype=tl.float32)
    for first in tl.range(0, rank, BLOCK_RANK):
        ranks = first + tl.arange(0, BLOCK_RANK)
        is_rank = ranks < rank
        left = tl.load(h + rows * h_stride + ranks[None, :], mask=is_token[:, None] & is_rank[None, :], other=0.0)
        right = tl.load(
            w + columns[None, :] * w_width_stride + ranks[:, None] * w_rank_stride,
            mask=is_rank[:, None] & is_column[None, :],
            other=0.0,
        )
        total = tl.dot(left, right, total, input_precision="ieee")
    total = total * scale
    if HAS_BASE:
        total = total + base.to(tl.float32)
    tl.store(at, total.to(out.dtype.element_ty), mask=is_inside)


@triton.jit(do_not_specialize=["num_tokens"])
def reduce_kernel(
    h,
    x,
    out,
    num_tokens,
    width,
    rank,
    scale,
    h_stride,
    x_stride,
    out_rank_stride,
    out_width_stride,
    tokens_of_split,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    """out[split][r, n] = scale * the sum of h[t, r] x[t, n] over the tokens t of the split."""
    columns = tl.program_id(0) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    split = tl.program_id(1)
    ranks = tl.program_id(2) * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
    is_column, is_rank = columns < width, ranks < rank
    total = tl.zeros((BLOCK_RANK, BLOCK_WIDTH), dtype=tl.float32)
    begin = split * tokens_of_split
    for first in tl.range(begin, tl.minimum(begin + tokens_of_split, num_tokens), BLOCK_TOKENS):
        tokens = first + tl.arange(0, BLOCK_TOKENS)
        is_token = tokens < num_tokens
        rows = tokens.to(tl.int64)
        left = tl.load(
            h + rows[None, :] * h_stride + ranks[:, None], mask=is_rank[:, None] & is_token[None, :], other=0.0
        )
        right = tl.load(
            x + rows[:, None] * x_stride + columns[None, :], mask=is_token[:, None] & is_column[None, :], other=0.0
        )
        total = tl.dot(left, right.to(left.dtype), total, input_precision="ieee")
    at = (
        out + split.to(tl.int64) * rank * width + ranks[:, None] * out_rank_stride + columns[None, :] * out_width_stride
    )
    tl.store(at, total * scale, mask=is_rank[:, None] & is_column[None, :])


@triton.jit(do_not_specialize=["num_parts", "size"])
def sum_kernel(parts, out, num_parts, size, BLOCK: tl.constexpr):
    """out[i] = parts[0, i] + parts[1, i] + ..., in this order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_inside = at < size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    here = parts + at
    for _ in tl.range(0, num_parts):
        total += tl.load(here, mask=is_inside, other=0.0)
        here += size
    tl.store(out + at, total.to(out.dtype.element_ty), mask=is_inside)
