"""What tensor parallelism cannot split is refused by name, from a configuration alone."""

from __future__ import annotations

import pytest
from transformers import GPTNeoXConfig, LlamaConfig, Qwen3MoeConfig

from nemo_rl_lora.config.dtensor import DTensorConfig
from nemo_rl_lora.policy.dtensor.limits import tensor_parallel_problems

TP = "policy.dtensor_cfg.tensor_parallel_size"
PLAN = "policy.dtensor_cfg.custom_parallel_plan"
PLANS = "tests.policy.dtensor.plans"
LLAMA = LlamaConfig(hidden_size=576, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536)


def problems(config, size: int, plan: str | None = None) -> list[str]:
    return tensor_parallel_problems(DTensorConfig(tensor_parallel_size=size, custom_parallel_plan=plan), config)


@pytest.mark.parametrize("config", [GPTNeoXConfig(), Qwen3MoeConfig()], ids=["gpt_neox", "qwen3_moe"])
def test_an_architecture_without_a_plan_is_refused_with_the_list_of_those_that_have_one(config):
    (problem,) = problems(config, 2)
    assert problem.startswith(f"{TP}=2: there is no plan to split the matrices of {config.model_type!r}")
    assert "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM" in problem
    assert problems(config, 1) == []


def test_heads_that_the_ranks_do_not_divide_are_named():
    assert problems(LLAMA, 3) == []
    said = problems(LLAMA, 2)
    assert [problem.split(", which")[0] for problem in said] == [
        f"{TP}=2: must divide num_attention_heads",
        f"{TP}=2: must divide num_key_value_heads",
    ]


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ("no_such_module.plan", "No module named 'no_such_module'"),
        (f"{PLANS}.nothing", "has no attribute 'nothing'"),
        (f"{PLANS}.NOT_A_PLAN", "is a list. A plan is a dict"),
        ("plan", "Empty module name"),
    ],
)
def test_a_plan_that_is_none_is_refused(plan, said):
    (problem,) = problems(LLAMA, 3, plan)
    assert problem.startswith(f"{PLAN}={plan!r}: ")
    assert said in problem


def test_an_own_plan_opens_any_architecture():
    assert problems(Qwen3MoeConfig(num_key_value_heads=4), 2, f"{PLANS}.mlp_alone") == []
