"""What a cluster's keys need of the rest of a run, known without Ray. Asked by `--plan` and by every start."""

from __future__ import annotations

import os
from collections.abc import Mapping

from nemo_rl_lora.config.cluster import RAY_ADDRESS, joins_ray
from nemo_rl_lora.config.errors import ConfigError, show
from nemo_rl_lora.config.master import MasterConfig
from nemo_rl_lora.config.policy import PolicyConfig

_OF_A_LAUNCHER = ("WORLD_SIZE", "RANK", "LOCAL_RANK")  # torchrun sets them all
_OF_SEVERAL = ("start_timeout_seconds", "step_timeout_seconds")


def cluster_problems(config: MasterConfig) -> list[str]:
    """One paragraph for each key of `cluster` that this run cannot have, or would not read."""
    cluster = config.cluster
    problems = []
    if cluster.num_nodes > 1 and not joins_ray():
        problems.append(
            f"cluster.num_nodes={cluster.num_nodes}: no Ray cluster is named, and on this machine alone one node "
            f"trains. Start Ray on the nodes (`ray start`) and set {RAY_ADDRESS}, or set cluster.num_nodes=1."
        )
    if cluster.num_processes == 1:
        problems += [
            f"cluster.{key}={value}: is read by nothing, since one process trains. Remove the change."
            for key in _OF_SEVERAL
            if (value := getattr(cluster, key)) is not None and config.is_set(f"cluster.{key}")
        ]
        generation = config.policy.generation
        if cluster.max_restarts and (generation is None or generation.colocated.enabled):
            problems.append(
                f"cluster.max_restarts={cluster.max_restarts}: one process trains, and no engine has a process of its "
                f"own, so that nothing can be lost. Remove the change."
            )
    return problems


def device_problems(config: MasterConfig, num_gpus: int) -> list[str]:
    """Why this machine has too few GPUs. Nothing on a CPU, which processes share, and nothing where a Ray cluster is
    joined, which has its own (distributed/placement.py)."""
    wanted, generation = config.cluster.gpus_per_node, config.policy.generation
    apart = generation is not None and not generation.colocated.enabled
    size = generation.devices_per_engine if generation is not None else 1
    engines = size * ((generation.known_engines or 1) if apart and generation is not None else 0)
    if not num_gpus or wanted + engines <= num_gpus or joins_ray():
        return []
    has = f"this machine has {num_gpus} GPU(s)"
    if not apart:
        return [f"cluster.gpus_per_node={wanted}: {has}. Set cluster.gpus_per_node={num_gpus}."]
    fewer = f"Set cluster.gpus_per_node={num_gpus - engines}" if num_gpus > engines else "Add a GPU"
    needs = "the engine needs a GPU of its own" if engines == 1 else f"the engines need {engines} GPUs of their own"
    return [
        f"policy.generation.colocated.enabled=False: {needs}, {has}, and "
        f"cluster.gpus_per_node={wanted} of them train. {fewer}, or set policy.generation.colocated.enabled=true."
    ]


def refuse_launcher() -> None:
    """ConfigError in a process that torchrun or the like started as one of several: a driver starts them itself."""
    found = {name: os.environ[name] for name in _OF_A_LAUNCHER if os.environ.get(name)}
    if "LOCAL_RANK" in found or found.get("WORLD_SIZE", "1") != "1":
        number = found.get("WORLD_SIZE", "N")
        raise ConfigError(
            f"{', '.join(f'{name}={value!r}' for name, value in found.items())}: torchrun, or another launcher, has "
            f"started this process as one of several, and here one driver starts the others. Start the driver once, as "
            f"`python examples/run_sft.py cluster.gpus_per_node={number}` (for several nodes with cluster.num_nodes "
            f"and {RAY_ADDRESS}), or unset these variables."
        )


def env_vars(policy: PolicyConfig) -> Mapping[str, str]:
    """Environment variables that the active backend's training processes are asked to have."""
    section = policy.dtensor_cfg if policy.active_backend == "dtensor" else policy.megatron_cfg
    return section.env_vars or {}


def missing_env_vars(policy: PolicyConfig) -> dict[str, str]:
    """Those of them that this process does not have; an empty value is that of a variable which is not set."""
    return {name: value for name, value in env_vars(policy).items() if os.environ.get(name, "") != value}


def refuse_missing_env_vars(policy: PolicyConfig) -> None:
    """ConfigError where the process that trains was started without them."""
    if missing := missing_env_vars(policy):
        key = "dtensor" if policy.active_backend == "dtensor" else "megatron"
        raise ConfigError(
            f"policy.{key}_cfg.env_vars={show(dict(env_vars(policy)))}: this process trains, and torch runs in it "
            f"already without {', '.join(missing)}. Set it in the shell that starts Python."
        )
