"""Keys of a backend or an engine that this run does not use.

Contract: a value that was changed there is refused by name, so that nothing asked for is ignored silently. Changed is
what differs from the algorithm's base file, from its quick start or from the schema's defaults, whichever is least: so
a recipe that says nothing about the other backend starts, whichever file it inherits. Switches (`enabled`) choose what
is used and are not judged here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from pydantic import BaseModel

from nemo_rl_lora.config.errors import show
from nemo_rl_lora.config.generation import chosen_engine
from nemo_rl_lora.config.loader import usual_sections
from nemo_rl_lora.config.master import MasterConfig

_PROCESS_KEYS = ("max_generation_failures", "timeout_seconds")
_VLLM_KEYS = ("vllm_cfg", "vllm_kwargs", *_PROCESS_KEYS)


def idle_problems(config: MasterConfig) -> list[str]:
    """One paragraph for each unused block in which a value was changed."""
    policy, problems = config.policy, []
    if policy.active_backend == "dtensor":
        problems += _problem(
            config,
            policy.megatron_cfg,
            "policy.megatron_cfg",
            "policy.backend=dtensor trains. Remove the change: the DTensor backend has policy.dtensor_cfg, "
            "policy.optimizer and policy.scheduler.",
        )
    else:
        problems += _problem(
            config,
            policy.dtensor_cfg,
            "policy.dtensor_cfg",
            "policy.backend=megatron trains. Remove the change: the Megatron backend has policy.megatron_cfg.",
            judged=lambda key: key != "lora_cfg",  # a block that is off
        )
    if policy.generation is not None and chosen_engine(policy.generation.backend)[0] != "vllm":
        problems += _problem(
            config,
            policy.generation,
            "policy.generation",
            f"completions do not come from vLLM (policy.generation.backend={policy.generation.backend}). Remove the "
            "change.",
            judged=lambda key: key in _VLLM_KEYS,
        )
    elif policy.generation is not None and policy.generation.colocated.enabled:
        problems += _problem(
            config,
            policy.generation,
            "policy.generation",
            "the engine runs in the trainer's process (policy.generation.colocated.enabled=true). Remove the change.",
            judged=lambda key: key in _PROCESS_KEYS,
        )
    return problems


def changed_values(
    config: MasterConfig, section: BaseModel, path: str, judged: Callable[[str], bool] = lambda _: True
) -> list[tuple[str, Any]]:
    """Keys of a section, relative to it, that were changed, with their values; `judged` says which of its own keys are
    looked at."""
    usual = [type(section)(), *usual_sections(config, path)]
    differing = [
        [(key, value) for key, value in _changed(section, base) if judged(key.split(".")[0])] for base in usual
    ]
    return min(differing, key=len)


def _problem(
    config: MasterConfig,
    section: BaseModel,
    path: str,
    reason: str,
    judged: Callable[[str], bool] = lambda _: True,
) -> list[str]:
    """The paragraph about a section, or nothing where none of its values was changed."""
    changed = [(f"{path}.{key}", value) for key, value in changed_values(config, section, path, judged)]
    if not changed:
        return []
    (key, value), others = changed[0], [key for key, _ in changed[1:]]
    also = f" (nor are {', '.join(others)})" if others else ""
    return [f"{key}={show(value)}: is read by nothing{also}, since {reason}"]


def _changed(section: BaseModel, base: BaseModel) -> Iterator[tuple[str, Any]]:
    """Keys whose value is not the base's, relative to the section."""
    for name, field in type(section).model_fields.items():
        key, value, usual = field.alias or name, getattr(section, name), getattr(base, name)
        if isinstance(value, BaseModel) and isinstance(usual, BaseModel):
            yield from ((f"{key}.{inner}", found) for inner, found in _changed(value, usual))
        elif name != "enabled" and value != usual:
            yield key, value
