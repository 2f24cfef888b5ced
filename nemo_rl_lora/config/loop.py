"""What the loops of all algorithms have in common: how long they are, and when they validate."""

from __future__ import annotations

from pydantic import Field

from nemo_rl_lora.config.base import Section


class LoopConfig(Section):
    """A training loop. An algorithm's section inherits it, and sets the defaults that are its own."""

    max_num_epochs: int = Field(default=1, ge=1)
    """Passes over the training data; the run ends at this or at max_num_steps, whichever comes first."""
    max_num_steps: int = Field(default=60, ge=1)
    """Steps of the run: optimizer steps, or rollouts in GRPO."""
    max_num_tokens: int | None = Field(default=None, ge=1)
    """The run ends too at the first step at which its tokens (the sum of `total_num_tokens`) are so many. No NeMo RL
    key."""
    val_period: int = Field(default=10, ge=-1)
    """Validate every so many steps; 0 or -1: never on the way."""
    val_at_start: bool = True
    """Validate before the first step."""
    val_at_end: bool = False
    """Validate after the last step."""
    seed: int = Field(default=42, ge=0)
    """Seed of every draw of the run."""


class TuningConfig(LoopConfig):
    """The loop of an algorithm that learns rows of data: SFT and DPO, whose rows are pairs."""

    val_batches: int = Field(default=8, ge=0)
    """Batches of a validation; 0 for the whole validation set."""
    val_global_batch_size: int = Field(default=32, ge=1)
    """Rows (DPO: pairs) of a validation batch."""
    val_micro_batch_size: int = Field(default=1, ge=1)
    """Rows (DPO: pairs) of a validation forward pass."""
