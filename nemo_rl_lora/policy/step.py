"""What both backends do alike around a forward pass: the loss of a microbatch, the sum of a step, the reference."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor, nn

from nemo_rl_lora.algorithms.losses.policy import loss_inputs
from nemo_rl_lora.distributed.ranks import Ranks
from nemo_rl_lora.policy.microbatches import Microbatch
from nemo_rl_lora.types import Batch, LossFn, StepOutput


@dataclass(frozen=True, slots=True)
class Share:
    """What a microbatch adds to the loss and the metrics of its step.

    Its numbers are read once a step (`read_shares`): to read them after a microbatch would be to wait for the device,
    which otherwise has the next one before it has ended this one.
    """

    numbers: Tensor | Sequence[float]  # the loss and each metric
    names: tuple[str, ...]  # of the metrics
    num_tokens: int
    num_padding_tokens: int
    num_loss_tokens: int
    num_attention_scores: int


def microbatch_loss(batch: Batch, micro: Microbatch, logprobs: Tensor, loss_fn: LossFn) -> tuple[Tensor, Share]:
    """The loss of a microbatch, to go backward from, and what it adds. Its rows: batch, and logprobs [b, width]."""
    loss, metrics = loss_fn(loss_inputs(batch, logprobs))
    return loss, _share(micro, torch.stack([loss.detach(), *metrics.values()]), tuple(metrics))


def empty_loss(hidden: Tensor, micro: Microbatch) -> tuple[Tensor, Share]:
    """The same of a microbatch without rows, which keeps step with other ranks: 0, with a gradient of 0."""
    return hidden.float().sum() * 0.0, _share(micro, [0.0], ())


def _share(micro: Microbatch, numbers: Tensor | Sequence[float], names: tuple[str, ...]) -> Share:
    return Share(
        numbers,
        names,
        num_tokens=micro.num_tokens,
        num_padding_tokens=micro.num_padding_tokens,
        num_loss_tokens=micro.num_loss_tokens,
        num_attention_scores=micro.num_attention_scores,
    )


def read_shares(shares: Sequence[Share]) -> list[Share]:
    """The same with their numbers read from the device, all at once."""
    unread = [share.numbers for share in shares if isinstance(share.numbers, Tensor)]
    read = iter(torch.cat(unread).tolist() if unread else [])
    return [
        replace(share, numbers=list(islice(read, len(share.numbers)))) if isinstance(share.numbers, Tensor) else share
        for share in shares
    ]


def step_output(shares: Sequence[Share], move: Callable[[float], tuple[float, float]]) -> StepOutput:
    """Move the optimizer, which is given the loss and gives the gradient's norm and the learning rate, and add up.

    The shares have been read.
    """
    loss = sum(float(share.numbers[0]) for share in shares)
    grad_norm, lr = move(loss)
    metrics: dict[str, float] = {}
    for share in shares:
        add_metrics(metrics, dict(zip(share.names, map(float, share.numbers[1:]), strict=True)))
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


def rows_in_order(shape: Sequence[int], micros: Sequence[Microbatch], found: Sequence[Tensor]) -> Tensor:
    """What was found of the rows of each microbatch, read from the device at once: [b, T] fp32 on the CPU."""
    out = torch.zeros(*shape, dtype=torch.float32)
    pairs = [(micro.rows, rows) for micro, rows in zip(micros, found, strict=False) if len(micro.rows) > 0]
    if pairs:
        out[torch.cat([places for places, _ in pairs])] = torch.cat([rows for _, rows in pairs]).cpu()
    return out


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
