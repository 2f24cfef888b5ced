"""What tensor parallelism of the DTensor backend cannot split, from a model's config.json alone."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from nemo_rl_lora.config.dtensor import DTensorConfig
from nemo_rl_lora.models.families import families_for


def tensor_parallel_problems(sizes: DTensorConfig, model_config: Any) -> list[str]:
    """A paragraph for each reason why these ranks cannot share the matrices of a model; its transformers config."""
    number, key = sizes.tensor_parallel_size, "policy.dtensor_cfg.tensor_parallel_size"
    if number == 1:
        return []
    if sizes.custom_parallel_plan is not None:
        try:
            read_custom_plan(sizes.custom_parallel_plan)
        except ValueError as error:
            return [str(error)]
    known = families_for("tensor_parallel")
    if sizes.custom_parallel_plan is None and model_config.model_type not in known:
        names = ", ".join(family.architecture for family in known.values())
        return [
            f"{key}={number}: there is no plan to split the matrices of {model_config.model_type!r}; there is one for "
            f"{names}. Set {key}=1, where FSDP2 shards any model, or give policy.dtensor_cfg.custom_parallel_plan."
        ]
    text = model_config.get_text_config()
    counts = {
        name: getattr(text, name, None) for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    }
    return [
        f"{key}={number}: must divide {name}, which is {count}. Set a divisor of {count}."
        for name, count in counts.items()
        if count is not None and count % number
    ]


def read_custom_plan(path: str) -> dict[str, Any]:
    """The plan at a dotted path, or what a function there gives: module names -> parallel styles. ValueError by the
    key's name."""
    key = f"policy.dtensor_cfg.custom_parallel_plan={path!r}"
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{key}: {error}. Give the dotted path of a plan in a module that can be imported.") from None
    plan = found() if callable(found) else found
    if not isinstance(plan, dict):
        raise ValueError(f"{key}: is a {type(plan).__name__}. A plan is a dict of module names and parallel styles.")
    return plan
