"""Plans against totals worked out by hand, against PEFT's own count, and against the bytes of real files."""

import io
import os
import struct
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM, NemotronHConfig, Qwen3Config, Qwen3MoeConfig

from nemo_rl_lora.config.load import CONFIG_DIR, load_config
from nemo_rl_lora.lora.files import adapter_tensor_name, write_adapter, write_moments
from nemo_rl_lora.plan.plan import engine_problems_of_cpus, machine_problems, make_plan
from nemo_rl_lora.plan.show import human_bytes, render_plan

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "architectures": ["LlamaForCausalLM"],
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    LlamaConfig(**TINY).save_pretrained(path)
    return path


def _plan(path: Path, *overrides: str, checks=()):
    config = load_config(None, [f"policy.model_name={path}", *overrides], "grpo")
    return make_plan(config, checks)


def _text(plan) -> str:
    """The plan on a terminal of 80 columns."""
    out = io.StringIO()
    Console(file=out, width=80).print(render_plan(plan))
    return " ".join(out.getvalue().split())


def test_a_plan_of_llama_70b(tmp_path):
    LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)
    plan = _plan(tmp_path, "policy.lora.dim=16")
    # A layer: q and o 8192 x 8192, k and v 1024 x 8192, three of 28672 x 8192, two norms of 8192.
    layer = 2 * 8192 * 8192 + 2 * 1024 * 8192 + 3 * 28672 * 8192 + 2 * 8192
    assert plan.num_params == 80 * layer + 2 * 128256 * 8192 + 8192 == 70_553_706_496
    assert plan.num_trainable_params == 80 * 16 * (2 * 16384 + 2 * 9216 + 3 * 36864) == 207_093_760
    assert plan.sizes.base_bytes == 2 * 70_553_706_496
    assert plan.sizes.adapter_bytes == plan.sizes.gradient_bytes == plan.sizes.sync_adapter_bytes == 828_375_040
    assert plan.sizes.optimizer_bytes == 2 * 828_375_040
    assert plan.sizes.checkpoint_bytes == 3 * 828_375_040
    assert plan.sizes.sync_merged_bytes == 80 * 2 * (layer - 2 * 8192)
    assert [t.num_modules for t in plan.adapted] == [80] * 7
    assert any("whether the run fits" in sentence for sentence in plan.unchecked)
    assert plan.problems == ()


def test_a_plan_of_qwen3_30b_a3b_leaves_its_stacked_experts_out_and_says_so(tmp_path):
    Qwen3MoeConfig(
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        vocab_size=151936,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        tie_word_embeddings=False,
        architectures=["Qwen3MoeForCausalLM"],
    ).save_pretrained(tmp_path)
    plan = _plan(tmp_path, "policy.lora.dim=16")
    attention = 2 * 4096 * 2048 + 2 * 512 * 2048 + 2 * 128
    layer = attention + 128 * 3 * 768 * 2048 + 128 * 2048 + 2 * 2048
    assert plan.num_params == 48 * layer + 2 * 151936 * 2048 + 2048 == 30_532_122_624
    assert plan.num_trainable_params == 48 * 16 * (2 * 6144 + 2 * 2560) == 13_369_344
    left_out = {t.name: (t.num_modules, t.weight_shape) for t in plan.left_out}
    assert left_out == {
        "lm_head": (1, (151936, 2048)),
        "model.layers.*.mlp.experts.gate_up_proj": (48, (128, 1536, 2048)),
        "model.layers.*.mlp.experts.down_proj": (48, (128, 2048, 768)),
    }
    assert "*.mlp.experts.gate_up_proj" in _text(plan)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["gate_proj", "down_proj", "o_proj"]])
def test_trainable_parameters_are_those_that_peft_counts(tiny, targets):
    plan = _plan(tiny, f"policy.lora.target_modules=[{','.join(targets)}]", "policy.lora.dim=4")
    wrapped = peft.get_peft_model(LlamaForCausalLM(LlamaConfig(**TINY)), peft.LoraConfig(r=4, target_modules=targets))
    trainable, together = wrapped.get_nb_trainable_parameters()
    assert (plan.num_trainable_params, plan.num_params + plan.num_trainable_params) == (trainable, together)


