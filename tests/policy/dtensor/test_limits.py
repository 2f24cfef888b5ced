"""What tensor parallelism cannot split is refused by name, from a configuration alone."""

from __future__ import annotations

import sys
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.tensor import Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard
from transformers import GPTNeoXConfig, LlamaConfig, Qwen3Config, Qwen3MoeConfig

from nemo_rl_lora.config.dtensor import DTensorConfig
from nemo_rl_lora.lora.targets import AdaptedModule
from nemo_rl_lora.policy.dtensor.limits import shares_differ, tensor_parallel_problems

TP = "policy.dtensor_cfg.tensor_parallel_size"
PLAN = "policy.dtensor_cfg.custom_parallel_plan"
PLANS = "tests.policy.dtensor.plans"
SIZES = {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
QWEN, LLAMA3 = Qwen3Config(**SIZES, head_dim=16), LlamaConfig(**SIZES)
LLAMA = LlamaConfig(hidden_size=576, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536)


def problems(config, size: int, plan: str | None = None, *, sp: bool = False, adapted=None) -> list[str]:
    sizes = DTensorConfig(tensor_parallel_size=size, custom_parallel_plan=plan, sequence_parallel=sp)
    return tensor_parallel_problems(sizes, config, adapted and [adapter(name) for name in adapted])


def adapter(name: str, dim: int = 8) -> AdaptedModule:
    return AdaptedModule(name=name, in_features=48, out_features=48, dim=dim, alpha=8.0, scale=1.0)


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
        ("tests.policy.dtensor.no_module.plan", "SyntaxError: invalid syntax"),
        (f"{PLANS}.needs_a_model", "TypeError: needs_a_model() missing 1 required positional argument"),
        (f"{PLANS}.leaves", "SystemExit: 3"),
        (f"{PLANS}.STYLES_BY_NAME", "'model.layers.*.mlp.gate_proj' has 'colwise'"),
        (f"{PLANS}.STYLES_WITHOUT_CALL", "and a module's name has a ParallelStyle"),
        (f"{PLANS}.NO_STYLES", "is empty. A plan is a dict"),
    ],
)
def test_a_plan_that_is_none_is_refused(plan, said, monkeypatch):
    broken = SimpleNamespace(find_spec=_broken)
    monkeypatch.setattr("sys.meta_path", [broken, *sys.meta_path])
    (problem,) = problems(LLAMA, 3, plan)
    assert problem.startswith(f"{PLAN}={plan!r}: ")
    assert said in problem


def _broken(name: str, *_: object) -> None:
    if name.endswith(".no_module"):
        compile("def plan(:", name, "exec")


def test_names_of_a_plan_that_match_no_module_are_refused():
    (problem,) = problems(LLAMA, 3, f"{PLANS}.misspelt")
    assert problem.startswith(f"{PLAN}='{PLANS}.misspelt': 'model.layers.*.self_attn.q_prj' matches no module")
    assert "Did you mean 'model.layers.*.self_attn.q_proj'?" in problem
    said = problems(GPTNeoXConfig(), 2, f"{PLANS}.mlp_alone")
    assert [problem.split("matches")[0] for problem in said] == [
        f"{PLAN}='{PLANS}.mlp_alone': 'model.layers.*.mlp.{name}_proj' " for name in ("gate", "up", "down")
    ]


@pytest.mark.parametrize(
    ("plan", "sp", "untold"),
    [
        ("attention", False, "model.layers.*.self_attn.q_norm, model.layers.*.self_attn.k_norm"),
        ("attention_and_its_norms", False, None),
        ("gathered_attention", False, None),
        ("mlp_alone", False, None),
        ("sequences", True, "model.layers.*.self_attn.q_norm, model.layers.*.self_attn.k_norm, model.norm"),
    ],
)
def test_weights_of_which_a_rank_would_train_a_part_have_a_style(plan, sp, untold):
    said = problems(QWEN, 2, f"{PLANS}.{plan}", sp=sp)
    assert [problem.split(", beside")[0] for problem in said] == (
        [] if untold is None else [f"{PLAN}='{PLANS}.{plan}': has no style for {untold}"]
    )


