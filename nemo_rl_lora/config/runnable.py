"""What this version cannot run, though the configuration is valid. Asked by `--plan` and by every start.

It reads the configuration, and of the machine only whether there is a GPU; no model.
"""

from __future__ import annotations

from nemo_rl_lora.config.generation import chosen_engine
from nemo_rl_lora.config.idle import unused_key_problems
from nemo_rl_lora.config.master import MasterConfig
from nemo_rl_lora.config.megatron_rules import megatron_problems


def check_runnable(config: MasterConfig) -> list[str]:
    """One paragraph for each setting that this version cannot run; empty where it can."""
    return [
        *_backend_problems(config),
        *_world_problems(config),
        *_engine_problems(config),
        *unused_key_problems(config),
    ]


def _backend_problems(config: MasterConfig) -> list[str]:
    return megatron_problems(config) if config.policy.active_backend == "megatron" else []


def _engine_problems(config: MasterConfig) -> list[str]:
    generation = config.policy.generation
    if generation is None or generation.colocated.enabled or chosen_engine(generation.backend)[0] == "vllm":
        return []
    return [
        f"policy.generation.colocated.enabled=False: only vLLM runs in a process of its own, and "
        f"policy.generation.backend={generation.backend!r}. Set policy.generation.backend=vllm, or "
        f"policy.generation.colocated.enabled=true."
    ]


def _world_problems(config: MasterConfig) -> list[str]:
    problems = []
    cluster, parallel = config.cluster, config.policy.dtensor_cfg
    if cluster.num_nodes > 1:
        problems.append(
            f"cluster.num_nodes={cluster.num_nodes}: this version trains on one node. Set cluster.num_nodes=1."
        )
    if config.policy.active_backend != "dtensor":
        return problems
    if cluster.gpus_per_node > 1:
        problems.append(
            f"cluster.gpus_per_node={cluster.gpus_per_node}: the DTensor backend of this version trains in one "
            f"process. Set cluster.gpus_per_node=1, or policy.backend=megatron."
        )
    for key in ("tensor_parallel_size", "context_parallel_size", "dp_replicate_size"):
        size = getattr(parallel, key)
        if size > 1:
            problems.append(
                f"policy.dtensor_cfg.{key}={size}: this version trains in one process. Set policy.dtensor_cfg.{key}=1."
            )
    if parallel.sequence_parallel:
        problems.append(
            "policy.dtensor_cfg.sequence_parallel=True: it shards activations between tensor-parallel ranks, and this "
            "version has one. Set policy.dtensor_cfg.sequence_parallel=false."
        )
    return problems
