"""The processes that share a model: which groups there are, and where this one stands. All rank arithmetic is here."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import initialize_rng_tracker

from nemo_rl_lora.config.megatron import MegatronConfig
from nemo_rl_lora.policy.megatron import shim
from nemo_rl_lora.policy.megatron.convert import ParallelLayout
from nemo_rl_lora.policy.megatron.families import Family, layer_ranges


def join_processes(family: Family, megatron: MegatronConfig) -> ParallelLayout:
    """Make megatron-core's process groups, once in a process, and say which part of the model is this one's."""
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
    stage = parallel_state.get_pipeline_model_parallel_rank()
    num_experts = 0 if family.experts is None else family.experts.num_experts
    own_experts = num_experts // megatron.expert_model_parallel_size
    first_expert = parallel_state.get_expert_model_parallel_rank() * own_experts
    return ParallelLayout(
        tp=megatron.tensor_model_parallel_size,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        expert_tp=megatron.expert_tensor_parallel_size,
        expert_tp_rank=parallel_state.get_expert_tensor_parallel_rank() or 0,
        pp=megatron.pipeline_model_parallel_size,
        pp_rank=stage,
        layers=layer_ranges(family.num_layers, megatron)[stage],
        experts=range(first_expert, first_expert + own_experts),
    )
