"""Which models the Megatron backend takes, what it reads of them, and by how many ranks they may be shared."""

import itertools

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    NemotronHConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from nemo_rl_lora.config.megatron import MegatronConfig
from nemo_rl_lora.lora.spec import LoraSpec
from nemo_rl_lora.policy.megatron.families import layer_ranges, parallel_problems, read_family, refuse_expert_targets
from tests.tiny_models import LLAMA3

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 128,
}
EXPERTS = {"head_dim": 16, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
SUPPORTED = (
    "The Megatron backend holds LlamaForCausalLM (Llama 2 and 3.x), MistralForCausalLM, Qwen2ForCausalLM (Qwen2 and "
    "2.5), Qwen3ForCausalLM and Qwen3MoeForCausalLM. Choose one of those, or set policy.backend=dtensor."
)


def family(config, max_length=128):
    return read_family(config, "a/model", max_length)


@pytest.mark.parametrize(
    ("config", "architecture", "bias", "qk_norm", "head_dim"),
    [
        (LlamaConfig(**SIZES), "LlamaForCausalLM", False, False, 8),
        (MistralConfig(**SIZES, sliding_window=None), "MistralForCausalLM", False, False, 8),
        (Qwen2Config(**SIZES), "Qwen2ForCausalLM", True, False, 8),
        (Qwen3Config(**SIZES, head_dim=16), "Qwen3ForCausalLM", False, True, 16),
        (Qwen3MoeConfig(**SIZES, **EXPERTS), "Qwen3MoeForCausalLM", False, True, 16),
    ],
)
def test_what_differs_between_families_is_read(config, architecture, bias, qk_norm, head_dim):
    found = family(config)
    assert (found.architecture, found.has_qkv_bias, found.has_qk_norm) == (architecture, bias, qk_norm)
    assert (found.num_layers, found.hidden_size, found.ffn_size, found.vocab_size) == (4, 32, 48, 64)
    assert (found.num_heads, found.num_kv_heads, found.head_dim) == (4, 2, head_dim)
    assert (found.norm_epsilon, found.max_positions) == (config.rms_norm_eps, 128)


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_read(tied):
    assert family(LlamaConfig(**SIZES, tie_word_embeddings=tied)).has_tied_head is tied


@pytest.mark.parametrize(
    "rotary",
    [
        {"rope_type": "default", "rope_theta": 1e6},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
        LLAMA3,
    ],
)
@pytest.mark.parametrize("make", [LlamaConfig, Qwen3Config])
def test_rotary_frequencies_are_those_of_transformers_bit_for_bit(make, rotary):
    config = make(**SIZES, head_dim=16, rope_parameters=rotary)
    theirs = AutoModelForCausalLM.from_config(config).model.rotary_emb.inv_freq
    assert torch.equal(torch.tensor(family(config).inverse_frequencies), theirs)


@pytest.mark.parametrize("which", [{}, {"mlp_only_layers": [0, 2]}, {"decoder_sparse_step": 2}])
def test_layers_with_experts_are_those_that_transformers_builds(which):
    config = Qwen3MoeConfig(**SIZES, **EXPERTS, **which)
    built = AutoModelForCausalLM.from_config(config).model.layers
    found = family(config)
    assert [found.has_experts(i) for i in range(4)] == [hasattr(layer.mlp, "experts") for layer in built]
    assert found.experts.layers == tuple(hasattr(layer.mlp, "experts") for layer in built)


@pytest.mark.parametrize("normalised", [True, False])
def test_the_router_is_read(normalised):
    experts = family(Qwen3MoeConfig(**SIZES, **EXPERTS, norm_topk_prob=normalised)).experts
    assert (experts.num_experts, experts.num_experts_per_token, experts.ffn_size) == (6, 2, 20)
    assert experts.softmax_before_top_k is not normalised


def test_a_mixture_whose_layers_are_all_dense_has_no_experts():
    assert family(Qwen3MoeConfig(**SIZES, **EXPERTS, mlp_only_layers=[0, 1, 2, 3])).experts is None


def test_a_window_that_no_sequence_outgrows_is_not_in_use():
    assert family(MistralConfig(**SIZES, sliding_window=128), max_length=128)
    assert family(Qwen2Config(**SIZES, sliding_window=16, use_sliding_window=False))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (NemotronHConfig(architectures=["NemotronHForCausalLM"]), "its architecture is NemotronHForCausalLM"),
        (Gemma3TextConfig(), "its architecture is gemma3_text (not named)"),
        (
            LlamaConfig(**SIZES, architectures=["LlamaForSequenceClassification"]),
            "its architecture is LlamaForSequenceClassification",
        ),
        (LlamaConfig(**SIZES, hidden_act="gelu"), "its hidden_act is 'gelu', where only 'silu' is held"),
        (Qwen3Config(**SIZES, attention_dropout=0.1), "its attention_dropout is 0.1, where only 0.0 is held"),
        (LlamaConfig(**SIZES, attention_bias=True), "its attention_bias is True, and a bias on o_proj is not held"),
        (
            LlamaConfig(**SIZES, mlp_bias=True),
            "its mlp_bias is True, and a bias on gate_proj, up_proj and down_proj is not held",
        ),
        (
            MistralConfig(**SIZES, sliding_window=127),
            "its sliding_window of 127 tokens is shorter than policy.max_total_sequence_length=128, where only full "
            "attention is held",
        ),
        (
            LlamaConfig(**SIZES, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}),
            "its rope_type is 'yarn', where only 'default', 'linear', 'llama3' are held",
        ),
        (
            LlamaConfig(**SIZES, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}),
            "its rope_type is 'dynamic', where only 'default', 'linear', 'llama3' are held",
        ),
        (
            LlamaConfig(
                **SIZES,
                rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
            ),
            "its partial_rotary_factor is 0.5, where only 1.0 is held",
        ),
        (
            LlamaConfig(**SIZES, quantization_config={"quant_method": "gptq", "bits": 4}),
            "its weights are quantized, where only float32, bfloat16 and float16 are held",
        ),
        (
            Qwen3MoeConfig(**SIZES, **{**EXPERTS, "num_experts_per_tok": 1}, norm_topk_prob=True),
            "its norm_topk_prob is True with one expert a token, so its router would have no gradient",
        ),
    ],
)
def test_what_cannot_be_held_is_refused_by_name(config, reason):
    with pytest.raises(ValueError) as error:
        family(config)
    assert str(error.value) == f"policy.model_name='a/model': {reason}. {SUPPORTED}"


