"""What AdamW is run with, on either backend, whichever keys it came from. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from nemo_rl_lora.config.optimizer import lr_factor
from nemo_rl_lora.config.policy import PolicyConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamSettings:
    """AdamW and its schedules. Steps count from 0."""

    lr_at: Callable[[int], float]
    weight_decay_at: Callable[[int], float]
    betas: tuple[float, float]
    eps: float
    max_grad_norm: float | None  # None: gradients are not clipped
    foreach: bool | None = None
    fused: bool | None = None


def adam_settings(policy: PolicyConfig, *, lora: bool) -> AdamSettings:
    """What `policy.optimizer` and `policy.scheduler` say, for a run with or without an adapter."""
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


def _scheduled_lr(policy: PolicyConfig, peak: float, step: int) -> float:
    return peak * lr_factor(policy.scheduler, step, lr=peak)


def constant(value: float, _step: int) -> float:
    """A schedule that stays where it is."""
    return value
