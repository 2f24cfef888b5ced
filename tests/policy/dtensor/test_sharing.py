"""Processes that share a model by FSDP2 and tensor parallelism train what one process trains: every way to share it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from tests.dynamo import why_nothing_compiles
from tests.policy.dtensor.test_policy import spec
from tests.policy.parallel_ranks import Case
from tests.policy.sharing import (
    BF16,
    PACKED,
    ROUNDED,
    checked,
    find,
)
from tests.tiny_models import LLAMA3, VOCABULARY

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,  # odd: ranks have parts of other sizes
    "max_position_embeddings": 512,
}
MODELS = {
    "llama": LlamaConfig(**SIZES, rope_parameters=LLAMA3, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=False),
    "qwen3": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, sliding_window=8, tie_word_embeddings=False),  # in padded rows
}
TP, REPLICATE, SP = "tensor_parallel_size", "dp_replicate_size", "sequence_parallel"
RECOMPUTED, PLAN = "activation_checkpointing", "custom_parallel_plan"
OWN_PLAN = "tests.policy.dtensor.plans.mlp_alone"
COMPILED = {**PACKED, "compile": True}
SORTED = {"dynamic_batching": {"enabled": True, "train_mb_tokens": 64, "logprob_mb_tokens": 64}}
LORA = spec()
BEFORE, AFTER = (spec(dropout=0.2, dropout_position=position, dim=3) for position in ("pre", "post"))

# A gradient of rounding's size: AdamW's first step, which divides by it, moves one element of 320 by another amount.
NEAR_ZERO = 2e-3

_CASES = [
    Case(name="dp2", number=2, sizes={}, layout=PACKED, spec=LORA),
    Case(name="dp2 sent, dpo", number=2, family="qwen2", sizes={"load": "broadcast"}, spec=LORA, loss="dpo"),
    Case(name="dp2 recomputed, sft", number=2, family="qwen3", sizes={RECOMPUTED: True}, spec=LORA, loss="sft"),
    Case(name="dp2 offloaded", number=2, sizes={"cpu_offload": True}, layout=SORTED, spec=LORA),
    Case(name="dp2 compiled", number=2, family="qwen3", sizes={RECOMPUTED: True}, layout=COMPILED, spec=LORA),
    Case(name="dp2 compiled, all weights", number=2, family="qwen2", sizes={}, layout=COMPILED, spec=None),
    Case(name="tp2 compiled", number=2, sizes={TP: 2}, layout=COMPILED, spec=AFTER),
    Case(name="dp2 padded", number=2, family="mistral", sizes={}, spec=LORA),
    Case(name="dp2, bf16", number=2, family="qwen3", sizes={}, layout=BF16, spec=LORA, **ROUNDED),
    Case(name="tp2", number=2, family="qwen2", sizes={TP: 2}, spec=LORA),
    Case(name="tp2 padded", number=2, family="mistral", sizes={TP: 2}, spec=LORA, after_steps=NEAR_ZERO),
    Case(name="tp2 by an own plan", number=2, family="qwen3", sizes={TP: 2, PLAN: OWN_PLAN}, spec=LORA),
    Case(name="tp2, dropout before", number=2, sizes={TP: 2}, spec=BEFORE),
    Case(name="tp2 sp, dropout after", number=2, sizes={TP: 2, SP: True}, spec=AFTER),
    Case(name="tp2 sp, sft", number=2, family="qwen3", sizes={TP: 2, SP: True}, layout=PACKED, spec=LORA, loss="sft"),
    Case(name="tp2 sp padded, dpo", number=2, family="mistral", sizes={TP: 2, SP: True}, spec=LORA, loss="dpo"),
    Case(name="tp2 sp, bf16", number=2, family="qwen3", sizes={TP: 2, SP: True}, layout=BF16, spec=LORA, **ROUNDED),
    Case(name="dp2, all weights", number=2, sizes={}, layout=PACKED, spec=None),
    Case(name="dp2, all weights, bf16", number=2, sizes={}, layout=BF16, spec=None, **ROUNDED),
    Case(name="tp2, all weights", number=2, family="qwen3", sizes={TP: 2}, spec=None),
    Case(name="tp2 sp, all weights", number=2, family="qwen2", sizes={TP: 2, SP: True}, spec=None, loss="sft"),
    Case(
        name="dp2 tp2 sp",
        number=4,
        family="qwen2",
        sizes={TP: 2, SP: True, RECOMPUTED: True},
        layout=PACKED,
        spec=LORA,
        foreign=True,
    ),
    Case(name="dp2 tp2", number=4, family="qwen3", sizes={TP: 2}, layout=SORTED, spec=LORA, loss="dpo"),
    Case(name="replicate2 shard2", number=4, sizes={REPLICATE: 2}, spec=LORA, loss="sft", foreign=True),
    Case(name="replicate2 tp2, all weights", number=4, family="qwen3", sizes={REPLICATE: 2, TP: 2}, spec=None),
    Case(name="dp2 tp2 sp, all weights", number=4, sizes={TP: 2, SP: True}, layout=PACKED, spec=None),
]
CASES = [
    replace(case, backend="dtensor")
    for case in _CASES
    if not case.layout.get("compile") or why_nothing_compiles() is None
]
DEFAULT = {"dp2", "tp2 sp, dropout after", "dp2, all weights", "dp2 tp2 sp"}


@pytest.fixture(scope="module")
def found(request, tmp_path_factory):
    return find(CASES, MODELS, request, tmp_path_factory)


@pytest.mark.timeout(1800)  # the first one runs all cases
@checked(CASES, DEFAULT)
def test_processes_that_share_a_model_are_one_process(found, name, check):
    check(found[name])