def stages(num_layers, pp, first, last):
    return MegatronConfig(
        pipeline_model_parallel_size=pp,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
    )


def stages_of_megatron_core(num_layers, pp, first, last):
    """Offset and number of layers of each stage, or None where megatron-core refuses, or loses layers."""
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    try:
        config = TransformerConfig(
            num_layers=num_layers,
            hidden_size=8,
            num_attention_heads=1,
            pipeline_model_parallel_size=pp,
            pipeline_dtype=torch.float32,
            num_layers_in_first_pipeline_stage=first,
            num_layers_in_last_pipeline_stage=last,
        )
        sizes = [get_num_layers_to_build(config, pp_rank=rank) for rank in range(pp)]
    except (ValueError, AssertionError):
        return None
    starts = [get_transformer_layer_offset(config, pp_rank=rank) for rank in range(pp)]
    return list(zip(starts, sizes, strict=True)) if min(sizes) > 0 and sum(sizes) == num_layers else None


def test_pipeline_stages_are_those_of_megatron_core():
    for layout in itertools.product((4, 7), (1, 2, 3, 4), (None, 1, 2, 4), (None, 1, 3)):
        try:
            own = [(layers.start, len(layers)) for layers in layer_ranges(layout[0], stages(*layout))]
        except ValueError:
            own = None
        assert own == stages_of_megatron_core(*layout), layout


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (
            (7, 2, None, None),
            "policy.megatron_cfg.pipeline_model_parallel_size=2: must divide the model's 7 layers. Choose 1 or 7, or "
            "set policy.megatron_cfg.num_layers_in_first_pipeline_stage.",
        ),
        (
            (7, 3, 2, None),
            "policy.megatron_cfg.num_layers_in_first_pipeline_stage=2: leaves 5 of 7 layers to 2 other stages, which "
            "must have as many each, and one at least. Change it or "
            "policy.megatron_cfg.pipeline_model_parallel_size=3.",
        ),
        (
            (4, 2, None, 4),
            "policy.megatron_cfg.num_layers_in_last_pipeline_stage=4: leaves 0 of 4 layers to 1 other stages, which "
            "must have as many each, and one at least. Change it or "
            "policy.megatron_cfg.pipeline_model_parallel_size=2.",
        ),
    ],
)
def test_stages_that_cannot_share_the_layers_are_refused(layout, message):
    with pytest.raises(ValueError) as error:
        layer_ranges(layout[0], stages(*layout))
    assert str(error.value) == message


_KEY = "policy.megatron_cfg"
_DENSE, _SPARSE = family(LlamaConfig(**SIZES)), family(Qwen3MoeConfig(**SIZES, **EXPERTS))


