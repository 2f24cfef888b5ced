"""The model shapes of benchmarks/gpu_speed.py, their random weights, and the arithmetic of a token.

FLOP of a token in LoRA training: 4 for each weight of the frozen linear layers, the head included (2 forward, 2 for the
gradient of the inputs; none for the gradient of the weights), and in causal attention over T tokens 6 T q for each
layer, q being the width of all query heads (2 T q forward, twice that backward). Adapters, norms and what activation
checkpointing computes again are not counted. NeMo Automodel's 402 TFLOP/s at 12,473 tokens/s are 4.01 FLOP a weight, so
its figure has no attention, which adds 10 % for 8B at 4,096 tokens: compare tokens/s with it rather than MFU.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config, Qwen3Config

TOY_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 256,
}
NO_SPECIAL_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}  # nothing ends a completion


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    name: str
    config_class: Any  # of transformers
    sizes: Mapping[str, Any]

    def config(self, *, toy: bool) -> Any:
        """transformers' config; `toy`: the same architecture, small enough for a CPU."""
        sizes = {**self.sizes, **TOY_SIZES} if toy else self.sizes
        return self.config_class(**sizes, **NO_SPECIAL_TOKENS)


LLAMA_8B = Shape(
    name="Llama-3.1-8B",
    config_class=LlamaConfig,
    sizes={
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    },
)
LLAMA_1B = Shape(
    name="Llama-3.2-1B",
    config_class=LlamaConfig,
    sizes={
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
)
QWEN3_4B = Shape(
    name="Qwen3-4B",
    config_class=Qwen3Config,
    sizes={
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
    },
)
QWEN2_HALF_B = Shape(
    name="Qwen2.5-0.5B",
    config_class=Qwen2Config,
    sizes={
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    },
)


def random_model(config: Any, device: str, *, attention: str) -> PreTrainedModel:
    """bf16 weights drawn on the device, in evaluation mode."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=torch.bfloat16, attn_implementation=attention
        )
    model.config.dtype = torch.bfloat16
    return model.eval()


def flop_of_token(config: Any, num_tokens: int) -> float:
    """Of a LoRA training step, in sequences of this many tokens; the module's formula."""
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (2 * q + 2 * kv + 3 * config.intermediate_size)
    num_weights = config.num_hidden_layers * layer + config.hidden_size * config.vocab_size
    return 4.0 * num_weights + 6.0 * num_tokens * q * config.num_hidden_layers
