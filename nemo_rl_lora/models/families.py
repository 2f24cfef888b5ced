"""The architectures that this product computes itself: one row each, and what may use it.

Contract: a model is known by its transformers `model_type`. A row holds what differs between families that are alike in
the rest: RMSNorm before attention and before the MLP, a gated MLP, grouped heads, rotary positions. `segments` is
training on flat runs of tokens (policy/attention.py), `decoder` the in-process engine's fast decoder
(generation/in_process/decoder.py), `megatron` the Megatron backend (policy/megatron/families.py), `tensor_parallel`
the DTensor backend with matrices split between ranks (policy/dtensor/limits.py). What a family lacks is done by
transformers' own forward pass, or refused by whoever needs it. Reads no weight, imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Use = Literal["segments", "decoder", "megatron", "tensor_parallel"]
ALL_USES: tuple[Use, ...] = ("segments", "decoder", "megatron", "tensor_parallel")


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyTraits:
    """What is known of a model type."""

    architecture: str  # its causal language model in transformers
    known_as: str = ""  # what people call it, where the class does not say so
    has_qkv_bias: bool = False
    has_qk_norm: bool = False  # RMSNorm over each head of q and k
    has_experts: bool = False
    has_layer_types: bool = False  # a window counts only in layers that `layer_types` calls sliding_attention
    uses: tuple[Use, ...] = ALL_USES


FAMILIES = {
    "llama": FamilyTraits(architecture="LlamaForCausalLM", known_as="Llama 2 and 3.x"),
    "mistral": FamilyTraits(architecture="MistralForCausalLM"),
    "qwen2": FamilyTraits(
        architecture="Qwen2ForCausalLM", known_as="Qwen2 and 2.5", has_qkv_bias=True, has_layer_types=True
    ),
    "qwen3": FamilyTraits(architecture="Qwen3ForCausalLM", has_qk_norm=True, has_layer_types=True),
    "qwen3_moe": FamilyTraits(
        architecture="Qwen3MoeForCausalLM", has_qk_norm=True, has_experts=True, uses=("segments", "megatron")
    ),
}
"""transformers' model_type -> its row."""

ROPE_TYPES: dict[str, tuple[Use, ...]] = {
    "default": ALL_USES,
    "linear": ALL_USES,
    "llama3": ALL_USES,
    "yarn": ("segments", "decoder"),  # it scales cosines and sines too, which megatron-core's layers here do not
}
"""Rotary embeddings whose frequencies do not depend on a sequence's length. Segments take any: transformers turns."""


def families_for(use: Use) -> dict[str, FamilyTraits]:
    """model_type -> row, of those that may be used so."""
    return {model_type: family for model_type, family in FAMILIES.items() if use in family.uses}


def rope_types_for(use: Use) -> tuple[str, ...]:
    """The rope types that may be used so."""
    return tuple(name for name, uses in ROPE_TYPES.items() if use in uses)


def shortening_window(config: Any, max_length: int) -> int | None:
    """The sliding window that hides positions in a sequence of `max_length` tokens; None where attention is plainly
    causal.

    The rule is that of transformers' layers. They never read `use_sliding_window`: a config folds it into
    `sliding_window` when it is made. A window as long as the sequence hides nothing.
    """
    window = getattr(config, "sliding_window", None)
    family = FAMILIES.get(config.model_type)
    if family is not None and family.has_layer_types and "sliding_attention" not in config.layer_types:
        return None
    return window if window is not None and window < max_length else None


def changing_positions(config: Any, max_length: int) -> tuple[str, int] | None:
    """The rope type by which a position turns otherwise in a long sequence than in a short one, and the length from
    which it does, where sequences of `max_length` tokens are longer: rows would depend on those beside them."""
    settings = getattr(config, "rope_parameters", None) or {}
    for rotary in settings.values() if all(isinstance(part, dict) for part in settings.values()) else [settings]:
        longest = int(getattr(config, "max_position_embeddings", max_length))
        if rotary.get("rope_type") == "longrope":
            longest = rotary.get("original_max_position_embeddings") or longest
        elif rotary.get("rope_type") != "dynamic":
            continue
        if max_length > longest:
            return rotary["rope_type"], longest
    return None


def has_tied_head(config: Any) -> bool:
    """Whether the output head of a transformers config is its embedding matrix."""
    return bool(getattr(config.get_text_config(), "tie_word_embeddings", False))
