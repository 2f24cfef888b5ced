"""The losses of DPO and its relatives, and the outcome of a pair, which validation reads too.

Contract: as policy.py, with rows in pairs: row 2i is the chosen answer of a pair and row 2i + 1 the rejected one, and
both have loss tokens. `num_sequences` counts rows, so means over the batch's pairs divide by half of it.

Not here: the forward pass, reference log-probabilities, and which combinations are allowed (config/dpo.py, which
also has the formulas' sources).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_rl_lora.config.dpo import DpoConfig
from nemo_rl_lora.types import LossInputs


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRewards:
    """Implicit rewards of pairs, each [pairs]: beta times the log-ratio of policy to reference (DPO, section 4)."""

    chosen: Tensor
    rejected: Tensor

    @property
    def margin(self) -> Tensor:
        """[pairs]: how far the chosen answer is ahead."""
        return self.chosen - self.rejected

    @property
    def accuracy(self) -> Tensor:
        """[pairs]: 1 where the chosen answer is ahead, 0 where it is behind, 1/2 where the policy has not moved."""
        return (self.margin.detach().sign() + 1) / 2


def row_logprobs(logprobs: Tensor, loss_mask: Tensor) -> Tensor:
    """[b]: the log-probability of a row's loss tokens together, as references are kept. Both arguments are [b, T].

    Summed in fp64, since a margin is a small difference of such sums.
    """
    return torch.where(loss_mask, logprobs, 0.0).sum(dim=1, dtype=torch.float64).to(logprobs.dtype)


def pair_rewards(logprobs: Tensor, reference_logprobs: Tensor, loss_mask: Tensor, config: DpoConfig) -> PairRewards:
    """Rewards of the pairs in b rows; a mean over tokens with `preference_average_log_probs`.

    logprobs and loss_mask: [b, T]; reference_logprobs: [b], as `row_logprobs` of the reference.
    """
    assert reference_logprobs.shape == logprobs.shape[:1], reference_logprobs.shape
    log_ratio = row_logprobs(logprobs, loss_mask) - reference_logprobs.to(logprobs.dtype)
    if config.preference_average_log_probs:
        log_ratio = log_ratio / loss_mask.sum(dim=1)
    rewards = config.reference_policy_kl_penalty * log_ratio
    return PairRewards(chosen=rewards[0::2], rejected=rewards[1::2])


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceLoss:
    """A types.LossFn: the preference loss and the likelihood of the chosen answers, each where it has a weight."""

    config: DpoConfig

    @property
    def needs_reference(self) -> bool:
        """Whether `reference_logprobs` must be given; without the preference loss there are no rewards."""
        return self.config.preference_loss_weight > 0

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of what a call reports beside the loss."""
        rewards = ("accuracy", "rewards_chosen_mean", "rewards_rejected_mean", "rewards_margin_mean")
        likelihood = ("sft_loss",) if self.config.sft_loss_weight > 0 else ()
        return (*(("preference_loss", *rewards) if self.needs_reference else ()), *likelihood)

    def __call__(self, inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss with gradient, detached metrics), both scalars; this microbatch's share of the batch."""
        config, mask = self.config, inputs.loss_mask
        assert inputs.logprobs.dtype in (torch.float32, torch.float64), inputs.logprobs.dtype
        if not mask.is_cuda:  # a GPU would be waited for
            assert torch.equal(inputs.group_index[0::2], inputs.group_index[1::2]), inputs.group_index
            assert mask.any(dim=1).all(), "a row of a pair has no loss tokens"
        of_pairs = self._preference_terms(inputs) if self.needs_reference else {}
        if config.sft_loss_weight > 0:
            nll = -row_logprobs(inputs.logprobs, mask)[0::2]
            of_pairs["sft_loss"] = nll / mask[0::2].sum(dim=1) if config.sft_average_log_probs else nll
        num_pairs = max(inputs.denominators.num_sequences, 2) / 2
        shares = {name: values.sum() / num_pairs for name, values in of_pairs.items()}
        weights = {"preference_loss": config.preference_loss_weight, "sft_loss": config.sft_loss_weight}
        loss = torch.stack([weight * shares[name] for name, weight in weights.items() if name in shares]).sum()
        return loss, {name: share.detach() for name, share in shares.items()}

    def _preference_terms(self, inputs: LossInputs) -> dict[str, Tensor]:
        """Each [pairs]."""
        assert inputs.reference_logprobs is not None, "dpo.preference_loss_weight needs reference logprobs"
        rewards = pair_rewards(inputs.logprobs, inputs.reference_logprobs, inputs.loss_mask, self.config)
        return {
            "preference_loss": _pair_losses(rewards.margin, self.config),
            "accuracy": rewards.accuracy,
            "rewards_chosen_mean": rewards.chosen,
            "rewards_rejected_mean": rewards.rejected,
            "rewards_margin_mean": rewards.margin,
        }


def _pair_losses(margin: Tensor, config: DpoConfig) -> Tensor:
    """[pairs] from `margin` [pairs], beta times the d of `dpo.loss_type`."""
    if config.loss_type == "ipo":
        beta = config.reference_policy_kl_penalty
        return (margin / beta - 1 / (2 * beta)).square()
    if config.loss_type == "hinge":
        return torch.relu(1 - margin)
    smoothing = config.label_smoothing
    marked_right, marked_wrong = -F.logsigmoid(margin), -F.logsigmoid(-margin)
    if config.loss_type == "robust":
        return ((1 - smoothing) * marked_right - smoothing * marked_wrong) / (1 - 2 * smoothing)
    assert config.loss_type == "sigmoid", config.loss_type
    return (1 - smoothing) * marked_right + smoothing * marked_wrong
