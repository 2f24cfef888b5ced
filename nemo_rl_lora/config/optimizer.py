"""The optimizer and the learning-rate schedule, in NeMo RL's list form and in a short form of our own.

`lr_factor` is a pure function of the step, so that a resumed run needs no scheduler state. Steps are those of the run
(in GRPO rollouts, however many optimizer steps each has), and count from 0.
This module holds no optimizer and imports no torch.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from nemo_rl_lora.config.base import Section

_TORCH = "torch.optim.lr_scheduler."


class AdamWKwargs(Section):
    """Arguments of torch.optim.AdamW."""

    lr: float = Field(default=5e-6, ge=0, allow_inf_nan=False)
    """Peak learning rate; the scheduler multiplies it."""
    weight_decay: float = Field(default=0.01, ge=0, allow_inf_nan=False)
    """Decoupled weight decay."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay rates of the first and second moment."""
    eps: float = Field(default=1e-8, gt=0, allow_inf_nan=False)
    """Added to the root of the second moment."""
    foreach: bool | None = None
    """Use torch's multi-tensor implementation; null for the fused one on a GPU, and elsewhere torch's choice."""
    fused: bool | None = None
    """Use torch's fused implementation; null for true on a GPU, unless foreach is true."""

    @model_validator(mode="after")
    def _one_implementation(self) -> AdamWKwargs:
        if self.foreach and self.fused:
            raise ValueError(
                "fused=True: AdamW runs either fused or foreach, and both are true. Set one of the two to false."
            )
        return self


class OptimizerConfig(Section):
    """Which optimizer trains the adapter (or, without LoRA, all weights)."""

    kwargs: AdamWKwargs = AdamWKwargs()
    """Its arguments."""
    full_finetuning_lr: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Learning rate in place of `kwargs.lr` when no LoRA block is on, since full fine-tuning wants far less than an
    adapter; null uses `kwargs.lr` for both. No NeMo RL key."""

    def learning_rate(self, *, lora: bool) -> float:
        """The peak learning rate of a run with or without an adapter."""
        if lora or self.full_finetuning_lr is None:
            return self.kwargs.lr
        return self.full_finetuning_lr


class ShortScheduler(Section):
    """Warm-up and one shape, by name. No NeMo RL key."""

    name: Literal["constant", "linear", "cosine", "wsd"]
    """constant; linear or cosine decay from the end of the warm-up to `total_steps`; wsd: warm-up, stable, then a
    linear decay over the last `decay_steps` of `total_steps`."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up: step s takes (s + 1) / warmup_steps of the learning rate."""
    decay_steps: int | None = Field(default=None, ge=1)
    """Length of the decay of wsd; null for the others."""
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    """What remains of the learning rate from `total_steps` on, as a share of its peak; 0 for constant."""
    total_steps: int | None = Field(default=None, ge=1)
    """Step at which the decay ends; null for constant."""

    @model_validator(mode="after")
    def _fields_fit_the_name(self) -> ShortScheduler:
        if self.name == "constant":
            for key, unset in (("total_steps", None), ("decay_steps", None), ("min_lr_ratio", 0.0)):
                if getattr(self, key) != unset:
                    raise ValueError(
                        f"{key}={getattr(self, key)!r}: has no meaning for the constant scheduler. Leave it out, or "
                        "choose linear, cosine or wsd."
                    )
            return self
        if self.total_steps is None:
            raise ValueError(
                f"total_steps=None: the {self.name} scheduler has to know where its decay ends. Set it to the number "
                "of the run's steps."
            )
        if self.name == "wsd" and self.decay_steps is None:
            raise ValueError("decay_steps=None: wsd has to know how long its decay is. Set a number of steps.")
        if self.name != "wsd" and self.decay_steps is not None:
            raise ValueError(
                f"decay_steps={self.decay_steps}: the {self.name} scheduler decays from the end of the warm-up to "
                "total_steps. Leave decay_steps out, or choose wsd."
            )
        if self.total_steps < self.warmup_steps + (self.decay_steps or 1):
            raise ValueError(
                f"total_steps={self.total_steps}: warm-up ({self.warmup_steps} steps) and decay "
                f"({self.decay_steps or 1} or more) do not fit. Raise total_steps or shorten the two."
            )
        return self


class LinearLRKwargs(Section):
    """Arguments of torch's LinearLR."""

    start_factor: float = Field(default=1 / 3, gt=0, le=1)
    """Factor at step 0."""
    end_factor: float = Field(default=1.0, ge=0, le=1)
    """Factor from `total_iters` on."""
    total_iters: int = Field(default=5, ge=1)
    """Steps from one to the other."""


class ConstantLRKwargs(Section):
    """Arguments of torch's ConstantLR."""

    factor: float = Field(default=1 / 3, ge=0, le=1)
    """Factor until `total_iters`; 1 from there on."""
    total_iters: int = Field(default=5, ge=0)
    """Steps for which the factor holds."""


class CosineAnnealingLRKwargs(Section):
    """Arguments of torch's CosineAnnealingLR."""

    T_max: int = Field(ge=1)
    """Steps of half a period."""
    eta_min: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """The lowest learning rate: an absolute value."""


class LinearLR(Section):
    """torch's LinearLR."""

    name: Literal["torch.optim.lr_scheduler.LinearLR"]
    """Dotted path of the class."""
    kwargs: LinearLRKwargs = LinearLRKwargs()
    """Its arguments."""


