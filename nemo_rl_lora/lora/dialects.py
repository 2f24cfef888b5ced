"""From a dialect's keys to LoraSpec, and PEFT's adapter_config.json in both directions.

Contract: a dialect is a mapping with string keys, and a table from LoraSpec's fields to them; the result is a LoraSpec,
or a ValueError naming the dialect's own key. A setting that LoraSpec has no field for is refused by name unless it is
off. The blocks of a configuration are in config/lora.py, other systems' files in lora/other_tools.py. This module reads
no file and no model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_rl_lora.lora.names import hf_targets, last_component, names_fused_layer
from nemo_rl_lora.lora.spec import LoraFieldError, LoraSpec
from nemo_rl_lora.lora.targets import ALL_LINEAR, AdaptedModule

_DTYPE_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "half": "float16", "float": "float32"}
_PEFT_METADATA = ("peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "peft_version")
_PEFT_OFF = {"bias": "none", "megatron_core": "megatron.core", "qalora_group_size": 16}
_PEFT_FIELDS: dict[str, tuple[str, Any]] = {
    "targets": ("target_modules", None),
    "excludes": ("exclude_modules", None),
    "dim": ("r", 8),
    "alpha": ("lora_alpha", 8),
    "dropout": ("lora_dropout", 0.0),
    "A_init": ("init_lora_weights", True),
    "rank_pattern": ("rank_pattern", {}),
    "alpha_pattern": ("alpha_pattern", {}),
    "use_rslora": ("use_rslora", False),
}
"""The field of LoraSpec: PEFT's key, and its default there."""


def filled(table: Mapping[str, tuple[str, Any]], block: Mapping[str, Any]) -> tuple[dict[str, Any], Mapping[str, str]]:
    """The block with a tool's defaults, and the tool's key for each field of LoraSpec."""
    return {key: block.get(key, default) for key, default in table.values()}, {f: key for f, (key, _) in table.items()}


def spec_from_keys(block: Mapping[str, Any], keys: Mapping[str, str], key_prefix: str, **overrides: Any) -> LoraSpec:
    """Build a LoraSpec from `block[keys[field]]`, or `overrides[field]`; errors name the block's keys.

    A field in neither has LoraSpec's default. Fused Megatron layers among the targets mean one shared A.
    """
    fields = {name: block[key] for name, key in keys.items() if name not in overrides} | overrides
    if not isinstance(fields["targets"], str):
        fields["targets"] = tuple(fields["targets"])
        if any(names_fused_layer(target) for target in fields["targets"]):
            fields["fused"] = "shared"
    fields["excludes"] = tuple(fields.get("excludes") or ())
    fields["dtype"] = parse_dtype(fields.get("dtype"))
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
    return f"normal({1 / rank!r})" if isinstance(rank, int) and rank > 0 else "xavier"


def parse_dtype(value: Any) -> Any:
    """A dtype's name without `torch.`; YAML's `None`, a string, is null. Unknown names pass, for LoraSpec to refuse."""
    if value is None or value in ("None", "none", "null", ""):
        return None
    name = str(value).removeprefix("torch.")
    return _DTYPE_ALIASES.get(name, name)


def plain_number(value: float) -> int | float:
    """A whole number as an int, which is how people write it."""
    return int(value) if float(value).is_integer() else value


