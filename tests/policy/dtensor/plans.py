"""Tensor-parallel plans of a user's own, for `policy.dtensor_cfg.custom_parallel_plan`."""

from __future__ import annotations

from typing import Any

from nemo_automodel.components.distributed.parallel_styles import ReplicatedWithGradAllReduce
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
)


def mlp_alone() -> dict[str, ParallelStyle]:
    """Attention, embeddings and head stay whole on every rank."""
    return {
        "model.layers.*.mlp.gate_proj": ColwiseParallel(),
        "model.layers.*.mlp.up_proj": ColwiseParallel(),
        "model.layers.*.mlp.down_proj": RowwiseParallel(),
    }


def attention(**styles: ParallelStyle) -> dict[str, ParallelStyle]:
    """Attention split by its heads, and styles of further modules beside its matrices."""
    column = {name: ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")}
    of_modules: dict[str, ParallelStyle] = {**column, "o_proj": RowwiseParallel(), **styles}
    return {f"model.layers.*.self_attn.{name}": style for name, style in of_modules.items()}


def attention_and_its_norms() -> dict[str, ParallelStyle]:
    return attention(q_norm=ReplicatedWithGradAllReduce(), k_norm=ReplicatedWithGradAllReduce())


def gathered_attention() -> dict[str, ParallelStyle]:
    """Each rank computes its heads' queries and keys, and has all of them."""
    return {
        f"model.layers.*.self_attn.{name}_proj": ColwiseParallel(output_layouts=Replicate()) for name in ("q", "k", "v")
    }


def sequences(**styles: ParallelStyle) -> dict[str, ParallelStyle]:
    """Activations split along the sequence, but for the final norm."""
    scattered = {"output_layouts": Shard(1), "use_local_output": False}
    of_layers: dict[str, Any] = {
        "input_layernorm": SequenceParallel(),
        "self_attn": PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": Shard(1)}, desired_input_kwarg_layouts={"hidden_states": Replicate()}
        ),
        **{f"self_attn.{name}_proj": ColwiseParallel() for name in ("q", "k", "v")},
        "self_attn.o_proj": RowwiseParallel(**scattered),
        "post_attention_layernorm": SequenceParallel(),
        **{f"mlp.{name}_proj": ColwiseParallel(input_layouts=Shard(1)) for name in ("gate", "up")},
        "mlp.down_proj": RowwiseParallel(**scattered),
    }
    return {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), **scattered),
        **{f"model.layers.*.{name}": style for name, style in of_layers.items()},
        "lm_head": ColwiseParallel(input_layouts=Shard(1)),
        **styles,
    }


def whole_sequences() -> dict[str, ParallelStyle]:
    return sequences(**{"model.norm": SequenceParallel()})


def sequences_of_attention() -> dict[str, ParallelStyle]:
    return {name: style for name, style in whole_sequences().items() if ".mlp." not in name}


def summed_mlp() -> dict[str, ParallelStyle]:
    names = (f"model.layers.*.mlp.{name}_proj" for name in ("gate", "up", "down"))
    return {**sequences_of_attention(), **{name: ReplicatedWithGradAllReduce() for name in names}}


def misspelt() -> dict[str, ParallelStyle]:
    return {**mlp_alone(), "model.layers.*.self_attn.q_prj": ColwiseParallel()}


def needs_a_model(model: Any) -> dict[str, ParallelStyle]:
    raise AssertionError(model)


def leaves() -> None:
    raise SystemExit(3)


STYLES_BY_NAME = {"model.layers.*.mlp.gate_proj": "colwise"}
STYLES_WITHOUT_CALL = {"model.layers.*.mlp.gate_proj": ColwiseParallel}
NO_STYLES: dict[str, ParallelStyle] = {}
NOT_A_PLAN = ["model.layers.*.mlp.gate_proj"]
