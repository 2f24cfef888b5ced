"""A tiny random model, and what an adapter changes in it."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nemo_rl_lora.lora.targets import LinearModule, resolve_targets


def tiny_llama(num_layers=3):
    """A random Llama of 16 channels."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=32,
            tie_word_embeddings=False,
        )
    )


def resolved(model, spec):
    """The modules of the model that the adapter changes."""
    linears = [
        LinearModule(name=name, in_features=m.in_features, out_features=m.out_features)
        for name, m in model.named_modules()
        if isinstance(m, torch.nn.Linear)
    ]
    return resolve_targets(spec, linears, tied_head=False, model_label="tiny", config_key="lora")
