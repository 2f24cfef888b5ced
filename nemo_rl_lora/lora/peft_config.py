"""PEFT's adapter_config.json in both directions, with PEFT's own meaning of every field.

Contract: each field is honoured, or says nothing of the update, or is refused by name unless it is off; a field that
is not known here is off only where it is null or false. Names are matched as PEFT matches them: entries of a list are
ends of a module's name, a string is a regular expression of the whole name, and the patterns of ranks and alphas are
regular expressions of its end. This module reads no file and no model.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from nemo_rl_lora.lora.dialects import filled, gaussian_init, plain_number, spec_from_keys
from nemo_rl_lora.lora.names import HF_PARTS, last_component
from nemo_rl_lora.lora.spec import LoraSpec
from nemo_rl_lora.lora.targets import ALL_LINEAR, AdaptedModule, LinearModule

_FIELDS: dict[str, tuple[str, Any]] = {
    "dim": ("r", 8),
    "alpha": ("lora_alpha", 8),
    "dropout": ("lora_dropout", 0.0),
    "rank_pattern": ("rank_pattern", {}),
    "alpha_pattern": ("alpha_pattern", {}),
    "use_rslora": ("use_rslora", False),
}
"""The field of LoraSpec: PEFT's key, and its default there."""
_CHECKED = (
    *("peft_type", "task_type", "target_modules", "exclude_modules", "init_lora_weights"),
    *("layers_to_transform", "layers_pattern"),
)
# What PEFT reads only to find the base or its own version, only beside a feature that is off here, or not at all.
_METADATA = (
    *("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping"),
    *("megatron_core", "qalora_group_size", "runtime_config"),
)
_OFF: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "loftq_config": ({},),
    "megatron_config": ({},),
    "modules_to_save": ([],),
    "trainable_token_indices": ([], {}),
    "target_parameters": ([],),
    "layer_replication": ([],),
}
"""What means off beside null and false."""
_PLAIN_NAME = re.compile(r"\w[\w-]*(\.\w[\w-]*)*")
_MEGATRON_NAMES = (*HF_PARTS, "output_layer")
_T = TypeVar("_T")
_FIRST_INDEX = r".*?\.[^.]*\.(?P<idx>\d+)\."


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftConfig:
    """A checked adapter_config.json."""

    numbers: LoraSpec  # rank, alpha, dropout, scaling; its patterns are PEFT's regular expressions
    targets: str | tuple[str, ...]  # ALL_LINEAR, a regular expression, or ends of names
    excludes: str | tuple[str, ...]
    layers: tuple[int, ...]  # of which targets count; empty: all
    layers_patterns: tuple[str, ...]  # what stands before a layer's number; empty: anything
    init: Any  # how PEFT would draw A

    @classmethod
    def read(cls, config: Mapping[str, Any], key_prefix: str = "adapter_config") -> PeftConfig:
        """ValueError names the first field that this product does not have, or whose value means nothing."""
        block, keys = filled(_FIELDS, config)
        _refuse_features(config, block, key_prefix)
        for key in ("rank_pattern", "alpha_pattern"):
            block[key] = _patterns(block[key], f"{key_prefix}.{key}")
        for key, kinds in (("r", int), ("lora_alpha", int | float), ("lora_dropout", int | float)):
            if not isinstance(block[key], kinds) or isinstance(block[key], bool):
                raise ValueError(f"{key_prefix}.{key}={block[key]!r}: must be a number. Correct it.")
        if not isinstance(block["use_rslora"], bool | None):
            raise ValueError(f"{key_prefix}.use_rslora={block['use_rslora']!r}: must be true or false. Correct it.")
        if config.get("layers_pattern") and config.get("layers_to_transform") is None:
            raise ValueError(
                f"{key_prefix}.layers_pattern={config['layers_pattern']!r}: means nothing without layers_to_transform. "
                "Set that too, or drop this one."
            )
        targets = _names(config.get("target_modules"), f"{key_prefix}.target_modules")
        if not targets:
            raise ValueError(
                f"{key_prefix}.target_modules={config.get('target_modules')!r}: names no module. List some."
            )
        layers = _layers(config.get("layers_to_transform"), f"{key_prefix}.layers_to_transform")
        if isinstance(targets, str) and config.get("layers_to_transform") is not None:
            raise ValueError(
                f"{key_prefix}.layers_to_transform={config['layers_to_transform']!r}: PEFT takes it beside a list of "
                f"target_modules alone. Put the layers into the regular expression."
            )
        layers_patterns = _names(config.get("layers_pattern") or (), f"{key_prefix}.layers_pattern")
        layers_patterns = (layers_patterns,) if isinstance(layers_patterns, str) else layers_patterns
        for pattern in layers_patterns:
            _compiled(_layer_index(pattern), config["layers_pattern"], f"{key_prefix}.layers_pattern")
        return cls(
            numbers=spec_from_keys(
                block,
                keys,
                key_prefix,
                targets=ALL_LINEAR,
                dropout_position="pre",
                use_rslora=bool(block["use_rslora"]),
            ),
            targets=ALL_LINEAR if isinstance(targets, str) and targets.lower() == ALL_LINEAR else targets,
            excludes=_names(config.get("exclude_modules") or (), f"{key_prefix}.exclude_modules"),
            layers=layers,
            layers_patterns=layers_patterns,
            init=config.get("init_lora_weights", True),
        )

    def reaches(self, module: LinearModule) -> bool:
        """Whether PEFT puts an adapter on this linear module."""
        name = module.name
        if _any_end(self.excludes, name):
            return False
        if self.targets == ALL_LINEAR:
            return not module.is_head
        if isinstance(self.targets, str) or name in self.targets or not self.layers:
            return _any_end(self.targets, name)
        return _any_end(self.targets, name) and self._layer_of(name) in self.layers

    def adapted(self, module: LinearModule) -> AdaptedModule:
        """The module with its rank, alpha and scale."""
        dim = _first(self.numbers.rank_pattern, module.name, self.numbers.dim)
        alpha = _first(self.numbers.alpha_pattern, module.name, self.numbers.alpha)
        scale = replace(self.numbers, dim=dim, alpha=alpha, rank_pattern={}, alpha_pattern={}).scale_of(module.name)
        return AdaptedModule(
            name=module.name,
            in_features=module.in_features,
            out_features=module.out_features,
            dim=dim,
            alpha=alpha,
            scale=scale,
        )

    def spec(self, adapted: Sequence[AdaptedModule]) -> LoraSpec:
        """The LoraSpec of exactly these modules, by their full names."""
        dim, alpha = self.numbers.dim, self.numbers.alpha
        return replace(
            self.numbers,
            targets=tuple(module.name for module in adapted),
            rank_pattern={module.name: module.dim for module in adapted if module.dim != dim},
            alpha_pattern={module.name: module.alpha for module in adapted if module.alpha != alpha},
        )

    def _layer_of(self, name: str) -> int | None:
        tried = [_layer_index(pattern) for pattern in self.layers_patterns] or [_FIRST_INDEX]
        match = next((match for pattern in tried if (match := re.match(pattern, name))), None)
        return None if match is None else int(match["idx"])


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


