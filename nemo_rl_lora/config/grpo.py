"""The `grpo` block: how many rollouts, how rewards become advantages, when to validate and to stop."""

from __future__ import annotations

from pydantic import Field, model_validator

from nemo_rl_lora.config.base import Section
from nemo_rl_lora.config.loop import LoopConfig
from nemo_rl_lora.config.loss_fn import LossFnConfig


class AdvEstimatorConfig(Section):
    """Which advantage a completion gets; two switches mirror those of `grpo` and must agree with them."""

    normalize_rewards: bool | None = None
    """As grpo.normalize_rewards, which the base file copies here."""
    use_leave_one_out_baseline: bool | None = None
    """As grpo.use_leave_one_out_baseline, which the base file copies here."""
    std_epsilon: float = Field(default=1e-6, ge=0)
    """Added to the standard deviation that divides advantages."""


class RewardShapingConfig(Section):
    """DAPO's overlong penalty (arXiv 2503.14476, eq. 13), or a factor on truncated completions."""

    enabled: bool = False
    """Shape rewards by completion length."""
    overlong_buffer_length: int | None = Field(default=128, gt=0)
    """Tokens before max_response_length over which the penalty grows."""
    overlong_buffer_penalty: float | None = Field(default=1.0, ge=0)
    """What is taken off the reward of a completion of max_response_length tokens."""
    max_response_length: int | None = Field(default=None, gt=0)
    """The length L: no penalty up to L - overlong_buffer_length tokens, linear in the length from there."""
    stop_properly_penalty_coef: float | None = Field(default=None, ge=0, le=1)
    """Where set, it replaces the overlong penalty: rewards of truncated completions are multiplied by it."""

    @model_validator(mode="after")
    def _check_complete(self) -> RewardShapingConfig:
        if not self.enabled or self.stop_properly_penalty_coef is not None:
            return self
        for key in ("overlong_buffer_length", "overlong_buffer_penalty", "max_response_length"):
            if getattr(self, key) is None:
                raise ValueError(
                    f"grpo.reward_shaping.{key}=None: the overlong penalty needs it. "
                    "Set it, or grpo.reward_shaping.stop_properly_penalty_coef."
                )
        return self


class RewardScalingConfig(Section):
    """A linear map of rewards, clamped to the source range."""

    enabled: bool = False
    """Map rewards before they are shaped."""
    source_min: float = 0.0
    """Reward that becomes target_min."""
    source_max: float = 1.0
    """Reward that becomes target_max."""
    target_min: float = 0.0
    """Lower end of the result."""
    target_max: float = 1.0
    """Upper end of the result."""

    @model_validator(mode="after")
    def _check_range(self) -> RewardScalingConfig:
        if self.source_min >= self.source_max:
            raise ValueError(
                f"grpo.reward_scaling.source_min={self.source_min!r}: must be below "
                f"grpo.reward_scaling.source_max={self.source_max!r}. Exchange or widen them."
            )
        return self


class AsyncGrpoConfig(Section):
    """Rollouts that run ahead of training, so that neither waits for the other (docs/async.md)."""

    enabled: bool = False
    """Sample the groups of later steps while a step trains."""
    max_trajectory_age_steps: int = Field(default=1, ge=0)
    """How many steps rollouts run ahead: a step trains on groups whose weights are so many steps old, or less. 0 is the
    synchronous run."""
    in_flight_weight_updates: bool = False
    """Completions that are being sampled when new weights come go on under these: their tokens carry both versions.
    false: they are finished first."""
    recompute_kv_cache_after_weight_updates: bool = False
    """What was computed of such a completion is computed again from the new weights; false: its keys and values stay
    those of the old ones."""

    @property
    def num_steps_ahead(self) -> int:
        """How far rollouts run ahead; 0: not at all."""
        return self.max_trajectory_age_steps if self.enabled else 0

    @model_validator(mode="after")
    def _check_updates(self) -> AsyncGrpoConfig:
        if self.in_flight_weight_updates and self.enabled and not self.num_steps_ahead:
            raise ValueError(
                "grpo.async_grpo.in_flight_weight_updates=True: nothing is sampled while weights change, since "
                "grpo.async_grpo.max_trajectory_age_steps=0. Raise that, or set this to false."
            )
        if self.recompute_kv_cache_after_weight_updates and not self.in_flight_weight_updates:
            raise ValueError(
                "grpo.async_grpo.recompute_kv_cache_after_weight_updates=True: no completion outlives its weights "
                "while grpo.async_grpo.in_flight_weight_updates=false. Set that to true, or this to false."
            )
        return self


