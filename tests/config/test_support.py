"""What loads and yet cannot run in this version is named, key by key."""

import pytest

from nemo_rl_lora.config.load import CONFIG_DIR, load_config
from nemo_rl_lora.config.support import check_runnable, phase_problems


@pytest.mark.parametrize("backend", ["dtensor", "megatron"])
@pytest.mark.parametrize("algorithm", ["sft", "dpo", "grpo"])
def test_quick_start_is_runnable(algorithm, backend) -> None:
    assert check_runnable(load_config(None, [f"policy.backend={backend}"], algorithm)) == []


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["policy.dtensor_cfg.tensor_parallel_size=2"], "policy.dtensor_cfg.tensor_parallel_size=2"),
        (["policy.dtensor_cfg.context_parallel_size=4"], "policy.dtensor_cfg.context_parallel_size=4"),
        (["policy.dtensor_cfg.dp_replicate_size=2"], "policy.dtensor_cfg.dp_replicate_size=2"),
        (["policy.dtensor_cfg.sequence_parallel=true"], "policy.dtensor_cfg.sequence_parallel=True"),
        (["cluster.num_nodes=2"], "cluster.num_nodes=2"),
        (["policy.generation.colocated.enabled=false"], "policy.generation.colocated.enabled=False"),
    ],
)
def test_setting_that_cannot_run_is_named(overrides: list[str], key: str) -> None:
    problems = check_runnable(load_config(None, overrides, "grpo"))
    assert len(problems) == 1
    assert problems[0].startswith(f"{key}: ")


def test_recipe_for_two_nodes_loads_and_names_all_that_is_missing() -> None:
    file = CONFIG_DIR / "recipes" / "llm" / "grpo-nanov3-30BA3B-2n8g-megatron-lora.yaml"
    keys = [problem.split("=")[0] for problem in check_runnable(load_config(file, [], "grpo"))]
    assert keys == ["cluster.num_nodes"]


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("policy.megatron_cfg.tensor_model_parallel_size=2", "policy.megatron_cfg.tensor_model_parallel_size=2"),
        ("policy.megatron_cfg.optimizer.lr=1.0e-4", "policy.megatron_cfg.optimizer.lr=0.0001"),
        ("policy.megatron_cfg.peft.dim=64", "policy.megatron_cfg.peft.dim=64"),
        (
            "policy.generation.vllm_cfg.gpu_memory_utilization=0.8",
            "policy.generation.vllm_cfg.gpu_memory_utilization=0.8",
        ),
        ("+policy.generation.vllm_kwargs.seed=4", "policy.generation.vllm_kwargs={'seed': 4}"),
        ("policy.generation.timeout_seconds=60", "policy.generation.timeout_seconds=60.0"),
        ("policy.generation.vllm_cfg.enforce_eager=true", "policy.generation.vllm_cfg.enforce_eager=True"),
    ],
)
def test_value_that_nothing_reads_is_named(override: str, key: str) -> None:
    problems = check_runnable(load_config(None, [override], "grpo"))
    assert len(problems) == 1
    assert problems[0].startswith(f"{key}: is read by nothing")


def test_a_key_of_the_in_process_engine_is_named_beside_vllm() -> None:
    overrides = ["policy.generation.backend=vllm", "policy.generation.cuda_graphs=false"]
    (problem,) = check_runnable(load_config(None, overrides, "grpo"))
    assert problem.startswith("policy.generation.cuda_graphs=False: is read by nothing")
    assert problem.endswith("vLLM has policy.generation.vllm_cfg.enforce_eager.")


def test_what_an_engine_in_the_trainers_process_does_not_read_is_named() -> None:
    overrides = ["policy.generation.backend=vllm", "policy.generation.max_generation_failures=5"]
    (problem,) = check_runnable(load_config(None, overrides, "grpo"))
    assert problem.startswith("policy.generation.max_generation_failures=5: is read by nothing")
    assert check_runnable(load_config(None, [*overrides, "policy.generation.colocated.enabled=false"], "grpo")) == []


def test_values_that_follow_from_others_are_no_change() -> None:
    """The base file takes clip_grad, pipeline_dtype and max_model_len from the policy's own keys."""
    overrides = ["policy.max_grad_norm=null", "policy.precision=float32", "policy.max_total_sequence_length=256"]
    assert check_runnable(load_config(None, overrides, "grpo")) == []