def spec_from_peft_config(
    config: Mapping[str, Any], key_prefix: str = "adapter_config", modules: Sequence[LinearModule] = ()
) -> LoraSpec:
    """What an adapter_config.json describes on any model, to be trained from a drawn A and B = 0.

    Where it is more than names, it has no meaning here but on a model: then on `modules`, those of the adapter's
    tensors, by their full names. ValueError for what would start from another A or B, and where modules are missing.
    """
    read = PeftConfig.read(config, key_prefix)
    A_init = _drawn_init(read, key_prefix)
    try:
        return _plain_spec(read, config, key_prefix, A_init)
    except ValueError:
        if not modules:
            raise
    return replace(read.spec([read.adapted(module) for module in modules if read.reaches(module)]), A_init=A_init)


def peft_names(value: Any, key: str) -> str | tuple[str, ...]:
    """PEFT's list of names, which match as suffixes like ours, or "all-linear". A string otherwise is a regex."""
    if value == ALL_LINEAR:
        return ALL_LINEAR
    if not isinstance(value, list | tuple | set | frozenset):
        raise ValueError(f"{key}={value!r}: must be a list of module names. List the names that it stands for.")
    names = tuple(sorted(value) if isinstance(value, set | frozenset) else value)
    if other := [name for name in names if not _means_the_same(str(name))]:
        raise ValueError(
            f"{key}={list(names)!r}: PEFT reads {other[0]!r} as the end of a Hugging Face name, and here it means "
            "something else. List such ends without wildcards."
        )
    return names


