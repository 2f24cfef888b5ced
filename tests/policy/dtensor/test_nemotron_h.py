"""Nemotron-H (Mamba, experts, attention and MLP blocks) on the DTensor backend: in several processes as in one.

Slow, models whose layers are parts of layers (Mamba) or have parts in common (Zamba).
"""

from __future__ import annotations

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.driver import Ended, TinyRun
from tests.policy.dtensor.test_policy import plain_logprobs, relative, spec
from tests.policy.parallel_ranks import Case
from tests.policy.sharing import (
    BF16,
    ROUNDED,
    check_gradients,
    check_logprobs,
    check_published,
    check_resumed,
    find,
    named,
)
from tests.tiny_models import VOCABULARY, make_tiny_nemotron_h, mamba, nemotron_h, zamba

LORA = spec(excludes=("*out_proj*",))
ROWS = {"train_micro_batch_size": 1}  # of seven rows one process has three: it runs a microbatch without rows
CASES = [
    Case(name=f"nemotron-h {name}", backend="dtensor", family="nemotron_h", **settings)
    for name, settings in {
        "dp2": {"number": 2, "sizes": {}, "layout": ROWS, "spec": LORA},
        "dp2 recomputed, sft": {
            "number": 2,
            "sizes": {"activation_checkpointing": True},
            "layout": ROWS,
            "spec": LORA,
            "loss": "sft",
        },
        "dp2, bf16": {"number": 2, "sizes": {}, "layout": BF16, "spec": LORA, **ROUNDED},
        "dp2, all weights": {"number": 2, "sizes": {}, "layout": ROWS, "spec": None, "loss": "sft"},
        "replicate2 shard2, dpo": {"number": 4, "sizes": {"dp_replicate_size": 2}, "spec": LORA, "loss": "dpo"},
    }.items()
] + [
    Case(name=f"{family} dp2, all weights", backend="dtensor", family=family, number=2, sizes={}, spec=None, loss="sft")
    for family in ("mamba", "zamba")
]
DEFAULT = {"nemotron-h dp2", "nemotron-h dp2, all weights"}


@pytest.fixture(scope="module")
def found(request, tmp_path_factory):
    return find(
        CASES,
        {"nemotron_h": nemotron_h(VOCABULARY), "mamba": mamba(VOCABULARY), "zamba": zamba(VOCABULARY)},
        request,
        tmp_path_factory,
    )


@named(CASES, DEFAULT)
def test_logprobs_are_those_of_one_process(found, name):
    check_logprobs(found[name])


@named([case for case in CASES if case.spec is not None and "bf16" not in case.name], DEFAULT)
def test_logprobs_are_those_of_stock_transformers_and_peft(found, name):
    inputs = found[name].inputs
    base = AutoModelForCausalLM.from_pretrained(inputs.model, dtype=torch.float32)
    judge = peft.PeftModel.from_pretrained(base, inputs.adapter).eval()
    assert relative(found[name].shared["logprobs"], plain_logprobs(judge, inputs.batch).detach()) <= 1e-5
    adapted = {key for key in judge.state_dict() if "lora_A" in key}
    assert {part for key in adapted for part in key.split(".") if "_proj" in part} == {
        *("in_proj", "up_proj", "down_proj", "q_proj", "k_proj", "v_proj", "o_proj")
    }


@named(CASES, DEFAULT)
def test_gradients_of_three_steps_are_those_of_one_process(found, name):
    check_gradients(found[name])


@named(CASES, DEFAULT)
def test_weights_that_are_published_are_those_of_one_process(found, name):
    check_published(found[name])


@named(CASES, DEFAULT)
def test_a_checkpoint_is_read_back_by_every_process(found, name):
    check_resumed(found[name])


# Through the drivers


@pytest.fixture(scope="module")
def tiny_nemotron_h(tmp_path_factory):
    return make_tiny_nemotron_h(tmp_path_factory.mktemp("nemotron_h"))


@pytest.fixture
def run(tiny_nemotron_h, tmp_path):
    """A run of an algorithm with the recipes' targets; call it with the name of its directory, and overrides."""

    def start(algorithm, name: str, *overrides: str) -> tuple[Ended, TinyRun]:
        root = tmp_path / name
        root.mkdir()
        tiny = TinyRun(root=root, model=tiny_nemotron_h, algorithm=algorithm)
        targets = "policy.dtensor_cfg.lora_cfg={exclude_modules: ['*out_proj*'], match_all_linear: false}"
        return tiny(targets, "policy.train_micro_batch_size=1", *overrides), tiny

    return start


@pytest.mark.parametrize("algorithm", [pytest.param("sft", marks=pytest.mark.slow), "grpo"])
def test_a_run_in_two_processes_is_the_run_of_one(run, algorithm):
    lines = []
    for number in (1, 2):
        ended, tiny = run(algorithm, str(number), f"cluster.gpus_per_node={number}")
        assert ended.code == 0, ended.err
        lines.append(tiny.metrics())
    one, two = lines
    assert len(one) == len(two) == 2
    for name in ("loss", "grad_norm", "reward"):
        if name in one[0]:
            assert [line[name] for line in two] == pytest.approx([line[name] for line in one], rel=1e-5, abs=1e-5)


def test_without_a_plan_tensor_parallelism_is_refused_with_those_that_have_one(run):
    ended, _ = run("sft", "tp", "cluster.gpus_per_node=2", "policy.dtensor_cfg.tensor_parallel_size=2")
    assert ended.code == 2
    assert (
        "policy.dtensor_cfg.tensor_parallel_size=2: there is no plan to split the matrices of 'nemotron_h'; there is "
        "one for LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM."
    ) in ended.err
