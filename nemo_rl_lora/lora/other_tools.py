"""The LoRA settings of VeOmni, verl and theseus, translated into LoraSpec with their meaning and their init.

Contract: `translate(document)` finds the one adapter that a parsed YAML or JSON document describes, in any dialect,
and says which dialect it was. Each source's defaults stand in its table here. What a source can say and LoraSpec
cannot is refused by name; keys beside the adapter's own are not read. This module reads no file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

from nemo_rl_lora.lora.dialects import (
    filled,
    gaussian_init,
    megatron_init,
    spec_from_keys,
)
from nemo_rl_lora.lora.peft_config import peft_names, spec_from_peft_config
from nemo_rl_lora.lora.regex_globs import globs_of_regex
from nemo_rl_lora.lora.spec import LoraSpec
from nemo_rl_lora.lora.targets import ALL_LINEAR, LinearModule

# The field of LoraSpec: the tool's key, and its default there.
_VEOMNI_TABLE: dict[str, tuple[str, Any]] = {
    "dim": ("rank", 8),
    "alpha": ("alpha", 8),
    "targets": ("lora_modules", None),
    "excludes": ("exclude_modules", None),
    "dropout": ("lora_dropout", 0.0),
    "use_rslora": ("use_rslora", False),
    "rank_pattern": ("rank_pattern", {}),
    "alpha_pattern": ("alpha_pattern", {}),
}
# PEFT's names, which VeOmni takes as well; the first counts where both stand there.
_VEOMNI_ALIASES = {"rank": "r", "alpha": "lora_alpha", "lora_modules": "target_modules"}
# What means off, and why another value has no counterpart.
_VEOMNI_OFF: dict[str, tuple[tuple[Any, ...], str]] = {
    "target_parameters": (([],), "adapters of experts that are one tensor are not here. List linear modules"),
    "share_expert_lora": ((False,), "an adapter that all experts of a layer share is not here. Set it to false"),
    "bias": (("none",), "an adapter here trains no bias. Set it to none"),
    "modules_to_save": (([],), "nothing is trained beside the adapter. Leave it out"),
    "init_lora_weights": ((True,), "A is drawn and B starts at zero. Set it to true"),
    "is_trainable": ((True,), "this is policy.adapter.trainable here. Leave it out, and set that"),
    "task_type": (("CAUSAL_LM",), "an adapter here is one of a causal LM. Leave it out"),
}
_VERL_FIELDS = {
    "dim": ("lora_rank", 0),
    "alpha": ("lora_alpha", 16),
    "targets": ("target_modules", ALL_LINEAR),
    "excludes": ("exclude_modules", None),
}
_VERL_MEGATRON_FIELDS = {
    "dim": ("rank", 0),
    "alpha": ("alpha", 32),
    "dropout": ("dropout", 0.0),
    "dropout_position": ("dropout_position", "pre"),
    "targets": ("target_modules", ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]),
    "excludes": ("exclude_modules", []),
    "A_init": ("lora_A_init_method", "xavier"),
    "B_init": ("lora_B_init_method", "zero"),
    "a2a": ("a2a_experimental", False),
    "dtype": ("dtype", None),
}
_THESEUS_FIELDS = {"dim": ("rank", 16), "alpha": ("alpha", 16.0), "targets": ("target_modules", ["kernel"])}
_FROZEN = {f"freeze_{part}": True for part in ("vision_model", "vision_projection", "language_model")}
_VERL_MEGATRON_OFF = {"merge": False, "fully_sharded_loras": False, **_FROZEN}
# What each dialect calls the adapter to start from.
_OFF = (0, "0", None)
_START_KEYS = ("lora_adapter", "lora_adapter_path", "adapter_path")
_CANONICAL_NAMES = {
    "linear_q": "q_proj",
    "linear_k": "k_proj",
    "linear_v": "v_proj",
    "linear_fc1_gate": "gate_proj",
    "linear_fc1_up": "up_proj",
}
_CANONICAL_DEFAULT = [*_CANONICAL_NAMES, "linear_proj", "linear_fc2"]
# What PEFT does and these tools do not say; LoraSpec's defaults are the rest.
_AS_PEFT = {"dropout_position": "pre", "A_init": "uniform"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Translation:
    """The adapter that a document describes, and where it stood."""

    dialect: str
    key: str  # dotted key of the block within the document; empty when the document is the block
    spec: LoraSpec
    init_from: str | None = None  # the adapter to start from, `policy.adapter.init_from` here
    enabled: bool = True  # false: a block that is shown, and switched off


def spec_from_veomni(block: Mapping[str, Any], key_prefix: str) -> LoraSpec:
    """`lora_config`, by VeOmni's names or PEFT's: names as PEFT takes them, patterns that match anywhere in a name."""
    known = (*(key for key, _ in _VEOMNI_TABLE.values()), *_VEOMNI_ALIASES.values(), *_VEOMNI_OFF)
    _refuse_unknown(block, (*known, "lora_adapter", "base_model_name_or_path"), key_prefix)
    for off_key, (off, why) in _VEOMNI_OFF.items():
        if block.get(off_key) is not None and block[off_key] not in off:
            raise ValueError(f"{key_prefix}.{off_key}={block[off_key]!r}: {why}.")
    for own, alias in _VEOMNI_ALIASES.items():
        if block.get(own) is not None and block.get(alias) not in (None, block[own]):
            raise ValueError(
                f"{key_prefix}.{alias}={block[alias]!r}: {own}={block[own]!r} is the same setting, and the one that "
                f"VeOmni takes. Remove one of them."
            )
    written = {key: value for key, value in block.items() if value is not None}
    names: dict[str, str] = {
        own: alias for own, alias in _VEOMNI_ALIASES.items() if own not in written and alias in written
    }
    fields = {field: (names.get(key, key), default) for field, (key, default) in _VEOMNI_TABLE.items()}
    settings, keys = filled(fields, written)
    value = {field: settings[key] for field, key in keys.items()}
    key = {field: f"{key_prefix}.{name}" for field, name in keys.items()}
    if not value["targets"]:
        shown = "<absent>" if value["targets"] is None else repr(value["targets"])
        raise ValueError(f"{key['targets']}={shown}: adapts no module. List the modules.")
    found: dict[str, Any] = {
        "targets": _peft_targets(value["targets"], key["targets"]),
        "excludes": _peft_targets(value["excludes"] or (), key["excludes"]),
    }
    for field in ("rank_pattern", "alpha_pattern"):
        if not isinstance(value[field], Mapping):
            raise ValueError(f"{key[field]}={value[field]!r}: must map patterns of names to numbers. Correct it.")
        globs = ((globs_of_regex(str(regex), key[field], whole=False), each) for regex, each in value[field].items())
        found[field] = {glob: each for names_of_one, each in globs for glob in names_of_one}
    return spec_from_keys(settings, keys, key_prefix, **found, **_AS_PEFT)


def _peft_targets(value: Any, key: str) -> str | tuple[str, ...]:
    """Names as PEFT takes them: a list of ends, "all-linear", or a regular expression of the whole name."""
    if isinstance(value, str) and value.lower() != ALL_LINEAR:
        return globs_of_regex(value, key, whole=True)
    return peft_names(value, key)


def spec_from_verl(block: Mapping[str, Any], key_prefix: str) -> LoraSpec:
    """verl's FSDP keys (`lora_rank`, `lora_alpha`, ...): a PEFT adapter without dropout."""
    own = {k: v for k, v in block.items() if k.startswith("lora_") or k in ("target_modules", "exclude_modules")}
    block, keys = filled(_VERL_FIELDS, block)
    _refuse_unknown(own, (*block, "lora_adapter_path"), key_prefix)
    _refuse_off(block, "lora_rank", key_prefix)
    targets = _peft_targets(block["target_modules"], f"{key_prefix}.target_modules")
    excludes = _peft_targets(block["exclude_modules"] or (), f"{key_prefix}.exclude_modules")
    return spec_from_keys(block, keys, key_prefix, targets=targets, excludes=excludes, **_AS_PEFT)


