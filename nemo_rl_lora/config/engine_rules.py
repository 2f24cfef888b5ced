"""How many engines sample, and on what: what the keys need of each other. Asked by `--plan` and by every start."""

from __future__ import annotations

from nemo_rl_lora.config.generation import EngineConfig, GenerationConfig, chosen_engine

_KEY = "policy.generation"
_RESOURCES = f"{_KEY}.colocated.resources"


def engine_problems(generation: GenerationConfig | None) -> list[str]:
    """One paragraph for each key that this engine, or this number of engines, cannot have."""
    if generation is None:
        return []
    if chosen_engine(generation.backend)[0] != "vllm":
        return [*_other_engine_problems(generation), *graph_problems(generation)]
    return _number_problems(generation)


def graph_problems(generation: EngineConfig) -> list[str]:
    """Why the engine in the trainer's process has no CUDA graphs that were asked for."""
    import torch

    if generation.cuda_graphs is not True or torch.cuda.is_available():
        return []
    return [f"{_KEY}.cuda_graphs=True: a CUDA graph needs a GPU, and torch finds none. Set it to auto, or remove it."]


def _other_engine_problems(generation: GenerationConfig) -> list[str]:
    """Of an engine that is one, in the trainer's process."""
    problems, backend = [], f"{_KEY}.backend={generation.backend!r}"
    if not generation.colocated.enabled:
        problems.append(
            f"{_KEY}.colocated.enabled=False: only vLLM runs in a process of its own, and {backend}. Set "
            f"{_KEY}.backend=vllm, or {_KEY}.colocated.enabled=true."
        )
    if (number := generation.num_engines or 1) > 1:
        problems.append(
            f"{_KEY}.num_engines={number}: only vLLM has several engines, and {backend}. Set {_KEY}.backend=vllm with "
            f"{_KEY}.colocated.enabled=false, or {_KEY}.num_engines=1."
        )
    return problems + _resource_problems(generation, f"only vLLM has devices of its own, and {backend}.")


def _number_problems(generation: GenerationConfig) -> list[str]:
    resources, number, size = generation.colocated.resources, generation.num_engines, generation.devices_per_engine
    if generation.colocated.enabled:
        problems = _resource_problems(generation, "the engine shares the trainer's devices.")
        if number is not None and number > 1:
            problems.append(
                f"{_KEY}.num_engines={number}: one engine shares the trainer's process. Set "
                f"{_KEY}.colocated.enabled=false, which gives each engine a process of its own, or "
                f"{_KEY}.num_engines=1."
            )
        return problems
    if resources.gpus_per_node is None:
        return [] if resources.num_nodes is None else [_without_devices(resources.num_nodes)]
    if resources.gpus_per_node % size:
        return [
            f"{_RESOURCES}.gpus_per_node={resources.gpus_per_node}: an engine takes {size} devices of one node "
            f"({_KEY}.vllm_cfg.tensor_parallel_size x pipeline_parallel_size), which has to divide it. Change one of "
            f"them."
        ]
    if number is not None and number != generation.known_engines:
        return [
            f"{_KEY}.num_engines={number}: {resources.num_nodes or 1} node(s) with {resources.gpus_per_node} devices "
            f"({_RESOURCES}) and {size} for each engine come to {generation.known_engines}. Set "
            f"{_KEY}.num_engines={generation.known_engines}, or leave it out."
        ]
    return []


def _without_devices(num_nodes: int) -> str:
    return (
        f"{_RESOURCES}.num_nodes={num_nodes}: says nothing without the number of devices on each node. Set "
        f"{_RESOURCES}.gpus_per_node too, or remove it."
    )


def _resource_problems(generation: GenerationConfig, reason: str) -> list[str]:
    """A paragraph for each key of resources that is set where engines have none."""
    return [
        f"{_RESOURCES}.{key}={value}: {reason} Set {_KEY}.backend=vllm with {_KEY}.colocated.enabled=false, or remove "
        f"the key."
        for key, value in generation.colocated.resources
        if value is not None
    ]
