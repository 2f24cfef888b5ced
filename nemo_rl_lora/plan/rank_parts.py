"""What each process of the Megatron backend holds, by its tensor-, pipeline- and expert-parallel ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from nemo_rl_lora.config.megatron import MegatronConfig
from nemo_rl_lora.lora.names import megatron_name
from nemo_rl_lora.lora.targets import AdaptedModule
from nemo_rl_lora.policy.megatron.convert import ParallelLayout, adapter_shard_shape, layout_of, megatron_weights
from nemo_rl_lora.policy.megatron.families import Family


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPart:
    """What one process of the Megatron backend holds of the model; its tensor-parallel siblings hold as much."""

    pp_rank: int
    ep_rank: int
    num_tp_ranks: int
    layers: range
    experts: range
    num_params: int
    num_adapter_params: int


def rank_parts(
    family: Family, megatron: MegatronConfig, adapted: Sequence[AdaptedModule], *, shared_a: bool
) -> tuple[RankPart, ...]:
    """The parts of the model, by stage and by the experts held. Tensor-parallel ranks have equal shares of each."""
    parts = []
    for pp_rank in range(megatron.pipeline_model_parallel_size):
        for ep_rank in range(megatron.expert_model_parallel_size):
            layout = layout_of(family, megatron, tp_rank=0, pp_rank=pp_rank, ep_rank=ep_rank)
            held = [weight for weight in megatron_weights(family, layout.pp) if layout.holds(weight.name)]
            part = RankPart(
                pp_rank=pp_rank,
                ep_rank=ep_rank,
                num_tp_ranks=layout.tp,
                layers=layout.layers,
                experts=layout.experts,
                num_params=sum(prod(weight.local_shape(layout)) for weight in held),
                num_adapter_params=_adapter_params(adapted, layout, shared_a),
            )
            parts.append(part)
    return tuple(parts)


def _adapter_params(adapted: Sequence[AdaptedModule], layout: ParallelLayout, shared_a: bool) -> int:
    total = 0
    counted_a: set[str] = set()
    for module in adapted:
        layer = megatron_name(module.name)
        assert layer is not None, module.name
        if not layout.holds(layer):
            continue
        total += prod(adapter_shard_shape(layer, "B", (module.out_features, module.dim), layout))
        if not (shared_a and layer in counted_a):
            total += prod(adapter_shard_shape(layer, "A", (module.dim, module.in_features), layout))
        counted_a.add(layer)
    return total
