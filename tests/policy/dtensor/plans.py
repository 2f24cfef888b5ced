"""Tensor-parallel plans of a user's own, for `policy.dtensor_cfg.custom_parallel_plan`."""

from __future__ import annotations

from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel


def mlp_alone() -> dict[str, ParallelStyle]:
    """Attention, embeddings and head stay whole on every rank."""
    return {
        "model.layers.*.mlp.gate_proj": ColwiseParallel(),
        "model.layers.*.mlp.up_proj": ColwiseParallel(),
        "model.layers.*.mlp.down_proj": RowwiseParallel(),
    }


NOT_A_PLAN = ["model.layers.*.mlp.gate_proj"]