class ConstantLR(Section):
    """torch's ConstantLR."""

    name: Literal["torch.optim.lr_scheduler.ConstantLR"]
    """Dotted path of the class."""
    kwargs: ConstantLRKwargs = ConstantLRKwargs()
    """Its arguments."""


class CosineAnnealingLR(Section):
    """torch's CosineAnnealingLR."""

    name: Literal["torch.optim.lr_scheduler.CosineAnnealingLR"]
    """Dotted path of the class."""
    kwargs: CosineAnnealingLRKwargs
    """Its arguments."""


class Milestones(Section):
    """The steps at which each scheduler of the list hands over to the next."""

    milestones: tuple[Annotated[int, Field(ge=1)], ...]
    """One less than there are schedulers, ascending."""


TorchScheduler = Annotated[LinearLR | ConstantLR | CosineAnnealingLR, Field(discriminator="name")]


def _item_form(item: Any) -> str:
    """Which element of the list form this is."""
    is_milestones = isinstance(item, Milestones) or (isinstance(item, dict) and "milestones" in item)
    return "milestones" if is_milestones else "scheduler"


def _scheduler_form(value: Any) -> str:
    """Which of the three forms a scheduler is written in."""
    if isinstance(value, (list, tuple)):
        return "sequence"
    if isinstance(value, ShortScheduler):
        return "short"
    if isinstance(value, Section):
        return "single"
    return "single" if isinstance(value, dict) and str(value.get("name")).startswith(_TORCH) else "short"


SchedulerConfig = Annotated[
    Annotated[ShortScheduler, Tag("short")]
    | Annotated[TorchScheduler, Tag("single")]
    | Annotated[
        tuple[
            Annotated[
                Annotated[TorchScheduler, Tag("scheduler")] | Annotated[Milestones, Tag("milestones")],
                Discriminator(_item_form),
            ],
            ...,
        ],
        Tag("sequence"),
    ],
    Discriminator(_scheduler_form),
]
"""`{name: cosine, ...}`, one torch scheduler `{name, kwargs}`, or NeMo RL's list of them with its milestones."""

AnyScheduler = ShortScheduler | TorchScheduler | tuple[TorchScheduler | Milestones, ...]


def split_sequence(
    items: tuple[TorchScheduler | Milestones, ...],
) -> tuple[tuple[TorchScheduler, ...], tuple[int, ...]]:
    """The schedulers and the milestones of the list form. ValueError where they do not fit together."""
    schedulers = tuple(item for item in items if not isinstance(item, Milestones))
    milestones = tuple(step for item in items if isinstance(item, Milestones) for step in item.milestones)
    if not schedulers:
        raise ValueError("names no scheduler. Add one, or set policy.scheduler=null.")
    if len(milestones) != len(schedulers) - 1:
        raise ValueError(
            f"{len(schedulers)} schedulers need {len(schedulers) - 1} milestones, and there are {len(milestones)}. "
            "Give the step at which each hands over to the next."
        )
    if any(later <= earlier for earlier, later in pairwise(milestones)):
        raise ValueError(f"milestones {list(milestones)} have to ascend. Sort them.")
    return schedulers, milestones


def lr_factor(scheduler: AnyScheduler | None, step: int, *, lr: float | None = None) -> float:
    """What the peak learning rate is multiplied with at this step; 1.0 without a scheduler.

    `lr` is the peak; only CosineAnnealingLR with an absolute `eta_min` other than 0 needs it.
    """
    if scheduler is None:
        return 1.0
    if isinstance(scheduler, ShortScheduler):
        return _short_factor(scheduler, step)
    if isinstance(scheduler, tuple):
        schedulers, milestones = split_sequence(scheduler)
        index = bisect_right(milestones, step)
        return lr_factor(schedulers[index], step - (milestones[index - 1] if index else 0), lr=lr)
    kwargs = scheduler.kwargs
    if isinstance(kwargs, LinearLRKwargs):
        progress = min(step, kwargs.total_iters) / kwargs.total_iters
        return kwargs.start_factor + (kwargs.end_factor - kwargs.start_factor) * progress
    if isinstance(kwargs, ConstantLRKwargs):
        return kwargs.factor if step < kwargs.total_iters else 1.0
    floor = 0.0
    if kwargs.eta_min:
        assert lr is not None, "eta_min is an absolute value and needs the peak learning rate"
        floor = kwargs.eta_min / lr if lr else 0.0
    return floor + (1 - floor) * (1 + math.cos(math.pi * step / kwargs.T_max)) / 2


def _short_factor(scheduler: ShortScheduler, step: int) -> float:
    """The short form: warm-up, then the shape of the name."""
    if step < scheduler.warmup_steps:
        return (step + 1) / scheduler.warmup_steps
    if scheduler.name == "constant" or scheduler.total_steps is None:
        return 1.0
    length = scheduler.decay_steps or scheduler.total_steps - scheduler.warmup_steps
    progress = min(max(step - (scheduler.total_steps - length), 0) / length, 1.0)
    remaining = (1 + math.cos(math.pi * progress)) / 2 if scheduler.name == "cosine" else 1 - progress
    return scheduler.min_lr_ratio + (1 - scheduler.min_lr_ratio) * remaining
