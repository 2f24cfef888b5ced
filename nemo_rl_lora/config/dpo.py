"""Settings of direct preference optimization: its length, its validation and its loss."""

from __future__ import annotations

from pydantic import Field

from nemo_rl_lora.config.base import Section


class DpoConfig(Section):
    """The DPO loop and its loss (Rafailov et al. 2023, eq. 7)."""

    max_num_epochs: int = Field(default=1, ge=1)
    """Passes over the training pairs."""
    max_num_steps: int = Field(default=150, ge=1)
    """Optimizer steps; the run ends at whichever of the two limits comes first."""
    val_period: int = Field(default=25, ge=0)
    """Steps between validations; 0 for none."""
    val_batches: int = Field(default=8, ge=0)
    """Batches of a validation; 0 for the whole validation set."""
    val_global_batch_size: int = Field(default=8, ge=1)
    """Pairs of a validation batch."""
    val_micro_batch_size: int = Field(default=1, ge=1)
    """Pairs of a validation forward pass."""
    val_at_start: bool = True
    """Validate before the first step."""
    val_at_end: bool = False
    """Validate after the last step."""
    seed: int = Field(default=42, ge=0)
    """Seed of every draw of the run."""
    reference_policy_kl_penalty: float = Field(default=0.05, gt=0, allow_inf_nan=False)
    """beta: how strongly the policy is held to the reference."""
    preference_average_log_probs: bool = False
    """Average a completion's logprobs over its tokens in the preference loss; false sums them."""
    sft_average_log_probs: bool = False
    """The same for the SFT loss."""
    preference_loss_weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Weight of the preference loss."""
    sft_loss_weight: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Weight of the loss on the chosen completion; 0 leaves it out."""
