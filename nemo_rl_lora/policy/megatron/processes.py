"""The processes that share a model: which groups there are, and what this one holds by its ranks in them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import initialize_rng_tracker

from nemo_rl_lora.config.megatron import MegatronConfig
from nemo_rl_lora.policy.megatron import shim
from nemo_rl_lora.policy.megatron.convert import ParallelLayout, layout_of
from nemo_rl_lora.policy.megatron.families import Family
from nemo_rl_lora.policy.megatron.ranks import Ranks


def join_processes(megatron: MegatronConfig) -> None:
    """Make megatron-core's process groups, once in a process."""
    shim.install()
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if torch.cuda.is_available() else "gloo", store=dist.HashStore(), rank=0, world_size=1
        )
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=megatron.tensor_model_parallel_size,
            pipeline_model_parallel_size=megatron.pipeline_model_parallel_size,
            context_parallel_size=megatron.context_parallel_size,
            expert_model_parallel_size=megatron.expert_model_parallel_size,
            expert_tensor_parallel_size=megatron.expert_tensor_parallel_size,
        )
    # No layer draws a random number, so the states that megatron-core would fork stay empty.
    initialize_rng_tracker(inference_rng_tracker=True)


def ranks_of(family: Family, megatron: MegatronConfig) -> Ranks:
    """All processes, each of which makes this call, and which part of the model is whose."""
    layout = own_layout(family, megatron)
    return Ranks(layout, sequence_parallel=megatron.sequence_parallel, has_tied_head=family.has_tied_head)


def own_layout(family: Family, megatron: MegatronConfig) -> ParallelLayout:
    """The part of the model of this process, by its ranks in megatron-core's groups."""
    return layout_of(
        family,
        megatron,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        expert_tp_rank=parallel_state.get_expert_tensor_parallel_rank() or 0,
    )
