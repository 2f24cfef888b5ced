"""What loads and yet cannot run in this version is named, key by key."""

import pytest

from nemo_rl_lora.config.loader import CONFIG_DIR, load_config
from nemo_rl_lora.config.runnable import check_runnable


def test_quick_start_is_runnable() -> None:
    assert check_runnable(load_config(None, [], "grpo")) == []


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["policy.backend=megatron"], "policy.backend='megatron'"),
        (
            ["policy.dtensor_cfg.enabled=false", "policy.megatron_cfg.enabled=true"],
            "policy.megatron_cfg.enabled=True",
        ),
        (["policy.dtensor_cfg.tensor_parallel_size=2"], "policy.dtensor_cfg.tensor_parallel_size=2"),
        (["policy.dtensor_cfg.context_parallel_size=4"], "policy.dtensor_cfg.context_parallel_size=4"),
        (["policy.dtensor_cfg.dp_replicate_size=2"], "policy.dtensor_cfg.dp_replicate_size=2"),
        (["policy.dtensor_cfg.sequence_parallel=true"], "policy.dtensor_cfg.sequence_parallel=True"),
        (["cluster.gpus_per_node=8"], "cluster.gpus_per_node=8"),
        (["cluster.num_nodes=2"], "cluster.num_nodes=2"),
        (["policy.generation.backend=vllm"], "policy.generation.backend='vllm'"),
    ],
)
def test_setting_that_cannot_run_is_named(overrides: list[str], key: str) -> None:
    problems = check_runnable(load_config(None, overrides, "grpo"))
    assert len(problems) == 1
    assert problems[0].startswith(f"{key}: ")


def test_recipe_for_two_nodes_loads_and_names_all_that_is_missing() -> None:
    file = CONFIG_DIR / "recipes" / "llm" / "grpo-nanov3-30BA3B-2n8g-megatron-lora.yaml"
    keys = [problem.split("=")[0] for problem in check_runnable(load_config(file, [], "grpo"))]
    assert keys == ["policy.megatron_cfg.enabled", "cluster.gpus_per_node", "policy.generation.backend"]
