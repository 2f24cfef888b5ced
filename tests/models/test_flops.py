"""FLOP rates of known models, written out by hand; tests/policy/test_flops.py counts what runs."""

import pytest
from transformers import GemmaConfig, LlamaConfig, MistralConfig, Qwen3MoeConfig

from nemo_rl_lora.lora.spec import LoraSpec
from nemo_rl_lora.lora.targets import resolve_targets
from nemo_rl_lora.models.flops import flop_rates, why_not_counted
from nemo_rl_lora.models.load import empty_model, linear_modules
from nemo_rl_lora.types import StepOutput

LLAMA_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    tie_word_embeddings=False,
)
LAYER = 4096 * (4096 + 1024 + 1024 + 4096 + 3 * 14336)


def test_a_frozen_weight_costs_four_a_trained_one_six_and_embeddings_nothing():
    model = empty_model(LLAMA_8B)
    adapted = resolve_targets(
        LoraSpec(dim=16, alpha=32), linear_modules(model), tied_head=False, model_label="8B", config_key="lora"
    )
    lora, every = flop_rates(model, adapted), flop_rates(model, None)
    adapter = 16 * 32 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    assert lora.per_token == 4 * 32 * LAYER + 6 * adapter
    assert every.per_token == 6 * 32 * LAYER
    assert (lora.per_loss_token, every.per_loss_token) == (4 * 4096 * 128256, 6 * 4096 * 128256)
    assert lora.per_score == every.per_score == 3 * 4 * 128 * 32 * 32


def test_a_tied_head_is_no_weight_of_the_body():
    tied = empty_model(LlamaConfig(**{**LLAMA_8B.to_dict(), "tie_word_embeddings": True}))
    assert flop_rates(tied, ()) == flop_rates(empty_model(LLAMA_8B), ())


def test_of_experts_those_that_a_token_is_sent_to_count():
    config = Qwen3MoeConfig(
        hidden_size=64,
        moe_intermediate_size=32,
        num_experts=8,
        num_experts_per_tok=2,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=256,
    )
    attention, router, expert = 64 * (64 + 32 + 32 + 64), 64 * 8, 3 * 64 * 32
    assert flop_rates(empty_model(config), None).per_token == 6 * (attention + router + 2 * expert)


def test_a_step_is_priced_by_its_tokens_loss_tokens_and_scores():
    rates = flop_rates(empty_model(LLAMA_8B), ())
    output = StepOutput(
        loss=0.0,
        grad_norm=0.0,
        lr=0.0,
        metrics={},
        num_forward_tokens=100,
        num_padding_tokens=36,
        num_loss_tokens=20,
        num_attention_scores=2080,
    )
    expected = 64 * 4 * 32 * LAYER + 20 * 4 * 4096 * 128256 + 2080 * 12 * 4096 * 32
    assert rates.of_step(output) == pytest.approx(expected, rel=1e-12)


def test_what_is_not_known_is_said():
    assert why_not_counted(LLAMA_8B, 8192) is None
    assert "of gemma is not known" in why_not_counted(GemmaConfig(), 64)
    assert "(of 32 tokens)" in why_not_counted(MistralConfig(sliding_window=32), 64)
    assert why_not_counted(MistralConfig(sliding_window=64), 64) is None
