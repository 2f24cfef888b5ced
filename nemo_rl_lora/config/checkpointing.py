"""`checkpointing`: where checkpoints go, which are kept, and where a run continues from. No file is touched
here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from nemo_rl_lora.config.base import NOT_BLANK, Section, matching

_WALL_CLOCK = r"(\d+):([01]?\d|2[0-3]):([0-5]?\d):([0-5]?\d)"
_WALL_CLOCK_RULE = "must be dd:hh:mm:ss. Write '00:03:45:00' for 3 hours and 45 minutes."
_METRIC_RULE = (
    "must start with 'train:', 'val:' or 'eval:'. Write 'val:accuracy', 'train:reward' or 'eval:gsm8k/accuracy', for "
    "example."
)


class CheckpointingConfig(Section):
    enabled: bool = True
    """Save checkpoints. Without them a run cannot continue, and leaves no adapter behind."""

    checkpoint_dir: Annotated[
        str, matching(NOT_BLANK, "is empty. Name a directory, or set checkpointing.enabled=false.")
    ] = "results"
    """The directory of the run's checkpoints, `step_N` each. A run with another configuration needs another
    one."""

    metric_name: Annotated[str, matching("(train|val|eval):.+", _METRIC_RULE)] | None = None
    """What `keep_top_k` ranks by: `train:<metric>`, `val:<metric>` or, of an evaluation, `eval:<name>/<metric>`, such
    as `val:accuracy`, `train:reward` or `eval:gsm8k/accuracy`. null ranks by step."""

    higher_is_better: bool = True
    """Whether a larger `metric_name` is the better one."""

    keep_top_k: Annotated[int, Field(ge=1)] | None = None
    """How many checkpoints to keep. The newest is always kept, so that the run can continue. null keeps
    all."""

    save_period: Annotated[int, Field(ge=0)] = 10
    """Save every this many steps; 0 saves only at the end (and where `save_epochs` says)."""

    save_epochs: bool | Annotated[int, Field(ge=1)] = False
    """Save at the end of every epoch (true), or of every this many epochs."""

    checkpoint_must_save_by: Annotated[str, matching(_WALL_CLOCK, _WALL_CLOCK_RULE)] | None = None
    """`dd:hh:mm:ss` of wall clock since the start: save and stop before it has passed, counting one more step
    and the save itself. For queues that end a job without warning."""

    save_optimizer: bool = True
    """Save the optimizer state. A checkpoint without it cannot be continued, only used."""

    load_path: Annotated[str, matching(NOT_BLANK, "is empty. Write auto, none, or a directory.")] = "auto"
    """Where to continue from: `auto` (the newest complete step of `checkpoint_dir`, or the start), `none`
    (the start; steps of an earlier run are set aside), or the directory of a step or of a run."""

    on_damage: Literal["stop", "previous"] = "stop"
    """When a file of the step to continue from is damaged: `stop`, or continue from the `previous` undamaged step. No
    NeMo RL key."""

    @model_validator(mode="after")
    def _deadline_needs_checkpoints(self) -> CheckpointingConfig:
        if self.checkpoint_must_save_by is not None and not self.enabled:
            raise ValueError(
                f"checkpoint_must_save_by={self.checkpoint_must_save_by!r}: needs "
                "checkpointing.enabled=true. Enable checkpointing, or set it to null."
            )
        return self

    @property
    def must_save_by_seconds(self) -> float | None:
        """`checkpoint_must_save_by` in seconds."""
        if self.checkpoint_must_save_by is None:
            return None
        days, hours, minutes, seconds = (int(part) for part in self.checkpoint_must_save_by.split(":"))
        return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
