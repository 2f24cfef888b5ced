"""log softmax(logits)[target] of each row, and its slope by the logits, written over them: a Triton kernel.

Two passes over a row, of which nothing but the logits is ever stored: one for the largest and the sum of exponentials,
kept for each lane of the program and joined in the end, and one for the slope. Everything is computed in fp32; a slope
is rounded to the dtype of the logits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 4096, 8
_NO_LOGIT: tl.constexpr = tl.constexpr(-3.0e38)


@triton.jit
def _tanh(x):
    shrunk = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - shrunk) / (1.0 + shrunk)
    return tl.where(x < 0.0, -size, size)


@triton.jit
def _tempered(logits, factor, cap_factor, cap, HAS_CAP: tl.constexpr):
    """What the softmax is taken of."""
    if HAS_CAP:
        return _tanh(logits * cap_factor) * cap
    return logits * factor


@triton.jit
def logprob_kernel(
    logits,
    target,
    logprobs,
    vocabulary,
    stride,
    factor,
    cap_factor,
    cap,
    HAS_CAP: tl.constexpr,
    WITH_SLOPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program has a row. With a cap z = cap * tanh(cap_factor * logit), else z = factor * logit."""
    row = tl.program_id(0)
    own = tl.load(target + row)
    at = logits + row.to(tl.int64) * stride
    z_own = _tempered(tl.load(at + own).to(tl.float32), factor, cap_factor, cap, HAS_CAP)
    lanes = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), _NO_LOGIT, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in tl.range(0, vocabulary, BLOCK):
        is_inside = first + lanes < vocabulary
        logit = tl.load(at + first + lanes, mask=is_inside, other=0.0).to(tl.float32)
        z = tl.where(is_inside, _tempered(logit, factor, cap_factor, cap, HAS_CAP), _NO_LOGIT)
        higher = tl.maximum(largest, z)
        total = total * tl.exp(largest - higher) + tl.exp(z - higher)
        largest = higher
    peak = tl.max(largest, 0)
    log_total = tl.log(tl.sum(total * tl.exp(largest - peak), 0))
    tl.store(logprobs + row, z_own - peak - log_total)
    if WITH_SLOPE:
        for first in tl.range(0, vocabulary, BLOCK):
            columns = first + lanes
            is_inside = columns < vocabulary
            logit = tl.load(at + columns, mask=is_inside, other=0.0).to(tl.float32)
            z = _tempered(logit, factor, cap_factor, cap, HAS_CAP)
            slope = tl.where(columns == own, 1.0, 0.0) - tl.exp(z - peak - log_total)
            if HAS_CAP:
                bent = _tanh(logit * cap_factor)
                slope *= 1.0 - bent * bent
            tl.store(at + columns, slope.to(logits.dtype.element_ty), mask=is_inside)


def target_logprobs(
    logits: Tensor, target: Tensor, *, factor: float, soft_cap: float | None, temperature: float, with_slope: bool
) -> Tensor:
    """log softmax(z / temperature)[target] [M] fp32, with z = factor * logits, or soft_cap * tanh(that / soft_cap).

    logits [M, V] have columns side by side; target [M] int64. `with_slope`: the logits are overwritten by the slope of
    that log-probability by z, times that of the soft cap: its slope by the logits but for factor / temperature.
    """
    assert logits.stride(1) == 1
    logprobs = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    kernel: Any = logprob_kernel
    kernel[(len(logits),)](
        logits,
        target,
        logprobs,
        logits.shape[1],
        logits.stride(0),
        float(factor / temperature),
        float(factor / (soft_cap or 1.0)),
        float((soft_cap or 1.0) / temperature),
        HAS_CAP=soft_cap is not None,
        WITH_SLOPE=with_slope,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    return logprobs
