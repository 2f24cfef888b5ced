"""Four processes, FSDP2, Qwen3 of two layers: LoRA tensors are the same bits after a reload, and after a resume."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen3Config

from tests.policy.dtensor.resumed_ranks import NUM_STEPS, reload_and_resume
from tests.policy.test_pairs import make_chats
from tests.rank_processes import run_ranks
from tests.tiny_models import VOCABULARY, save_random_model

QWEN3 = Qwen3Config(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    tie_word_embeddings=False,
)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the processes had: under "step N", "reloaded 1", "resumed N"."""
    model = save_random_model(QWEN3, tmp_path_factory.mktemp("model"))
    meeting = tmp_path_factory.mktemp("meeting")
    run_ranks(4, meeting, reload_and_resume, model, [make_chats() for _ in range(NUM_STEPS)], meeting)
    return torch.load(meeting / "found.pt")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_reloaded_step_has_the_same_bits(found):
    assert same(found["reloaded 1"], found["step 1"])
    assert not same(found["step 1"], found["step 2"])
    assert all(tensor.any() for name, tensor in found["step 1"].items() if ".lora_B." in name)


@pytest.mark.parametrize("step", [3, 4])
def test_a_resumed_run_is_the_one_that_was_not_interrupted(found, step):
    assert same(found[f"resumed {step}"], found[f"step {step}"])
