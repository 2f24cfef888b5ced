"""What of `policy.megatron_cfg` is refused when Megatron trains: a key that the user set and the backend does not read,
and values that do not fit together. What AdamW gets of it is in config/adam.py."""

from __future__ import annotations

from typing import Any

from nemo_rl_lora.config.adam import (
    megatron_peak_lr,
    megatron_schedule_is_in_force,
    weight_decay_schedule_is_in_force,
)
from nemo_rl_lora.config.errors import show
from nemo_rl_lora.config.lora import lora_block_key, lora_spec_from_policy
from nemo_rl_lora.config.master import MasterConfig
from nemo_rl_lora.config.megatron import MegatronSchedulerConfig
from nemo_rl_lora.config.tree import lookup

_KEY = "policy.megatron_cfg"
_OPTIMIZER_KEYS = ("lr", "min_lr", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "clip_grad")
_READ = (
    "tensor_model_parallel_size",
    "expert_tensor_parallel_size",
    "expert_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "sequence_parallel",
    *(f"optimizer.{key}" for key in _OPTIMIZER_KEYS),
    *(f"scheduler.{key}" for key in MegatronSchedulerConfig.model_fields),
    "activation_checkpointing",
    "freeze_moe_router",
    "fused_linear_logprobs_chunk_size",
    "moe_router_dtype",
    "moe_token_dispatcher_type",
)
_DONE_ANYWAY: dict[str, tuple[Any, ...]] = {
    "use_fused_linear_logprobs": (True,),  # the head always runs in chunks, with its gradient
    "force_reconvert_from_hf": (True,),  # weights are always read from the Hugging Face files
    "apply_rope_fusion": (False,),
    "bias_activation_fusion": (False,),
    "moe_permute_fusion": (False,),
    "moe_router_load_balancing_type": ("none",),
    "optimizer.use_distributed_optimizer": (False, "auto"),
}
"""Other values of a key that are what this backend does anyway."""


def megatron_problems(config: MasterConfig) -> list[str]:
    """A paragraph for each value of `policy.megatron_cfg` that this backend does not run."""
    section = config.policy.megatron_cfg.model_dump(by_alias=True)
    problems = []
    for key in (key.removeprefix(f"{_KEY}.") for key in config.layers.set_keys(_KEY)):
        (value,) = lookup(section, key.split(".")) or (None,)
        if not (key.startswith("peft.") or key == "enabled" or key in _READ or value in _DONE_ANYWAY.get(key, ())):
            problems.append(
                f"{_KEY}.{key}={show(value)}: the Megatron backend of this version has no such setting. Remove the "
                "change."
            )
    return [
        *problems,
        *_sequence_problems(config),
        *_context_problems(config),
        *_schedule_problems(config),
        *_a2a_problems(config),
    ]


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
    block = lora_block_key(policy)
    key = f"{block}.{'a2a' if block.endswith('.lora') else 'a2a_experimental'}"
    sizes = policy.megatron_cfg
    if sizes.sequence_parallel and sizes.tensor_model_parallel_size > 1:
        return []
    return [
        f"{key}=True: one all-to-all replaces a gather between tensor-parallel ranks that share the sequence, and "
        f"there are {sizes.tensor_model_parallel_size} with {_KEY}.sequence_parallel={sizes.sequence_parallel}. "
        f"Set it to false."
    ]
