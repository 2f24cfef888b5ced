"""Log-probabilities of given tokens from hidden states, without ever holding [tokens, vocabulary] logits.

The head runs over chunks of tokens. Each log-probability is a scalar per token, so its derivative with respect to the
hidden state, (W[target] - softmax(logits) @ W) / temperature, is computed in the forward pass while the chunk's logits
are there, and scaled in the backward pass by whatever gradient the loss sends. Where the head itself is trained (full
fine-tuning) the chunk is computed again in the backward pass instead.

Tensor-parallel ranks may share the vocabulary: each has rows of the head, all have the hidden states and the targets,
and all get every log-probability and the whole gradient of the hidden states.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """A model's head, as `target_logprobs` uses it."""

    weight: Tensor  # [V, H]
    temperature: float
    chunk_tokens: int
    group: dist.ProcessGroup | None = None


def target_logprobs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    temperature: float,
    chunk_tokens: int,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """log softmax(hidden @ weight^T / temperature)[target].

    hidden: [M, H]; weight: [V, H]; target: [M] int64 -> [M] fp32. Products in hidden's dtype, softmax in fp32.
    `group`: ranks that share the vocabulary by equal parts in the order of their ranks; weight is this rank's part.
    """
    if weight.requires_grad and torch.is_grad_enabled():
        return _TrainedHead.apply(hidden, weight, target, temperature, chunk_tokens, group)
    return _FrozenHead.apply(hidden, weight, target, temperature, chunk_tokens, group)


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    logits = F.linear(hidden, weight).float()
    return logits if temperature == 1.0 else logits.div_(temperature)


def _own_target(target: Tensor, num_rows: int, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor | None]:
    """The row of this rank's head for each target, and where the target is of another rank's (row 0 stands in)."""
    if group is None:
        return target, None
    row = target - group.rank() * num_rows
    elsewhere = (row < 0) | (row >= num_rows)
    return row.masked_fill(elsewhere, 0), elsewhere


def _log_softmax(logits: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """log softmax over the vocabulary that the group shares; logits are overwritten where there is one."""
    if group is None:
        return torch.log_softmax(logits, dim=-1)
    largest = logits.amax(-1, keepdim=True)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    total = logits.sub_(largest).exp().sum(-1, keepdim=True)
    dist.all_reduce(total, group=group)
    return logits.sub_(total.log_())


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, temperature, chunk_tokens, group):
        weight = weight.to(hidden.dtype)
        row, elsewhere = _own_target(target, weight.shape[0], group)
        out = torch.empty(len(target), dtype=torch.float32, device=hidden.device)
        slope = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for begin in range(0, len(target), chunk_tokens):
            part = slice(begin, begin + chunk_tokens)
            logp = _log_softmax(_logits(hidden[part], weight, temperature), group)
            out[part] = logp.gather(1, row[part, None])[:, 0]
            if slope is not None:
                torch.mm(logp.exp_().to(hidden.dtype), weight, out=slope[part])
        if slope is not None:
            slope.neg_().add_(_without(weight.index_select(0, row), elsewhere)).div_(temperature)
        if group is not None:
            dist.all_reduce(_without(out, elsewhere), group=group)
            if slope is not None:
                dist.all_reduce(slope, group=group)
        if slope is not None:
            ctx.save_for_backward(slope)
        return out

    @staticmethod
    def backward(ctx, grad):
        (slope,) = ctx.saved_tensors
        return slope * grad[:, None].to(slope.dtype), None, None, None, None, None


class _TrainedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, temperature, chunk_tokens, group):
        ctx.save_for_backward(hidden, weight, target)
        ctx.temperature, ctx.chunk_tokens, ctx.group = temperature, chunk_tokens, group
        return _FrozenHead.apply(hidden.detach(), weight.detach(), target, temperature, chunk_tokens, group)

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, target = ctx.saved_tensors
        cast = weight.to(hidden.dtype)
        row, elsewhere = _own_target(target, weight.shape[0], ctx.group)
        here = torch.ones(len(target), device=hidden.device) if elsewhere is None else (~elsewhere).float()
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for begin in range(0, len(target), ctx.chunk_tokens):
            part = slice(begin, begin + ctx.chunk_tokens)
            slope = _log_softmax(_logits(hidden[part], cast, ctx.temperature), ctx.group).exp_().neg_()
            slope[torch.arange(len(slope)), row[part]] += here[part]
            slope = slope.mul_(grad[part, None] / ctx.temperature).to(hidden.dtype)
            torch.mm(slope, cast, out=grad_hidden[part])
            grad_weight += torch.mm(slope.t(), hidden[part])
        if ctx.group is not None:
            dist.all_reduce(grad_hidden, group=ctx.group)
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


def _without(x: Tensor, elsewhere: Tensor | None) -> Tensor:
    """x with zeros in the rows of targets that another rank holds."""
    if elsewhere is not None:
        x[elsewhere] = 0
    return x
