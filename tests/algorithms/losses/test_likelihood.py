"""The SFT loss against numbers worked out by hand."""

import math
import pickle
from dataclasses import replace

import pytest
import torch

from nemo_rl_lora.algorithms.losses.likelihood import SftLoss
from nemo_rl_lora.algorithms.losses.policy import count_denominators
from nemo_rl_lora.types import LossInputs


@pytest.fixture
def inputs() -> LossInputs:
    """Rows of 2 and 1 loss tokens with probabilities 1/2, 1/4 and 1/8; the first row has a gap, as in a chat."""
    mask = torch.tensor([[False, True, False, True], [False, False, True, False]])
    logprobs = torch.tensor([[0.0, 0.5, 0.0, 0.25], [0.0, 0.0, 0.125, 0.0]], dtype=torch.float64).log()
    return LossInputs(
        logprobs=torch.where(mask, logprobs, math.nan).requires_grad_(),
        old_logprobs=logprobs,
        reference_logprobs=None,
        generation_logprobs=None,
        advantages=None,
        loss_mask=mask,
        sequence_length=torch.tensor([4, 3]),
        group_index=torch.tensor([0, 1]),
        denominators=count_denominators(mask),
    )


def test_loss_is_the_mean_over_tokens_and_what_is_outside_the_mask_has_no_part(inputs: LossInputs) -> None:
    loss, metrics = SftLoss()(inputs)
    assert loss.item() == pytest.approx((math.log(2) + math.log(4) + math.log(8)) / 3, rel=1e-12)
    assert metrics == {}
    loss.backward()
    assert inputs.logprobs.grad is not None
    assert torch.equal(inputs.logprobs.grad, -inputs.loss_mask.double() / 3)


def test_microbatches_add_up_to_the_batch(inputs: LossInputs) -> None:
    rows = [
        replace(inputs, logprobs=inputs.logprobs[i : i + 1], loss_mask=inputs.loss_mask[i : i + 1]) for i in range(2)
    ]
    parts = [SftLoss()(row)[0].item() for row in rows]
    assert parts == pytest.approx([math.log(8) / 3, math.log(8) / 3])


def test_loss_can_be_sent_to_a_worker() -> None:
    assert pickle.loads(pickle.dumps(SftLoss())) == SftLoss()
