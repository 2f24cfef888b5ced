"""Rows laid out as batches."""

import pytest
import torch

from nemo_rl_lora.algorithms.batch import collate_examples, collate_rollouts
from nemo_rl_lora.types import Completion, Example, Prompt, RolloutGroup


def _example(token_ids, loss_mask):
    return Example(token_ids=token_ids, loss_mask=loss_mask, source="rows", num_cut_tokens=0)


def test_a_first_token_is_learned_of_no_row_since_nothing_predicts_it():
    batch = collate_examples([_example((5, 6, 7), (True, True, False)), _example((8, 9), (False, True))])
    assert batch.loss_mask.tolist() == [[False, True, False], [False, True, False]]
    assert batch.token_ids.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch.prompt_length.tolist() == [1, 1]
    assert (batch.denominators.num_loss_tokens, batch.denominators.num_sequences) == (2, 2)


@pytest.mark.parametrize(
    ("filtering", "learned"), [(False, [[0, 0, 1, 1], [0, 0, 1, 0]]), (True, [[0] * 4, [0, 0, 1, 0]])]
)
def test_overlong_filtering_learns_nothing_of_a_completion_that_was_cut(filtering, learned):
    prompt = Prompt(index=0, token_ids=(3, 4), text="", row={}, environment="math")
    ends = {"length": (7, 8), "stop": (9,)}
    completions = tuple(
        Completion(token_ids=ids, logprobs=(-1.0,) * len(ids), versions=((len(ids), 0),), text="", finish_reason=reason)
        for reason, ids in ends.items()
    )
    group = RolloutGroup(prompt=prompt, completions=completions, rewards=(0.0, 1.0))
    batch = collate_rollouts([group], torch.tensor([-1.0, 1.0]), overlong_filtering=filtering)
    assert batch.loss_mask.int().tolist() == learned
    assert batch.denominators.num_loss_tokens == sum(map(sum, learned))
