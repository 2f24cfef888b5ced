"""Every way to write an adapter down, translated into LoraSpec with the meaning that it has at its source.

Contract: a dialect is a mapping with string keys (a config block, a JSON file); its parser gives a LoraSpec
or raises ValueError naming the dialect's own key. A setting that LoraSpec has no field for is refused by
name unless it is off. The native blocks come complete (config/lora.py holds their defaults); PEFT's own
defaults fill an adapter_config.json. Other systems' files are in lora/foreign.py. This module reads no file
and no model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_rl_lora.lora.names import hf_targets, last_component, names_fused_layer
from nemo_rl_lora.lora.spec import LoraFieldError, LoraSpec
from nemo_rl_lora.lora.targets import ALL_LINEAR, AdaptedModule

SHARED_KEYS = {
    "targets": "target_modules",
    "excludes": "exclude_modules",
    "dim": "dim",
    "alpha": "alpha",
    "dropout": "dropout",
    "dropout_position": "dropout_position",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "use_rslora": "use_rslora",
}
LORA_CFG_KEYS = {**SHARED_KEYS, "A_init": "lora_A_init", "kernels": "use_triton", "dtype": "lora_dtype"}
MEGATRON_KEYS = {
    **SHARED_KEYS,
    "A_init": "lora_A_init_method",
    "B_init": "lora_B_init_method",
    "a2a": "a2a_experimental",
    "dtype": "lora_dtype",
}
UNIFIED_KEYS = {
    **SHARED_KEYS,
    "A_init": "A_init",
    "B_init": "B_init",
    "kernels": "use_triton",
    "a2a": "a2a",
    "dtype": "dtype",
}
"""For each dialect of ours: the field of LoraSpec, and the key that holds it."""

_DTYPE_ALIASES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
    "half": "float16",
    "float": "float32",
}
_PEFT_METADATA = (
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "peft_version",
)
_PEFT_OFF = {"bias": "none", "megatron_core": "megatron.core", "qalora_group_size": 16}
_PEFT_KEYS = {
    "targets": "target_modules",
    "excludes": "exclude_modules",
    "dim": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "A_init": "init_lora_weights",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "use_rslora": "use_rslora",
}


def spec_from_lora_cfg(block: Mapping[str, Any], key_prefix: str) -> LoraSpec:
    """`policy.dtensor_cfg.lora_cfg`, complete. Names of fused Megatron layers are refused: there are none
    here.
    """
    targets = block["target_modules"]
    if block["match_all_linear"] and targets and targets != ALL_LINEAR:
        raise ValueError(
            f"{key_prefix}.target_modules={list(targets)!r}: cannot be combined with "
            "match_all_linear=true, which "
            f"adapts every linear layer. Set {key_prefix}.match_all_linear=false to adapt only these "
            "modules, or "
            f"{key_prefix}.target_modules=[] to adapt all."
        )
    spec = spec_from_keys(block, LORA_CFG_KEYS, key_prefix, targets=targets or ALL_LINEAR)
    refuse_shared_a(spec, key_prefix)
    return spec


def spec_from_megatron_peft(block: Mapping[str, Any], key_prefix: str) -> LoraSpec:
    """`policy.megatron_cfg.peft`, complete. `normal` without a number has Megatron Bridge's standard
    deviation.
    """
    A_init = block["lora_A_init_method"]
    return spec_from_keys(
        block,
        MEGATRON_KEYS,
        key_prefix,
        targets=block["target_modules"] or ALL_LINEAR,
        A_init="normal(0.2)" if A_init == "normal" else A_init,
        kernels=False,
    )


def spec_from_unified(block: Mapping[str, Any], key_prefix: str, backend: str) -> LoraSpec:
    """`policy.lora`, complete, for the backend ("dtensor" or "megatron") that is on.

    A setting without a meaning on that backend is refused. `use_triton: null` means on where the backend
    has kernels.
    """
    if backend == "dtensor" and block["a2a"]:
        raise ValueError(
            f"{key_prefix}.a2a=True: the all-to-all is a way of the Megatron backend, and the backend is "
            "dtensor. "
            f"Set it to false, or policy.backend=megatron."
        )
    if backend == "megatron" and block["use_triton"]:
        raise ValueError(
            f"{key_prefix}.use_triton=True: the Triton kernels belong to the DTensor backend, and the "
            "backend is "
            f"megatron. Set it to null or false, or policy.backend=dtensor."
        )
    kernels = backend == "dtensor" if block["use_triton"] is None else block["use_triton"]
    spec = spec_from_keys(block, UNIFIED_KEYS, key_prefix, targets=block["target_modules"], kernels=kernels)
    if backend == "dtensor":
        refuse_shared_a(spec, key_prefix)
    return spec


def unified_from_spec(spec: LoraSpec) -> dict[str, Any]:
    """The `policy.lora` block that parses into this spec; null for kernels that are on, which serves both backends."""
    block: dict[str, Any] = {"enabled": True}
    for name, key in UNIFIED_KEYS.items():
        value = getattr(spec, name)
        block[key] = list(value) if isinstance(value, tuple) else value
    block["use_triton"] = None if spec.kernels else False
    block["alpha"] = _plain_number(spec.alpha)
    return block


def spec_from_keys(block: Mapping[str, Any], keys: Mapping[str, str], key_prefix: str, **overrides: Any) -> LoraSpec:
    """Build a LoraSpec from `block[keys[field]]`, or `overrides[field]`; errors name the block's keys."""
    fields = {name: block[key] for name, key in keys.items() if name not in overrides} | overrides
    targets = fields["targets"]
    fields["targets"] = targets if isinstance(targets, str) else tuple(targets)
    fields["excludes"] = tuple(fields["excludes"] or ())
    if isinstance(fields["targets"], tuple) and any(names_fused_layer(t) for t in fields["targets"]):
        fields["fused"] = "shared"
    if "dtype" in fields:
        fields["dtype"] = parse_dtype(fields["dtype"])
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
        f"{key_prefix}.target_modules={targets!r}: {', '.join(map(repr, fused))} means one A shared by a "
        "fused layer, "
        f"which only the Megatron backend has. Use {instead!r}, which have an A each, or "
        "policy.backend=megatron."
    )