def test_checkpoint_bytes_are_those_of_the_files_without_their_headers(tiny, tmp_path):
    plan = _plan(tiny, "policy.lora.dim=4", "policy.lora.target_modules=[q_proj,down_proj]")
    tensors = {}
    for layer in range(3):
        for part, (out_features, in_features) in {"self_attn.q_proj": (32, 32), "mlp.down_proj": (32, 48)}.items():
            name = f"model.layers.{layer}.{part}"
            tensors[adapter_tensor_name(name, "A")] = torch.zeros(4, in_features)
            tensors[adapter_tensor_name(name, "B")] = torch.zeros(out_features, 4)
    write_adapter(tmp_path / "adapter", tensors, {})
    write_moments(tmp_path / "optimizer", {name: (t, t) for name, t in tensors.items()}, 1)
    num_bytes = sum(_tensor_bytes(file) for file in tmp_path.rglob("*.safetensors"))
    assert plan.sizes.checkpoint_bytes == num_bytes
    assert plan.sizes.adapter_bytes == sum(t.numel() * 4 for t in tensors.values())


def _tensor_bytes(file: Path) -> int:
    content = file.read_bytes()
    (header,) = struct.unpack("<Q", content[:8])
    return len(content) - 8 - header


def test_without_the_optimizer_a_checkpoint_is_the_adapter(tiny):
    plan = _plan(tiny, "policy.lora.dim=4", "checkpointing.save_optimizer=false")
    assert plan.sizes.checkpoint_bytes == plan.sizes.adapter_bytes


def test_full_fine_tuning_trains_every_weight_in_fp32(tiny):
    plan = _plan(tiny)
    num_params = sum(p.numel() for p in LlamaForCausalLM(LlamaConfig(**TINY)).parameters())
    assert plan.spec is None
    assert plan.num_trainable_params == plan.num_params == num_params
    assert plan.sizes.base_bytes == plan.sizes.gradient_bytes == 4 * num_params
    assert plan.sizes.optimizer_bytes == 8 * num_params
    assert plan.sizes.sync_adapter_bytes is None
    assert "every weight is trained" in _text(plan)


def test_compute_dtype_sets_the_bytes_of_the_base_and_of_a_merged_sync(tiny):
    half, single = _plan(tiny, "policy.lora.dim=4"), _plan(tiny, "policy.lora.dim=4", "policy.precision=float32")
    assert single.sizes.base_bytes == 2 * half.sizes.base_bytes
    assert single.sizes.sync_merged_bytes == 2 * half.sizes.sync_merged_bytes
    assert single.sizes.adapter_bytes == half.sizes.adapter_bytes


def test_a_shared_a_is_counted_once_in_memory_and_written_for_every_module(tiny):
    plan = _plan(tiny, "policy.backend=megatron", "policy.lora.target_modules=[linear_qkv]", "policy.lora.dim=4")
    assert plan.num_trainable_params == 3 * 4 * (32 + 32 + 16 + 16)
    assert plan.sizes.sync_adapter_bytes == 4 * 3 * 4 * (3 * 32 + 32 + 16 + 16)
    assert plan.problems == ()


def test_ranks_of_single_modules_make_types_of_their_own(tiny):
    plan = _plan(tiny, "policy.lora.target_modules=[q_proj]", "policy.lora.rank_pattern={layers.0.self_attn.q_proj:2}")
    assert [(t.num_modules, t.dim, t.scale) for t in plan.adapted] == [(1, 2, 16.0), (2, 8, 4.0)]


def test_tied_embeddings_count_once(tmp_path):
    LlamaConfig(**TINY, tie_word_embeddings=True).save_pretrained(tmp_path)
    untied = sum(p.numel() for p in LlamaForCausalLM(LlamaConfig(**TINY, tie_word_embeddings=False)).parameters())
    assert _plan(tmp_path).num_params == untied - 64 * 32
    with pytest.raises(ValueError, match=r"policy\.lora\.target_modules=\['lm_head'\]: matches the output head"):
        _plan(tmp_path, "policy.lora.target_modules=[lm_head]")


