"""Which models the Megatron backend holds, what each needs to be built, and how many ranks may share one.

Contract: `read_family` turns a transformers config into a Family or refuses it; `layer_ranges` and `parallel_problems`
judge a parallel layout; nothing here reads a weight, starts a process or imports megatron. The vocabulary is never
padded: tensor parallelism must divide it. Left out: sliding windows, yarn and other rotary embeddings that change with
the length, biases outside q, k and v, shared experts, quantized weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from nemo_rl_lora.config.megatron import MegatronConfig
from nemo_rl_lora.lora.spec import LoraSpec
from nemo_rl_lora.lora.targets import AdaptedModule, module_matches
from nemo_rl_lora.models.families import families_for, has_tied_head, rope_types_for, shortening_window

_KEY = "policy.megatron_cfg"
_HELD = families_for("megatron")


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """The mixture of experts of a model. Its router scores with a softmax in fp32, and adds no loss of its own."""

    num_experts: int
    num_experts_per_token: int
    ffn_size: int
    softmax_before_top_k: bool  # false: the chosen experts' scores sum to 1 (norm_topk_prob)
    layers: tuple[bool, ...]  # per layer: whether it has experts in place of a dense MLP (moe_layer_freq)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A model as megatron-core's TransformerConfig and GPTModel need it: RMSNorm, gated silu, rotary positions."""

    architecture: str
    num_layers: int
    hidden_size: int
    ffn_size: int  # of a dense MLP
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_epsilon: float
    inverse_frequencies: tuple[float, ...]  # of the rotary positions, fp32, scaling applied
    max_positions: int
    vocab_size: int
    has_tied_head: bool
    has_qkv_bias: bool
    has_qk_norm: bool
    experts: Experts | None

    def has_experts(self, layer: int) -> bool:
        """Whether this layer, by its global number, is a mixture of experts."""
        return self.experts is not None and self.experts.layers[layer]


def read_family(config: Any, model_name: str, max_length: int) -> Family:
    """The family of a transformers config, for sequences of up to `max_length` tokens.

    ValueError for a model that Megatron's layers would not compute as transformers does.
    """
    reason = _unknown_architecture(config) or next(_unsupported_settings(config, max_length), None)
    if reason is not None:
        *others, last = (f"{f.architecture} ({f.known_as})" if f.known_as else f.architecture for f in _HELD.values())
        raise ValueError(
            f"policy.model_name={model_name!r}: {reason}. The Megatron backend holds {', '.join(others)} and {last}. "
            f"Choose one of those, or set policy.backend=dtensor."
        )
    traits = _HELD[config.model_type]
    rotary = LlamaRotaryEmbedding(config)  # transformers' own scaling; the same class for every family here
    return Family(
        architecture=traits.architecture,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_size=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        norm_epsilon=config.rms_norm_eps,
        inverse_frequencies=tuple(rotary.inv_freq.tolist()),
        max_positions=config.max_position_embeddings,
        vocab_size=config.vocab_size,
        has_tied_head=has_tied_head(config),
        has_qkv_bias=traits.has_qkv_bias,
        has_qk_norm=traits.has_qk_norm,
        experts=_read_experts(config) if traits.has_experts else None,
    )


def _read_experts(config: Any) -> Experts | None:
    layers = tuple(
        layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0
        for layer in range(config.num_hidden_layers)
    )
    if not any(layers) or config.num_experts == 0:
        return None
    return Experts(
        num_experts=config.num_experts,
        num_experts_per_token=config.num_experts_per_tok,
        ffn_size=config.moe_intermediate_size,
        softmax_before_top_k=not config.norm_topk_prob,
        layers=layers,
    )


def _unknown_architecture(config: Any) -> str | None:
    traits = _HELD.get(config.model_type)
    known = None if traits is None else traits.architecture
    named = (getattr(config, "architectures", None) or [known or f"{config.model_type} (not named)"])[0]
    return None if named == known else f"its architecture is {named}"