class GrpoConfig(LoopConfig):
    """A GRPO run."""

    num_prompts_per_step: int = Field(default=32, ge=1)
    """Prompts of one rollout."""
    num_generations_per_prompt: int = Field(default=16, ge=2)
    """Completions of each prompt: the group. One alone has no advantage."""
    max_num_steps: int = Field(default=1_000_000, ge=1)
    """Rollouts of the run."""
    normalize_rewards: bool = True
    """Divide advantages by the standard deviation of the rewards that the baseline is taken from."""
    use_leave_one_out_baseline: bool = True
    """Baseline (and standard deviation) of the other completions of the group; false: of the whole group."""
    val_start_at: int = Field(default=-1, ge=-1)
    """No periodic validation before this step; -1: from the first."""
    val_at_start: bool = False
    """Validate before the first step."""
    overlong_filtering: bool = False
    """Completions that reached the length limit count for the baseline and not for the loss."""
    advantage_clip_low: float | None = None
    """Advantages below this become this; null: not clipped."""
    advantage_clip_high: float | None = None
    """Advantages above this become this; null: not clipped."""
    max_val_samples: int | None = Field(default=256, ge=1)
    """Validation prompts at most; null: all."""
    val_num_generations_per_prompt: int = Field(default=1, ge=1)
    """Completions of each validation prompt."""
    stop_at_validation_metric: str | None = None
    """Stop once this validation metric reaches stop_at_validation_threshold; null: off."""
    stop_at_validation_threshold: float | None = None
    """The value at which to stop."""
    val_batch_size: int = Field(default=256, ge=1)
    """Validation prompts that are generated at once."""
    use_dynamic_sampling: bool = False
    """DAPO: drop groups whose rewards are all equal and roll out more until num_prompts_per_step are kept."""
    dynamic_sampling_max_gen_batches: int = Field(default=10, ge=1)
    """Rollouts that dynamic sampling may take for one step before it gives up."""
    batch_multiplier: float = Field(default=1, ge=1)
    """Dynamic sampling rolls out this many times num_prompts_per_step at once."""
    keep_surplus_groups: bool = False
    """What dynamic sampling kept beyond num_prompts_per_step is trained in the next step, oldest first, with the
    log-probabilities of the policy that sampled it in the loss's ratio; false: dropped, as NeMo RL does. No NeMo RL
    key."""
    async_grpo: AsyncGrpoConfig | None = AsyncGrpoConfig()
    """Rollouts that run ahead of training; null: none do."""
    reward_shaping: RewardShapingConfig = RewardShapingConfig()
    """Rewards by length."""
    adv_estimator: AdvEstimatorConfig = AdvEstimatorConfig()
    """How advantages are estimated."""
    reward_scaling: RewardScalingConfig = RewardScalingConfig()
    """A linear map of rewards."""
    skip_reference_policy_logprobs_calculation: bool | None = None
    """true asserts that no reference pass runs, which needs loss_fn.reference_policy_kl_penalty=0. At 0 the
    pass is left out in any case."""

    @property
    def num_steps_ahead(self) -> int:
        """How many steps rollouts run ahead of training; 0: none."""
        return 0 if self.async_grpo is None else self.async_grpo.num_steps_ahead

    @property
    def num_completions_per_step(self) -> int:
        """Rows of one rollout."""
        return self.num_prompts_per_step * self.num_generations_per_prompt

    @model_validator(mode="after")
    def _check_combinations(self) -> GrpoConfig:
        for key in ("normalize_rewards", "use_leave_one_out_baseline"):
            mirrored = getattr(self.adv_estimator, key)
            if mirrored not in (None, getattr(self, key)):
                raise ValueError(
                    f"grpo.adv_estimator.{key}={mirrored!r}: disagrees with grpo.{key}="
                    f"{getattr(self, key)!r}. Set grpo.{key}; the base file copies it to grpo.adv_estimator."
                )
        low, high = self.advantage_clip_low, self.advantage_clip_high
        if low is not None and high is not None and low >= high:
            raise ValueError(
                f"grpo.advantage_clip_low={low!r}: must be below grpo.advantage_clip_high={high!r}. Exchange them."
            )
        if (self.stop_at_validation_metric is None) != (self.stop_at_validation_threshold is None):
            raise ValueError(
                f"grpo.stop_at_validation_metric={self.stop_at_validation_metric!r}: goes together with "
                f"grpo.stop_at_validation_threshold={self.stop_at_validation_threshold!r}. "
                "Set both or neither."
            )
        if self.batch_multiplier != 1 and not self.use_dynamic_sampling:
            raise ValueError(
                f"grpo.batch_multiplier={self.batch_multiplier!r}: rolls out more prompts than a step keeps. "
                "Set grpo.use_dynamic_sampling=true or grpo.batch_multiplier=1."
            )
        if self.keep_surplus_groups and not self.use_dynamic_sampling:
            raise ValueError(
                "grpo.keep_surplus_groups=True: there are none, since every group of a rollout is trained. "
                "Set grpo.use_dynamic_sampling=true or grpo.keep_surplus_groups=false."
            )
        return self


