"""Module names in two vocabularies: Hugging Face (Llama and Qwen style) and Megatron Core. Pure string work.

Contract: `megatron_name` and `hf_names` are inverse to each other on the layers that both vocabularies know. A fused
Megatron layer holds several Hugging Face modules, so one Megatron name gives several Hugging Face names, in the order
in which Megatron stores them. Names that only one side knows (Mamba mixers, vision towers, routers) give None or ().
This module does not look at a model.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

FUSED_PARTS = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_fc1": ("gate_proj", "up_proj"),
}
"""Megatron's fused layers, by last path component, and the Hugging Face modules that each holds."""

HF_PARTS = {**FUSED_PARTS, "linear_proj": ("o_proj",), "linear_fc2": ("down_proj",)}
"""Every Megatron layer that takes an adapter, by last path component."""

OUTPUT_HEAD_NAMES = ("lm_head", "embed_out", "output_layer")
"""Last path components by which the output head is known."""

_MEGATRON_LAYER = {part: layer for layer, parts in HF_PARTS.items() for part in parts}
_ATTENTION_PARTS = ("q_proj", "k_proj", "v_proj", "o_proj")
_HF_NAME = re.compile(r"model\.layers\.(?P<layer>\d+)\.(?P<block>self_attn|mlp(?:\.experts\.\d+)?)\.(?P<part>\w+)")
_MEGATRON_NAME = re.compile(
    r"decoder\.layers\.(?P<layer>\d+)\."
    r"(?P<block>self_attention|mlp(?:\.experts\.local_experts\.\d+)?)\.(?P<part>\w+)"
)


def megatron_name(hf_name: str) -> str | None:
    """Megatron's name of the layer that holds this Hugging Face module, or None where there is none."""
    if hf_name == "lm_head":
        return "output_layer"
    match = _HF_NAME.fullmatch(hf_name)
    if match is None or match["part"] not in _MEGATRON_LAYER:
        return None
    if (match["block"] == "self_attn") != (match["part"] in _ATTENTION_PARTS):
        return None
    block = match["block"].replace("self_attn", "self_attention").replace("experts.", "experts.local_experts.")
    return f"decoder.layers.{match['layer']}.{block}.{_MEGATRON_LAYER[match['part']]}"


def hf_names(megatron: str) -> tuple[str, ...]:
    """The Hugging Face modules that a Megatron layer holds, in Megatron's order; empty where there are none."""
    if megatron == "output_layer":
        return ("lm_head",)
    match = _MEGATRON_NAME.fullmatch(megatron)
    if match is None or match["part"] not in HF_PARTS:
        return ()
    if (match["block"] == "self_attention") != (match["part"] in ("linear_qkv", "linear_proj")):
        return ()
    block = match["block"].replace("self_attention", "self_attn").replace("local_experts.", "")
    return tuple(f"model.layers.{match['layer']}.{block}.{part}" for part in HF_PARTS[match["part"]])


def last_component(name: str) -> str:
    """The part after the last dot; of a glob too, where `*` may reach over dots."""
    return name.rsplit(".", 1)[-1]


def names_fused_layer(pattern: str) -> bool:
    """Whether a target asks for a fused Megatron layer, and so for one shared A.

    It does when its last component reaches `linear_qkv` or `linear_fc1` and none of the modules that they hold:
    `*.layers.0.*` reaches both and asks for modules.
    """
    last = last_component(pattern)
    parts = [part for fused in FUSED_PARTS.values() for part in fused]
    return any(fnmatchcase(fused, last) for fused in FUSED_PARTS) and not any(fnmatchcase(p, last) for p in parts)


def names_fused_part(pattern: str) -> bool:
    """Whether a target asks for a Hugging Face module that Megatron holds inside a fused layer."""
    last = last_component(pattern)
    return any(fnmatchcase(part, last) for parts in FUSED_PARTS.values() for part in parts)


def hf_targets(pattern: str) -> tuple[str, ...]:
    """The last components in the Hugging Face vocabulary that a Megatron target stands for."""
    last = last_component(pattern)
    prefix = pattern[: len(pattern) - len(last)]
    if prefix and not prefix.startswith("*"):
        prefix = prefix.replace("decoder.", "model.").replace("local_experts.", "")
    prefix = prefix.replace("self_attention.", "self_attn.")
    return tuple(prefix + part for layer, parts in HF_PARTS.items() if fnmatchcase(layer, last) for part in parts)
