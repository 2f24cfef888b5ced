"""What AdamW is run with, on either backend, whichever keys it came from. No torch.

The DTensor backend has `policy.optimizer`, `policy.scheduler` and `policy.max_grad_norm`. On Megatron each of lr,
weight decay, the two betas, eps, the clip and the schedule as a whole has a key there and one in
`policy.megatron_cfg`: the one that the later layer wrote is in force (config/layers.py), and in one layer Megatron's.
Where `policy.optimizer` is null Megatron's are, and so is its schedule where `policy.scheduler` is null too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from nemo_rl_lora.config.layers import SET_BY, Layers, layers_from_record
from nemo_rl_lora.config.lora import LoraCfg, PeftCfg, UnifiedLora
from nemo_rl_lora.config.master import GrpoMaster, MasterConfig
from nemo_rl_lora.config.megatron import MegatronSchedulerConfig
from nemo_rl_lora.config.optimizer import OptimizerConfig, lr_factor
from nemo_rl_lora.config.policy import PolicyConfig
from nemo_rl_lora.config.refused_keys import take_out
from nemo_rl_lora.config.tree import flatten

_KWARGS = "policy.optimizer.kwargs"
_MEGATRON = "policy.megatron_cfg"
LR, FULL_LR, MEGATRON_LR = f"{_KWARGS}.lr", "policy.optimizer.full_finetuning_lr", f"{_MEGATRON}.optimizer.lr"
WEIGHT_DECAY, MEGATRON_WEIGHT_DECAY = f"{_KWARGS}.weight_decay", f"{_MEGATRON}.optimizer.weight_decay"
WEIGHT_DECAY_SCHEDULE = tuple(
    f"{_MEGATRON}.scheduler.{key}" for key in ("end_weight_decay", "start_weight_decay", "weight_decay_incr_style")
)
SCHEDULE = "policy.scheduler"
MEGATRON_SCHEDULE = (
    *(
        f"{_MEGATRON}.scheduler.{key}"
        for key in ("lr_decay_style", "lr_decay_iters", "lr_warmup_iters", "lr_warmup_init")
    ),
    f"{_MEGATRON}.optimizer.min_lr",
)
BETAS, MEGATRON_BETAS = f"{_KWARGS}.betas", tuple(f"{_MEGATRON}.optimizer.adam_beta{i}" for i in (1, 2))
EPS, MEGATRON_EPS = f"{_KWARGS}.eps", f"{_MEGATRON}.optimizer.adam_eps"
CLIP, MEGATRON_CLIP = "policy.max_grad_norm", f"{_MEGATRON}.optimizer.clip_grad"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamSettings:
    """AdamW and its schedules, by the steps of the run, which in GRPO are rollouts. They count from 0."""

    lr_at: Callable[[int], float]
    weight_decay_at: Callable[[int], float]
    betas: tuple[float, float]
    eps: float
    max_grad_norm: float | None  # None: gradients are not clipped
    foreach: bool | None = None
    fused: bool | None = None


def adam_settings(policy: PolicyConfig, *, lora: bool) -> AdamSettings:
    """What `policy.optimizer` and `policy.scheduler` say, for a run with or without an adapter."""
    assert policy.optimizer is not None, "checked by PolicyConfig"
    kwargs = policy.optimizer.kwargs
    return AdamSettings(
        lr_at=partial(_scheduled_lr, policy, policy.optimizer.learning_rate(lora=lora)),
        weight_decay_at=partial(constant, kwargs.weight_decay),
        betas=kwargs.betas,
        eps=kwargs.eps,
        max_grad_norm=policy.max_grad_norm,
        foreach=kwargs.foreach,
        fused=kwargs.fused,
    )


def megatron_adam_settings(config: MasterConfig, *, lora: bool) -> AdamSettings:
    """AdamW of a run on Megatron. The configuration has no megatron_problems."""
    policy, megatron = config.policy, config.policy.megatron_cfg
    kwargs, optimizer = (policy.optimizer or OptimizerConfig()).kwargs, megatron.optimizer
    wins = partial(_wins, config.layers, alone=policy.optimizer is None)
    first, second = kwargs.betas
    weight_decay = optimizer.weight_decay if wins(MEGATRON_WEIGHT_DECAY, WEIGHT_DECAY) else kwargs.weight_decay
    if weight_decay_schedule_is_in_force(config.layers):
        weight_decay = megatron.scheduler.end_weight_decay
    peak = megatron_peak_lr(config, lora=lora)
    lr_at = partial(_scheduled_lr, policy, peak)
    if megatron_schedule_is_in_force(config):
        lr_at = partial(megatron_lr, megatron.scheduler, peak, optimizer.min_lr)
    return AdamSettings(
        lr_at=lr_at,
        weight_decay_at=partial(constant, weight_decay),
        betas=(
            optimizer.adam_beta1 if wins(MEGATRON_BETAS[0], BETAS) else first,
            optimizer.adam_beta2 if wins(MEGATRON_BETAS[1], BETAS) else second,
        ),
        eps=optimizer.adam_eps if wins(MEGATRON_EPS, EPS) else kwargs.eps,
        max_grad_norm=(optimizer.clip_grad or None)
        if _wins(config.layers, MEGATRON_CLIP, CLIP)
        else policy.max_grad_norm,
        foreach=kwargs.foreach,
        fused=kwargs.fused,
    )


def peak_lr(config: MasterConfig, *, lora: bool) -> float:
    """The peak learning rate of a run, on either backend."""
    if config.policy.active_backend == "megatron":
        return megatron_peak_lr(config, lora=lora)
    assert config.policy.optimizer is not None, "checked by PolicyConfig"
    return config.policy.optimizer.learning_rate(lora=lora)


def megatron_peak_lr(config: MasterConfig, *, lora: bool) -> float:
    """The peak learning rate of a run on Megatron."""
    optimizer = config.policy.optimizer
    if optimizer is None:
        return config.policy.megatron_cfg.optimizer.lr
    ours = LR if lora or optimizer.full_finetuning_lr is None else FULL_LR
    if _wins(config.layers, MEGATRON_LR, ours):
        return config.policy.megatron_cfg.optimizer.lr
    return optimizer.learning_rate(lora=lora)


def megatron_schedule_is_in_force(config: MasterConfig) -> bool:
    """Whether, on Megatron, the learning rate follows Megatron's own schedule: all of its keys or none."""
    alone = config.policy.optimizer is None and config.policy.scheduler is None
    return _wins(config.layers, MEGATRON_SCHEDULE, SCHEDULE, alone=alone)


