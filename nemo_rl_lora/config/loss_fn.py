"""The `loss_fn` block of GRPO. Contract: the loss computes every combination that validates as written.

Formulas and sources stand in docs/grpo_losses.md; the loss itself is algorithms/losses/policy.py.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from nemo_rl_lora.config.base import Section

Objective = Literal["clip", "cispo", "sapo", "vespo", "reinforce"]


class SapoConfig(Section):
    """Soft Adaptive Policy Optimization (arXiv 2511.20347): a sigmoid gate in the place of the clip."""

    temperature_positive: float = Field(default=1.0, gt=0)
    """Steepness of the gate where the advantage is positive."""
    temperature_negative: float = Field(default=1.05, gt=0)
    """Steepness of the gate where the advantage is zero or negative."""


class VespoConfig(Section):
    """VESPO (arXiv 2602.10693): logprobs weighted by w^k exp(lambda (1 - w)), w the sequence ratio."""

    k_positive: float = Field(default=2.0, ge=0)
    """Exponent k where the advantage is zero or positive."""
    lambda_positive: float = Field(default=3.0, ge=1e-4)
    """Decay lambda where the advantage is zero or positive."""
    k_negative: float = Field(default=3.0, ge=0)
    """Exponent k where the advantage is negative."""
    lambda_negative: float = Field(default=2.0, ge=1e-4)
    """Decay lambda where the advantage is negative."""


class LossFnConfig(Section):
    """Clipped policy gradient with its variants and a KL penalty."""

    reference_policy_kl_penalty: float = Field(default=0.01, ge=0)
    """Coefficient of the KL term. 0 leaves the reference pass out."""
    reference_policy_kl_type: Literal["k1", "k2", "k3"] = "k3"
    """KL estimator of a token, with d = reference - current: k1 = -d, k2 = d^2 / 2, k3 = exp(d) - 1 - d."""
    kl_gradient: Literal["unbiased", "paper"] = "unbiased"
    """unbiased: the estimate is weighted by exp(current - its detached self), which is 1 and has the gradient of having
    sampled the token. In expectation k1 and k3 then have the gradient of KL(current || reference), as in NeMo RL.
    paper: the estimate's gradient alone, as in the GRPO paper and TRL. In expectation k3 then has the gradient of
    KL(reference || current), k2 that of KL(current || reference), and k1 none, so it is refused."""
    kl_input_clamp_value: float | None = Field(default=20.0, gt=0)
    """d is clamped to plus or minus this before the estimator; null: not clamped."""
    kl_output_clamp_value: float | None = Field(default=10.0, gt=0)
    """The estimate, times its weight, is clamped to plus or minus this; null: not clamped."""
    ratio_clip_min: float = Field(default=0.2, ge=0)
    """The probability ratio is clipped below at 1 - this."""
    ratio_clip_max: float = Field(default=0.2, ge=0)
    """The probability ratio is clipped above at 1 + this. Larger than ratio_clip_min: DAPO's clip-higher."""
    ratio_clip_c: float | None = Field(default=None, gt=1)
    """Dual clip: with a negative advantage the loss is at most this times its absolute value. null: off."""
    use_on_policy_kl_approximation: bool = False
    """Weight the KL of each token by the ratio of the current policy to the generation engine, with its gradient
    (with kl_gradient=paper: detached)."""
    use_unbiased_kl_estimate: bool = False
    """Multiply the KL of each token by the ratio, with its gradient (DeepSeek-V3.2, arXiv 2512.02556)."""
    use_importance_sampling_correction: bool = False
    """Weight the policy term by the ratio of the trainer's old policy to the generation engine: per token,
    or per sequence (the product over its tokens) with sequence_level_importance_ratios."""
    truncated_importance_sampling_type: Literal["tis", "icepop", "seq-mask-tis"] | None = None
    """What happens to a weight of the importance-sampling correction that is out of bounds. tis: it is cut at the
    bounds. icepop: the token counts as 0. seq-mask-tis: every token of a sequence counts as 0 whose weights' geometric
    mean is out of bounds."""
    truncated_importance_sampling_ratio: float | None = Field(default=None, gt=0)
    """Upper bound of the importance-sampling weight; needs a type."""
    truncated_importance_sampling_ratio_min: float | None = Field(default=None, ge=0)
    """Lower bound; needs a type. icepop and seq-mask-tis need it; null with tis: 0."""
    sequence_level_importance_ratios: bool = False
    """GSPO: one ratio for the sequence, the geometric mean over its tokens."""
    token_level_loss: bool = True
    """true: the sum over tokens divided by all loss tokens. false: the mean over sequences of token means."""
    constant_length_normalizer: int | None = Field(default=None, gt=0)
    """Dr. GRPO: divide the sum over tokens by num_sequences times this length, in place of the number of
    loss tokens. Usually the maximum completion length; 1 sums over tokens (LUSPO). null: off."""
    force_on_policy_ratio: bool = False
    """Take the ratio as 1, with its gradient: needs one optimizer step per rollout."""
    use_cispo: bool = False
    """CISPO: log-probabilities weighted by the detached clipped ratio; every token keeps its gradient."""
    sapo: SapoConfig | None = None
    """Set (to `{}` for the defaults) to use SAPO's soft gate in the place of the clip."""
    vespo: VespoConfig | None = None
    """Set (to `{}` for the defaults) to use VESPO's sequence weights in the place of the clip."""
    disable_ppo_ratio: bool = False
    """REINFORCE: advantages times log-probabilities, without ratio and clip."""

    @property
    def objective(self) -> Objective:
        """Which formula the policy term has."""
        if self.disable_ppo_ratio:
            return "reinforce"
        if self.use_cispo:
            return "cispo"
        if self.sapo is not None:
            return "sapo"
        return "clip" if self.vespo is None else "vespo"

    @model_validator(mode="after")
    def _check_combinations(self) -> LossFnConfig:
        self._check_one_objective()
        self._check_objective_options()
        self._check_normalization()
        self._check_importance_sampling()
        self._check_kl()
        return self

    def _check_one_objective(self) -> None:
        chosen = {
            "loss_fn.use_cispo=True": self.use_cispo,
            f"loss_fn.sapo={self.sapo!r}": self.sapo is not None,
            f"loss_fn.vespo={self.vespo!r}": self.vespo is not None,
            "loss_fn.disable_ppo_ratio=True": self.disable_ppo_ratio,
        }
        given = [text for text, is_given in chosen.items() if is_given]
        if len(given) > 1:
            raise ValueError(f"{given[0]}: excludes {', '.join(given[1:])}. Keep one of them.")

    def _check_objective_options(self) -> None:
        objective = self.objective
        if self.ratio_clip_c is not None and objective != "clip":
            raise ValueError(
                f"loss_fn.ratio_clip_c={self.ratio_clip_c!r}: dual clip belongs to the clipped objective, "
                f"not to {objective}. Set loss_fn.ratio_clip_c=null."
            )
        if self.force_on_policy_ratio and objective != "clip":
            raise ValueError(
                f"loss_fn.force_on_policy_ratio=True: {objective} {_WITHOUT_RATIO[objective]}. "
                "Set loss_fn.force_on_policy_ratio=false."
            )
        if self.sequence_level_importance_ratios and objective in ("cispo", "vespo", "reinforce"):
            raise ValueError(
                f"loss_fn.sequence_level_importance_ratios=True: {objective} "
                f"{_WITHOUT_SEQUENCE_RATIO[objective]}. Set loss_fn.sequence_level_importance_ratios=false."
            )
        if self.use_cispo and not self.token_level_loss:
            raise ValueError(
                "loss_fn.token_level_loss=False: CISPO divides by the number of loss tokens. "
                "Set loss_fn.token_level_loss=true or loss_fn.use_cispo=false."
            )

    def _check_normalization(self) -> None:
        if self.constant_length_normalizer is not None and not self.token_level_loss:
            raise ValueError(
                f"loss_fn.constant_length_normalizer={self.constant_length_normalizer!r}: divides a sum over "
                "tokens, and loss_fn.token_level_loss=False takes a mean per sequence. Set one of them back."
            )
        has_token_mean = self.token_level_loss and self.constant_length_normalizer is None
        if self.sequence_level_importance_ratios and has_token_mean:
            raise ValueError(
                "loss_fn.sequence_level_importance_ratios=True: a token-level loss would weight sequences by "
                "their length. Set loss_fn.token_level_loss=false (GSPO) or "
                "loss_fn.constant_length_normalizer=1 (LUSPO)."
            )

    def _check_importance_sampling(self) -> None:
        kind, ratio = self.truncated_importance_sampling_type, self.truncated_importance_sampling_ratio
        if kind is not None and ratio is None:
            raise ValueError(
                f"loss_fn.truncated_importance_sampling_type={kind!r}: needs an upper bound. "
                "Set loss_fn.truncated_importance_sampling_ratio, for example to 2.0."
            )
        low = self.truncated_importance_sampling_ratio_min
        is_missing = low is None and kind in ("icepop", "seq-mask-tis")
        if is_missing or (low is not None and ratio is not None and low > ratio):
            raise ValueError(
                f"loss_fn.truncated_importance_sampling_ratio_min={low!r}: {kind!r} needs a lower bound of at most "
                f"loss_fn.truncated_importance_sampling_ratio={ratio!r}. Set it, for example to 0.5."
            )
        if kind is None and low is not None:
            raise ValueError(
                f"loss_fn.truncated_importance_sampling_ratio_min={low!r}: has no effect without a type. "
                "Set loss_fn.truncated_importance_sampling_type=tis and loss_fn.truncated_importance_sampling_ratio."
            )
        if kind == "seq-mask-tis" and self.sequence_level_importance_ratios:
            raise ValueError(
                "loss_fn.truncated_importance_sampling_type='seq-mask-tis': judges sequences and weights tokens, and "
                "loss_fn.sequence_level_importance_ratios=True weights sequences. Use 'icepop', or set that to false."
            )
        if kind is None and ratio is not None:
            raise ValueError(
                f"loss_fn.truncated_importance_sampling_ratio={ratio!r}: has no effect without a type. "
                "Set loss_fn.truncated_importance_sampling_type=tis."
            )
        if kind is not None and not self.use_importance_sampling_correction:
            raise ValueError(
                f"loss_fn.truncated_importance_sampling_type={kind!r}: truncates the importance-sampling "
                "correction, which is off. Set loss_fn.use_importance_sampling_correction=true."
            )
        if self.use_importance_sampling_correction and self.vespo is not None:
            raise ValueError(
                "loss_fn.use_importance_sampling_correction=True: VESPO weights whole sequences itself. "
                "Set loss_fn.use_importance_sampling_correction=false."
            )

    def _check_kl(self) -> None:
        if self.use_unbiased_kl_estimate and self.use_on_policy_kl_approximation:
            raise ValueError(
                "loss_fn.use_unbiased_kl_estimate=True: both it and "
                "loss_fn.use_on_policy_kl_approximation=True weight the KL by a ratio. Keep one of them."
            )
        if self.kl_gradient == "paper" and self.reference_policy_kl_type == "k1":
            raise ValueError(
                "loss_fn.kl_gradient='paper': its expected gradient of loss_fn.reference_policy_kl_type='k1' is 0, "
                "a penalty that does nothing. Set loss_fn.kl_gradient=unbiased, or a type of k2 or k3."
            )
        if self.kl_gradient == "paper" and self.use_unbiased_kl_estimate:
            raise ValueError(
                "loss_fn.kl_gradient='paper': would take from loss_fn.use_unbiased_kl_estimate=True the gradient of "
                "the ratio, which makes it unbiased. Set one of them back."
            )


_WITHOUT_RATIO = {
    "cispo": "optimizes the ratio that this would remove",
    "sapo": "gates by the ratio that this would remove",
    "vespo": "weights by the ratio that this would remove",
    "reinforce": "(loss_fn.disable_ppo_ratio=True) has no ratio to force",
}
_WITHOUT_SEQUENCE_RATIO = {
    "cispo": "weights tokens one by one",
    "vespo": "computes its own sequence weights",
    "reinforce": "(loss_fn.disable_ppo_ratio=True) has no ratio",
}