def test_a_target_without_a_match_is_refused_before_any_weight(tiny):
    with pytest.raises(ValueError, match=r"matches none of the 2\d linear modules of .* Did you mean 'q_proj'\?"):
        _plan(tiny, "policy.lora.target_modules=[q_prj]")


def test_a_quantized_base_needs_an_adapter_dtype(tmp_path):
    config = LlamaConfig(**TINY)
    config.quantization_config = {"quant_method": "awq", "bits": 4}
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"policy\.lora\.dtype=None: the base is quantized \(awq\)"):
        _plan(tmp_path, "policy.lora.dim=4")
    assert _plan(tmp_path, "policy.lora.dim=4", "policy.lora.dtype=bfloat16").num_trainable_params > 0


def test_a_model_that_is_nowhere_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"policy\.model_name="):
        _plan(tmp_path / "absent")


def test_what_settings_come_to_is_said_with_its_reason(tiny):
    effects = {e.key: e for e in _plan(tiny, "policy.dtensor_cfg.lora_cfg.enabled=true").effects}
    kernels = effects["policy.dtensor_cfg.lora_cfg.use_triton"]
    assert kernels.requested == "on"
    assert kernels.effective == ("on" if torch.cuda.is_available() else "off")
    assert torch.cuda.is_available() or "no CUDA device" in kernels.reason
    assert effects["policy.shared_prefix.enabled"].effective == "on"
    off = _plan(tiny, "policy.dtensor_cfg.lora_cfg.enabled=true", "policy.dtensor_cfg.lora_cfg.use_triton=false")
    assert off.effects[0].reason == "not asked for"
    other = _plan(tiny, "policy.lora.dim=4", "policy.lora.use_triton=automodel").effects[0]
    assert (other.requested, other.effective) == ("automodel", "automodel" if torch.cuda.is_available() else "off")
    unshared = {e.key: e for e in _plan(tiny, "policy.shared_prefix.enabled=false").effects}
    assert unshared["policy.shared_prefix.enabled"].effective == "off"


def test_tensor_parallel_kernels_are_off_and_two_processes_are_a_problem(tiny):
    plan = _plan(tiny, "policy.lora.dim=4", "policy.dtensor_cfg.tensor_parallel_size=2")
    assert "policy.dtensor_cfg.tensor_parallel_size=2" in plan.effects[0].reason
    assert any(p.startswith("policy.dtensor_cfg.tensor_parallel_size=2: ") for p in plan.problems)
    assert "Stops this run:" in _text(plan)


def test_checks_report_what_they_found_or_become_problems(tiny):
    def fails() -> str:
        raise ValueError("data.train.path='x': no such file. Give another.")

    plan = _plan(tiny, checks=[("tokenizer", lambda: "64 tokens"), ("data", fails)])
    assert ("tokenizer", "64 tokens") in [(c.name, c.finding) for c in plan.checks]
    assert plan.problems == ("data.train.path='x': no such file. Give another.",)
    assert not any("tokenizer" in sentence for sentence in plan.unchecked)
    assert any("data: nobody looked" in sentence for sentence in _plan(tiny).unchecked)


def test_the_text_shows_both_names_totals_and_bytes(tiny):
    text = _text(_plan(tiny, "policy.lora.dim=4"))
    for wanted in (
        "*.self_attn.q_proj",
        "linear_qkv",
        "[48, 32]",
        "a sync, merged",
        "Not checked:",
        "the weights themselves: none was read",
    ):
        assert wanted in text


def test_bytes_are_shown_exactly_and_scaled():
    assert human_bytes(None) == "-"
    assert human_bytes(1536) == "1,536 (1.5 KiB)"
    assert human_bytes(828_375_040) == "828,375,040 (790.0 MiB)"


