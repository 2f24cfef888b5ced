"""What both backends do alike around a forward pass: passes without gradient, the optimizer step, the reference.

A backend's `Forward` gives the log-probabilities [b, width] of a microbatch's rows; what is behind it is not known.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from nemo_rl_lora.algorithms.losses import loss_inputs
from nemo_rl_lora.policy.masters import MasterAdam
from nemo_rl_lora.policy.microbatches import Microbatch, MicrobatchPlan, plan_microbatches
from nemo_rl_lora.types import Batch, LossFn, StepOutput

Forward = Callable[[Microbatch, int], Tensor]


@torch.no_grad()
def logprob_pass(batch: Batch, plan: MicrobatchPlan, forward: Forward) -> Tensor:
    """[B, T] fp32 on the CPU; 0.0 outside the loss mask."""
    width = batch.token_ids.shape[1]
    out = torch.zeros(batch.token_ids.shape, dtype=torch.float32)
    for micro in plan_microbatches(batch, plan):
        out[micro.rows] = forward(micro, width).cpu()
    return out


def optimizer_step(
    batch: Batch,
    plan: MicrobatchPlan,
    forward: Forward,
    loss_fn: LossFn,
    optimizer: MasterAdam,
    dropout: Callable[[int], AbstractContextManager[None]],
) -> StepOutput:
    """All microbatches, each with its `dropout`, then one step. FloatingPointError before the optimizer moves on bad
    numbers."""
    optimizer.zero_grad(set_to_none=True)
    total_loss = 0.0
    metrics: dict[str, float] = {}
    microbatches = plan_microbatches(batch, plan)
    for index, micro in enumerate(microbatches):
        with dropout(index):
            logprobs = forward(micro, batch.token_ids.shape[1])
            loss, shares = loss_fn(loss_inputs(batch, logprobs, micro.rows))
            loss.backward()
        total_loss += loss.item()
        add_metrics(metrics, shares)
    grad_norm, lr = optimizer.move(total_loss, torch.nn.utils.get_total_norm)
    return StepOutput(
        loss=total_loss,
        grad_norm=grad_norm,
        lr=lr,
        metrics=metrics,
        num_forward_tokens=sum(micro.num_tokens for micro in microbatches),
        num_padding_tokens=sum(micro.num_padding_tokens for micro in microbatches),
    )


def add_metrics(totals: dict[str, float], shares: Mapping[str, Any]) -> None:
    """Add a microbatch's shares; names ending in _min or _max are reduced by min or max."""
    for name, share in shares.items():
        value = float(share)
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
    """The parameters hold these tensors for the time being."""
    current = {name: p.data for name, p in parameters.items()}
    for name, p in parameters.items():
        p.data = tensors[name].to(p.device)
    try:
        yield
    finally:
        for name, p in parameters.items():
            p.data = current[name]
