"""Draws tokens from logits. Contract: a draw is a function of (seed, position) and the row's logits alone, never of
the rows beside it or of global state; `logprob` is that of the token under the distribution it was drawn from.

Order of operations per row: logits / temperature, the `top_k` likeliest, then the smallest set of likeliest tokens
that holds `top_p` of what is left. Temperature 0 takes the likeliest token; its logprob is that at temperature 1.
One uniform number per row picks by inverse distribution function, in fp64 where sums could lose a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nemo_rl_lora.generation.tickets import NONFINITE_LOGITS
from nemo_rl_lora.types import SamplingParams

BLOCK = 256  # tokens summed together before the running sum; a second running sum works inside one block
TOP_P_PREFIX = 1024  # sorted first; a row whose mass reaches further is sorted whole


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> Tensor:
    """[N] fp64 in [0, 1), one for each (seed, position): the SplitMix64 generator, its state hashed from the seed
    (Steele, Lea, Flood 2014)."""
    seed = np.array([s & 0xFFFFFFFFFFFFFFFF for s in seeds], dtype=np.uint64)
    position = np.array(positions, dtype=np.uint64)
    with np.errstate(over="ignore"):
        state = _mix(seed + np.uint64(0x9E3779B97F4A7C15))
        bits = _mix(state + (position + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))
    return torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def sample(logits: Tensor, sampling: Sequence[SamplingParams], u: Tensor) -> tuple[Tensor, Tensor]:
    """One token for each row: logits [N, V], u [N] in [0, 1). Returns tokens [N] int64 and logprobs [N] fp64.

    Raises FloatingPointError where a row's logits give no distribution.
    """
    u = u.to(logits.device)
    if len(set(sampling)) == 1:
        return _sample_alike(logits, sampling[0], u)
    tokens = torch.empty(len(sampling), dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(len(sampling), dtype=torch.float64, device=logits.device)
    for params in dict.fromkeys(sampling):
        rows = torch.tensor([i for i, other in enumerate(sampling) if other == params], device=logits.device)
        tokens[rows], logprobs[rows] = _sample_alike(logits[rows], params, u[rows])
    return tokens, logprobs


def _sample_alike(logits: Tensor, params: SamplingParams, u: Tensor) -> tuple[Tensor, Tensor]:
    if params.temperature == 0:
        tokens = logits.argmax(dim=-1, keepdim=True)
        chosen = logits.gather(1, tokens).float() - logits.float().logsumexp(dim=-1, keepdim=True)
        _refuse_nonfinite(chosen)
        return tokens[:, 0], chosen[:, 0].double()
    if params.top_k is None and params.top_p == 1:
        return _inverse_cdf(logits, params.temperature, u)
    ordered, order = _truncate(logits.float() / params.temperature, params)
    picked, logprobs = _inverse_cdf(ordered, 1.0, u)
    return order.gather(1, picked[:, None])[:, 0], logprobs


def _truncate(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Sorted logits [N, c] with -inf for what top-k and top-p cut, and the token of each place [N, c]."""
    vocabulary = logits.shape[1]
    if params.top_k is not None:
        ordered, order = logits.topk(min(params.top_k, vocabulary), dim=-1)
        total = ordered.double().logsumexp(dim=-1, keepdim=True)
    else:
        total = logits.double().logsumexp(dim=-1, keepdim=True)
        ordered, order = logits.topk(min(TOP_P_PREFIX, vocabulary), dim=-1)
        if bool(((ordered.double() - total).exp().sum(dim=-1) < params.top_p).any()):
            ordered, order = logits.sort(dim=-1, descending=True)
    if params.top_p < 1:
        mass = (ordered.double() - total).exp()
        ordered = ordered.masked_fill(mass.cumsum(dim=-1) - mass >= params.top_p, float("-inf"))
    return ordered, order


def _inverse_cdf(logits: Tensor, temperature: float, u: Tensor) -> tuple[Tensor, Tensor]:
    """The column where the running sum of probabilities passes u, and its logprob."""
    N, V = logits.shape
    largest = logits.amax(dim=-1, keepdim=True).float()
    # One fp32 table, changed in place: at a large vocabulary its memory traffic is the cost of a draw.
    weights = logits.new_empty((N, -(-V // BLOCK) * BLOCK), dtype=torch.float32)
    weights[:, V:] = 0.0
    weights[:, :V].copy_(logits).sub_(largest)
    if temperature != 1:
        weights[:, :V].div_(temperature)
    weights[:, :V].exp_()
    blocks = weights.view(N, -1, BLOCK)
    running = blocks.sum(dim=-1).double().cumsum(dim=-1)
    total = running[:, -1:]
    _refuse_nonfinite(total)
    target = u[:, None] * total
    block = _first_above(running, target)
    before = torch.where(block > 0, running.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks[torch.arange(N, device=logits.device), block[:, 0]].double().cumsum(dim=-1)
    picked = block * BLOCK + _first_above(inside, target - before)
    logprobs = (logits.gather(1, picked).double() - largest.double()) / temperature - total.log()
    return picked[:, 0], logprobs[:, 0]


def _first_above(running: Tensor, target: Tensor) -> Tensor:
    """[N, 1] first index whose running sum exceeds target; at most the last that adds anything."""
    last = (running < running[:, -1:]).sum(dim=-1, keepdim=True)
    return torch.minimum(torch.searchsorted(running, target, right=True), last)


def _refuse_nonfinite(values: Tensor) -> None:
    if not bool(values.isfinite().all()):
        raise FloatingPointError(NONFINITE_LOGITS)
