"""Prints, as JSON, what megatron-core's model holds on every rank of several layouts: name -> shape.

One process plays each rank in turn over torch's fake process group, which answers without communicating.
"""

import json
import sys

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from nemo_rl_lora.policy.megatron.groups import join_processes, own_layout
from nemo_rl_lora.policy.megatron.layers import build_model, transformer_config
from tests.policy.megatron.test_convert import LAYOUTS, family_of, megatron_of, possible


def parameters_of_rank(family, megatron, rank: int, num_ranks: int):
    """The rank's part of the model as the backend sees it, and the model's own parameters."""
    dist.init_process_group("fake", rank=rank, world_size=num_ranks, store=FakeStore())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=megatron.tensor_model_parallel_size,
        pipeline_model_parallel_size=megatron.pipeline_model_parallel_size,
        expert_model_parallel_size=megatron.expert_model_parallel_size,
        expert_tensor_parallel_size=megatron.expert_tensor_parallel_size,
        create_gloo_process_groups=False,
    )
    join_processes(megatron)
    layout = own_layout(family, megatron)
    model = build_model(family, layout, transformer_config(family, megatron, torch.float32))
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    return {"layout": repr(layout), "shapes": {name: list(p.shape) for name, p in model.named_parameters()}}


def main() -> None:
    found = []
    for name, tied in (("llama", True), ("qwen2", False), ("qwen3_moe", False)):
        family = family_of(name, tied)
        for layout in LAYOUTS:
            if possible(family, layout):
                tp, pp, ep, _ = layout
                num_ranks = pp * max(tp, ep)
                ranks = [parameters_of_rank(family, megatron_of(layout), rank, num_ranks) for rank in range(num_ranks)]
                found.append({"family": name, "tied": tied, "layout": layout, "ranks": ranks})
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
