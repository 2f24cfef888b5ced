"""The policy losses of GRPO and its relatives.

Contract: pure functions of log-probabilities, in the dtype these come in (fp32 in training). The mask is
applied to the inputs, before any arithmetic, so that what stands outside it (NaN included) cannot reach
loss or gradient. Loss and metrics are sums over the rows given, divided by the global denominators: adding
microbatches and ranks gives the value of the batch. A row without loss tokens (a filtered completion)
counts nowhere.

Not here: the forward pass, advantages, and which combinations are allowed (config/loss_fn.py). Formulas and
sources: docs/grpo_losses.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemo_rl_lora.config.loss_fn import LossFnConfig, VespoConfig
from nemo_rl_lora.types import Batch, Denominators, LossInputs

_VESPO_LOG_WEIGHT_MIN = math.log(1e-8)
_VESPO_LOG_WEIGHT_MAX = 20.0


def count_denominators(loss_mask: Tensor) -> Denominators:
    """Loss tokens, and rows that have any, of a whole optimizer batch. loss_mask: [B, T] bool."""
    return Denominators(num_loss_tokens=int(loss_mask.sum()), num_sequences=int(loss_mask.any(dim=1).sum()))


def loss_inputs(batch: Batch, logprobs: Tensor, rows: Tensor | slice = slice(None)) -> LossInputs:
    """What a loss sees of these rows of a batch. logprobs: [b, T] of the same rows, on whose device everything goes."""
    device = logprobs.device

    def of_rows(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[rows].to(device)

    old = of_rows(batch.old_logprobs)
    return LossInputs(
        logprobs=logprobs,
        old_logprobs=logprobs.detach() if old is None else old,
        reference_logprobs=of_rows(batch.reference_logprobs),
        generation_logprobs=of_rows(batch.generation_logprobs),
        advantages=of_rows(batch.advantages),
        loss_mask=batch.loss_mask[rows].to(device),
        sequence_length=batch.sequence_length[rows].to(device),
        group_index=batch.group_index[rows].to(device),
        denominators=batch.denominators,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyLoss:
    """A types.LossFn with what it needs spelled out, so that a driver leaves out every pass it can."""

    config: LossFnConfig

    @property
    def needs_reference(self) -> bool:
        """Whether `reference_logprobs` must be given."""
        return self.config.reference_policy_kl_penalty != 0

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether later optimizer steps of a rollout need the log-probabilities from before the first."""
        has_ratio = self.config.objective != "reinforce" or self.config.use_unbiased_kl_estimate
        needed = has_ratio or self.config.use_importance_sampling_correction
        return needed and not self.config.force_on_policy_ratio

    @property
    def needs_generation_logprobs(self) -> bool:
        """Whether `generation_logprobs` must be given; without them the engine's metrics are left out."""
        approximates = self.config.use_on_policy_kl_approximation and self.needs_reference
        return self.config.use_importance_sampling_correction or approximates

    def __call__(self, inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss with gradient, detached metrics), both scalars; this microbatch's share of the batch."""
        inputs = _masked(inputs, force_on_policy=self.config.force_on_policy_ratio)
        terms = self._policy_terms(inputs)
        loss = self._reduce(terms.per_token * self._sampling_weights(inputs), inputs)
        metrics = _ratio_metrics(terms, inputs)
        if self.needs_reference:
            kl = self._reduce(self._kl_per_token(terms, inputs), inputs)
            loss = loss + self.config.reference_policy_kl_penalty * kl
            metrics["kl_penalty"] = kl
        if inputs.generation_logprobs is not None:
            metrics |= _generation_metrics(inputs, self.config)
        metrics["num_valid_samples"] = inputs.loss_mask.any(dim=1).sum()
        return loss, {name: value.detach() for name, value in metrics.items()}

    def _policy_terms(self, inputs: LossInputs) -> _PolicyTerms:
        config = self.config
        assert inputs.advantages is not None, "a policy loss needs advantages"
        advantages = inputs.advantages.to(inputs.logprobs.dtype)
        advantages = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
        log_ratio = inputs.logprobs - inputs.old_logprobs
        if config.sequence_level_importance_ratios:
            log_ratio = _row_mean(log_ratio, inputs.loss_mask).unsqueeze(1).expand_as(log_ratio)
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - config.ratio_clip_min, 1 + config.ratio_clip_max)
        objective = config.objective
        if objective == "reinforce":
            per_token = -advantages * inputs.logprobs
        elif objective == "cispo":
            per_token = -clipped.detach() * advantages * inputs.logprobs
        elif objective == "vespo":
            assert config.vespo is not None
            weights = _vespo_weights(log_ratio.detach(), advantages, inputs.loss_mask, config.vespo)
            per_token = -weights * advantages * inputs.logprobs
        elif objective == "sapo":
            assert config.sapo is not None
            temperature = _choose(
                advantages > 0, config.sapo.temperature_positive, config.sapo.temperature_negative, advantages
            )
            per_token = -advantages * torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature
        else:
            per_token = _clipped_terms(ratio, clipped, advantages, config.ratio_clip_c)
        is_low = (ratio < 1 - config.ratio_clip_min) & ((advantages < 0) | (objective == "cispo"))
        is_high = (ratio > 1 + config.ratio_clip_max) & ((advantages > 0) | (objective == "cispo"))
        has_clip = objective in ("clip", "cispo")
        return _PolicyTerms(
            per_token=per_token,
            ratio=ratio,
            clipped_ratio=clipped if has_clip else ratio,
            is_clipped_low=is_low & has_clip,
            is_clipped_high=is_high & has_clip,
        )

    def _kl_per_token(self, terms: _PolicyTerms, inputs: LossInputs) -> Tensor:
        config = self.config
        assert inputs.reference_logprobs is not None, "loss_fn.reference_policy_kl_penalty needs reference logprobs"
        if config.use_unbiased_kl_estimate:
            weights = terms.ratio
        elif config.use_on_policy_kl_approximation:
            assert inputs.generation_logprobs is not None, "the approximation needs generation logprobs"
            weights = _finite_exp(inputs.logprobs - inputs.generation_logprobs)
        else:
            weights = (inputs.logprobs - inputs.logprobs.detach()).exp()
        return estimate_kl(
            inputs.logprobs,
            inputs.reference_logprobs,
            config.reference_policy_kl_type,
            weights=weights.detach() if config.kl_gradient == "paper" else weights,
            input_clamp=config.kl_input_clamp_value,
            output_clamp=config.kl_output_clamp_value,
        )

    def _sampling_weights(self, inputs: LossInputs) -> Tensor:
        """[b, T] or [b, 1]: the importance weight of the trainer against the engine; 1 where it is off."""
        if not self.config.use_importance_sampling_correction:
            return torch.ones_like(inputs.old_logprobs)
        return _bounded_weights(inputs, self.config)[0]

    def _reduce(self, per_token: Tensor, inputs: LossInputs) -> Tensor:
        """This microbatch's share of the loss that the config asks for. per_token: [b, T]."""
        per_token = torch.where(inputs.loss_mask, per_token, 0.0)
        num_sequences = max(inputs.denominators.num_sequences, 1)
        if self.config.constant_length_normalizer is not None:
            return per_token.sum() / (num_sequences * self.config.constant_length_normalizer)
        if self.config.token_level_loss:
            return per_token.sum() / max(inputs.denominators.num_loss_tokens, 1)
        return _row_mean(per_token, inputs.loss_mask).sum() / num_sequences