def test_adapters_on_what_a_plan_leaves_whole_are_refused_where_it_splits_sequences():
    adapted = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"]
    assert problems(QWEN, 2, f"{PLANS}.attention", adapted=adapted) == []
    assert problems(QWEN, 2, f"{PLANS}.whole_sequences", sp=True, adapted=adapted) == []
    for plan in ("sequences_of_attention", "summed_mlp"):  # of an adapter no style sums a part
        (problem,) = problems(QWEN, 2, f"{PLANS}.{plan}", sp=True, adapted=adapted)
        assert "has no style for model.layers.*.mlp.up_proj, beside" in problem
        assert problem.endswith("(ColwiseParallel, RowwiseParallel), or leave them out of the adapter.")


@pytest.mark.parametrize(("plan", "does"), [("whole_sequences", "splits"), ("attention", "does not split")])
def test_a_plan_that_splits_sequences_and_the_key_that_says_so_go_together(plan, does):
    adapted = ["model.layers.0.self_attn.q_proj"]
    is_split = does == "splits"
    assert problems(LLAMA3, 2, f"{PLANS}.{plan}", sp=is_split, adapted=adapted) == []
    (problem,) = problems(LLAMA3, 2, f"{PLANS}.{plan}", sp=not is_split, adapted=adapted)
    assert problem.startswith(f"policy.dtensor_cfg.sequence_parallel={not is_split}: {PLAN}='{PLANS}.{plan}' {does} ")


def test_an_own_plan_opens_any_architecture():
    assert problems(Qwen3MoeConfig(num_key_value_heads=4, mlp_only_layers=[1]), 2, f"{PLANS}.mlp_alone") == []


def test_the_rule_on_rows_is_what_torch_splits():
    for rows, ranks, shards in product(range(1, 60), (2, 3, 4), (1, 2, 3, 4, 5)):
        split = [[part.numel() for part in whole.chunk(shards)] for whole in torch.arange(rows).chunk(ranks)]
        split = [of_rank + [0] * (shards - len(of_rank)) for of_rank in [*split, *[[]] * (ranks - len(split))]]
        differs = any(
            _compute_local_shape_and_global_offset(
                (rows,), (shards, ranks), [shard, rank], (_StridedShard(0, split_factor=ranks), Shard(0))
            )[0]
            != (split[rank][shard],)
            for shard, rank in product(range(shards), range(ranks))
        )
        assert shares_differ(rows, ranks, shards) == differs, (rows, ranks, shards)


@pytest.mark.parametrize(("vocab_size", "num_shards"), [(211, 3), (32001, 4), (128257, 4)])
def test_a_vocabulary_that_ranks_and_shards_split_differently_is_named(vocab_size, num_shards):
    config = LlamaConfig(**SIZES, vocab_size=vocab_size)
    for shards, plan in ((num_shards, None), (num_shards, f"{PLANS}.mlp_alone"), (2, None)):
        sizes = DTensorConfig(tensor_parallel_size=2, custom_parallel_plan=plan)
        said = tensor_parallel_problems(sizes, config, [], num_shards=shards)
        assert [problem.split(", and FSDP2")[0] for problem in said] == [
            f"{TP}=2: does not divide the {vocab_size} rows of {name}"
            for name in ("model.embed_tokens", "lm_head")
            if (shards, plan) == (num_shards, None)
        ]


def test_a_dim_that_ranks_and_shards_split_differently_is_named():
    adapted = [adapter(f"model.layers.0.self_attn.{name}_proj", dim=9) for name in ("q", "o")]
    sizes = DTensorConfig(tensor_parallel_size=2)
    (problem,) = tensor_parallel_problems(sizes, LLAMA3, adapted, num_shards=4)
    assert f"{TP}=2: does not divide the 9 rows of the A of model.layers.*.self_attn.q_proj (its dim)" in problem
