"""Settings of supervised fine-tuning: its length, its validation and which tokens it learns."""

from __future__ import annotations

from pydantic import Field

from nemo_rl_lora.config.base import Section


class SftConfig(Section):
    """The SFT loop."""

    max_num_epochs: int = Field(default=1, ge=1)
    """Passes over the training data."""
    max_num_steps: int = Field(default=60, ge=1)
    """Optimizer steps; the run ends at whichever of the two limits comes first."""
    val_period: int = Field(default=10, ge=0)
    """Steps between validations; 0 for none."""
    val_batches: int = Field(default=8, ge=0)
    """Batches of a validation; 0 for the whole validation set."""
    val_global_batch_size: int = Field(default=32, ge=1)
    """Rows of a validation batch."""
    val_micro_batch_size: int = Field(default=1, ge=1)
    """Rows of a validation forward pass."""
    val_at_start: bool = True
    """Validate before the first step."""
    val_at_end: bool = False
    """Validate after the last step."""
    seed: int = Field(default=42, ge=0)
    """Seed of every draw of the run."""
    only_unmask_final: bool = False
    """Learn the last assistant message only; false learns all of them."""
