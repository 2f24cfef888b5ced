"""Draws tokens from logits. Contract: a draw is a function of (seed, position) and the row's logits alone, never of
the rows beside it or of global state; `logprob` is that of the token under the distribution it was drawn from.

Order of operations per row: logits / temperature, the `top_k` likeliest, then the smallest set of likeliest tokens
that holds `top_p` of what is left. Temperature 0 takes the likeliest token; its logprob is that at temperature 1.
One uniform number per row picks by inverse distribution function, in fp64 where sums could lose a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class Draw:
    """What of SamplingParams decides which token is drawn."""

    temperature: float
    top_p: float
    top_k: int | None

    @staticmethod
    def of(sampling: SamplingParams) -> Draw:
        return Draw(sampling.temperature, sampling.top_p, sampling.top_k)


def sample(logits: Tensor, sampling: Sequence[SamplingParams], u: Tensor) -> tuple[Tensor, Tensor]:
    """One token for each row: logits [N, V], u [N] in [0, 1). Returns tokens [N] int64 and logprobs [N] fp64.

    Raises FloatingPointError where a row's logits give no distribution.
    """
    u = u.to(logits.device)
    draws = [Draw.of(params) for params in sampling]
    kinds = tuple(dict.fromkeys(draws))
    kind_of_row = torch.tensor([kinds.index(one) for one in draws], device=logits.device) if len(kinds) > 1 else None
    tokens, logprobs, is_drawn = draw(logits, kinds, kind_of_row, u)
    if not bool(is_drawn.all()):
        rows = (~is_drawn).nonzero()[:, 0]
        kind_of_these = None if kind_of_row is None else kind_of_row[rows]
        tokens[rows], logprobs[rows], is_drawn = draw(logits[rows], kinds, kind_of_these, u[rows], prefix=None)
        if not bool(is_drawn.all()):
            raise FloatingPointError(NONFINITE_LOGITS)
    return tokens, logprobs


def draw(
    logits: Tensor, kinds: Sequence[Draw], kind_of_row: Tensor | None, u: Tensor, prefix: int | None = TOP_P_PREFIX
) -> tuple[Tensor, Tensor, Tensor]:
    """As `sample`, without a look at a number: a third tensor [N] says which rows have their token. The others have
    logits without a distribution, or a top-p that reaches past the `prefix` likeliest tokens (None: past none).

    `kind_of_row` [N] is the place in `kinds` of each row's; every kind is drawn for all rows, and there are few.
    """
    found = _draw_alike(logits, kinds[0], u, prefix)
    for place, kind in enumerate(kinds[1:], start=1):
        assert kind_of_row is not None
        is_this, others = kind_of_row == place, _draw_alike(logits, kind, u, prefix)
        found = tuple(torch.where(is_this, one, other) for one, other in zip(others, found, strict=True))
    tokens, logprobs, is_drawn = found
    return tokens, logprobs, is_drawn


def _draw_alike(logits: Tensor, kind: Draw, u: Tensor, prefix: int | None) -> tuple[Tensor, Tensor, Tensor]:
    if kind.temperature == 0:
        tokens = logits.argmax(dim=-1, keepdim=True)
        chosen = logits.gather(1, tokens).float() - logits.float().logsumexp(dim=-1, keepdim=True)
        return tokens[:, 0], chosen[:, 0].double(), chosen[:, 0] > float("-inf")  # as NaN is not
    if kind.top_k is None and kind.top_p == 1:
        return _inverse_cdf(logits, kind.temperature, u)
    ordered, order, is_enough = _truncate(logits.float() / kind.temperature, kind, prefix)
    picked, logprobs, is_drawn = _inverse_cdf(ordered, 1.0, u)
    return order.gather(1, picked[:, None])[:, 0], logprobs, is_drawn if is_enough is None else is_drawn & is_enough


def _truncate(logits: Tensor, kind: Draw, prefix: int | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sorted logits [N, c] with -inf for what top-k and top-p cut, the token of each place [N, c], and the rows whose
    top-p lies within c [N]; None where all do."""
    vocabulary, is_enough = logits.shape[1], None
    if kind.top_k is not None:
        ordered, order = logits.topk(min(kind.top_k, vocabulary), dim=-1)
        total = ordered.double().logsumexp(dim=-1, keepdim=True)
    else:
        total = logits.double().logsumexp(dim=-1, keepdim=True)
        if prefix is None:
            ordered, order = logits.sort(dim=-1, descending=True)
        else:
            ordered, order = logits.topk(min(prefix, vocabulary), dim=-1)
            is_enough = (ordered.double() - total).exp().sum(dim=-1) >= kind.top_p
    if kind.top_p < 1:
        mass = (ordered.double() - total).exp()
        ordered = ordered.masked_fill(mass.cumsum(dim=-1) - mass >= kind.top_p, float("-inf"))
    return ordered, order, is_enough


def _inverse_cdf(logits: Tensor, temperature: float, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The column where the running sum of probabilities passes u, its logprob, and whether there is such a sum."""
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
    target = u[:, None] * total
    block = _first_above(running, target)
    before = running.gather(1, (block - 1).clamp(min=0)).masked_fill_(block == 0, 0.0)
    inside = blocks.gather(1, block[:, :, None].expand(N, 1, BLOCK))[:, 0].double().cumsum(dim=-1)
    picked = block * BLOCK + _first_above(inside, target - before)
    logprobs = logits.gather(1, picked).double() - largest.double()
    if temperature != 1:
        logprobs /= temperature
    return picked[:, 0], (logprobs - total.log())[:, 0], total[:, 0] > 0  # as NaN is not


def _first_above(running: Tensor, target: Tensor) -> Tensor:
    """[N, 1] first index whose running sum exceeds target; at most the last that adds anything."""
    last = (running < running[:, -1:]).sum(dim=-1, keepdim=True)
    return torch.minimum(torch.searchsorted(running, target, right=True), last)
