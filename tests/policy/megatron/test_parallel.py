"""Processes that share a model train what one process trains: every way to share it, with adapters whose B is not zero.

The expected values are those of world size 1, which other tests hold against transformers, PEFT and the other backend.
"""

from __future__ import annotations

import pytest
from transformers import LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from tests.policy.dtensor.test_policy import spec
from tests.policy.parallel_ranks import Case
from tests.policy.sharing import (
    BF16,
    PACKED,
    ROUNDED,
    checked,
    find,
)
from tests.tiny_models import LLAMA3

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 212,  # the batches' 211, made even
    "max_position_embeddings": 512,
}
MODELS = {
    "llama": LlamaConfig(**SIZES, rope_parameters=LLAMA3, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=False),
    "qwen3": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
    "experts": Qwen3MoeConfig(
        **SIZES,
        moe_intermediate_size=32,
        num_experts=6,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        mlp_only_layers=[1],
        head_dim=16,
        tie_word_embeddings=False,
    ),
}
TP, PP, EP = (f"{kind}_model_parallel_size" for kind in ("tensor", "pipeline", "expert"))
CP = "context_parallel_size"
ETP = "expert_tensor_parallel_size"
SP = "sequence_parallel"
ALONE = {"train_micro_batch_size": 1, "shared_prefix": {"enabled": False}}
# A router chooses: after three steps of its adapter, one process that packs its rows otherwise differs from itself by
# 4e-4, and by more where the router itself is trained.
CHOOSING = {"after_steps": 1e-2}
SHARED = spec(targets=("linear_qkv", "linear_fc1", "linear_proj"), fused="shared")
LORA, ATTENTION = spec(), spec(targets=("q_proj", "k_proj", "v_proj", "o_proj"))
ONE_STAGE = spec(targets=("*.layers.3.*",))

TWO = [
    Case(name="tp2", number=2, sizes={TP: 2}, spec=LORA, foreign=True),
    Case(name="tp2 sp, shared A", number=2, family="qwen3", sizes={TP: 2, SP: True}, layout=PACKED, spec=SHARED),
    Case(name="tp2 sp, dpo", number=2, family="qwen2", sizes={TP: 2, SP: True}, spec=LORA, loss="dpo"),
    Case(name="pp2, sft", number=2, sizes={PP: 2}, spec=LORA, loss="sft"),
    Case(
        name="pp2 uneven",
        number=2,
        family="qwen2",
        sizes={PP: 2, "num_layers_in_first_pipeline_stage": 1},
        layout=ALONE,
        spec=SHARED,
    ),
    Case(name="pp2, adapters on the last stage", number=2, sizes={PP: 2}, layout=ALONE, spec=ONE_STAGE),
    Case(
        name="pp2 recomputed, with dropout",
        number=2,
        sizes={PP: 2, "activation_checkpointing": True},
        layout=ALONE,
        spec=spec(dropout=0.2),
    ),
    Case(name="cp2", number=2, sizes={CP: 2}, spec=LORA),
    Case(name="cp2 packed, sft", number=2, family="qwen3", sizes={CP: 2}, layout=PACKED, spec=LORA, loss="sft"),
    Case(name="dp2", number=2, sizes={}, layout=PACKED, spec=LORA),
    Case(name="dp2, dpo", number=2, sizes={}, spec=LORA, loss="dpo"),
    Case(name="ep2", number=2, family="experts", sizes={EP: 2}, spec=ATTENTION, **CHOOSING),
    Case(name="etp2", number=2, family="experts", sizes={ETP: 2}, layout=PACKED, spec=ATTENTION, **CHOOSING),
    Case(name="etp2, all weights", number=2, family="experts", sizes={ETP: 2}, layout=PACKED, spec=None, **CHOOSING),
    Case(name="tp2 sp, bf16", number=2, family="qwen3", sizes={TP: 2, SP: True}, layout=BF16, spec=LORA, **ROUNDED),
    Case(name="pp2, bf16", number=2, sizes={PP: 2}, layout={**ALONE, **BF16}, spec=LORA),
    Case(name="tp2 sp, all weights", number=2, family="qwen3", sizes={TP: 2, SP: True}, spec=None),
    Case(name="tp2, all weights", number=2, family="qwen3", sizes={TP: 2}, spec=None),
    Case(name="pp2, all weights and a tied head", number=2, sizes={PP: 2}, layout=ALONE, spec=None),
    Case(name="dp2 ep2, all weights", number=2, family="experts", sizes={EP: 2}, layout=PACKED, spec=None, **CHOOSING),
]
FOUR = [
    Case(name="tp2 pp2", number=4, sizes={TP: 2, PP: 2}, layout=ALONE, spec=LORA),
    Case(name="tp2 dp2 sp", number=4, family="qwen2", sizes={TP: 2, SP: True}, spec=LORA),
    Case(name="tp2 cp2 sp", number=4, family="qwen3", sizes={TP: 2, CP: 2, SP: True}, spec=LORA),
    Case(name="pp2 dp2", number=4, sizes={PP: 2}, layout=ALONE, spec=SHARED),
    Case(name="tp2 pp2 sp, all weights", number=4, sizes={TP: 2, PP: 2, SP: True}, layout=ALONE, spec=None),
    Case(name="tp2 sp ep2", number=4, family="experts", sizes={TP: 2, SP: True, EP: 2}, spec=ATTENTION, **CHOOSING),
]
CASES = [*TWO, *FOUR]
# A case of each way to share a model; the combinations are slow.
DEFAULT = {"tp2 sp, shared A", "pp2, sft", "cp2", "dp2", "ep2", "tp2 pp2 sp, all weights"}


@pytest.fixture(scope="module")
def found(request, tmp_path_factory):
    return find(CASES, MODELS, request, tmp_path_factory)


@pytest.mark.timeout(1800)  # the first one runs all cases
@checked(CASES, DEFAULT)
def test_processes_that_share_a_model_are_one_process(found, name, check):
    check(found[name])