def _plain_spec(read: PeftConfig, config: Mapping[str, Any], key_prefix: str, A_init: str) -> LoraSpec:
    if read.layers:
        raise ValueError(
            f"{key_prefix}.layers_to_transform={config['layers_to_transform']!r}: there is no such setting here. "
            "List the full names of the modules."
        )
    for key, patterns in (
        ("rank_pattern", read.numbers.rank_pattern),
        ("alpha_pattern", read.numbers.alpha_pattern),
    ):
        if other := [pattern for pattern in patterns if not _means_the_same(_unescaped(pattern))]:
            raise ValueError(
                f"{key_prefix}.{key}={dict(patterns)!r}: {other[0]!r} is a regular expression. List names."
            )
    return replace(
        read.numbers,
        targets=peft_names(read.targets, f"{key_prefix}.target_modules"),
        excludes=tuple(peft_names(read.excludes or (), f"{key_prefix}.exclude_modules")),
        rank_pattern={_unescaped(pattern): dim for pattern, dim in read.numbers.rank_pattern.items()},
        alpha_pattern={_unescaped(pattern): alpha for pattern, alpha in read.numbers.alpha_pattern.items()},
        A_init=A_init,
    )


def _means_the_same(name: str) -> bool:
    """Whether a name matches by the rule of lora/targets.py what it matches as the end of a Hugging Face name."""
    return _PLAIN_NAME.fullmatch(name) is not None and last_component(name) not in _MEGATRON_NAMES


def _unescaped(pattern: str) -> str:
    return pattern.replace("\\.", ".").removesuffix("$")


def _drawn_init(read: PeftConfig, key_prefix: str) -> str:
    if read.init is True:
        return "uniform"
    if str(read.init).lower() == "gaussian" and not read.numbers.rank_pattern:
        return gaussian_init(read.numbers.dim)
    raise ValueError(
        f"{key_prefix}.init_lora_weights={read.init!r}: must be true, or 'gaussian' without a rank_pattern. "
        f"Other inits start from a non-zero update or change the base."
    )


def _refuse_features(config: Mapping[str, Any], block: Mapping[str, Any], key_prefix: str) -> None:
    for key, value in config.items():
        if key in block or key in _CHECKED or key in _METADATA:
            continue
        if value is not None and value is not False and value not in _OFF.get(key, ()):
            raise ValueError(
                f"{key_prefix}.{key}={value!r}: this product has no such feature. Use an adapter made with {key} off, "
                f"or merge it into its base with PEFT first."
            )
    for key, allowed in (("peft_type", ("LORA",)), ("task_type", (None, "CAUSAL_LM"))):
        if (value := config.get(key, allowed[0])) not in allowed:
            rule = f"must be {allowed[-1]!r}. Use a LoRA adapter of a causal LM."
            raise ValueError(f"{key_prefix}.{key}={value!r}: {rule}")
    if not isinstance(name := config.get("base_model_name_or_path"), str | None):
        raise ValueError(f"{key_prefix}.base_model_name_or_path={name!r}: must be a name. Correct it.")
    init = config.get("init_lora_weights", True)
    if not (init is None or isinstance(init, bool) or (isinstance(init, str) and init.lower() == "gaussian")):
        raise ValueError(
            f"{key_prefix}.init_lora_weights={init!r}: must be true, false or 'gaussian'. Other inits change the base, "
            "or are a variant of LoRA: merge the adapter into its base with PEFT first."
        )


def _names(value: Any, key: str) -> str | tuple[str, ...]:
    """A regular expression, or a list of names."""
    if isinstance(value, str):
        _compiled(value, value, key)
        return value
    if not isinstance(value, Collection) or isinstance(value, Mapping) or not all(isinstance(n, str) for n in value):
        raise ValueError(f"{key}={value!r}: must be a list of module names or a regular expression. Correct it.")
    return tuple(sorted(value) if isinstance(value, set | frozenset) else value)


def _patterns(value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, Mapping | None):
        raise ValueError(f"{key}={value!r}: must map patterns of module names to numbers. Correct it.")
    for pattern in value or ():
        _compiled(_name_end(pattern), value, key)
    return dict(value or {})


def _layers(value: Any, key: str) -> tuple[int, ...]:
    layers = [] if value is None else value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers):
        raise ValueError(f"{key}={value!r}: must be the number of a layer, or a list of them. Correct it.")
    return tuple(layers)


def _compiled(pattern: str, value: Any, key: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{key}={value!r}: is no regular expression ({error}). Correct it.") from error


def _first(patterns: Mapping[str, _T], name: str, default: _T) -> _T:
    """The value of the first pattern that matches the name's end."""
    return next((value for pattern, value in patterns.items() if re.match(_name_end(pattern), name)), default)


def _name_end(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def _layer_index(pattern: str) -> str:
    return rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."


def _any_end(names: str | tuple[str, ...], name: str) -> bool:
    """Whether a regular expression is all of the name, or any of these is it or its end."""
    if isinstance(names, str):
        return bool(names) and re.fullmatch(names, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in names)
