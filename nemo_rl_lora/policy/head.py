"""Log-probabilities of given tokens from hidden states, without ever holding [tokens, vocabulary] logits.

The head runs over chunks of tokens. Each log-probability is a scalar per token, so its derivative with respect to the
hidden state, (W[target] - softmax(logits) @ W) * scale / temperature (each row of W times the slope of the soft cap,
where there is one), is computed in the forward pass while the chunk's logits
are there, and scaled in the backward pass by whatever gradient the loss sends. Where the head itself is trained (full
fine-tuning) the chunk is computed again in the backward pass instead. On a GPU a Triton kernel takes a chunk's logits
as they are and writes their slope over them (kernels/logprobs.py); elsewhere torch does.

Tensor-parallel ranks may share the vocabulary: each has rows of the head, all have the hidden states and the targets,
and all get every log-probability and the whole gradient of the hidden states.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from nemo_rl_lora.kernels import machine
from nemo_rl_lora.models.own_forward import HeadForm


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """A model's head, as `target_logprobs` uses it."""

    weight: Tensor  # [V, H], or this rank's rows of it
    temperature: float
    chunk_tokens: int
    form: HeadForm = HeadForm()
    group: dist.ProcessGroup | None = None  # ranks that share the vocabulary; None: this one has all of it
    first_row: int = 0  # of this rank's rows


def target_logprobs(hidden: Tensor, head: Head, target: Tensor) -> Tensor:
    """log softmax(logits / temperature)[target], with the logits that the head's form makes of hidden @ weight^T.

    hidden: [M, H]; target: [M] int64 -> [M] fp32. Products in hidden's dtype, softmax in fp32.
    """
    is_trained = head.weight.requires_grad and torch.is_grad_enabled()
    return (_TrainedHead if is_trained else _FrozenHead).apply(hidden, head.weight, target, head)


def _logits(hidden: Tensor, weight: Tensor, head: Head) -> tuple[Tensor, Tensor | None]:
    """Logits over the temperature, and the slope of the soft cap at each; None where there is no cap."""
    logits, cap = F.linear(hidden, weight).float(), head.form.soft_cap
    factor, slope = head.form.scale / head.temperature, None
    if cap is not None:
        logits.mul_(head.form.scale / cap).tanh_()
        factor, slope = cap / head.temperature, 1 - logits.square()
    return (logits if factor == 1.0 else logits.mul_(factor)), slope


def _kernel_takes(hidden: Tensor, head: Head) -> bool:
    """Whether the Triton kernel computes the log-probabilities of these: it sees one rank's logits alone."""
    return hidden.is_cuda and head.group is None and machine.kernel_problem() is None


def _by_kernel(hidden: Tensor, weight: Tensor, target: Tensor, head: Head, slope: Tensor | None) -> Tensor:
    """Log-probabilities of a chunk; `slope`, where there is one, becomes theirs by hidden, but for the factor on it."""
    from nemo_rl_lora.kernels import logprobs

    logits = F.linear(hidden, weight)
    values = logprobs.target_logprobs(
        logits,
        target,
        factor=head.form.scale,
        soft_cap=head.form.soft_cap,
        temperature=head.temperature,
        with_slope=slope is not None,
    )
    if slope is not None:
        torch.mm(logits, weight, out=slope)
    return values


def _own_target(target: Tensor, head: Head) -> tuple[Tensor, Tensor | None]:
    """The row of this rank's head for each target, and where the target is of another rank's (row 0 stands in)."""
    if head.group is None:
        return target, None
    row = target - head.first_row
    elsewhere = (row < 0) | (row >= head.weight.shape[0])
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
    def forward(ctx, hidden: Tensor, weight: Tensor, target: Tensor, head: Head):
        weight, group = weight.to(hidden.dtype), head.group
        row, elsewhere = _own_target(target, head)
        out = torch.empty(len(target), dtype=torch.float32, device=hidden.device)
        slope = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        by_kernel = _kernel_takes(hidden, head)
        for begin in range(0, len(target), head.chunk_tokens):
            part = slice(begin, begin + head.chunk_tokens)
            if by_kernel:
                out[part] = _by_kernel(hidden[part], weight, row[part], head, None if slope is None else slope[part])
                continue
            logits, bend = _logits(hidden[part], weight, head)
            logp = _log_softmax(logits, group)
            out[part] = logp.gather(1, row[part, None])[:, 0]
            if slope is not None:
                p, own = logp.exp_(), _without(weight.index_select(0, row[part]), _rows(elsewhere, part))
                if bend is not None:
                    p, own = p.mul_(bend), own * bend.gather(1, row[part, None]).to(own.dtype)
                torch.sub(own, torch.mm(p.to(hidden.dtype), weight), out=slope[part])
        if slope is not None:
            slope.mul_(head.form.scale / head.temperature)
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
        return slope * grad[:, None].to(slope.dtype), None, None, None


class _TrainedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, target: Tensor, head: Head):
        ctx.save_for_backward(hidden, weight, target)
        ctx.head = head
        return _FrozenHead.apply(hidden.detach(), weight.detach(), target, head)

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, target = ctx.saved_tensors
        head: Head = ctx.head
        cast = weight.to(hidden.dtype)
        row, elsewhere = _own_target(target, head)
        here = torch.ones(len(target), device=hidden.device) if elsewhere is None else (~elsewhere).float()
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for begin in range(0, len(target), head.chunk_tokens):
            part = slice(begin, begin + head.chunk_tokens)
            logits, bend = _logits(hidden[part], cast, head)
            slope = _log_softmax(logits, head.group).exp_().neg_()
            slope[torch.arange(len(slope)), row[part]] += here[part]
            slope = slope if bend is None else slope.mul_(bend)
            slope = slope.mul_(grad[part, None] * (head.form.scale / head.temperature)).to(hidden.dtype)
            torch.mm(slope, cast, out=grad_hidden[part])
            grad_weight += torch.mm(slope.t(), hidden[part])
        if head.group is not None:
            dist.all_reduce(grad_hidden, group=head.group)
        return grad_hidden, grad_weight.to(weight.dtype), None, None


def _rows(elsewhere: Tensor | None, part: slice) -> Tensor | None:
    return None if elsewhere is None else elsewhere[part]


def _without(x: Tensor, elsewhere: Tensor | None) -> Tensor:
    """x with zeros in the rows of targets that another rank holds."""
    if elsewhere is not None:
        x[elsewhere] = 0
    return x
