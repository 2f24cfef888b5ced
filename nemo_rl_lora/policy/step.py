"""What both backends do alike around a forward pass: the loss of a microbatch, the sum of a step, the reference."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nemo_rl_lora.algorithms.losses.policy import loss_inputs
from nemo_rl_lora.distributed.ranks import Ranks
from nemo_rl_lora.policy.microbatches import Microbatch
from nemo_rl_lora.types import Batch, LossFn, StepOutput


@dataclass(frozen=True, slots=True)
class Share:
    """What a microbatch adds to the loss and the metrics of its step."""

    loss: float
    metrics: Mapping[str, float]
    num_tokens: int
    num_padding_tokens: int
    num_loss_tokens: int
    num_attention_scores: int


def microbatch_loss(batch: Batch, micro: Microbatch, logprobs: Tensor, loss_fn: LossFn) -> tuple[Tensor, Share]:
    """The loss of a microbatch, to go backward from, and what it adds. logprobs: [b, width], of its rows."""
    loss, metrics = loss_fn(loss_inputs(batch, logprobs, micro.rows))
    values = {name: float(value) for name, value in metrics.items()}
    return loss, _share(micro, loss.item(), values)


def empty_loss(hidden: Tensor, micro: Microbatch) -> tuple[Tensor, Share]:
    """The same of a microbatch without rows, which keeps step with other ranks: 0, with a gradient of 0."""
    return hidden.float().sum() * 0.0, _share(micro, 0.0, {})


def _share(micro: Microbatch, loss: float, metrics: Mapping[str, float]) -> Share:
    return Share(
        loss,
        metrics,
        num_tokens=micro.num_tokens,
        num_padding_tokens=micro.num_padding_tokens,
        num_loss_tokens=micro.num_loss_tokens,
        num_attention_scores=micro.num_attention_scores,
    )


def step_output(shares: Sequence[Share], move: Callable[[float], tuple[float, float]]) -> StepOutput:
    """Move the optimizer, which is given the loss and gives the gradient's norm and the learning rate, and add up."""
    loss = sum(share.loss for share in shares)
    grad_norm, lr = move(loss)
    metrics: dict[str, float] = {}
    for share in shares:
        add_metrics(metrics, share.metrics)
    return StepOutput(
        loss=loss,
        grad_norm=grad_norm,
        lr=lr,
        metrics=metrics,
        num_forward_tokens=sum(share.num_tokens for share in shares),
        num_padding_tokens=sum(share.num_padding_tokens for share in shares),
        num_loss_tokens=sum(share.num_loss_tokens for share in shares),
        num_attention_scores=sum(share.num_attention_scores for share in shares),
    )


def peak_gpu_gib(ranks: Ranks) -> float | None:
    """The most GiB that PyTorch had allocated on a process's GPU since this was asked last, of the process that had the
    most; None without GPUs. Every process asks."""
    if not torch.cuda.is_available():
        return None
    peak = max(ranks.everybodys(torch.cuda.max_memory_allocated()))
    torch.cuda.reset_peak_memory_stats()
    return peak / 2**30


def add_metrics(totals: dict[str, float], shares: Mapping[str, float]) -> None:
    """Add a microbatch's shares; names ending in _min or _max are reduced by min or max."""
    for name, value in shares.items():
        if name not in totals:
            totals[name] = value
        elif name.endswith("_min"):
            totals[name] = min(totals[name], value)
        elif name.endswith("_max"):
            totals[name] = max(totals[name], value)
        else:
            totals[name] += value


def copies_on_cpu(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """A copy of every parameter: the reference of a run that trains them."""
    return {name: p.detach().to("cpu", copy=True) for name, p in parameters.items()}


@contextlib.contextmanager
def holding(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """The parameters hold these tensors for the time being, and the tensors what the parameters held.

    Values are exchanged in place, one parameter at a time: whatever shares a parameter's memory sees them.
    """
    _exchange(parameters, tensors)
    try:
        yield
    finally:
        _exchange(parameters, tensors)


@torch.no_grad()
def _exchange(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    for name, p in parameters.items():
        current = p.detach().to(tensors[name].device, copy=True)
        p.copy_(tensors[name])
        tensors[name].copy_(current)