def spec_from_verl_megatron(block: Mapping[str, Any], key_prefix: str) -> LoraSpec:
    """verl's Megatron block `lora`: type lora shares A in fused layers, canonical_lora has an A per module."""
    settings, keys = filled(_VERL_MEGATRON_FIELDS, block)
    _refuse_unknown(block, ("type", *settings, "adapter_path", *_VERL_MEGATRON_OFF), key_prefix)
    for key, off in _VERL_MEGATRON_OFF.items():
        if (value := block.get(key, off)) != off:
            raise ValueError(
                f"{key_prefix}.{key}={value!r}: is no part of an adapter's description. Set it to {off!r} here "
                f"and decide it in the run's configuration."
            )
    _refuse_off(settings, "rank", key_prefix)
    kind, targets = block.get("type", "lora"), settings["target_modules"] or ALL_LINEAR
    if kind not in ("lora", "canonical_lora"):
        raise ValueError(
            f"{key_prefix}.type={kind!r}: must be 'lora' or 'canonical_lora'. Other types are not supported."
        )
    if kind == "canonical_lora" and not isinstance(targets, str):
        named = _CANONICAL_DEFAULT if targets == _VERL_MEGATRON_FIELDS["targets"][1] else targets
        targets = [_canonical_target(name) for name in named]
    A_init = megatron_init(settings["lora_A_init_method"])
    return spec_from_keys(settings, keys, key_prefix, targets=targets, A_init=A_init, kernels=False)


