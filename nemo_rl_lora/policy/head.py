"""Log-probabilities of given tokens from hidden states, without ever holding [tokens, vocabulary] logits.

The head runs over chunks of tokens. Each log-probability is a scalar per token, so its derivative with respect to the
hidden state, (W[target] - softmax(logits) @ W) / temperature, is computed in the forward pass while the chunk's logits
are there, and scaled in the backward pass by whatever gradient the loss sends. Where the head itself is trained (full
fine-tuning) the chunk is computed again in the backward pass instead.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def target_logprobs(hidden: Tensor, weight: Tensor, target: Tensor, *, temperature: float, chunk_tokens: int) -> Tensor:
    """log softmax(hidden @ weight^T / temperature)[target].

    hidden: [M, H]; weight: [V, H]; target: [M] int64 -> [M] fp32. Products in hidden's dtype, softmax in fp32.
    """
    if weight.requires_grad and torch.is_grad_enabled():
        return _TrainedHead.apply(hidden, weight, target, temperature, chunk_tokens)
    return _FrozenHead.apply(hidden, weight, target, temperature, chunk_tokens)


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    logits = F.linear(hidden, weight).float()
    return logits if temperature == 1.0 else logits.div_(temperature)


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, temperature, chunk_tokens):
        weight = weight.to(hidden.dtype)
        out = torch.empty(len(target), dtype=torch.float32, device=hidden.device)
        slope = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for begin in range(0, len(target), chunk_tokens):
            part = slice(begin, begin + chunk_tokens)
            logp = torch.log_softmax(_logits(hidden[part], weight, temperature), dim=-1)
            out[part] = logp.gather(1, target[part, None])[:, 0]
            if slope is not None:
                torch.mm(logp.exp_().to(hidden.dtype), weight, out=slope[part])
        if slope is not None:
            slope.neg_().add_(weight.index_select(0, target)).div_(temperature)
            ctx.save_for_backward(slope)
        return out

    @staticmethod
    def backward(ctx, grad):
        (slope,) = ctx.saved_tensors
        return slope * grad[:, None].to(slope.dtype), None, None, None, None


class _TrainedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, temperature, chunk_tokens):
        ctx.save_for_backward(hidden, weight, target)
        ctx.temperature, ctx.chunk_tokens = temperature, chunk_tokens
        return _FrozenHead.apply(hidden.detach(), weight.detach(), target, temperature, chunk_tokens)

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, target = ctx.saved_tensors
        cast = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for begin in range(0, len(target), ctx.chunk_tokens):
            part = slice(begin, begin + ctx.chunk_tokens)
            slope = torch.softmax(_logits(hidden[part], cast, ctx.temperature), dim=-1).neg_()
            slope[torch.arange(len(slope)), target[part]] += 1.0
            slope = slope.mul_(grad[part, None] / ctx.temperature).to(hidden.dtype)
            torch.mm(slope, cast, out=grad_hidden[part])
            grad_weight += torch.mm(slope.t(), hidden[part])
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None
