"""A microbatch's share of the loss and of the metrics, and how shares add up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nemo_rl_lora.policy.microbatches import Microbatch
from nemo_rl_lora.types import Batch, LossFn, LossInputs


def loss_share(batch: Batch, micro: Microbatch, logprobs: Tensor, loss_fn: LossFn) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a microbatch, with gradient, and its metrics. logprobs: [b, T] of the microbatch's rows."""
    device, rows = logprobs.device, micro.rows

    def of_rows(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[rows].to(device)

    old = of_rows(batch.old_logprobs)
    inputs = LossInputs(
        logprobs=logprobs,
        old_logprobs=logprobs.detach() if old is None else old,
        reference_logprobs=of_rows(batch.reference_logprobs),
        generation_logprobs=of_rows(batch.generation_logprobs),
        advantages=of_rows(batch.advantages),
        loss_mask=batch.loss_mask[rows].to(device),
        sequence_length=batch.sequence_length[rows].to(device),
        group_index=batch.group_index[rows].to(device),
        denominators=batch.denominators,
    )
    return loss_fn(inputs)


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