def spec_from_theseus(block: Mapping[str, Any], key_prefix: str) -> LoraSpec:
    """`optimization/lora`: names are substrings of the parameter's path; A has standard deviation 1 / rank.

    'kernel' is what its parameter of every linear layer is called, and so means all-linear.
    """
    settings, keys = filled(_THESEUS_FIELDS, block)
    _refuse_unknown(block, tuple(settings), key_prefix)
    names = settings["target_modules"]
    targets = _theseus_targets(names, f"{key_prefix}.target_modules")
    A_init = gaussian_init(settings["rank"])
    return spec_from_keys(settings, keys, key_prefix, targets=targets, dropout_position="pre", A_init=A_init)


def _theseus_targets(names: Any, key: str) -> str | tuple[str, ...]:
    """`kernel` is every linear layer; beside it, another name can only add what is none, such as `embedding`."""
    every = isinstance(names, list | tuple) and "kernel" in names
    for name in names if isinstance(names, list | tuple) else ():
        if "embed" in str(name) or (every and "kernel" not in str(name)):
            raise ValueError(
                f"{key}={list(names)!r}: {name!r} adapts what is no linear layer, and only linear layers have "
                f"adapters here. Leave it out to train the others."
            )
    if every:
        return ALL_LINEAR
    return substring_globs(names, key, suffix="/kernel")


def substring_globs(names: Any, key: str, suffix: str = "") -> tuple[str, ...]:
    """Names that match anywhere in the full name, as globs: `attn/q` becomes `*attn.q*`. `suffix` is left out."""
    if not isinstance(names, list | tuple) or not names:
        raise ValueError(f"{key}={names!r}: adapts no module. List parts of module names.")
    return tuple(f"*{str(name).removesuffix(suffix).replace('/', '.')}*" for name in names)


