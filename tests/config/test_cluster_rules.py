"""What the keys of `cluster` and `env_vars` need of the rest of a run."""

import pytest

from nemo_rl_lora.config.cluster_rules import (
    cluster_problems,
    device_problems,
    env_vars,
    missing_env_vars,
    refuse_missing_env_vars,
)
from nemo_rl_lora.config.errors import ConfigError
from nemo_rl_lora.config.load import load_config

TWO = ["policy.backend=megatron", "cluster.gpus_per_node=2"]


def problems(*overrides: str) -> list[str]:
    return cluster_problems(load_config(None, list(overrides), "sft"))


def test_more_nodes_need_a_ray_cluster(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (problem,) = problems("cluster.num_nodes=2")
    assert problem.startswith("cluster.num_nodes=2: no Ray cluster is named")
    assert problem.endswith("set RAY_ADDRESS, or set cluster.num_nodes=1.")
    for address, number in (("10.0.0.1:6379", 0), ("auto", 0), ("local", 1), ("", 1)):
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert len(problems("cluster.num_nodes=2")) == number


@pytest.mark.parametrize("override", ["start_timeout_seconds=60.0", "step_timeout_seconds=60.0"])
def test_one_process_reads_none_of_what_several_need(override):
    (problem,) = problems(f"cluster.{override}")
    assert problem.startswith(f"cluster.{override}: is read by nothing")
    assert problems(*TWO, f"cluster.{override}") == []
    assert problems("cluster.segment_size=null") == []
    assert problems("cluster.segment_size=18") == []  # one node is a group of its own


ENGINE = "policy.generation.colocated.enabled=False: the engine needs a GPU of its own, this machine has"
FEWER, TOGETHER = "Set cluster.gpus_per_node=7", "or set policy.generation.colocated.enabled=true."


@pytest.mark.parametrize(
    ("per_node", "colocated", "num_gpus", "start", "end"),
    [
        (8, True, 4, "cluster.gpus_per_node=8: this machine has 4 GPU(s).", "Set cluster.gpus_per_node=4."),
        (8, False, 8, f"{ENGINE} 8 GPU(s), and cluster.gpus_per_node=8 of them train. {FEWER}", TOGETHER),
        (1, False, 1, f"{ENGINE} 1 GPU(s), and cluster.gpus_per_node=1 of them train. Add a GPU", TOGETHER),
        (8, True, 8, None, ""),
        (7, False, 8, None, ""),
        (8, False, 0, None, ""),  # on a CPU
    ],
)
def test_a_machine_with_too_few_gpus_is_named(per_node, colocated, num_gpus, start, end, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    overrides = [f"cluster.gpus_per_node={per_node}", f"policy.generation.colocated.enabled={colocated}"]
    config = load_config(None, overrides, "grpo")
    found = device_problems(config, num_gpus)
    said = [(problem.startswith(start or ""), problem.endswith(end)) for problem in found]
    assert said == ([] if start is None else [(True, True)])
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert device_problems(config, num_gpus) == []


@pytest.mark.parametrize(
    ("more", "num_gpus", "found"),
    [
        (["num_engines=3"], 4, "the engines need 3 GPUs of their own, this machine has 4 GPU(s), and"),
        (["num_engines=2"], 4, None),
        (
            ["vllm_cfg.tensor_parallel_size=2"],
            3,
            "the engines need 2 GPUs of their own, this machine has 3 GPU(s), and",
        ),
        (["colocated.resources.gpus_per_node=4"], 8, None),
    ],
)
def test_engines_need_gpus_that_do_not_train(more, num_gpus, found, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    overrides = ["colocated.enabled=false", "backend=vllm", *more]
    config = load_config(None, ["cluster.gpus_per_node=2", *(f"policy.generation.{one}" for one in overrides)], "grpo")
    said = device_problems(config, num_gpus)
    assert [found in one for one in said] == ([] if found is None else [True])


def test_a_run_that_can_lose_nothing_has_no_restarts():
    apart = ["policy.generation.backend=vllm", "policy.generation.colocated.enabled=false"]
    (problem,) = problems("cluster.max_restarts=2")
    assert problem.startswith("cluster.max_restarts=2: one process trains")
    assert problems(*TWO, "cluster.max_restarts=2") == problems("cluster.max_restarts=0") == []
    grpo = [load_config(None, [*more, "cluster.max_restarts=2"], "grpo") for more in ([], apart)]
    assert [len(cluster_problems(config)) for config in grpo] == [1, 0]


def test_environment_variables_of_the_active_backend_are_asked_for(monkeypatch):
    monkeypatch.setenv("NRL_TEST_THERE", "1")
    monkeypatch.delenv("NRL_TEST_UNSET", raising=False)
    asked = "policy.megatron_cfg.env_vars={NRL_TEST_THERE: '1', NRL_TEST_UNSET: ''}"
    policy = load_config(None, ["policy.backend=megatron", asked], "sft").policy
    assert env_vars(policy) == {"NRL_TEST_THERE": "1", "NRL_TEST_UNSET": ""}
    refuse_missing_env_vars(policy)
    monkeypatch.setenv("NRL_TEST_THERE", "2")
    assert missing_env_vars(policy) == {"NRL_TEST_THERE": "1"}
    with pytest.raises(ConfigError, match=r"^policy.megatron_cfg.env_vars=\{.*torch runs in it already without NRL"):
        refuse_missing_env_vars(policy)


def test_a_run_in_a_process_that_has_torch_cannot_have_other_variables(tiny_sft):
    ended = tiny_sft("policy.dtensor_cfg.env_vars={NRL_TEST_OTHER: '1'}")
    assert ended.code == 2, ended.err
    assert "Error: policy.dtensor_cfg.env_vars={'NRL_TEST_OTHER': '1'}: this process trains" in ended.err
    ended = tiny_sft("policy.dtensor_cfg.env_vars={NRL_TEST_OTHER: 1}")
    assert ended.code == 2
    assert "policy.dtensor_cfg.env_vars.NRL_TEST_OTHER=1: must be text" in ended.err
