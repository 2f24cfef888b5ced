"""Every builder of tiny random models. A model of a test's own shape is `random_model` of its config.

| builder | makes | for |
|---|---|---|
| `make_tiny_llama` | a directory: Llama and a tokenizer of bytes | whole runs; the fixture `tiny_llama` |
| `make_vllm_llama` | the same, with heads for vLLM's CPU kernels | whole runs with vLLM; the fixture `vllm_llama` |
| `make_tiny_nemotron_h` | a directory: Nemotron-H, of blocks of all kinds, and a tokenizer of bytes | whole runs |
| `make_character_llama` | a directory: a smaller Llama and a tokenizer of characters | runs whose reads are recorded |
| `random_model` | in memory: any config; no bias is 0, no norm is 1 | the two below |
| `save_random_model` | a directory of one, without tokenizer | policies; the fixture `tiny_model`, of FAMILIES |
| `sampling_model` | in memory: large weights, which make choices clear | engines in this process |
| `small_llama` | in memory: 16 channels, three layers | what an adapter changes in it |
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    NemotronHConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    ZambaConfig,
)

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# Models with a tokenizer

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|a|>{{ m.content }}<|end|>"
    "{% else %}<|{{ m.role }}|>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|a|>{% endif %}"
)


def save_byte_tokenizer(directory: Path) -> int:
    """A tokenizer of bytes with a chat template, of which token 0 ends a text, and the number of its tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|end|>", "<|user|>", "<|a|>"]
    symbols = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_only, eos_token="<|end|>", additional_special_tokens=special[1:]
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return len(symbols)


def make_tiny_llama(directory: Path, **overrides: Any) -> Path:
    """A random Llama of 50,000 parameters with a tokenizer of bytes, as a Hugging Face directory."""
    sizes: dict[str, Any] = {
        "vocab_size": save_byte_tokenizer(directory),
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
        "bos_token_id": None,
    }
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**(sizes | overrides))).save_pretrained(directory)
    return directory


def make_vllm_llama(directory: Path) -> Path:
    """`make_tiny_llama`'s with attention heads that vLLM's CPU kernels take."""
    return make_tiny_llama(directory, hidden_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=32)


def make_tiny_nemotron_h(directory: Path) -> Path:
    """A random Nemotron-H of four blocks with a tokenizer of bytes, as a Hugging Face directory."""
    return save_random_model(nemotron_h(save_byte_tokenizer(directory)), directory)


def make_character_llama(path: Path) -> Path:
    """A random Llama of two layers and a tokenizer of one token a character, as a Hugging Face directory."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<e>", *map(chr, range(32, 127)), "\n"])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<e>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters, eos_token="<e>", unk_token="<e>", pad_token="<e>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(vocabulary),
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=0,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


_LINEARS = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 80), (64, 80), (80, 64)]  # in, out: of one of two layers
VLLM_LLAMA_SYNC_BYTES = {
    "merged": 2 * sum(i * o for i, o in _LINEARS) * 4,
    "adapter": 2 * sum(4 * (i + o) for i, o in _LINEARS) * 4,
}

# Models of any config

VOCABULARY = 211  # of FAMILIES

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

FAMILIES = {
    "llama": LlamaConfig(**_SIZES, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**_SIZES, tie_word_embeddings=False),
    "qwen3": Qwen3Config(**_SIZES, head_dim=16, tie_word_embeddings=True),
    "mistral-window": MistralConfig(**_SIZES, sliding_window=8, tie_word_embeddings=False),
}


def nemotron_h(vocab_size: int) -> NemotronHConfig:
    """A tiny Nemotron-H with a block of each kind: Mamba, experts (two of six for a token), attention, MLP."""
    return NemotronHConfig(
        vocab_size=vocab_size,
        hidden_size=48,
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=80,
        ssm_state_size=16,
        mamba_num_heads=8,
        mamba_head_dim=12,
        n_groups=2,
        chunk_size=16,
        n_routed_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        moe_shared_expert_intermediate_size=40,
        routed_scaling_factor=2.5,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=0,
    )


def mamba(vocab_size: int) -> MambaConfig:
    """A tiny Mamba, of whose kinds of layers one is part of the other."""
    return MambaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=8,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=0,
    )


def zamba(vocab_size: int) -> ZambaConfig:
    """A tiny Zamba of six layers, of which two share their attention."""
    return ZambaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_mamba_heads=2,
        mamba_d_state=8,
        attn_layer_period=3,
        attn_layer_offset=1,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=0,
    )


def random_model(
    config: PretrainedConfig, *, seed: int = 0, moved: float = 0.05, vectors_only: bool = False
) -> PreTrainedModel:
    """A model of this config in fp32.

    Biases and norms start at 0 and 1, which would hide a forgotten one: every parameter, or every vector alone, is
    moved by a normal deviate of this size.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 or not vectors_only:
                parameter.add_(moved * torch.randn_like(parameter))
    return model


def save_random_model(config: PretrainedConfig, directory: Path, **settings: Any) -> Path:
    """`random_model` with these settings, as a Hugging Face directory without a tokenizer."""
    random_model(config, **settings).save_pretrained(directory)
    return directory


def sampling_model(architecture: str, **overrides: Any) -> PreTrainedModel:
    """A model of 97 tokens, none of which ends a text, with weights large enough that its choices are clear."""
    sizes: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "tie_word_embeddings": True,
    }
    config, own = {
        "llama": (LlamaConfig, {}),
        "mistral": (MistralConfig, {"sliding_window": None, "tie_word_embeddings": False}),
        "qwen2": (Qwen2Config, {}),
        "qwen3": (Qwen3Config, {"head_dim": 16, "tie_word_embeddings": False}),
    }[architecture]
    model = random_model(config(**(sizes | own | overrides)), seed=7, moved=0.2, vectors_only=True).eval()
    model.generation_config.eos_token_id = None
    return model


def small_llama() -> LlamaForCausalLM:
    """A random Llama of 16 channels and three layers."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=32,
            tie_word_embeddings=False,
        )
    )
