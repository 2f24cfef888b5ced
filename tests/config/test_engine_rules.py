"""How many engines there are, and on what: what the keys need of each other."""

import pytest

from nemo_rl_lora.config.generation import chosen_engine
from nemo_rl_lora.config.load import load_config
from nemo_rl_lora.config.support import check_runnable

APART = ("policy.generation.backend=vllm", "policy.generation.colocated.enabled=false")


def of(*overrides: str):
    return load_config(None, list(overrides), "grpo")


def problems(*overrides: str) -> list[str]:
    return check_runnable(of(*overrides))


@pytest.mark.parametrize(
    ("overrides", "start", "end"),
    [
        (
            ["policy.generation.backend=in_process", "policy.generation.num_engines=2"],
            "policy.generation.num_engines=2: only vLLM has several engines, and policy.generation.backend=",
            "or policy.generation.num_engines=1.",
        ),
        (
            ["policy.generation.cuda_graphs=true"],
            "policy.generation.cuda_graphs=True: a CUDA graph needs a GPU, and torch finds none.",
            "Set it to auto, or remove it.",
        ),
        (
            ["policy.generation.backend=vllm", "policy.generation.num_engines=2"],
            "policy.generation.num_engines=2: one engine shares the trainer's process. Set "
            "policy.generation.colocated.enabled=false",
            "or policy.generation.num_engines=1.",
        ),
        (
            ["policy.generation.backend=vllm", "policy.generation.colocated.resources.gpus_per_node=2"],
            "policy.generation.colocated.resources.gpus_per_node=2: the engine shares the trainer's devices.",
            "or remove the key.",
        ),
        (
            ["policy.generation.backend=in_process", "policy.generation.colocated.resources.gpus_per_node=2"],
            "policy.generation.colocated.resources.gpus_per_node=2: only vLLM has devices of its own",
            "or remove the key.",
        ),
        (
            [*APART, "policy.generation.colocated.resources.num_nodes=2"],
            "policy.generation.colocated.resources.num_nodes=2: says nothing without the number of devices",
            "gpus_per_node too, or remove it.",
        ),
        (
            [
                *APART,
                "policy.generation.colocated.resources.gpus_per_node=3",
                "policy.generation.vllm_cfg.tensor_parallel_size=2",
            ],
            "policy.generation.colocated.resources.gpus_per_node=3: an engine takes 2 devices of one node",
            "Change one of them.",
        ),
        (
            [
                *APART,
                "policy.generation.num_engines=3",
                "policy.generation.colocated.resources={num_nodes: 2, gpus_per_node: 4}",
                "policy.generation.vllm_cfg.tensor_parallel_size=2",
            ],
            "policy.generation.num_engines=3: 2 node(s) with 4 devices",
            "come to 4. Set policy.generation.num_engines=4, or leave it out.",
        ),
    ],
)
def test_a_number_of_engines_that_cannot_be_is_refused_with_the_way_out(overrides, start, end):
    (problem,) = problems(*overrides)
    assert problem.startswith(start)
    assert problem.endswith(end)


@pytest.mark.parametrize(
    ("overrides", "number"),
    [
        ([], 1),
        (["policy.generation.num_engines=1"], 1),
        ([*APART], None),  # as many as the GPUs give
        ([*APART, "policy.generation.num_engines=3"], 3),
        ([*APART, "policy.generation.colocated.resources.gpus_per_node=4"], 4),
        ([*APART, "policy.generation.colocated.resources={num_nodes: 2, gpus_per_node: 4}"], 8),
        (
            [
                *APART,
                "policy.generation.colocated.resources={num_nodes: 2, gpus_per_node: 4}",
                "policy.generation.vllm_cfg.tensor_parallel_size=2",
                "policy.generation.num_engines=4",
            ],
            4,
        ),
    ],
)
def test_the_number_of_engines_follows_from_the_keys(overrides, number):
    assert problems(*overrides) == []
    assert of(*overrides).policy.generation.known_engines == number


@pytest.mark.parametrize("has_gpu", [True, False])
def test_the_engine_of_auto_is_the_one_that_was_run_on_such_a_device(has_gpu, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_gpu)
    chosen, reason = chosen_engine("auto")
    assert chosen == "in_process"
    assert ("policy.generation.backend=vllm asks for it" in reason) == has_gpu
    assert chosen_engine("vllm") == ("vllm", "as asked for")
