"""Settings of direct preference optimization: its length, its validation and its loss."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from nemo_rl_lora.config.loop import TuningConfig


class DpoConfig(TuningConfig):
    """The DPO loop and its loss."""

    max_num_steps: int = Field(default=150, ge=1)
    """Optimizer steps of the run."""
    val_period: int = Field(default=25, ge=-1)
    """Validate every so many steps; 0 or -1: never on the way."""
    val_global_batch_size: int = Field(default=8, ge=1)
    """Pairs of a validation batch."""
    reference_policy_kl_penalty: float = Field(default=0.05, gt=0, allow_inf_nan=False)
    """beta: how strongly the policy is held to the reference."""
    preference_average_log_probs: bool = False
    """Average a completion's logprobs over its tokens in the preference loss; false sums them."""
    sft_average_log_probs: bool = False
    """The same for the SFT loss."""
    preference_loss_weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Weight of the preference loss; 0 leaves it out, with the reference and the rewards."""
    sft_loss_weight: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Weight of the loss on the chosen completion; 0 leaves it out."""
    loss_type: Literal["sigmoid", "ipo", "hinge", "robust"] = "sigmoid"
    """Loss of a pair, d being how much further the chosen logprob is above its reference than the rejected one.
    sigmoid: -log sigmoid(beta d), DPO (arXiv 2305.18290, eq. 7). ipo: (d - 1 / (2 beta))^2 (arXiv 2310.12036,
    eq. 17); its authors and TRL average logprobs over tokens: preference_average_log_probs=true. hinge:
    max(0, 1 - beta d) (SLiC-HF, arXiv 2305.10425). robust: sigmoid made unbiased for pairs that are marked the
    wrong way round with probability label_smoothing (arXiv 2403.00409). No NeMo RL key."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Probability that a pair is marked the wrong way round. sigmoid: the loss expected under it (conservative DPO,
    https://ericmitchell.ai/cdpo.pdf); robust needs it above 0; ipo and hinge have none. No NeMo RL key."""

    @model_validator(mode="after")
    def _loss_is_whole(self) -> DpoConfig:
        if self.preference_loss_weight == 0 and self.sft_loss_weight == 0:
            raise ValueError(
                "dpo.preference_loss_weight=0: dpo.sft_loss_weight is 0 as well, so there is no loss. "
                "Set one of the two above 0."
            )
        if self.preference_loss_weight == 0 and self.loss_type != "sigmoid":
            raise ValueError(
                f"dpo.loss_type={self.loss_type!r}: dpo.preference_loss_weight is 0, so no loss of a pair is computed. "
                "Leave dpo.loss_type out, or set the weight above 0."
            )
        if self.loss_type == "robust" and self.label_smoothing == 0:
            raise ValueError(
                "dpo.loss_type='robust': needs the probability of a wrong mark, and dpo.label_smoothing is 0. "
                "Set dpo.label_smoothing between 0 and 0.5, for example to 0.1, or dpo.loss_type=sigmoid."
            )
        if self.label_smoothing > 0 and (self.loss_type in ("ipo", "hinge") or self.preference_loss_weight == 0):
            where = f"dpo.loss_type={self.loss_type!r}" if self.preference_loss_weight else "the SFT loss alone"
            raise ValueError(
                f"dpo.label_smoothing={self.label_smoothing!r}: {where} has no label smoothing. "
                "Set dpo.label_smoothing=0, or train with dpo.loss_type sigmoid or robust."
            )
        return self