def test_recipe_of_the_other_backend_names_every_value_it_changed() -> None:
    file = CONFIG_DIR / "recipes" / "llm" / "sft-llama3.1-8b-1n8g-megatron-lora.yaml"
    overrides = ["policy.backend=dtensor", "policy.megatron_cfg.peft.enabled=false", "cluster.gpus_per_node=1"]
    problems = check_runnable(load_config(file, overrides, "sft"))
    assert len(problems) == 1
    assert {"policy.megatron_cfg.peft.dim", "policy.megatron_cfg.optimizer.lr"} <= set(
        problems[0].replace("=", " ").replace(",", " ").replace(":", " ").split()
    )


@pytest.mark.parametrize("name", ["sft-llama3.1-8b-1n8g-fsdp2tp1-lora", "grpo-qwen3-8B-base-1n8g-fsdp2-lora"])
def test_recipe_that_is_silent_about_the_other_backend_is_not_refused_for_it(name: str) -> None:
    overrides = ["cluster.gpus_per_node=1"]
    algorithm = "grpo" if name.startswith("grpo") else "sft"
    if algorithm == "grpo":
        overrides.append("policy.generation.backend=auto")
    assert check_runnable(load_config(CONFIG_DIR / "recipes" / "llm" / f"{name}.yaml", overrides, algorithm)) == []


FULL, LORA = "{train: full, steps: 1}", "{train: lora, steps: 1}"
OWN = "{train: full, steps: 1, lr: 0.1, warmup_pct: 0.5, data: {dataset_name: squad}}"
MEGATRON = "policy.backend=megatron"


@pytest.mark.parametrize(
    ("phases", "overrides", "said"),
    [
        (FULL, ["policy.lora={enabled: true, dim: 8}"], "policy.lora.enabled=True: is read by nothing (nor are policy"),
        (FULL, ["policy.lora.dim=8"], "policy.lora.dim=8: is read by nothing"),
        (FULL, ["policy.dtensor_cfg.lora_cfg.enabled=true"], "policy.dtensor_cfg.lora_cfg.enabled=True: is read by"),
        (FULL, [MEGATRON, "policy.megatron_cfg.peft={enabled: true, dim: 4}"], "policy.megatron_cfg.peft.enabled=True"),
        (OWN, ["policy.optimizer.kwargs.lr=0.1"], "policy.optimizer.kwargs.lr=0.1: is read by nothing"),
        (OWN, ["policy.optimizer.full_finetuning_lr=0.1"], "policy.optimizer.full_finetuning_lr=0.1: is read by no"),
        (OWN, [MEGATRON, "policy.megatron_cfg.optimizer.lr=0.1"], "policy.megatron_cfg.optimizer.lr=0.1: is read by"),
        (OWN, ["policy.scheduler={_override_: true, name: constant}"], "policy.scheduler.name='constant': is read by"),
        (
            OWN,
            [MEGATRON, "policy.megatron_cfg.optimizer.min_lr=0"],
            "policy.megatron_cfg.optimizer.min_lr=0.0: is read",
        ),
        (OWN, ["data.train.dataset_name=gsm8k"], "data.train.dataset_name='gsm8k': is read by nothing"),
        (OWN, ["data.train=[{dataset_name: gsm8k, rate: 1.0}]"], "data.train="),
    ],
)
def test_keys_of_the_run_are_refused_where_every_phase_has_its_own(phases, overrides, said):
    config = load_config(None, [f"sft.phases=[{phases}]", *overrides], "sft")
    (problem,) = phase_problems(config)
    assert problem.startswith(said), problem
    others = load_config(None, [f"sft.phases=[{phases}, {LORA}]", *overrides], "sft")
    assert phase_problems(others) == []  # one phase reads them


def test_keys_that_phases_refer_to_or_that_were_inherited_are_not_refused():
    for overrides in (
        [],
        ["data.train=${sft.phases.0.data}"],
        ["data.train=[{dataset_name: squad}]", "data.validation=${data.train}"],
    ):
        assert phase_problems(load_config(None, [f"sft.phases=[{OWN}]", *overrides], "sft")) == [], overrides
    switched_off = ["policy.lora={enabled: false, dim: 8}"]
    assert phase_problems(load_config(None, [f"sft.phases=[{FULL}]", *switched_off], "sft")) == []
