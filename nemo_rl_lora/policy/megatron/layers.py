"""megatron-core's GPTModel over layers of our own: it takes the flat layout and gives hidden states.

Contract: `build_model` makes one pipeline stage with uninitialised weights; the caller loads them. Attention is
policy/attention.py's, so packed sequences and shared prompts are computed as on the DTensor backend, and norms,
rotary positions and activation have the arithmetic of transformers. The model stays in evaluation mode: no layer here
draws a random number, and dropout is the adapters'. Logits are not computed here (forward.py).
"""

from __future__ import annotations

import contextlib
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nemo_rl_lora.config.megatron import MegatronConfig
from nemo_rl_lora.policy.adapter_state import AdapterSwitch
from nemo_rl_lora.policy.attention import AttentionPlan, segment_attention
from nemo_rl_lora.policy.megatron.context import ContextPlan, context_attention
from nemo_rl_lora.policy.megatron.convert import ParallelLayout
from nemo_rl_lora.policy.megatron.families import Experts, Family


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatRun:
    """What attention needs to know of a microbatch. It travels through the model as its `packed_seq_params`."""

    attention: AttentionPlan | ContextPlan
    cos: Tensor  # [N, 1, 1, head_dim], in the compute dtype; N is of this context-parallel rank's tokens
    sin: Tensor
    qkv_format: str = "flat"  # megatron-core asks whether it is "thd": queries are [N, 1, heads, head_dim] otherwise


def flat_run(
    position_ids: Tensor, attention: AttentionPlan | ContextPlan, frequencies: Tensor, dtype: torch.dtype
) -> FlatRun:
    """The rotary table of tokens at these positions [N], which restart with each sequence, beside their attention.

    frequencies: the family's inverse frequencies, fp32.
    """
    angles = position_ids.float()[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)[:, None, None]
    return FlatRun(attention=attention, cos=angles.cos().to(dtype), sin=angles.sin().to(dtype))


class StageModel(GPTModel):
    """One pipeline stage. `forward` gives hidden states [N, 1, H], after the final norm on the last stage."""

    def _postprocess(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states

    def setup_embeddings_and_output_layer(self) -> None:
        """Nothing: both copies of a tied head are loaded, and none is initialised."""

    @property
    def head_weight(self) -> Tensor:
        """[V, H], or a rank's rows of it."""
        weight = self.output_layer.weight
        if weight is None:  # tied, and the embeddings are on this stage
            weight = self.embedding.word_embeddings.weight
        return weight


class Layer(TransformerLayer):
    """A transformer layer that, with `recompute`, keeps only its input for the backward pass.

    `switch` is of the adapters in it: what is computed again drops what was dropped, whatever has begun since.
    """

    recompute = False
    switch: AdapterSwitch | None = None

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        if not (self.recompute and torch.is_grad_enabled()):
            return super().forward(hidden_states=hidden_states, **kwargs)

        switch = self.switch
        seed = None if switch is None else switch.dropout_seed

        def run(hidden: Tensor) -> Any:
            with contextlib.nullcontext() if switch is None else switch.dropping(seed):
                return super(Layer, self).forward(hidden_states=hidden, **kwargs)

        return checkpoint(run, hidden_states, use_reentrant=False, preserve_rng_state=False)


class RMSNorm(nn.Module):
    """weight * x / rms(x), normalised in fp32 and multiplied in x's dtype, as transformers does."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class SegmentAttention(nn.Module):
    """Rotary positions and attention within segments, for this rank's heads."""

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        super().__init__()
        assert config.attention_dropout == 0.0, config.attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: FlatRun,
        **_: Any,
    ) -> Tensor:
        """query [N, 1, heads, d], key and value [N, 1, kv heads, d] -> [N, 1, heads * d]."""
        run = packed_seq_params
        q, k = (x * run.cos + _rotate_half(x) * run.sin for x in (query, key))
        if isinstance(run.attention, ContextPlan):
            return context_attention(q[:, 0], k[:, 0], value[:, 0], run.attention).flatten(1)[:, None]
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, value))
        out, _none = segment_attention(self, q, k, v, attention_mask, attention_plan=run.attention)
        return out.reshape(out.shape[1], 1, -1)


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