def spec_to_peft_config(
    spec: LoraSpec, base_model_name: str, adapted_modules: Sequence[AdaptedModule]
) -> dict[str, Any]:
    """An adapter_config.json that stock PEFT loads to the same modules, ranks and scales.

    PEFT matches by suffix, so names are short where that reaches exactly the adapted modules, else full. What PEFT has
    no field for is left out: how A was drawn (the file beside it holds A) and the dropout's position.
    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name,
        "revision": None,
        "inference_mode": True,
        "r": spec.dim,
        "lora_alpha": plain_number(spec.alpha),
        "lora_dropout": spec.dropout,
        "target_modules": _peft_targets(spec, adapted_modules),
        "exclude_modules": None,
        "rank_pattern": {m.name: m.dim for m in adapted_modules if m.dim != spec.dim},
        "alpha_pattern": {m.name: plain_number(m.alpha) for m in adapted_modules if m.alpha != spec.alpha},
        "use_rslora": spec.use_rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def _peft_targets(spec: LoraSpec, adapted_modules: Sequence[AdaptedModule]) -> list[str]:
    last = list(dict.fromkeys(last_component(m.name) for m in adapted_modules))
    plain = isinstance(spec.targets, str) or all(t in last for t in spec.targets)
    return last if plain and not spec.excludes else [m.name for m in adapted_modules]


def spec_from_peft_config(config: Mapping[str, Any], key_prefix: str = "adapter_config") -> LoraSpec:
    """What an adapter_config.json describes. Raises ValueError for a feature that LoraSpec has no field for."""
    block, keys = filled(_PEFT_FIELDS, config)
    for key, value in config.items():
        if key not in block and key not in _PEFT_METADATA and not _is_off(key, value):
            raise ValueError(
                f"{key_prefix}.{key}={value!r}: this product has no such feature. Use an adapter made with {key} off, "
                f"or merge it into its base with PEFT first."
            )
    for key, allowed in (("peft_type", ("LORA",)), ("task_type", (None, "CAUSAL_LM"))):
        if (value := config.get(key, allowed[0])) not in allowed:
            rule = f"must be {allowed[-1]!r}. Use a LoRA adapter of a causal LM."
            raise ValueError(f"{key_prefix}.{key}={value!r}: {rule}")
    patterns = {key: _peft_pattern(block[key], f"{key_prefix}.{key}") for key in ("rank_pattern", "alpha_pattern")}
    return spec_from_keys(
        block,
        keys,
        key_prefix,
        targets=peft_names(block["target_modules"], f"{key_prefix}.target_modules"),
        excludes=peft_names(block["exclude_modules"] or (), f"{key_prefix}.exclude_modules"),
        A_init=_peft_init(block, key_prefix),
        dropout_position="pre",
        **patterns,
    )


def peft_names(value: Any, key: str) -> str | tuple[str, ...]:
    """PEFT's list of names, which match as suffixes like ours, or "all-linear". A string otherwise is a regex."""
    if value == ALL_LINEAR:
        return ALL_LINEAR
    if isinstance(value, str) or value is None:
        raise ValueError(f"{key}={value!r}: must be a list of module names. List the names that it stands for.")
    names = tuple(sorted(value) if isinstance(value, set | frozenset) else value)
    if wild := [name for name in names if any(c in str(name) for c in "*?[")]:
        raise ValueError(
            f"{key}={list(names)!r}: PEFT reads {wild[0]!r} as a plain name. List names without wildcards."
        )
    return names


def _is_off(key: str, value: Any) -> bool:
    return value is None or value is False or value in ([], {}, "") or value == _PEFT_OFF.get(key)


def _peft_init(block: Mapping[str, Any], key_prefix: str) -> str:
    value = block["init_lora_weights"]
    if value is True:
        return "uniform"
    if value == "gaussian" and not block["rank_pattern"]:
        return gaussian_init(block["r"])
    raise ValueError(
        f"{key_prefix}.init_lora_weights={value!r}: must be true, or 'gaussian' without a rank_pattern. "
        f"Other inits start from a non-zero update or change the base."
    )


def _peft_pattern(patterns: Mapping[str, Any] | None, key: str) -> dict[str, Any]:
    """PEFT's patterns are regular expressions at the end of the name; those that are names translate."""
    plain = {}
    for pattern, value in (patterns or {}).items():
        name = pattern.removeprefix("^").replace("\\.", ".").removesuffix("$")
        if not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(f"{key}={dict(patterns or {})!r}: {pattern!r} is a regular expression. List names.")
        plain[name] = value
    return plain
