"""What this version cannot run, though the configuration is valid. Asked by `--plan` and by every start.

It reads the configuration, and of the machine only whether there is a GPU; no model.
"""

from __future__ import annotations

from nemo_rl_lora.config.generation import chosen_engine
from nemo_rl_lora.config.lora import lora_field_key, lora_spec_from_policy
from nemo_rl_lora.config.master import MasterConfig
from nemo_rl_lora.config.optimizer_settings import (
    megatron_peak_lr,
    megatron_schedule_is_in_force,
    weight_decay_schedule_is_in_force,
)
from nemo_rl_lora.config.unused_keys import unused_key_problems

_KEY = "policy.megatron_cfg"


def check_runnable(config: MasterConfig) -> list[str]:
    """One paragraph for each setting that this version cannot run; empty where it can."""
    return [
        *(megatron_problems(config) if config.policy.active_backend == "megatron" else []),
        *_world_problems(config),
        *_engine_problems(config),
        *unused_key_problems(config),
    ]


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


def megatron_problems(config: MasterConfig) -> list[str]:
    """A paragraph for each value of `policy.megatron_cfg` that this backend does not run."""
    return [
        *_balancing_problems(config),
        *_sequence_problems(config),
        *_context_problems(config),
        *_schedule_problems(config),
        *_a2a_problems(config),
    ]


def _balancing_problems(config: MasterConfig) -> list[str]:
    key, kind = f"{_KEY}.moe_router_load_balancing_type", config.policy.megatron_cfg.moe_router_load_balancing_type
    if kind == "none" or not config.is_set(key):
        return []
    return [f"{key}={kind!r}: the Megatron backend of this version has no such setting. Remove the change."]


def _sequence_problems(config: MasterConfig) -> list[str]:
    sizes = config.policy.megatron_cfg
    if not sizes.sequence_parallel or sizes.tensor_model_parallel_size > 1:
        return []
    return [
        f"{_KEY}.sequence_parallel=True: it shards activations between tensor-parallel ranks, and there is one. Set "
        f"{_KEY}.sequence_parallel=false."
    ]


def _context_problems(config: MasterConfig) -> list[str]:
    size = config.policy.megatron_cfg.context_parallel_size
    if size == 1 or config.policy.shared_prefix.enabled is not True:
        return []
    return [
        f"policy.shared_prefix.enabled=True: {size} context-parallel ranks share each sequence, and a prompt does not "
        f"split with it. Set policy.shared_prefix.enabled=auto, or {_KEY}.context_parallel_size=1."
    ]


def _schedule_problems(config: MasterConfig) -> list[str]:
    megatron = config.policy.megatron_cfg
    scheduler, key = megatron.scheduler, f"{_KEY}.scheduler"
    varies = (
        scheduler.start_weight_decay != scheduler.end_weight_decay or scheduler.weight_decay_incr_style != "constant"
    )
    problems = []
    if weight_decay_schedule_is_in_force(config.layers) and varies:
        problems.append(
            f"{key}.end_weight_decay={scheduler.end_weight_decay}: weight decay is constant here, and it starts at "
            f"{scheduler.start_weight_decay} ({scheduler.weight_decay_incr_style}). Set both to one value and "
            f"{key}.weight_decay_incr_style=constant."
        )
    if not megatron_schedule_is_in_force(config.layers):
        return problems
    style, warmup, end = scheduler.lr_decay_style, scheduler.lr_warmup_iters, scheduler.lr_decay_iters
    peak = megatron_peak_lr(config, lora=lora_spec_from_policy(config.policy) is not None)
    if style == "WSD":
        problems.append(
            f"{key}.lr_decay_style='WSD': no key says how long its decay is. Use "
            "policy.scheduler={name: wsd, ...} and leave the Megatron schedule as it is."
        )
    elif style != "constant" and (end is None or end <= warmup):
        problems.append(
            f"{key}.lr_decay_iters={end}: the {style} schedule has to end after its warm-up of {warmup} steps. "
            f"Set it to the number of optimizer steps."
        )
    if style != "constant" and megatron.optimizer.min_lr > peak:
        problems.append(
            f"{_KEY}.optimizer.min_lr={megatron.optimizer.min_lr}: is where the learning rate of {peak} decays to. "
            f"Lower it to {peak} or less."
        )
    if warmup and scheduler.lr_warmup_init > peak and config.is_set(f"{key}.lr_warmup_init"):
        problems.append(
            f"{key}.lr_warmup_init={scheduler.lr_warmup_init}: is where the warm-up to the learning rate of {peak} "
            f"starts. Lower it to {peak} or less."
        )
    return problems


def _a2a_problems(config: MasterConfig) -> list[str]:
    policy, spec = config.policy, lora_spec_from_policy(config.policy)
    if spec is None or not spec.a2a:
        return []
    key = lora_field_key(policy, "a2a")
    sizes = policy.megatron_cfg
    if sizes.sequence_parallel and sizes.tensor_model_parallel_size > 1:
        return []
    return [
        f"{key}=True: one all-to-all replaces a gather between tensor-parallel ranks that share the sequence, and "
        f"there are {sizes.tensor_model_parallel_size} with {_KEY}.sequence_parallel={sizes.sequence_parallel}. "
        f"Set it to false."
    ]