def weight_decay_schedule_is_in_force(layers: Layers) -> bool:
    """Whether, on Megatron, weight decay is that of `policy.megatron_cfg.scheduler`."""
    return _wins(layers, WEIGHT_DECAY_SCHEDULE, (WEIGHT_DECAY, MEGATRON_WEIGHT_DECAY))


def _wins(layers: Layers, theirs: str | Sequence[str], ours: str | Sequence[str], *, alone: bool = False) -> bool:
    """Whether the later layer, or the same one, wrote Megatron's keys for a thing, or there are no others (`alone`)."""
    return alone or _layer(layers, theirs) >= _layer(layers, ours)


def _layer(layers: Layers, keys: str | Sequence[str]) -> int:
    return max(layers.layer_of(key) for key in ([keys] if isinstance(keys, str) else keys))


def megatron_lr(scheduler: MegatronSchedulerConfig, lr: float, min_lr: float, step: int) -> float:
    """The learning rate of a step, counted from 0, as megatron-core's OptimizerParamScheduler has it.

    A warm-up does not start above the peak: one that was inherited for a larger learning rate starts at the peak.
    """
    warmup, end = scheduler.lr_warmup_iters, scheduler.lr_decay_iters
    if warmup and step <= warmup:
        start = min(scheduler.lr_warmup_init, lr)
        return start + (lr - start) * step / warmup
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


def _scheduled_lr(policy: PolicyConfig, peak: float, step: int) -> float:
    return peak * lr_factor(policy.scheduler, step, lr=peak)


def constant(value: float, _step: int) -> float:
    """A schedule that stays where it is."""
    return value


def effective_values(tree: Mapping[str, Any], written_now: Layers) -> dict[str, Any]:
    """A resolved configuration, as plain data, by dotted key; of keys for one thing only the one in force.

    Two configurations with equal effective values train alike, on either backend, whichever keys said so. A tree
    without a record of who set what is one of an earlier version. It is read by `written_now`, and there, in one layer,
    the policy's own keys were in force.
    """
    record = tree.get(SET_BY)
    layers = written_now if record is None else layers_from_record(record, "config.yaml")
    read, _, _ = take_out(GrpoMaster, {key: value for key, value in tree.items() if key != SET_BY})
    flat = flatten(read)
    backend = flat.get("policy.backend")
    on_megatron = backend == "megatron" if backend else bool(flat.get(f"{_MEGATRON}.enabled"))

    is_null = flat.get("policy.optimizer", ...) is None

    def wins(theirs: str | Sequence[str], ours: str | Sequence[str], *, alone: bool = is_null) -> bool:
        margin = 0 if record is not None else 1
        return on_megatron and (alone or _layer(layers, theirs) >= _layer(layers, ours) + margin)

    moved = {EPS: MEGATRON_EPS, CLIP: MEGATRON_CLIP, WEIGHT_DECAY: MEGATRON_WEIGHT_DECAY}
    changed = {
        ours: flat.get(theirs) for ours, theirs in moved.items() if wins(theirs, ours, alone=is_null and ours != CLIP)
    }
    if LR in flat or is_null:
        blocks = (UnifiedLora, PeftCfg if on_megatron else LoraCfg)
        lora = any(flat.get(f"{block.KEY}.enabled") for block in blocks)
        ours = LR if lora or flat.get(FULL_LR) is None else FULL_LR
        changed[LR] = flat.get(MEGATRON_LR if wins(MEGATRON_LR, ours) else ours)
    if wins(WEIGHT_DECAY_SCHEDULE, (WEIGHT_DECAY, MEGATRON_WEIGHT_DECAY), alone=False):
        changed[WEIGHT_DECAY] = flat.get(WEIGHT_DECAY_SCHEDULE[0])
    if BETAS in flat or is_null:
        pairs = zip(MEGATRON_BETAS, flat.get(BETAS, (None, None)), strict=True)
        changed[BETAS] = [flat.get(theirs) if wins(theirs, BETAS) else value for theirs, value in pairs]
    unused = {"policy.optimizer", FULL_LR, MEGATRON_LR, *moved.values(), *WEIGHT_DECAY_SCHEDULE, *MEGATRON_BETAS}
    if not wins(MEGATRON_SCHEDULE, SCHEDULE, alone=is_null and flat.get(SCHEDULE, 0) is None):
        unused |= set(MEGATRON_SCHEDULE)
    else:
        unused |= {key for key in flat if key == SCHEDULE or key.startswith(f"{SCHEDULE}.")}
    return {key: value for key, value in (flat | changed).items() if key not in unused}