def make_policy_loss(config: LossFnConfig) -> PolicyLoss:
    """The loss of a `loss_fn` block: a frozen, picklable types.LossFn."""
    return PolicyLoss(config=config)


def estimate_kl(
    logprobs: Tensor,
    reference_logprobs: Tensor,
    kind: str,
    *,
    weights: Tensor | None = None,
    input_clamp: float | None = None,
    output_clamp: float | None = None,
) -> Tensor:
    """KL(policy || reference) of every token, from samples of the policy: http://joschu.net/blog/kl-approx.html.

    `weights` of the samples multiply the estimate before the output clamp. Their gradient is that of having sampled the
    token (arXiv 2506.09477). A token that a clamp cuts, input or output, has no gradient.
    """
    difference = reference_logprobs - logprobs
    if input_clamp is not None:
        is_kept = difference.abs() <= input_clamp
        difference = difference.clamp(-input_clamp, input_clamp)
        weights = None if weights is None else torch.where(is_kept, weights, weights.detach())
    if kind == "k1":
        kl = -difference
    elif kind == "k2":
        kl = difference.square() / 2
    else:
        assert kind == "k3", kind
        kl = torch.expm1(difference) - difference
    kl = kl if weights is None else kl * weights
    return kl if output_clamp is None else kl.clamp(-output_clamp, output_clamp)