@pytest.mark.parametrize(
    ("model", "sizes", "num_processes", "problem"),
    [
        (
            _DENSE,
            {"tensor_model_parallel_size": 4},
            4,
            f"{_KEY}.tensor_model_parallel_size=4: must divide the model's num_key_value_heads=2. Choose 1 or 2.",
        ),
        (
            _DENSE,
            {"tensor_model_parallel_size": 3},
            3,
            f"{_KEY}.tensor_model_parallel_size=3: must divide the model's num_attention_heads=4, "
            f"num_key_value_heads=2, vocab_size=64. Choose 1 or 2.",
        ),
        (
            family(LlamaConfig(**{**SIZES, "intermediate_size": 49, "vocab_size": 65})),
            {"tensor_model_parallel_size": 2},
            2,
            f"{_KEY}.tensor_model_parallel_size=2: must divide the model's vocab_size=65, intermediate_size=49. "
            f"Choose 1.",
        ),
        (
            _DENSE,
            {"pipeline_model_parallel_size": 3},
            3,
            f"{_KEY}.pipeline_model_parallel_size=3: must divide the model's 4 layers. Choose 1, 2 or 4, or set "
            f"{_KEY}.num_layers_in_first_pipeline_stage.",
        ),
        (
            _DENSE,
            {"tensor_model_parallel_size": 2, "context_parallel_size": 2},
            6,
            f"{_KEY}.tensor_model_parallel_size=2: tensor x pipeline x context parallel ranks are 2 x 1 x 2 = 4, "
            f"which must divide the 6 training processes (cluster.num_nodes x cluster.gpus_per_node). Set "
            f"cluster.gpus_per_node to a multiple of 4, or lower it.",
        ),
        (
            _DENSE,
            {"expert_model_parallel_size": 2},
            2,
            f"{_KEY}.expert_model_parallel_size=2: LlamaForCausalLM has no experts. Set "
            f"{_KEY}.expert_model_parallel_size=1.",
        ),
        (
            _SPARSE,
            {"expert_model_parallel_size": 4},
            4,
            f"{_KEY}.expert_model_parallel_size=4: must divide the model's num_experts=6. Choose 1, 2, 3 or 6.",
        ),
        (
            _SPARSE,
            {"expert_tensor_parallel_size": 3},
            3,
            f"{_KEY}.expert_tensor_parallel_size=3: must divide the model's moe_intermediate_size=20. Choose 1, 2, "
            f"4, 5, 10 or 20.",
        ),
        (
            _SPARSE,
            {"expert_model_parallel_size": 2},
            3,
            f"{_KEY}.expert_model_parallel_size=2: expert tensor x expert x pipeline parallel ranks are 1 x 2 x 1 = "
            f"2, which must divide the 3 training processes (cluster.num_nodes x cluster.gpus_per_node). Change one "
            f"of them.",
        ),
        (
            _SPARSE,
            {"tensor_model_parallel_size": 2},
            2,
            f"{_KEY}.sequence_parallel=False: megatron-core trains experts with 2 tensor-parallel ranks only where "
            f"they share the sequence. Set {_KEY}.sequence_parallel=true.",
        ),
    ],
)
def test_sizes_that_cannot_share_the_model_are_named_with_the_numbers(model, sizes, num_processes, problem):
    assert parallel_problems(model, MegatronConfig(**sizes), num_processes) == [problem]


def test_sizes_that_can_share_the_model_are_no_problem():
    sizes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    assert parallel_problems(_DENSE, MegatronConfig(**sizes), 8) == []
    experts = {"expert_model_parallel_size": 2, "sequence_parallel": True}
    assert parallel_problems(_SPARSE, MegatronConfig(**sizes, **experts), 4) == []


def test_only_a_dense_mlp_binds_its_width():
    sizes = {**SIZES, "intermediate_size": 49}
    tp2 = MegatronConfig(tensor_model_parallel_size=2, sequence_parallel=True)
    assert parallel_problems(family(Qwen3MoeConfig(**sizes, **EXPERTS)), tp2, 2) == []
    mixed = family(Qwen3MoeConfig(**sizes, **EXPERTS, mlp_only_layers=[1]))
    assert "intermediate_size=49" in parallel_problems(mixed, tp2, 2)[0]


@pytest.mark.parametrize(
    ("targets", "target", "reached"),
    [
        (["q_proj", "gate_proj"], "gate_proj", "gate_proj"),
        (["linear_fc2"], "linear_fc2", "down_proj"),
        (["*.experts.*"], "*.experts.*", "gate_proj"),
    ],
)
def test_a_target_that_reaches_experts_is_refused(targets, target, reached):
    spec = LoraSpec(dim=4, alpha=8, targets=tuple(targets))
    with pytest.raises(ValueError) as error:
        refuse_expert_targets(spec, _SPARSE, "policy.lora")
    assert str(error.value) == (
        f"policy.lora.target_modules={targets!r}: {target!r} reaches the experts "
        f"(model.layers.0.mlp.experts.0.{reached}), which transformers holds in one tensor a layer, so an adapter "
        f"there has no module to be loaded into. Target q_proj, k_proj, v_proj and o_proj, or 'all-linear', which "
        f"leaves experts out."
    )


def test_targets_that_reach_no_expert_pass():
    for targets in (("q_proj", "o_proj"), "all-linear", ("*.self_attention.linear_proj",)):
        refuse_expert_targets(LoraSpec(dim=4, alpha=8, targets=targets), _SPARSE, "policy.lora")
    refuse_expert_targets(LoraSpec(dim=4, alpha=8, targets=("gate_proj",)), _DENSE, "policy.lora")
