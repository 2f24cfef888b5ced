"""The loss of supervised fine-tuning. Contract: as policy.py. It sees log-probabilities only, so it has no metrics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_rl_lora.types import LossInputs


@dataclass(frozen=True, slots=True, kw_only=True)
class SftLoss:
    """A types.LossFn: the negative log-likelihood of a loss token, averaged over the batch's loss tokens."""

    def __call__(self, inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        """(this microbatch's share of the loss, no metrics)."""
        total = torch.where(inputs.loss_mask, inputs.logprobs, 0.0).sum()
        return -total / max(inputs.denominators.num_loss_tokens, 1), {}
