"""Batches for the policy's tests."""

from collections.abc import Sequence

import torch

from nemo_rl_lora.distributed.ranks import ALONE
from nemo_rl_lora.policy.microbatches import Cutting, Microbatch, MicrobatchPlan, Segment
from nemo_rl_lora.types import Batch, Denominators
from tests.tiny_models import VOCABULARY


def make_groups_batch() -> Batch:
    """Two groups (3 and 4 rows), prompts of 9 and 14 tokens, one completion empty, lengths from 9 to 40."""
    generator = torch.Generator().manual_seed(1)
    prompt_length = torch.tensor([9, 9, 9, 14, 14, 14, 14])
    sequence_length = torch.tensor([20, 31, 9, 40, 22, 15, 33])
    group_index = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    token_ids = torch.randint(0, VOCABULARY, (7, 40), generator=generator)
    for row, group in enumerate(group_index.tolist()):
        first = group_index.tolist().index(group)
        token_ids[row, : prompt_length[row]] = token_ids[first, : prompt_length[row]]
    columns = torch.arange(40)[None]
    loss_mask = (columns >= prompt_length[:, None]) & (columns < sequence_length[:, None])
    shape = (7, 40)
    return Batch(
        token_ids=token_ids,
        loss_mask=loss_mask,
        sequence_length=sequence_length,
        prompt_length=prompt_length,
        group_index=group_index,
        denominators=Denominators(num_loss_tokens=int(loss_mask.sum()), num_sequences=int(loss_mask.any(1).sum())),
        generation_logprobs=-torch.rand(shape, generator=generator) * loss_mask,
        advantages=torch.randn(7, generator=generator),
    )


def microbatches_of(batch: Batch, plan: MicrobatchPlan) -> list[Microbatch]:
    """How one process cuts a batch."""
    return Cutting(train=plan, logprob=plan, share=ALONE).portions(batch, "train")[0].microbatches()


def segments_of(layout: Sequence[tuple[int, int | None]]) -> tuple[Segment, ...]:
    """Segments that follow each other, from the length and the parent of each."""
    starts = [sum(length for length, _ in layout[:i]) for i in range(len(layout))]
    return tuple(
        Segment(start=start, length=length, parent=parent)
        for start, (length, parent) in zip(starts, layout, strict=True)
    )
