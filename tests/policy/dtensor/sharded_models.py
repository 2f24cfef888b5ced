"""Tiny models on the meta device, sharded by torch alone, in as many processes as the layout has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AutoConfig, PreTrainedModel

from nemo_rl_lora.models.load import empty_model

LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
    "fsdp 2": ((2,), ("dp_shard",)),
    "tp 2": ((2,), ("tp",)),
    "fsdp 4": ((4,), ("dp_shard",)),
    "fsdp 2 x tp 2": ((2, 2), ("dp_shard", "tp")),
    "replicate 2 x shard 2": ((2, 2), ("dp_replicate", "dp_shard")),
}


def num_processes(layout: str) -> int:
    """How many processes a layout has."""
    return torch.Size(LAYOUTS[layout][0]).numel()


def empty_sharded(path: Path, layout: str | None, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model of a directory's config on the meta device, with an adapter's parameters; None: not sharded."""
    config = AutoConfig.from_pretrained(path)
    if dtype is not None:
        config.dtype = dtype
    model = empty_model(config)
    body: Any = model.requires_grad_(False).model
    for layer in body.layers:
        layer.register_module("lora_A", nn.Linear(config.hidden_size, 4, bias=False, device="meta"))
    return model if layout is None else shard(model, layout)


def shard(model: PreTrainedModel, layout: str) -> PreTrainedModel:
    """FSDP2 and torch's tensor parallelism over the base of a model, and FSDP2 over adapters."""
    mesh = init_device_mesh("cpu", LAYOUTS[layout][0], mesh_dim_names=LAYOUTS[layout][1])
    names = LAYOUTS[layout][1]
    body: Any = model.model
    if "tp" in names:
        column, row = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")
        plan: dict[str, Any] = {}
        for name, module in body.named_modules():
            last = name.rpartition(".")[2]
            if isinstance(module, nn.Linear) and last in column + row:
                plan[name] = ColwiseParallel() if last in column else RowwiseParallel()
        parallelize_module(body, mesh["tp"], plan)
    data = tuple(name for name in names if name != "tp")
    if data:
        for layer in body.layers:
            fully_shard(layer, mesh=mesh[data])
        fully_shard(model, mesh=mesh[data])
    return model


def whole(tensor: Tensor) -> Tensor:
    """A tensor or DTensor, whole. Every process calls it."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()