def test_a_plan_says_what_each_megatron_rank_holds(tmp_path):
    LlamaConfig(**{**TINY, "num_hidden_layers": 4, "tie_word_embeddings": True}).save_pretrained(tmp_path)
    sizes = ["tensor_model_parallel_size=2", "pipeline_model_parallel_size=2", "num_layers_in_first_pipeline_stage=1"]
    plan = _plan(
        tmp_path,
        "policy.backend=megatron",
        "policy.lora.dim=4",
        "cluster.gpus_per_node=4",
        *(f"policy.megatron_cfg.{size}" for size in sizes),
    )
    assert plan.problems == ()
    first, last = plan.rank_parts
    assert (first.layers, last.layers, first.num_tp_ranks) == (range(1), range(1, 4), 2)
    # Of a layer: q and o 32 x 32, k and v 16 x 32, three of 48 x 32, halved; and two norms of 32, whole.
    layer = (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32) // 2 + 2 * 32
    embeddings = 64 * 32 // 2  # the tied head is on both stages
    assert (first.num_params, last.num_params) == (layer + embeddings, 3 * layer + 32 + embeddings)
    adapter = 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48)) // 2
    assert (first.num_adapter_params, last.num_adapter_params) == (adapter, 3 * adapter)
    assert 2 * (first.num_adapter_params + last.num_adapter_params) == plan.num_trainable_params
    assert f"0 0-1 0 0 - {first.num_params:,} {first.num_adapter_params:,}" in _text(plan)


@pytest.mark.parametrize(("nodes", "gpus"), [(1, 1), (1, 2), (2, 1)])
def test_a_plan_says_of_several_processes_that_each_keeps_its_moments(tiny, nodes, gpus):
    sizes = [f"cluster={{num_nodes: {nodes}, gpus_per_node: {gpus}}}"]
    effects = _plan(tiny, "policy.backend=megatron", "policy.lora.dim=4", *sizes).effects
    said = [e.key for e in effects if e.key == "policy.megatron_cfg.optimizer.use_distributed_optimizer"]
    assert len(said) == (nodes * gpus > 1)


def test_a_plan_says_which_experts_a_rank_holds(tmp_path):
    Qwen3MoeConfig(
        **{key: value for key, value in TINY.items() if key != "architectures"},
        architectures=["Qwen3MoeForCausalLM"],
        head_dim=8,
        moe_intermediate_size=24,
        num_experts=6,
        num_experts_per_tok=2,
    ).save_pretrained(tmp_path)
    overrides = ["policy.backend=megatron", "policy.lora.dim=4", "cluster.gpus_per_node=2"]
    plan = _plan(tmp_path, *overrides, "policy.megatron_cfg.expert_model_parallel_size=2")
    assert plan.problems == ()
    assert [part.experts for part in plan.rank_parts] == [range(3), range(3, 6)]
    effects = {effect.key: effect.effective for effect in plan.effects}
    assert effects["policy.megatron_cfg.moe_router_load_balancing_type"] == "none"
    assert effects["policy.megatron_cfg.optimizer.use_distributed_optimizer"] == "off"
    (problem,) = _plan(tmp_path, "policy.backend=megatron", "policy.generation.backend=in_process").problems
    assert "the engine in this process takes no trained experts" in problem


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["tensor_model_parallel_size=4"], "policy.megatron_cfg.tensor_model_parallel_size=4: must divide the model's"),
        (["tensor_model_parallel_size=2", "peft.dim=5"], "policy.megatron_cfg.peft.dim=5: tensor-parallel ranks share"),
        (["pipeline_model_parallel_size=4"], "policy.megatron_cfg.pipeline_model_parallel_size=4: must divide"),
        (["context_parallel_size=3"], "are 1 x 1 x 3 = 3, which must divide the 4 training processes"),
        (["expert_model_parallel_size=2"], "policy.megatron_cfg.expert_model_parallel_size=2: LlamaForCausalLM has no"),
    ],
)
def test_sizes_that_the_model_or_the_processes_do_not_have_are_refused(tiny, overrides, problem):
    lora = ["peft.enabled=true", "enabled=true", *overrides]
    plan = _plan(
        tiny,
        "policy.dtensor_cfg.enabled=false",
        "cluster.gpus_per_node=4",
        *(f"policy.megatron_cfg.{override}" for override in lora),
    )
    assert any(problem in sentence for sentence in plan.problems), plan.problems


EIGHT_B = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False}
LLAMA_8B = LlamaConfig(
    **EIGHT_B,
    intermediate_size=14336,
    num_hidden_layers=32,
    vocab_size=128256,
    max_position_embeddings=131072,
    architectures=["LlamaForCausalLM"],
)
QWEN3_8B = Qwen3Config(
    **EIGHT_B,
    intermediate_size=12288,
    num_hidden_layers=36,
    head_dim=128,
    vocab_size=151936,
    max_position_embeddings=32768,
    architectures=["Qwen3ForCausalLM"],
)


