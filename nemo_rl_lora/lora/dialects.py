"""From a dialect's keys to LoraSpec.

Contract: a dialect is a mapping with string keys, and a table from LoraSpec's fields to them; the result is a LoraSpec,
or a ValueError naming the dialect's own key. The blocks of a configuration are in config/lora.py, PEFT's file in
lora/peft_config.py, other systems' in lora/other_tools.py. This module reads no file and no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_rl_lora.lora.names import hf_targets, names_fused_layer
from nemo_rl_lora.lora.spec import LoraFieldError, LoraSpec
from nemo_rl_lora.scalars import as_number, as_switch

_DTYPE_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "half": "float16", "float": "float32"}


def filled(table: Mapping[str, tuple[str, Any]], block: Mapping[str, Any]) -> tuple[dict[str, Any], Mapping[str, str]]:
    """The block with a tool's defaults, and the tool's key for each field of LoraSpec."""
    return {key: block.get(key, default) for key, default in table.values()}, {f: key for f, (key, _) in table.items()}


def spec_from_keys(block: Mapping[str, Any], keys: Mapping[str, str], key_prefix: str, **overrides: Any) -> LoraSpec:
    """Build a LoraSpec from `block[keys[field]]`, or `overrides[field]`; errors name the block's keys.

    A field in neither has LoraSpec's default. Fused Megatron layers among the targets mean one shared A.
    """
    fields = {name: block[key] for name, key in keys.items() if name not in overrides} | overrides
    for name in ("targets", "excludes"):
        if not isinstance(value := fields.get(name), str | list | tuple | None) or any(
            not isinstance(each, str) for each in value or ()
        ):
            key = f"{key_prefix}.{keys.get(name, name)}"
            raise ValueError(f"{key}={value!r}: must be a list of module names. Correct it.")
    if not isinstance(fields["targets"], str):
        fields["targets"] = tuple(fields["targets"])
        if any(names_fused_layer(target) for target in fields["targets"]):
            fields["fused"] = "shared"
    fields["excludes"] = tuple(fields.get("excludes") or ())
    fields["dtype"] = parse_dtype(fields.get("dtype"))
    fields |= {name: as_number(value) for name, value in fields.items() if name == "dim"}
    fields |= {n: as_number(v) for n, v in fields.items() if n in ("alpha", "dropout") and isinstance(v, str)}
    fields |= {n: as_switch(v) for n, v in fields.items() if n in ("use_rslora", "a2a", "kernels")}
    try:
        return LoraSpec(**fields)
    except LoraFieldError as e:
        name, _, pattern = e.field.partition(".")
        key = ".".join(part for part in (key_prefix, keys.get(name, name), pattern) if part)
        raise ValueError(f"{key}={e.value!r}: {e.rule}") from None


def refuse_shared_a(spec: LoraSpec, key_prefix: str) -> None:
    """Refuse fused Megatron layers where modules are not fused, naming the Hugging Face targets instead."""
    if spec.fused != "shared":
        return
    targets = list(spec.targets)
    fused = [t for t in targets if names_fused_layer(t)]
    instead = [part for t in targets for part in (hf_targets(t) if t in fused else (t,))]
    raise ValueError(
        f"{key_prefix}.target_modules={targets!r}: {', '.join(map(repr, fused))} means one A shared by a fused layer, "
        f"which only the Megatron backend has. Use {instead!r}, which have an A each, or policy.backend=megatron."
    )


def megatron_init(A_init: str) -> str:
    """How Megatron Bridge draws A: its `normal`, without a number, has standard deviation 0.2."""
    return "normal(0.2)" if A_init == "normal" else A_init


def gaussian_init(rank: Any) -> str:
    """A drawn with standard deviation 1 / rank. A rank that is none is left to LoraSpec to refuse, by its name."""
    dim = as_number(rank)
    is_rank = isinstance(dim, int) and not isinstance(dim, bool) and dim > 0
    return f"normal({1 / dim!r})" if is_rank else "xavier"


def parse_dtype(value: Any) -> Any:
    """A dtype's name without `torch.`; YAML's `None`, a string, is null. Unknown names pass, for LoraSpec to refuse."""
    if value is None or value in ("None", "none", "null", ""):
        return None
    name = str(value).removeprefix("torch.")
    return _DTYPE_ALIASES.get(name, name)


def plain_number(value: float) -> int | float:
    """A whole number as an int, which is how people write it."""
    return int(value) if float(value).is_integer() else value
