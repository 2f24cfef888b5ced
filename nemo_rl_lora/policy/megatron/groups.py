"""The processes that share a model under megatron-core: its process groups, and what each process holds.

Contract: parameters are named globally, and names may go on after that: `<layer>.<anything>`. What is done over the
groups is distributed/ranks.py's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import initialize_rng_tracker

from nemo_rl_lora.config.megatron import MegatronConfig
from nemo_rl_lora.distributed.ranks import DataShare, Ranks, join_alone
from nemo_rl_lora.patches import megatron_core
from nemo_rl_lora.policy.megatron.convert import ParallelLayout, layout_of, owners
from nemo_rl_lora.policy.megatron.families import Family

_TIED = ("embedding.word_embeddings.weight", "output_layer.weight")


@dataclass(frozen=True, kw_only=True)
class MegatronRanks(Ranks):
    """This process among all of them, and the groups that meet inside a forward pass."""

    layouts: tuple[ParallelLayout, ...]  # of every process
    tensor_group: dist.ProcessGroup
    context_group: dist.ProcessGroup
    sequence_parallel: bool

    @property
    def layout(self) -> ParallelLayout:
        return self.layouts[self.rank]


def join_processes(megatron: MegatronConfig) -> None:
    """Make megatron-core's process groups, once in a process."""
    megatron_core.install()
    join_alone()
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


def ranks_of(family: Family, megatron: MegatronConfig) -> MegatronRanks:
    """All processes, each of which makes this call, and which part of the model is whose."""
    layout = own_layout(family, megatron)
    rank, number = dist.get_rank(), dist.get_world_size()
    layouts = tuple(Ranks(rank=rank, number=number).everybodys(layout))
    tensor_group = _group(parallel_state.get_tensor_model_parallel_group())
    context_group = _group(parallel_state.get_context_parallel_group())
    has_copied_head = family.has_tied_head and layout.pp > 1

    def is_partial(name: str) -> bool:
        """Whether tensor-parallel ranks each have a part of the gradient of a parameter that they all hold."""
        if "q_layernorm" in name or "k_layernorm" in name:
            return True  # of its own heads
        return megatron.sequence_parallel and ("layernorm" in name or ".router." in name)  # of its own tokens

    def counts(name: str) -> bool:
        return not (has_copied_head and name == "output_layer.weight") and rank in owners(name, layouts)

    sums = [
        (parallel_state.get_data_parallel_group(with_context_parallel=True), lambda name: not _is_experts(name)),
        (parallel_state.get_expert_data_parallel_group(), _is_experts),
        (tensor_group, is_partial),
    ]
    if has_copied_head and layout.pp_rank in (0, layout.pp - 1):
        sums.append((parallel_state.get_embedding_group(), _TIED.__contains__))
    return MegatronRanks(
        rank=rank,
        number=number,
        data_share=DataShare(
            index=parallel_state.get_data_parallel_rank(),
            number=parallel_state.get_data_parallel_world_size(),
            meets="tokens" if _shares_experts() else "never",
        ),
        reports=layout.pp_rank == layout.pp - 1 and layout.tp_rank == 0 and context_group.rank() == 0,
        gradient_sums=tuple((_group(group), includes) for group, includes in sums),
        counts=counts,
        layouts=layouts,
        tensor_group=tensor_group,
        context_group=context_group,
        sequence_parallel=megatron.sequence_parallel,
    )


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


def _shares_experts() -> bool:
    """Whether ranks share experts, or an expert: they then exchange tokens in every forward pass."""
    return _group(parallel_state.get_expert_tensor_and_model_parallel_group()).size() > 1


def _is_experts(name: str) -> bool:
    return "local_experts" in name


def _group(found: Any) -> dist.ProcessGroup:
    """One of megatron-core's groups, which this process is in."""
    assert isinstance(found, dist.ProcessGroup), found
    return found