def check_rollout_against_loss(grpo: GrpoConfig, loss_fn: LossFnConfig, train_global_batch_size: int) -> None:
    """Rules across `grpo`, `loss_fn` and `policy.train_global_batch_size`. Raises ValueError."""
    num_rows = grpo.num_completions_per_step
    if num_rows % train_global_batch_size != 0:
        raise ValueError(
            f"policy.train_global_batch_size={train_global_batch_size!r}: must divide the "
            f"{num_rows} completions of a step (grpo.num_prompts_per_step={grpo.num_prompts_per_step} times "
            f"grpo.num_generations_per_prompt={grpo.num_generations_per_prompt}). "
            f"Use {num_rows} for one optimizer step per rollout."
        )
    if loss_fn.force_on_policy_ratio and num_rows != train_global_batch_size:
        raise ValueError(
            f"loss_fn.force_on_policy_ratio=True: needs one optimizer step per rollout, and a rollout of "
            f"{num_rows} completions makes {num_rows // train_global_batch_size}. "
            f"Set policy.train_global_batch_size={num_rows} or loss_fn.force_on_policy_ratio=false."
        )
    if grpo.keep_surplus_groups and (loss_fn.force_on_policy_ratio or loss_fn.objective == "reinforce"):
        key = "force_on_policy_ratio" if loss_fn.force_on_policy_ratio else "disable_ppo_ratio"
        raise ValueError(
            f"grpo.keep_surplus_groups=True: an earlier policy has sampled those groups, and loss_fn.{key}=true leaves "
            f"out the ratio that accounts for it. Set grpo.keep_surplus_groups=false or loss_fn.{key}=false."
        )
    if grpo.num_steps_ahead and not loss_fn.use_importance_sampling_correction:
        remedy = "Set it to true" if loss_fn.vespo is None else "Choose another objective than loss_fn.vespo"
        raise ValueError(
            f"loss_fn.use_importance_sampling_correction=False: with grpo.async_grpo.max_trajectory_age_steps="
            f"{grpo.num_steps_ahead} an earlier policy has sampled what a step trains on, and the loss has to account "
            f"for it. {remedy}, or set grpo.async_grpo.enabled=false."
        )
    if grpo.num_steps_ahead and grpo.use_dynamic_sampling:
        raise ValueError(
            "grpo.use_dynamic_sampling=True: how many rollouts a step takes is known only once they are scored, and "
            "grpo.async_grpo.enabled=true asks for them ahead. Set one of them to false."
        )
    if grpo.skip_reference_policy_logprobs_calculation and loss_fn.reference_policy_kl_penalty != 0:
        raise ValueError(
            "grpo.skip_reference_policy_logprobs_calculation=True: the KL term needs the reference while "
            f"loss_fn.reference_policy_kl_penalty={loss_fn.reference_policy_kl_penalty!r}. Set that to 0."
        )