@dataclass(frozen=True, slots=True, kw_only=True)
class _PolicyTerms:
    """What the objective makes of every token: all [b, T]."""

    per_token: Tensor
    ratio: Tensor
    clipped_ratio: Tensor
    is_clipped_low: Tensor
    is_clipped_high: Tensor


def _clipped_terms(ratio: Tensor, clipped: Tensor, advantages: Tensor, dual_clip: float | None) -> Tensor:
    """PPO's clip (arXiv 1707.06347) and the dual clip of negative advantages (arXiv 1912.09729)."""
    per_token = torch.maximum(-advantages * ratio, -advantages * clipped)
    if dual_clip is None:
        return per_token
    return torch.where(advantages < 0, torch.minimum(per_token, -advantages * dual_clip), per_token)


def _vespo_weights(log_ratio: Tensor, advantages: Tensor, mask: Tensor, config: VespoConfig) -> Tensor:
    """[b, 1] or [b, T]: w^k exp(lambda (1 - w)), 1 at w = 1, with w the product of the row's ratios."""
    log_ratio = torch.where(mask, log_ratio.clamp(-20.0, 20.0), 0.0)
    log_weight = log_ratio.sum(dim=1, keepdim=True).clamp(_VESPO_LOG_WEIGHT_MIN, _VESPO_LOG_WEIGHT_MAX)
    is_positive = advantages >= 0
    power = _choose(is_positive, config.k_positive, config.k_negative, advantages)
    decay = _choose(is_positive, config.lambda_positive, config.lambda_negative, advantages)
    return (decay + power * log_weight - decay * log_weight.exp()).exp()


def _choose(condition: Tensor, if_true: float, if_false: float, like: Tensor) -> Tensor:
    """One of two numbers by a condition, in the dtype of `like`."""
    return torch.where(condition, like.new_full((), if_true), like.new_full((), if_false))


def _masked(inputs: LossInputs, *, force_on_policy: bool) -> LossInputs:
    """The same with log-probabilities 0 outside the mask, in one dtype, only `logprobs` with a gradient."""
    dtype = inputs.logprobs.dtype
    assert dtype in (torch.float32, torch.float64), f"logprobs must be fp32, got {dtype}"

    def clean(values: Tensor | None) -> Tensor | None:
        return None if values is None else torch.where(inputs.loss_mask, values.detach().to(dtype), 0.0)

    old = clean(inputs.logprobs if force_on_policy else inputs.old_logprobs)
    assert old is not None
    return replace(
        inputs,
        logprobs=torch.where(inputs.loss_mask, inputs.logprobs, 0.0),
        old_logprobs=old,
        reference_logprobs=clean(inputs.reference_logprobs),
        generation_logprobs=clean(inputs.generation_logprobs),
    )


