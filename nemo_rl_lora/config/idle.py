"""Keys of a backend or an engine that this run does not use.

Contract: a value that was changed there is refused by name, so that nothing asked for is ignored silently. Changed is
what differs from the algorithm's base file, or from the schema's defaults where that is less: so a recipe that says
nothing about the other backend starts, whether it inherits the base file or not. Switches (`enabled`) choose what is
used and are not judged here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from nemo_rl_lora.config.errors import show
from nemo_rl_lora.config.loader import base_section
from nemo_rl_lora.config.master import MasterConfig


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
    if policy.generation is not None and policy.generation.backend != "vllm":
        problems += _problem(
            config,
            policy.generation,
            "policy.generation",
            f"completions do not come from vLLM (policy.generation.backend={policy.generation.backend}). Remove the "
            "change.",
            only=("vllm_cfg", "vllm_kwargs"),
        )
    return problems


def _problem(
    config: MasterConfig, section: BaseModel, path: str, reason: str, only: tuple[str, ...] | None = None
) -> list[str]:
    """The paragraph about a section, or nothing where none of its values (`only` some of its keys) was changed."""
    usual = [base for base in (type(section)(), base_section(config, path)) if base is not None]
    differing = [
        [(key, value) for key, value in _changed(section, base) if only is None or key.split(".")[0] in only]
        for base in usual
    ]
    changed = [(f"{path}.{key}", value) for key, value in min(differing, key=len)]
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