@pytest.mark.parametrize(
    ("recipe", "model", "trainable_per_layer"),
    [
        ("sft-llama3.1-8b-1n8g-megatron-lora", LLAMA_8B, 128 * (2 * 8192 + 2 * 5120 + 3 * 18432)),
        ("dpo-llama3.1-8b-instruct-1n8g-megatron-lora", LLAMA_8B, 128 * (2 * 8192 + 2 * 5120 + 3 * 18432)),
        ("grpo-qwen3-8b-base-1n8g-megatron-lora", QWEN3_8B, 128 * (2 * 8192 + 2 * 5120 + 3 * 16384)),
    ],
)
def test_megatron_recipes_plan(tmp_path, recipe, model, trainable_per_layer):
    """On models of the same shapes, whose weights are not there."""
    model.save_pretrained(tmp_path)
    file = CONFIG_DIR / "recipes" / "llm" / f"{recipe}.yaml"
    config = load_config(file, [f"policy.model_name={tmp_path}"], recipe.split("-")[0])
    plan = make_plan(config)
    assert plan.backend == "megatron"
    assert plan.problems == ()
    (part,) = plan.rank_parts  # eight data-parallel ranks, each with the whole model
    assert part.num_params == plan.num_params
    assert part.num_adapter_params == plan.num_trainable_params == trainable_per_layer * model.num_hidden_layers


def test_the_megatron_recipe_of_another_architecture_is_counted_and_refused(tmp_path):
    NemotronHConfig(num_hidden_layers=4, architectures=["NemotronHForCausalLM"]).save_pretrained(tmp_path)
    file = CONFIG_DIR / "recipes" / "llm" / "grpo-nanov3-30BA3B-2n8g-megatron-lora.yaml"
    plan = make_plan(load_config(file, [f"policy.model_name={tmp_path}"], "grpo"))
    assert plan.num_params > 0
    assert plan.num_trainable_params > 0
    assert any("its architecture is NemotronHForCausalLM" in problem for problem in plan.problems)


