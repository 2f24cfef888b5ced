"""Microbatches through this process's stage: megatron-core's schedules, without a pipeline and with one (1F1B).

Contract: `run_microbatches` sends every microbatch through all stages, and backward where it is asked to; what the
last stage makes of the hidden states is the caller's. Source of the schedule: Narayanan et al. 2021,
https://arxiv.org/abs/2104.04473, section 2.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

if TYPE_CHECKING:
    from nemo_rl_lora.policy.megatron.layers import StageModel

Part = TypeVar("Part")  # a microbatch
Found = TypeVar("Found")


def run_microbatches(
    model: StageModel,
    microbatches: Iterator[Part],
    number: int,
    stage: Callable[[int, Part], Tensor],
    finish: Callable[[Part, Tensor], tuple[Tensor, Found]],
    *,
    backward: bool,
) -> list[Found]:
    """What `finish` found of each microbatch, in their order; empty but on the last stage.

    Each of this number of microbatches is taken when its turn comes. `stage` gives what this stage hands on, [N, 1, H],
    of a microbatch and its place; `finish`, on the last stage, the loss and whatever the caller wants to have.
    """
    if not number:
        return []

    def forward(items: Iterator[tuple[int, Part]], _model: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
        place, part = next(items)
        hidden = stage(place, part)
        if backward and not hidden.requires_grad:
            hidden.requires_grad_()  # nothing in this stage is trained, and the schedule asks for a gradient
        return hidden, partial(finished, part)

    def finished(part: Part, hidden: Tensor) -> tuple[Tensor, int, Found]:
        """A loss, in the form that megatron-core neither scales nor averages (calculate_per_token_loss)."""
        loss, found = finish(part, hidden)
        return loss, 0, found

    with torch.set_grad_enabled(backward):
        return get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=enumerate(microbatches),
            model=model,
            num_microbatches=number,
            seq_length=0,  # stages tell each other the shapes (variable_seq_lengths)
            micro_batch_size=1,
            forward_only=not backward,
        )
