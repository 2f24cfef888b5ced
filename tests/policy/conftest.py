"""Tiny random models on disk and batches of groups, for the policy's tests."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from nemo_rl_lora.types import Batch, Denominators

VOCABULARY = 211

_SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
}

LLAMA3 = {  # rope_parameters
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 2.0,
    "original_max_position_embeddings": 32,
}

CONFIGS = {
    "llama": LlamaConfig(**_SIZES, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**_SIZES, tie_word_embeddings=False),
    "qwen3": Qwen3Config(**_SIZES, head_dim=16, tie_word_embeddings=True),
    "mistral-window": MistralConfig(**_SIZES, sliding_window=8, tie_word_embeddings=False),
}


def save_random_model(config, directory: Path) -> Path:
    """A model of this config with random weights in fp32, norms and biases included."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def groups_batch() -> Batch:
    return make_groups_batch()


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