def _row_mean(values: Tensor, mask: Tensor) -> Tensor:
    """[b]: the mean over a row's loss tokens; 0 for a row without any."""
    return torch.where(mask, values, 0.0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def _token_share(values: Tensor, inputs: LossInputs) -> Tensor:
    """This microbatch's share of the mean over the batch's loss tokens. values: [b, T]."""
    return torch.where(inputs.loss_mask, values, 0.0).sum() / max(inputs.denominators.num_loss_tokens, 1)


def _engine_weights(inputs: LossInputs, config: LossFnConfig) -> Tensor:
    """Old policy over generation engine: [b, T] per token, or [b, 1] the product over the row."""
    assert inputs.generation_logprobs is not None, "importance weights need generation logprobs"
    log_weight = inputs.old_logprobs - inputs.generation_logprobs
    if config.sequence_level_importance_ratios:
        log_weight = log_weight.sum(dim=1, keepdim=True)
    return _finite_exp(log_weight)


def _finite_exp(log_weight: Tensor) -> Tensor:
    """An importance weight; 0 where it would be infinite or is not a number."""
    return torch.where(log_weight.exp().isfinite(), log_weight, -math.inf).exp()


def _bounded_weights(inputs: LossInputs, config: LossFnConfig) -> tuple[Tensor, Tensor]:
    """The engine's weights as the correction uses them, and which tokens or rows were out of bounds: [b, T] or [b, 1].

    tis cuts a weight at the bounds; icepop takes 0 for a token whose weight is out of them; seq-mask-tis takes 0 for
    every token of a row whose weights' geometric mean is.
    """
    weights, kind = _engine_weights(inputs, config), config.truncated_importance_sampling_type
    low, high = config.truncated_importance_sampling_ratio_min or 0.0, config.truncated_importance_sampling_ratio
    if kind is None or high is None:
        return weights, torch.zeros_like(weights, dtype=torch.bool)
    judged = weights
    if kind == "seq-mask-tis":
        assert inputs.generation_logprobs is not None
        judged = _row_mean(inputs.old_logprobs - inputs.generation_logprobs, inputs.loss_mask).exp().unsqueeze(1)
    is_out = (judged > high) | (judged < low)
    return weights.clamp(low, high) if kind == "tis" else torch.where(is_out, 0.0, weights), is_out


def _ratio_metrics(terms: _PolicyTerms, inputs: LossInputs) -> dict[str, Tensor]:
    metrics = {
        "probs_ratio": _token_share(terms.ratio, inputs),
        "probs_ratio_clamped": _token_share(terms.clipped_ratio, inputs),
        "clip_fraction_low": _token_share(terms.is_clipped_low.to(terms.ratio.dtype), inputs),
        "clip_fraction_high": _token_share(terms.is_clipped_high.to(terms.ratio.dtype), inputs),
    }
    metrics["clip_fraction"] = metrics["clip_fraction_low"] + metrics["clip_fraction_high"]
    for name, values in (("probs_ratio", terms.ratio), ("probs_ratio_clamped", terms.clipped_ratio)):
        metrics[f"{name}_min"] = torch.where(inputs.loss_mask, values, math.inf).min()
        metrics[f"{name}_max"] = torch.where(inputs.loss_mask, values, -math.inf).max()
    return metrics


@torch.no_grad()
def _generation_metrics(inputs: LossInputs, config: LossFnConfig) -> dict[str, Tensor]:
    """The distance of the trainer's old policy from the engine, and entropy by importance sampling."""
    assert inputs.generation_logprobs is not None
    trainer, engine = inputs.old_logprobs, inputs.generation_logprobs
    kind = config.reference_policy_kl_type
    log_mixture = torch.logaddexp(trainer, engine) - math.log(2)
    js_divergence = (estimate_kl(log_mixture, trainer, "k3") + estimate_kl(log_mixture, engine, "k3")) / 2
    weights, is_out = _bounded_weights(inputs, config)
    entropy = -(inputs.logprobs - engine).exp() * inputs.logprobs
    metrics = {
        "token_mult_prob_error": _token_share((engine - trainer).abs().exp(), inputs),
        "gen_kl_error": _token_share(estimate_kl(engine, trainer, kind), inputs),
        "policy_kl_error": _token_share(estimate_kl(trainer, engine, kind), inputs),
        "js_divergence_error": _token_share(js_divergence, inputs),
        "approx_entropy": _token_share(entropy, inputs),
    }

    def share_of_rows(values: Tensor) -> Tensor:
        has_tokens = inputs.loss_mask.any(dim=1)
        return torch.where(has_tokens, values.squeeze(1), 0.0).sum() / max(inputs.denominators.num_sequences, 1)

    is_out = is_out.to(weights.dtype)
    if config.truncated_importance_sampling_type == "seq-mask-tis":
        metrics["is_oob_ratio"] = share_of_rows(is_out)
    elif config.truncated_importance_sampling_type is not None:
        metrics["is_oob_ratio"] = _token_share(is_out.expand_as(trainer), inputs)
    by_row = config.sequence_level_importance_ratios
    metrics["sampling_importance_ratio"] = share_of_rows(weights) if by_row else _token_share(weights, inputs)
    return metrics