def _unsupported_settings(config: Any, max_length: int) -> Iterator[str]:
    """What its config.json says that Megatron's layers would compute otherwise, or not at all."""
    if config.hidden_act != "silu":
        yield f"its hidden_act is {config.hidden_act!r}, where only 'silu' is held"
    if config.attention_dropout:
        yield f"its attention_dropout is {config.attention_dropout}, where only 0.0 is held"
    for key, layers in (("attention_bias", "o_proj"), ("mlp_bias", "gate_proj, up_proj and down_proj")):
        if getattr(config, key, False):
            yield f"its {key} is True, and a bias on {layers} is not held"
    if (window := shortening_window(config, max_length)) is not None:
        yield (
            f"its sliding_window of {window} tokens is shorter than policy.max_total_sequence_length={max_length}, "
            f"where only full attention is held"
        )
    rotary = config.rope_parameters
    if rotary["rope_type"] not in (held := rope_types_for("megatron")):
        yield f"its rope_type is {rotary['rope_type']!r}, where only {', '.join(map(repr, held))} are held"
    if rotary.get("partial_rotary_factor", 1.0) != 1.0:
        yield f"its partial_rotary_factor is {rotary['partial_rotary_factor']}, where only 1.0 is held"
    if getattr(config, "quantization_config", None) is not None:
        yield "its weights are quantized, where only float32, bfloat16 and float16 are held"
    if getattr(config, "norm_topk_prob", False) and config.num_experts_per_tok == 1:
        yield "its norm_topk_prob is True with one expert a token, so its router would have no gradient"