_Parser = Callable[[Mapping[str, Any], str], LoraSpec]
# Where each dialect's block stands, and the keys that only it has.
_PLACES: tuple[tuple[str, tuple[str, ...], tuple[str, ...], _Parser], ...] = (
    ("PEFT adapter_config.json", ("",), ("peft_type",), spec_from_peft_config),
    ("VeOmni lora_config", ("model.lora_config", "lora_config", ""), ("lora_modules",), spec_from_veomni),
    ("VeOmni lora_config", ("model.lora_config", "lora_config"), (), spec_from_veomni),
    (
        "verl (Megatron)",
        ("actor_rollout_ref.model.lora", "critic.model.lora", "model.lora", "lora"),
        ("rank",),
        spec_from_verl_megatron,
    ),
    ("verl", ("actor_rollout_ref.model", "critic.model", "model", ""), ("lora_rank",), spec_from_verl),
    ("theseus", ("optimization.lora",), (), spec_from_theseus),
)


def translate(document: Mapping[str, Any], modules: Sequence[LinearModule] = ()) -> Translation:
    """The adapter of another tool's document. Raises ValueError when it holds none that is known here.

    `modules` are those of the tensors beside PEFT's file, by which its regular expressions have a meaning.
    """
    found = list(_found(document))
    # verl's files have the keys of both of its ways to train, of which one is on
    on = [each for each in found if not any(each[2].get(key, 1) in _OFF for key in ("rank", "lora_rank"))]
    for dialect, place, block, parse in on[:1] or found[:1]:
        others = [f"{other or 'the top level'} ({name})" for name, other, _, parser in on[1:] if parser is not parse]
        if others and dialect.startswith("verl"):
            raise ValueError(
                f"{place}: describes an adapter, and so does {others[0]}. Set the rank of the one that is not trained "
                f"to 0."
            )
        prefix = place or dialect.split()[0].lower()
        is_peft = parse is spec_from_peft_config
        spec = spec_from_peft_config(block, prefix, modules) if is_peft else parse(block, prefix)
        start = next((block[key] for key in _START_KEYS if block.get(key) is not None), None)
        return Translation(dialect=dialect, key=place, spec=spec, init_from=start)
    raise ValueError(
        f"document={list(document)!r}: holds no LoRA settings known here. Give a PEFT adapter_config.json, or YAML of "
        f"NeMo RL (policy.dtensor_cfg.lora_cfg, policy.megatron_cfg.peft, policy.lora), VeOmni (model.lora_config), "
        f"verl (actor_rollout_ref.model) or theseus (optimization.lora)."
    )


def is_of_another_tool(document: Mapping[str, Any]) -> bool:
    """Whether a document is one of the tools above, rather than NeMo RL's or nobody's."""
    return "policy" not in document and any(True for _ in _found(document))


def _found(document: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any], _Parser]]:
    """Every block of the document that is one of `_PLACES`, in their order."""
    for dialect, places, marks, parse in _PLACES:
        for place in places:
            block = _at(document, place)
            if block is not None and all(mark in block for mark in marks):
                yield dialect, place, block, parse


def _at(document: Mapping[str, Any], place: str) -> Mapping[str, Any] | None:
    """The mapping under a dotted key, or None where there is none."""
    keys = place.split(".") if place else []
    block = reduce(lambda node, key: node.get(key) if isinstance(node, Mapping) else None, keys, document)
    return block if isinstance(block, Mapping) else None


def _canonical_target(name: str) -> str:
    head, dot, last = name.rpartition(".")
    return head + dot + _CANONICAL_NAMES.get(last, last)


def _refuse_unknown(block: Mapping[str, Any], known: tuple[str, ...], key_prefix: str) -> None:
    for key, value in block.items():
        if key not in known:
            raise ValueError(f"{key_prefix}.{key}={value!r}: is no key known here. Known: {', '.join(known)}.")


def _refuse_off(block: Mapping[str, Any], key: str, key_prefix: str) -> None:
    if block[key] in _OFF:
        raise ValueError(f"{key_prefix}.{key}=0: means no adapter there. Set it above 0, or train without one.")
