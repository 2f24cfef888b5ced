"""The table of architectures against the models that transformers builds."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from nemo_rl_lora.models.families import FAMILIES, families_for, has_tied_head, rope_types_for, shortening_window

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 32,
}
LENGTH = 9


def built(config):
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_row_says_what_transformers_builds(model_type):
    row = FAMILIES[model_type]
    model = built(AutoConfig.for_model(model_type, **SIZES))
    layer = model.model.layers[-1]
    assert type(model).__name__ == row.architecture
    assert (layer.self_attn.q_proj.bias is not None) is row.has_qkv_bias
    assert hasattr(layer.self_attn, "q_norm") is row.has_qk_norm
    assert hasattr(layer.mlp, "experts") is row.has_experts
    assert hasattr(model.config, "layer_types") is row.has_layer_types
    assert (layer.self_attn.o_proj.bias, model.lm_head.bias) == (None, None)


def test_who_may_use_what():
    assert list(families_for("segments")) == list(families_for("megatron")) == list(FAMILIES)
    assert list(families_for("decoder")) == ["llama", "mistral", "qwen2", "qwen3"]
    assert rope_types_for("megatron") == ("default", "linear", "llama3")
    assert rope_types_for("decoder") == ("default", "linear", "llama3", "yarn")


def overridden(config, **values):
    """As `policy.hf_config_overrides` does it: after the config is made."""
    for name, value in values.items():
        setattr(config, name, value)
    return config


@pytest.mark.parametrize(
    ("config", "window"),
    [
        (MistralConfig(**SIZES, sliding_window=4), 4),
        (MistralConfig(**SIZES, sliding_window=LENGTH - 1), LENGTH - 1),
        (MistralConfig(**SIZES, sliding_window=LENGTH), None),
        (MistralConfig(**SIZES, sliding_window=None), None),
        (Qwen2Config(**SIZES, sliding_window=4), None),
        (Qwen2Config(**SIZES, sliding_window=4, use_sliding_window=True, max_window_layers=1), 4),
        (Qwen2Config(**SIZES, sliding_window=4, use_sliding_window=True, max_window_layers=2), None),
        (overridden(Qwen3Config(**SIZES), sliding_window=4), None),
        (Qwen3Config(**SIZES, sliding_window=4, use_sliding_window=True, max_window_layers=0), 4),
        (Qwen3MoeConfig(**SIZES, num_experts=8, sliding_window=4), None),
        (overridden(Qwen3MoeConfig(**SIZES, num_experts=8), sliding_window=4, use_sliding_window=False), 4),
    ],
)
def test_attention_is_called_plain_where_transformers_computes_it_so(config, window):
    assert shortening_window(config, LENGTH) == window
    tokens = torch.arange(LENGTH)[None]
    shown = built(config)(tokens, use_cache=False).logits
    plain = overridden(config, sliding_window=None)
    if hasattr(plain, "layer_types"):
        plain.layer_types = ["full_attention"] * 2
    assert torch.equal(shown, built(plain)(tokens, use_cache=False).logits) is (window is None)


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_the_embedding_matrix(tied):
    config = AutoConfig.for_model("llama", **SIZES, tie_word_embeddings=tied)
    model = built(config)
    assert has_tied_head(config) is tied is (model.lm_head.weight is model.model.embed_tokens.weight)