def layer_ranges(num_layers: int, megatron: MegatronConfig) -> tuple[range, ...]:
    """The layers of each pipeline stage, by global number. Raises ValueError where stages cannot share them."""
    num_stages = megatron.pipeline_model_parallel_size
    first, last = megatron.num_layers_in_first_pipeline_stage, megatron.num_layers_in_last_pipeline_stage
    layers_left = num_layers - (first or 0) - (last or 0)
    stages_left = num_stages - (first is not None) - (last is not None)
    between = [layers_left // stages_left] * stages_left if stages_left > 0 else []
    sizes = [size for size in (first, *between, last) if size is not None]
    if len(sizes) != num_stages or sum(sizes) != num_layers or min(sizes) < 1:
        if first is None and last is None:
            raise ValueError(
                f"{_KEY}.pipeline_model_parallel_size={num_stages}: must divide the model's {num_layers} layers. "
                f"Choose {_divisors(num_layers)}, or set {_KEY}.num_layers_in_first_pipeline_stage."
            )
        key, value = ("first", first) if first is not None else ("last", last)
        raise ValueError(
            f"{_KEY}.num_layers_in_{key}_pipeline_stage={value}: leaves {layers_left} of {num_layers} layers to "
            f"{stages_left} other stages, which must have as many each, and one at least. Change it or "
            f"{_KEY}.pipeline_model_parallel_size={num_stages}."
        )
    starts = [sum(sizes[:stage]) for stage in range(num_stages)]
    return tuple(range(start, start + size) for start, size in zip(starts, sizes, strict=True))


def parallel_problems(family: Family, megatron: MegatronConfig, num_processes: int) -> list[str]:
    """A paragraph for each size of `policy.megatron_cfg` by which this model cannot be shared."""
    problems = [*_tensor_problems(family, megatron), *_expert_problems(family, megatron)]
    try:
        layer_ranges(family.num_layers, megatron)
    except ValueError as error:
        problems.append(str(error))
    tp, pp = megatron.tensor_model_parallel_size, megatron.pipeline_model_parallel_size
    cp, ep = megatron.context_parallel_size, megatron.expert_model_parallel_size
    etp = megatron.expert_tensor_parallel_size
    processes = f"the {num_processes} training processes (cluster.num_nodes x cluster.gpus_per_node)"
    if num_processes % (tp * pp * cp):
        problems.append(
            f"{_KEY}.tensor_model_parallel_size={tp}: tensor x pipeline x context parallel ranks are {tp} x {pp} x "
            f"{cp} = {tp * pp * cp}, which must divide {processes}. Set cluster.gpus_per_node to a multiple of "
            f"{tp * pp * cp}, or lower it."
        )
    if num_processes % (etp * ep * pp):
        problems.append(
            f"{_KEY}.expert_model_parallel_size={ep}: expert tensor x expert x pipeline parallel ranks are {etp} x "
            f"{ep} x {pp} = {etp * ep * pp}, which must divide {processes}. Change one of them."
        )
    return problems


def _tensor_problems(family: Family, megatron: MegatronConfig) -> Iterator[str]:
    tp = megatron.tensor_model_parallel_size
    shared = {
        "num_attention_heads": family.num_heads,
        "num_key_value_heads": family.num_kv_heads,
        "vocab_size": family.vocab_size,
    }
    if family.experts is None or not all(family.experts.layers):
        shared["intermediate_size"] = family.ffn_size
    if broken := [f"{key}={size}" for key, size in shared.items() if size % tp]:
        yield (
            f"{_KEY}.tensor_model_parallel_size={tp}: must divide the model's {', '.join(broken)}. Choose "
            f"{_divisors(gcd(*shared.values()))}."
        )
    if family.experts is not None and tp > 1 and not megatron.sequence_parallel:
        yield (
            f"{_KEY}.sequence_parallel=False: megatron-core trains experts with {tp} tensor-parallel ranks only where "
            f"they share the sequence. Set {_KEY}.sequence_parallel=true."
        )


def _expert_problems(family: Family, megatron: MegatronConfig) -> Iterator[str]:
    experts = family.experts
    sizes = {
        "expert_model_parallel_size": ("num_experts", experts and experts.num_experts),
        "expert_tensor_parallel_size": ("moe_intermediate_size", experts and experts.ffn_size),
    }
    for key, (name, size) in sizes.items():
        ranks: int = getattr(megatron, key)
        if size is None and ranks > 1:
            yield f"{_KEY}.{key}={ranks}: {family.architecture} has no experts. Set {_KEY}.{key}=1."
        elif size is not None and size % ranks:
            yield f"{_KEY}.{key}={ranks}: must divide the model's {name}={size}. Choose {_divisors(size)}."


def refuse_expert_targets(spec: LoraSpec, family: Family, config_key: str) -> None:
    """ValueError for a target that reaches an expert. `config_key` is the dotted key of the LoRA block.

    transformers holds experts in tensors of three dimensions, so an adapter per expert has no Hugging Face module.
    """
    if family.experts is None or isinstance(spec.targets, str):
        return
    layer = family.experts.layers.index(True)
    modules = [f"model.layers.{layer}.mlp.experts.0.{part}" for part in ("gate_proj", "up_proj", "down_proj")]
    for target in spec.targets:
        if reached := next((module for module in modules if module_matches(target, module)), None):
            raise ValueError(
                f"{config_key}.target_modules={list(spec.targets)!r}: {target!r} reaches the experts ({reached}), "
                f"which transformers holds in one tensor a layer, so an adapter there has no module to be loaded "
                f"into. Target q_proj, k_proj, v_proj and o_proj, or 'all-linear', which leaves experts out."
            )


def adapter_problems(adapted: Sequence[AdaptedModule], megatron: MegatronConfig, config_key: str) -> list[str]:
    """A paragraph where tensor-parallel ranks cannot share an adapter: A of a column-parallel layer is split by dim."""
    tp = megatron.tensor_model_parallel_size
    broken = [m for m in adapted if m.dim % tp and m.name.rsplit(".", 1)[-1] not in ("o_proj", "down_proj")]
    if not broken:
        return []
    return [
        f"{config_key}.dim={broken[0].dim}: tensor-parallel ranks share A of {broken[0].name} by its dim, so "
        f"{_KEY}.tensor_model_parallel_size={tp} must divide it. Use a multiple of {tp}."
    ]


def _divisors(number: int) -> str:
    """ "1, 2 or 4": the divisors of a number, up to 64."""
    found = [str(n) for n in range(1, min(number, 64) + 1) if number % n == 0]
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])} or {found[-1]}"