def parse_dtype(value: Any) -> Any:
    """A dtype's name without `torch.`; YAML's `None`, a string, is null. Unknown names pass, for LoraSpec
    to refuse.
    """
    if value is None or value in ("None", "none", "null", ""):
        return None
    name = str(value).removeprefix("torch.")
    return _DTYPE_ALIASES.get(name, name)


def spec_to_peft_config(
    spec: LoraSpec, base_model_name: str, adapted_modules: Sequence[AdaptedModule]
) -> dict[str, Any]:
    """An adapter_config.json that stock PEFT loads to the same modules, ranks and scales.

    PEFT matches by suffix, so names are short where that reaches exactly the adapted modules, else full.
    What PEFT has no field for is left out: how A was drawn (the file beside it holds A) and the dropout's
    position.
    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name,
        "revision": None,
        "inference_mode": True,
        "r": spec.dim,
        "lora_alpha": _plain_number(spec.alpha),
        "lora_dropout": spec.dropout,
        "target_modules": _peft_targets(spec, adapted_modules),
        "exclude_modules": None,
        "rank_pattern": {m.name: m.dim for m in adapted_modules if m.dim != spec.dim},
        "alpha_pattern": {m.name: _plain_number(m.alpha) for m in adapted_modules if m.alpha != spec.alpha},
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


def _plain_number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value


def spec_from_peft_config(config: Mapping[str, Any], key_prefix: str = "adapter_config") -> LoraSpec:
    """What an adapter_config.json describes. Raises ValueError for a feature that LoraSpec has no field
    for.
    """
    known = {**dict.fromkeys(_PEFT_KEYS.values()), "lora_dropout": 0.0, "r": 8, "lora_alpha": 8}
    known |= {"rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "init_lora_weights": True}
    for key, value in config.items():
        if key not in known and key not in _PEFT_METADATA and not _is_off(key, value):
            raise ValueError(
                f"{key_prefix}.{key}={value!r}: this product has no such feature. Use an adapter made with "
                f"{key} "
                f"off, or merge it into its base with PEFT first."
            )
    _require(config, "peft_type", ("LORA",), key_prefix)
    _require(config, "task_type", (None, "CAUSAL_LM"), key_prefix)
    block = known | {key: value for key, value in config.items() if key in known}
    patterns = {k: _peft_pattern(block[k], f"{key_prefix}.{k}") for k in ("rank_pattern", "alpha_pattern")}
    return spec_from_keys(
        block,
        _PEFT_KEYS,
        key_prefix,
        targets=peft_names(block["target_modules"], f"{key_prefix}.target_modules"),
        excludes=peft_names(block["exclude_modules"] or (), f"{key_prefix}.exclude_modules"),
        A_init=_peft_init(block, key_prefix),
        dropout_position="pre",
        **patterns,
    )


def peft_names(value: Any, key: str) -> str | tuple[str, ...]:
    """PEFT's list of names, which match as suffixes like ours, or "all-linear". A string otherwise is a
    regex.
    """
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


def _require(config: Mapping[str, Any], key: str, allowed: tuple[Any, ...], key_prefix: str) -> None:
    value = config[key] if key in config else allowed[0]
    if value not in allowed:
        raise ValueError(f"{key_prefix}.{key}={value!r}: must be {allowed[-1]!r}. Use a LoRA adapter of a causal LM.")


def _peft_init(block: Mapping[str, Any], key_prefix: str) -> str:
    value = block["init_lora_weights"]
    if value is True:
        return "uniform"
    if value == "gaussian" and not block["rank_pattern"]:
        return f"normal({1 / block['r']!r})"
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