class GatedSilu(nn.Module):
    """silu(gate) * up of [.., gate | up]."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up


def transformer_config(family: Family, megatron: MegatronConfig, dtype: torch.dtype) -> TransformerConfig:
    """megatron-core's own description of the model, with every fusion off."""
    fields: dict[str, Any] = {
        "num_layers": family.num_layers,
        "hidden_size": family.hidden_size,
        "ffn_hidden_size": family.ffn_size,
        "num_attention_heads": family.num_heads,
        "num_query_groups": family.num_kv_heads,
        "kv_channels": family.head_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": family.norm_epsilon,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "use_te_activation_func": True,  # the activation is the layer spec's own
        "add_bias_linear": False,
        "add_qkv_bias": family.has_qkv_bias,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "params_dtype": dtype,
        "use_cpu_initialization": True,  # no weight is drawn: they are loaded, then moved to the device
        "perform_initialization": False,
        "tensor_model_parallel_size": megatron.tensor_model_parallel_size,
        "pipeline_model_parallel_size": megatron.pipeline_model_parallel_size,
        "context_parallel_size": megatron.context_parallel_size,
        "expert_model_parallel_size": megatron.expert_model_parallel_size,
        "expert_tensor_parallel_size": megatron.expert_tensor_parallel_size,
        "sequence_parallel": megatron.sequence_parallel,
        "num_layers_in_first_pipeline_stage": megatron.num_layers_in_first_pipeline_stage,
        "num_layers_in_last_pipeline_stage": megatron.num_layers_in_last_pipeline_stage,
        "pipeline_dtype": dtype,
        "calculate_per_token_loss": True,  # a loss is divided by its denominators, and by nothing else
        "cuda_graph_scope": [],
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
    }
    if family.experts is not None:
        fields |= _expert_fields(family.experts, megatron)
    config = TransformerConfig(**fields)
    # Set afterwards, since it is refused beside the allgather dispatcher, whose ranks must have equal lengths. They do.
    config.variable_seq_lengths = megatron.pipeline_model_parallel_size > 1
    return config


def _expert_fields(experts: Experts, megatron: MegatronConfig) -> dict[str, Any]:
    return {
        "num_moe_experts": experts.num_experts,
        "moe_router_topk": experts.num_experts_per_token,
        "moe_ffn_hidden_size": experts.ffn_size,
        "moe_router_pre_softmax": experts.softmax_before_top_k,
        "moe_layer_freq": [int(has_experts) for has_experts in experts.layers],
        "moe_router_load_balancing_type": "none",  # as on the DTensor backend
        "moe_router_dtype": megatron.moe_router_dtype,
        # alltoall runs on side streams of CUDA
        "moe_token_dispatcher_type": megatron.moe_token_dispatcher_type if torch.cuda.is_available() else "allgather",
    }


def build_model(family: Family, layout: ParallelLayout, config: TransformerConfig) -> StageModel:
    """This rank's part of the model, its weights not initialised, in evaluation mode."""
    layers = [_layer_spec(family, layer) for layer in layout.layers]
    model = StageModel(
        config,
        TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm),  # type: ignore[arg-type]
        vocab_size=family.vocab_size,
        max_sequence_length=family.max_positions,
        pre_process=layout.pp_rank == 0,
        post_process=layout.pp_rank == layout.pp - 1,
        share_embeddings_and_output_weights=family.has_tied_head,
        position_embedding_type="none",  # SegmentAttention rotates
    )
    return model.eval()


def _parallel_linears() -> tuple[Any, Any]:
    """Column- and row-parallel layers: Transformer Engine's where it and CUDA are there."""
    if torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None:
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

        return TEColumnParallelLinear, TERowParallelLinear
    return ColumnParallelLinear, RowParallelLinear


def _layer_spec(family: Family, layer: int) -> ModuleSpec:
    column, row = _parallel_linears()
    norm = RMSNorm if family.has_qk_norm else IdentityOp
    attention = SelfAttentionSubmodules(
        linear_qkv=column,
        core_attention=SegmentAttention,  # type: ignore[arg-type]
        linear_proj=row,
        q_layernorm=norm,
        k_layernorm=norm,
    )
    mlp = MLPSubmodules(linear_fc1=column, activation_func=GatedSilu, linear_fc2=row)
    if family.has_experts(layer):
        experts = MoESubmodules(experts=ModuleSpec(module=SequentialMLP, submodules=mlp))
        feed_forward = ModuleSpec(module=MoELayer, submodules=experts)
    else:
        feed_forward = ModuleSpec(module=MLP, params={"ffn_hidden_size": family.ffn_size}, submodules=mlp)
    return ModuleSpec(
        module=Layer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
            ),
            self_attn_bda=get_bias_dropout_add,  # type: ignore[arg-type]
            pre_mlp_layernorm=RMSNorm,
            mlp=feed_forward,
            mlp_bda=get_bias_dropout_add,  # type: ignore[arg-type]
        ),
    )
