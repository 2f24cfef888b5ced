"""What `policy.megatron_cfg` comes to when Megatron trains: its optimizer and schedule, and what is refused.

Contract: `policy.optimizer` and `policy.scheduler` drive this backend too; a value of `policy.megatron_cfg.optimizer`
or `.scheduler` that was set explicitly (config/idle.py says when) wins here. A schedule key that was set makes the
whole schedule Megatron's. Any other changed key that the backend does not read is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from nemo_rl_lora.config.adam import AdamSettings, adam_settings, constant
from nemo_rl_lora.config.errors import show
from nemo_rl_lora.config.idle import changed_values
from nemo_rl_lora.config.lora import lora_field_key, lora_spec_from_policy
from nemo_rl_lora.config.master import MasterConfig
from nemo_rl_lora.config.megatron import MegatronSchedulerConfig

_KEY = "policy.megatron_cfg"
_SCHEDULE_KEYS = ("lr_decay_style", "lr_decay_iters", "lr_warmup_iters", "lr_warmup_init")
_WEIGHT_DECAY_KEYS = ("start_weight_decay", "end_weight_decay", "weight_decay_incr_style")
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
    *(f"scheduler.{key}" for key in (*_SCHEDULE_KEYS, *_WEIGHT_DECAY_KEYS)),
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


def megatron_adam_settings(config: MasterConfig, *, lora: bool) -> AdamSettings:
    """AdamW of a run on Megatron. The configuration has no megatron_problems."""
    settings = adam_settings(config.policy, lora=lora)
    megatron = config.policy.megatron_cfg
    optimizer, changed = megatron.optimizer, _changed(config)
    explicit: dict[str, Any] = {}
    if "optimizer.lr" in changed:
        explicit["lr_at"] = partial(_scaled, settings.lr_at, optimizer.lr / (_peak(config, lora) or 1.0))
    if any(f"scheduler.{key}" in changed for key in _SCHEDULE_KEYS):
        lr = optimizer.lr if "optimizer.lr" in changed else _peak(config, lora)
        explicit["lr_at"] = partial(megatron_lr, megatron.scheduler, lr, optimizer.min_lr)
    if any(f"scheduler.{key}" in changed for key in _WEIGHT_DECAY_KEYS):
        explicit["weight_decay_at"] = partial(constant, megatron.scheduler.end_weight_decay)
    elif "optimizer.weight_decay" in changed:
        explicit["weight_decay_at"] = partial(constant, optimizer.weight_decay)
    first, second = settings.betas
    explicit["betas"] = (
        optimizer.adam_beta1 if "optimizer.adam_beta1" in changed else first,
        optimizer.adam_beta2 if "optimizer.adam_beta2" in changed else second,
    )
    if "optimizer.adam_eps" in changed:
        explicit["eps"] = optimizer.adam_eps
    if "optimizer.clip_grad" in changed:
        explicit["max_grad_norm"] = optimizer.clip_grad or None
    return replace(settings, **explicit)


def megatron_lr(scheduler: MegatronSchedulerConfig, lr: float, min_lr: float, step: int) -> float:
    """The learning rate of a step, counted from 0, as megatron-core's OptimizerParamScheduler has it."""
    warmup, end = scheduler.lr_warmup_iters, scheduler.lr_decay_iters
    if warmup and step <= warmup:
        return scheduler.lr_warmup_init + (lr - scheduler.lr_warmup_init) * step / warmup
    if scheduler.lr_decay_style == "constant":
        return lr
    assert end is not None, "refused by megatron_problems"
    if step > end:
        return min_lr
    if scheduler.lr_decay_style == "inverse-square-root":
        return max(min_lr, lr * math.sqrt(max(warmup, 1) / max(step, 1)))
    progress = (step - warmup) / (end - warmup)
    share = 1 - progress if scheduler.lr_decay_style == "linear" else (math.cos(math.pi * progress) + 1) / 2
    return min_lr + share * (lr - min_lr)


def megatron_problems(config: MasterConfig) -> list[str]:
    """A paragraph for each changed value of `policy.megatron_cfg` that this backend does not run."""
    changed = _changed(config)
    problems = [
        f"{_KEY}.{key}={show(value)}: the Megatron backend of this version has no such setting. Remove the change."
        for key, value in changed.items()
        if not (key.startswith("peft.") or key in _READ or (key in _DONE_ANYWAY and value in _DONE_ANYWAY[key]))
    ]
    return [
        *problems,
        *_sequence_problems(config),
        *_context_problems(config),
        *_schedule_problems(config, changed),
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


def _schedule_problems(config: MasterConfig, changed: dict[str, Any]) -> list[str]:
    megatron = config.policy.megatron_cfg
    scheduler, optimizer, key = megatron.scheduler, megatron.optimizer, f"{_KEY}.scheduler"
    problems = []
    if scheduler.start_weight_decay != scheduler.end_weight_decay or scheduler.weight_decay_incr_style != "constant":
        problems.append(
            f"{key}.end_weight_decay={scheduler.end_weight_decay}: weight decay is constant here, and it starts at "
            f"{scheduler.start_weight_decay} ({scheduler.weight_decay_incr_style}). Set both to one value and "
            f"{key}.weight_decay_incr_style=constant."
        )
    if not any(f"scheduler.{name}" in changed for name in _SCHEDULE_KEYS):
        return problems
    style, warmup, end = scheduler.lr_decay_style, scheduler.lr_warmup_iters, scheduler.lr_decay_iters
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
    if style != "constant" and optimizer.min_lr > optimizer.lr:
        problems.append(
            f"{_KEY}.optimizer.min_lr={optimizer.min_lr}: is where the learning rate of {optimizer.lr} decays to. "
            f"Lower it to {optimizer.lr} or less."
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


def _changed(config: MasterConfig) -> dict[str, Any]:
    return dict(changed_values(config, config.policy.megatron_cfg, _KEY))


def _peak(config: MasterConfig, lora: bool) -> float:
    return config.policy.optimizer.learning_rate(lora=lora)


def _scaled(lr_at: Callable[[int], float], factor: float, step: int) -> float:
    return lr_at(step) * factor
