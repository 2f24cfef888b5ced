"""Settings of supervised fine-tuning: its length, its validation and which tokens it learns."""

from __future__ import annotations

from pydantic import Field, model_validator

from nemo_rl_lora.config.loop import TuningConfig
from nemo_rl_lora.config.phases import PhaseConfig, check_phases


class SftConfig(TuningConfig):
    """The SFT loop."""

    only_unmask_final: bool = False
    """Learn the last assistant message only; false learns all of them."""
    phases: tuple[PhaseConfig, ...] = ()
    """Parts of the run, one after the other: all weights, then an adapter, then that merged and another. Each says its
    length, so that max_num_steps, max_num_epochs and max_num_tokens are not used. No NeMo RL key."""
    max_phase_loss_shift: float = Field(default=0.05, ge=0, allow_inf_nan=False)
    """How much the mean loss of a token may change where weights are frozen in the compute dtype, or an adapter is
    merged; more ends the run, with the checkpoint before it kept."""

    @model_validator(mode="after")
    def _phases_fit(self) -> SftConfig:
        check_phases(self.phases)
        return self