def test_more_processes_than_this_machine_can_run_are_refused_before_one_starts(tiny_sft, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cores = os.cpu_count() or 1
    number = 64 * cores
    several = [
        "policy.dtensor_cfg.lora_cfg.enabled=false",
        "policy.lora={dim: 4}",
        "policy.train_global_batch_size=640",
    ]
    for backend in ("megatron", "dtensor"):
        refused = tiny_sft(*several, f"policy.backend={backend}", f"cluster.gpus_per_node={number}")
        assert refused.code == 2
        assert f"cluster.gpus_per_node={number}: this machine has no GPU and {cores} CPU core(s)" in refused.err
        assert f"Set cluster.gpus_per_node={cores} or less." in refused.err
        assert not list(tiny_sft.logs.glob("exp_*"))


def test_processes_that_do_not_fit_into_the_free_memory_are_refused(tiny, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    overrides = [f"policy.model_name={tiny}", "policy.lora={dim: 4}", "cluster.gpus_per_node=2"]
    for backend, parts in (("dtensor", ()), ("megatron", ("policy.megatron_cfg.tensor_model_parallel_size=2",))):
        config = load_config(None, [*overrides, f"policy.backend={backend}", *parts], "sft")
        plan = make_plan(config)
        assert machine_problems(config, plan) == []
        large = replace(
            plan,
            sizes=replace(plan.sizes, base_bytes=2**50),
            rank_parts=tuple(replace(part, num_params=2**48) for part in plan.rank_parts),
        )
        (problem,) = machine_problems(config, large)
        assert problem.startswith("cluster.gpus_per_node=2: a process holds ")
        assert "GiB free. Set a lower cluster.gpus_per_node, or free some memory." in problem
        monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
        assert machine_problems(config, large) == []
        monkeypatch.delenv("RAY_ADDRESS")


@pytest.mark.parametrize(
    "keys",
    [
        ["num_engines=64"],
        ["colocated.resources.gpus_per_node=64"],
        ["vllm_cfg.tensor_parallel_size=64"],
        ["num_engines=32", "vllm_cfg.tensor_parallel_size=2"],
    ],
)
def test_engines_that_do_not_fit_on_the_cores_or_into_the_memory_are_refused(tiny, monkeypatch, keys):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    apart = [f"policy.generation.{key}" for key in ("backend=vllm", "colocated.enabled=false", *keys)]
    config = load_config(None, [f"policy.model_name={tiny}", "policy.lora={dim: 4}", *apart], "grpo")
    plan = make_plan(config)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (problem,) = engine_problems_of_cpus(config, plan)
    assert problem.startswith("policy.generation.colocated.enabled=False: ")
    assert "and this machine has no GPU and 2 CPU core(s)" in problem
    monkeypatch.setattr(os, "cpu_count", lambda: 32)
    large = replace(plan, num_params=2**50)
    (problem,) = engine_problems_of_cpus(config, large)
    assert "GiB for weights and themselves, and this machine has" in problem
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert engine_problems_of_cpus(config, large) == []


def test_engines_that_fit_are_no_problem(tiny, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    key = "policy.generation"
    for keys in (["num_engines=2", "backend=vllm", "colocated.enabled=false"], ["backend=in_process"]):
        overrides = [f"policy.model_name={tiny}", "policy.lora={dim: 4}", *(f"{key}.{one}" for one in keys)]
        config = load_config(None, overrides, "grpo")
        assert engine_problems_of_cpus(config, make_plan(config)) == []


def test_what_stays_in_the_hosts_memory_is_held_against_it_though_there_is_a_gpu(tiny, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    overrides = [f"policy.model_name={tiny}", "policy.lora={dim: 4}", "cluster.gpus_per_node=2"]
    key, gpu = "policy.dtensor_cfg.cpu_offload", SimpleNamespace(total_memory=2**10, major=9, minor=0)
    configs = {is_set: load_config(None, [*overrides, f"{key}={is_set}"], "sft") for is_set in ("false", "true")}
    plans = {is_set: make_plan(config) for is_set, config in configs.items()}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    monkeypatch.setattr(os, "cpu_count", lambda: 0)  # which says nothing where GPUs compute
    (problem,) = machine_problems(configs["false"], plans["false"])
    assert problem.endswith("and a GPU has 0.0 GiB. Share the model further.")
    assert machine_problems(configs["true"], plans["true"]) == []
    large = replace(plans["true"], sizes=replace(plans["true"].sizes, base_bytes=2**50))
    (problem,) = machine_problems(configs["true"], large)
    assert "GiB free" in problem
    unchecked = {is_set: "\n".join(make_plan(config).unchecked) for is_set, config in configs.items()}
    assert "whether the run fits" in unchecked["false"]
    assert "whether the run fits" not in unchecked["true"]


def test_a_plan_says_how_many_engines_sample_and_on_what(tiny, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    apart = ("policy.generation.backend=vllm", "policy.generation.colocated.enabled=false")

    def said(*overrides):
        (check,) = [check for check in _plan(tiny, *overrides).checks if check.name == "engines"]
        return check.finding

    assert said() == "1 in_process, in the trainer's process"
    assert said(apart[0]) == "1 vllm, in the trainer's process"
    one = "1 vllm, each in a process of its own on 1 CPU(s) of one node: "
    assert said(*apart) == f"{one}1 tensor-parallel x 1 pipeline-parallel rank(s)"
    assert said(*apart, "policy.generation.num_engines=3").startswith("3 vllm, each")
    resources = "policy.generation.colocated.resources={num_nodes: 2, gpus_per_node: 4}"
    found = said(*apart, resources, "policy.generation.vllm_cfg.tensor_parallel_size=2")
    assert found.startswith("4 vllm, each in a process of its own on 2 CPU(s) of one node: 2 tensor-parallel")
    assert found.endswith(", on 2 node(s) with 4 of them")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * 2**30))
    assert said(*apart, "cluster.gpus_per_node=2").startswith("6 vllm, each in a process of its own on 1 GPU(s)")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert said(*apart).startswith("as many vllm as the cluster has devices for, each")
