"""Processes that share a model train what one process trains: every way to share it, with adapters whose B is not zero.

The expected values are those of world size 1, which other tests hold against transformers, PEFT and the other backend.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from nemo_rl_lora.algorithms.losses.preference import row_logprobs
from nemo_rl_lora.lora.spec import LoraSpec
from nemo_rl_lora.policy.megatron.policy import MegatronPolicy
from nemo_rl_lora.types import Batch
from tests.policy.batches import make_groups_batch
from tests.policy.dtensor.test_policy import make_policy, plain_logprobs, relative, spec
from tests.policy.megatron.parallel_ranks import Case, run_case, run_cases
from tests.policy.megatron.twins import distance, random_adapter, set_masters
from tests.policy.test_pairs import make_chats, make_pairs
from tests.rank_processes import run_ranks
from tests.tiny_models import LLAMA3, save_random_model

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
PACKED = {"sequence_packing": {"enabled": True, "train_mb_tokens": 64, "logprob_mb_tokens": 64}}
ALONE = {"train_micro_batch_size": 1, "shared_prefix": {"enabled": False}}
# Steps at which the gradients of later ones still differ by rounding alone.
BF16 = {"precision": "bfloat16", "optimizer": {"kwargs": {"lr": 1e-4, "weight_decay": 0.0}}}
# bf16 has 8 bits: log-probabilities differ by 1.5e-3, and gradients by a tenth.
ROUNDED = {"rounding": 0.1, "after_steps": 0.2}
# A router chooses: after three steps of its adapter, one process that packs its rows otherwise differs from itself by
# 4e-4, and by more where the router itself is trained.
CHOOSING = {"after_steps": 1e-2}
SHARED = spec(targets=("linear_qkv", "linear_fc1", "linear_proj"), fused="shared")
LORA, ATTENTION = spec(), spec(targets=("q_proj", "k_proj", "v_proj", "o_proj"))
ONE_STAGE = spec(targets=("*.layers.3.*",))

TWO = [
    Case(name="tp2", number=2, sizes={TP: 2}, spec=LORA),
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


def named(cases: list[Case]) -> pytest.MarkDecorator:
    """A test of these cases by their names."""
    assert {case.name for case in CASES} >= DEFAULT
    slow = {case.name: () if case.name in DEFAULT else pytest.mark.slow for case in cases}
    return pytest.mark.parametrize("name", [pytest.param(name, marks=marks) for name, marks in slow.items()])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {name: save_random_model(config, tmp_path_factory.mktemp(name)) for name, config in MODELS.items()}


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the processes of a case found, and what one process finds."""

    case: Case
    shared: dict[str, Any]
    alone: dict[str, Any]
    checkpoint: Path  # of the processes
    model: Path
    batch: Batch


@pytest.fixture(scope="module")
def found(request, models, tmp_path_factory):
    """case -> what was found, for the cases that this session asks about."""
    asked = {item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")}
    batches = {"grpo": make_groups_batch(), "sft": make_chats(), "dpo": make_pairs()}
    results = {}
    for number in (2, 4):
        cases = [case for case in CASES if case.number == number and case.name in asked]
        if not cases:
            continue
        inputs = {}
        for case in cases:
            model = models[case.family]
            adapter = None if case.spec is None else saved_adapter(model, case.spec, tmp_path_factory.mktemp("adapter"))
            inputs[case.name] = model, adapter, with_reference(batches[case.loss], model)
        meeting = tmp_path_factory.mktemp("meeting")
        run_ranks(number, meeting, run_cases, cases, inputs, meeting)
        for case in cases:
            model, _, batch = inputs[case.name]
            results[case.name] = Found(
                case=case,
                shared=torch.load(meeting / case.name / "found.pt", weights_only=False),
                alone=run_case(case, *inputs[case.name], tmp_path_factory.mktemp("alone"), {}),
                checkpoint=meeting / case.name,
                model=model,
                batch=batch,
            )
    return results


def saved_adapter(model: Path, spec_: LoraSpec, directory: Path) -> Path:
    policy = make_policy(model, backend=MegatronPolicy, spec=spec_)
    set_masters(policy, random_adapter(policy))
    policy.save(directory)
    return directory / "adapter"


def with_reference(batch: Batch, model: Path) -> Batch:
    base = make_policy(model, backend=MegatronPolicy).logprobs(batch)
    return replace(batch, reference_logprobs=row_logprobs(base, batch.loss_mask) if batch.whole_groups else base)


@named(CASES)
def test_logprobs_are_those_of_one_process(found, name):
    shared, alone = found[name].shared, found[name].alone
    assert relative(shared["logprobs"], alone["logprobs"]) <= found[name].case.rounding
    if "reference" in alone:
        assert relative(shared["reference"], alone["reference"]) <= found[name].case.rounding
        assert found[name].case.spec is None or relative(shared["reference"], shared["logprobs"]) > 1e-3


@named(CASES)
def test_gradients_of_three_steps_are_those_of_one_process(found, name):
    case = found[name].case
    for number, (step, expected) in enumerate(
        zip(found[name].shared["steps"], found[name].alone["steps"], strict=True)
    ):
        bound = case.after_steps if number else case.rounding
        (output, gradients), (other, others) = step, expected
        assert output.loss == pytest.approx(other.loss, rel=bound, abs=bound)
        assert output.grad_norm == pytest.approx(other.grad_norm, rel=bound)
        assert output.metrics == pytest.approx(other.metrics, rel=10 * bound, abs=1e-5)
        used = {key: gradient for key, gradient in others.items() if gradient.norm() > 0}
        assert len(used) == len(others) or (
            "all weights" in name and ".experts." in (others.keys() - used.keys()).pop()
        )
        assert distance({key: gradients[key] for key in used}, used) <= bound


@named(CASES)
def test_weights_that_are_published_are_those_of_one_process(found, name):
    shared, alone = found[name].shared, found[name].alone
    assert distance(shared["merged"], alone["merged"]) <= 1e-6
    assert {tensor.dtype for tensor in shared["merged"].values()} == {
        tensor.dtype for tensor in alone["merged"].values()
    }
    assert shared["adapter digest"] == alone["adapter digest"]


@named(CASES)
def test_a_checkpoint_is_read_back_by_every_process(found, name):
    shared, alone = found[name].shared, found[name].alone
    after = found[name].case.after_steps
    assert distance(shared["resumed"], alone["resumed"]) <= after
    expected = {key: moment for key, moment in alone["resumed moments"].items() if moment.norm() > 0}
    assert distance({key: shared["resumed moments"][key] for key in expected}, expected) <= 10 * after


@named([case for case in CASES if case.spec is not None and case.family != "experts"])
def test_stock_peft_loads_what_the_processes_wrote(found, name, tmp_path):
    case = found[name]
    base = AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.float32)
    judge = peft.PeftModel.from_pretrained(base, case.checkpoint / "adapter").eval()
    one = make_policy(case.model, backend=MegatronPolicy, spec=case.case.spec)
    one.load(case.checkpoint)
    expected = plain_logprobs(judge, case.batch).detach()
    assert relative(one.logprobs(case.batch), expected) <= 1e-5
