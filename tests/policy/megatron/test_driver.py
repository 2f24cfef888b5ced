"""Whole runs on the Megatron backend, by the drivers' own entry, beside the same runs on the DTensor backend."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from nemo_rl_lora.config.load import CONFIG_DIR, algorithm_of
from tests.driver import Ended, TinyRun, run_driver

SLOW = pytest.mark.slow
NO_DTENSOR_BLOCK = "policy.dtensor_cfg.lora_cfg.enabled=false"
UNIFIED = [NO_DTENSOR_BLOCK, "policy.lora.dim=4"]
MEGATRON = [*UNIFIED, "policy.backend=megatron"]
FLAGS = [
    NO_DTENSOR_BLOCK,
    "policy.dtensor_cfg.enabled=false",
    "policy.megatron_cfg.enabled=true",
    "policy.megatron_cfg.peft.enabled=true",
    "policy.megatron_cfg.peft.dim=4",
    "policy.megatron_cfg.peft.dropout_position=post",
]


@pytest.fixture(params=["sft", "dpo", "grpo"])
def run(request, tiny_llama, tmp_path):
    """A run of each algorithm; call it with the name of its directory, and overrides."""

    def start(name: str, *overrides: str) -> tuple[Ended, TinyRun]:
        root = tmp_path / name
        root.mkdir()
        tiny = TinyRun(root=root, model=tiny_llama, algorithm=request.param)
        return tiny(*overrides), tiny

    return start


def headline(tiny: TinyRun) -> list[dict[str, float]]:
    names = ("loss", "grad_norm", "reward", "lr", "num_forward_tokens", "preference_accuracy")
    return [{name: line[name] for name in names if name in line} for line in tiny.metrics()]


def assert_same(actual: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert len(actual) == len(expected) == 2
    for one, other in zip(actual, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("asked", [MEGATRON, FLAGS], ids=["policy.lora", "NeMo RL's flags"])
def test_a_run_is_the_run_of_the_other_backend(run, asked):
    ended, expected = run("dtensor", *UNIFIED)
    assert ended.code == 0, ended.err
    ended, actual = run("megatron", *asked)
    assert ended.code == 0, ended.err
    assert_same(headline(actual), headline(expected))
    assert actual.steps() == expected.steps() == ["step_2"]
    files = [{file.name for file in (tiny.checkpoints / "step_2").rglob("*")} for tiny in (expected, actual)]
    assert files[0] == files[1]


def test_without_an_adapter_all_weights_are_trained(run):
    ended, expected = run("dtensor", NO_DTENSOR_BLOCK)
    assert ended.code == 0, ended.err
    ended, actual = run("megatron", NO_DTENSOR_BLOCK, "policy.backend=megatron")
    assert ended.code == 0, ended.err
    assert_same(headline(actual), headline(expected))
    assert (actual.checkpoints / "step_2" / "policy" / "weights" / "model.safetensors").is_file()


@pytest.mark.parametrize("mode", ["merged", "adapter"])
def test_the_engine_samples_from_the_adapter_that_is_trained(tiny_run, mode):
    ended = tiny_run(*MEGATRON, f"policy.generation.lora_sync={mode}", "grpo.max_num_steps=3")
    assert ended.code == 0, ended.err
    assert all(line["gen_kl_error"] < 1e-4 for line in tiny_run.metrics())


@pytest.mark.parametrize("schedule", ["policy.scheduler", "policy.megatron_cfg.scheduler"])
def test_a_schedule_counts_rollouts_and_goes_on_from_where_it_was(tiny_run, schedule):
    """Of two optimizer steps each: up over two rollouts, then down to 0 at the fourth or the fifth."""
    ours = ["policy.scheduler={_override_: true, name: linear, warmup_steps: 2, total_steps: 4}"]
    theirs = {"lr_decay_style": "linear", "lr_warmup_init": 0.0, "lr_warmup_iters": 2, "lr_decay_iters": 4}
    is_ours = schedule == "policy.scheduler"
    settings = ours if is_ours else [f"{schedule}.{key}={value}" for key, value in theirs.items()]
    settings += [] if is_ours else ["policy.megatron_cfg.optimizer.min_lr=0"]
    for num_steps in (2, 4):
        ended = tiny_run(
            *MEGATRON,
            *settings,
            "policy.optimizer.kwargs.lr=0.02",
            "policy.train_global_batch_size=8",
            f"grpo.max_num_steps={num_steps}",
        )
        assert ended.code == 0, ended.err
    rates = [line["lr"] for experiment in (1, 2) for line in tiny_run.metrics(experiment=experiment)]
    assert rates == pytest.approx([0.01, 0.02, 0.02, 0.01] if is_ours else [0.0, 0.01, 0.02, 0.01])


SPLIT = {
    "sft": ["policy.megatron_cfg.pipeline_model_parallel_size=2", "policy.megatron_cfg.activation_checkpointing=true"],
    "dpo": [],
    "grpo": [],
}


# The ways to share a model are in test_parallel.py, the actors in tests/distributed/test_policy_group.py.
@SLOW
@pytest.mark.parametrize("run", ["sft", "dpo", "grpo"], indirect=True)
def test_a_run_in_two_processes_is_the_run_of_one(run):
    ended, expected = run("one", *MEGATRON)
    assert ended.code == 0, ended.err
    ended, actual = run("two", *MEGATRON, "cluster.gpus_per_node=2", *SPLIT[expected.algorithm])
    assert ended.code == 0, ended.err
    shared = [{name: value for name, value in line.items() if "tokens" not in name} for line in headline(actual)]
    alone = [{name: value for name, value in line.items() if "tokens" not in name} for line in headline(expected)]
    assert_same(shared, alone)  # a prompt that two processes need is computed by both
    assert actual.steps() == expected.steps() == ["step_2"]


CPU_RECIPES = CONFIG_DIR / "recipes" / "cpu"
RECIPES = sorted(file.stem for file in CPU_RECIPES.glob("*.yaml"))
SMALL = {
    "sft": ["policy.train_global_batch_size=2", "sft.val_batches=1", "sft.val_global_batch_size=2"],
    "dpo": ["policy.train_global_batch_size=2", "dpo.val_batches=1", "dpo.val_global_batch_size=2"],
    "grpo": ["grpo.num_prompts_per_step=2", "policy.train_global_batch_size=16", "grpo.max_val_samples=2"],
}


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(CPU_RECIPES / f"{name}.yaml", marks=() if name.startswith("dpo") else SLOW) for name in RECIPES],
    ids=RECIPES,
)
def test_recipes_for_a_cpu_train_the_real_model(recipe, tmp_path):
    algorithm = algorithm_of(recipe)
    overrides = [f"{algorithm}.max_num_steps=1", f"{algorithm}.val_at_start=false", *SMALL[algorithm]]
    places = [f"checkpointing.checkpoint_dir={tmp_path}/steps", f"logger.log_dir={tmp_path}/logs"]
    ended = run_driver("--config", str(recipe), *overrides, *places, algorithm=algorithm)
    assert ended.code == 0, ended.err
    tensors = load_file(tmp_path / "steps" / "step_1" / "policy" / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 30
    assert all(tensor.any() for name, tensor in tensors.items() if ".lora_B." in name)


def test_an_interrupted_run_goes_on_as_the_run_that_was_not(tiny_sft, tmp_path):
    settings = [*MEGATRON, "policy.lora.dropout=0.2"]
    whole = tiny_sft(*settings, "sft.max_num_steps=4", f"checkpointing.checkpoint_dir={tmp_path}/whole")
    assert whole.code == 0, whole.err
    assert tiny_sft(*settings, "sft.max_num_steps=2").code == 0
    assert tiny_sft(*settings, "sft.max_num_steps=4").code == 0
    first, rest = tiny_sft.metrics(experiment=1), tiny_sft.metrics(experiment=3)
    assert [line["loss"] for line in first[2:]] == [line["loss"] for line in rest]
    one, two = (
        (path / "step_4" / "policy" / "adapter" / "adapter_model.safetensors").read_bytes()
        for path in (tmp_path / "whole", tiny_sft.checkpoints)
    )
    assert one == two


@pytest.mark.parametrize("backends", [("dtensor", "megatron"), ("megatron", "dtensor")], ids=" then ".join)
def test_a_run_goes_on_with_the_other_backend(tiny_sft, tmp_path, backends):
    settings = [*UNIFIED, "policy.lora.dropout=0.2", "policy.scheduler={name: cosine, total_steps: 6}"]
    whole = tiny_sft(*settings, "sft.max_num_steps=4", f"checkpointing.checkpoint_dir={tmp_path}/whole")
    assert whole.code == 0, whole.err
    for steps, backend in zip((2, 4), backends, strict=True):
        ended = tiny_sft(*settings, f"sft.max_num_steps={steps}", f"policy.backend={backend}")
        assert ended.code == 0, ended.err
    first, rest = tiny_sft.metrics(experiment=1), tiny_sft.metrics(experiment=3)
    assert [line["step"] for line in rest] == [3, 4]
    for expected, actual in zip(first[2:], rest, strict=True):
        assert actual["lr"] == expected["lr"]
        assert actual["loss"] == pytest.approx(expected["loss"], rel=1e-4)


NATIVE = {
    "dtensor": ["policy.dtensor_cfg.lora_cfg.dropout=0.2"],
    "megatron": [*FLAGS, "policy.megatron_cfg.peft.dropout=0.2"],
}


@pytest.mark.parametrize("backends", [("dtensor", "megatron"), ("megatron", "dtensor")], ids=" then ".join)
def test_a_run_goes_on_where_each_backend_has_its_own_block(tiny_sft, tmp_path, backends):
    first, second = backends
    whole = tiny_sft(*NATIVE[first], "sft.max_num_steps=4", f"checkpointing.checkpoint_dir={tmp_path}/whole")
    assert whole.code == 0, whole.err
    ended = tiny_sft(*NATIVE[first], "sft.max_num_steps=2")
    assert ended.code == 0, ended.err
    recomputed = f"policy.{second}_cfg.activation_checkpointing=true"
    ended = tiny_sft(*NATIVE[second], recomputed, "sft.max_num_steps=4")
    assert ended.code == 0, ended.err
    expected, actual = tiny_sft.metrics(experiment=1)[2:], tiny_sft.metrics(experiment=3)
    assert [line["step"] for line in actual] == [3, 4]
    for name in ("lr", "loss", "grad_norm"):
        assert [line[name] for line in actual] == pytest.approx([line[name] for line in expected], rel=1e-4)


@SLOW
def test_a_run_goes_on_in_two_processes_that_share_the_model(tiny_sft, tmp_path):
    whole = tiny_sft(*NATIVE["dtensor"], "sft.max_num_steps=4", f"checkpointing.checkpoint_dir={tmp_path}/whole")
    assert whole.code == 0, whole.err
    ended = tiny_sft(*NATIVE["dtensor"], "sft.max_num_steps=2")
    assert ended.code == 0, ended.err
    stages = ["cluster.gpus_per_node=2", "policy.megatron_cfg.pipeline_model_parallel_size=2"]
    ended = tiny_sft(*NATIVE["megatron"], *stages, "sft.max_num_steps=4")
    assert ended.code == 0, ended.err
    expected, actual = tiny_sft.metrics(experiment=1)[2:], tiny_sft.metrics(experiment=3)
    assert [line["loss"] for line in actual] == pytest.approx([line["loss"] for line in expected], rel=1e-4)


def test_a_plan_is_made_for_this_backend(tiny_run):
    ended = run_driver("--plan", *tiny_run.arguments(*MEGATRON))
    assert ended.code == 0, ended.err
    said = " ".join(ended.out.split())  # a line is cut where the model's path is long
    assert "megatron: LoRA, dim 4" in said
    assert "Stops this run" not in said


@pytest.mark.parametrize(
    ("override", "error"),
    [
        ("policy.megatron_cfg.pipeline_model_parallel_size=2", "which must divide the 1 training processes"),
        ("policy.lora.dropout=1.5", "policy.lora.dropout"),
        ("cluster.num_nodes=2", "cluster.num_nodes=2: no Ray cluster is named"),
        ("policy.megatron_cfg.use_gloo_process_groups=true", "policy.megatron_cfg.use_gloo_process_groups=True: "),
        ("policy.dtensor_cfg.activation_checkpointing=true", "policy.dtensor_cfg.activation_checkpointing=True: "),
        ("policy.lora.a2a=true", "policy.lora.a2a=True: "),
    ],
)
def test_what_this_backend_does_not_run_is_refused_by_name(tiny_run, override, error):
    ended = tiny_run(*MEGATRON, override)
    assert ended.code == 2
    assert error in ended.err


def test_another_architecture_is_refused_with_a_list_of_those_that_run(tiny_run, tmp_path):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        num_hidden_layers=1, num_attention_heads=2, hidden_size=16, intermediate_size=32, vocab_size=512
    )
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "neox")
    ended = tiny_run(*MEGATRON, f"policy.model_name={tmp_path / 'neox'}")
    assert ended.code == 2
    assert "its architecture is GPTNeoXForCausalLM. The Megatron backend holds LlamaForCausalLM" in ended.err
