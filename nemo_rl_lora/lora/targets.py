"""Which modules get an adapter: the one matching rule, and its errors. Pure string work.

The rule, for targets, excludes, `rank_pattern` and `alpha_pattern` alike:
- a plain name (`q_proj`) matches the last path component;
- a dotted name without wildcard (`to_out.0`) matches a suffix on component boundaries;
- a glob (any of `*?[`) matches the full name, case-sensitively; a dot in it is a dot, so `*.layers.0.*` never
  reaches layer 10.
A name may be written in the Hugging Face or the Megatron vocabulary: a module matches when either of its names does.
"all-linear" is every linear module but the output head. This module does not look at weights: the caller lists the
linear modules of the model, in module order.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from nemo_rl_lora.lora.names import FUSED_PARTS, OUTPUT_HEAD_NAMES, hf_names, last_component, megatron_name

if TYPE_CHECKING:
    from nemo_rl_lora.lora.spec import LoraSpec

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearModule:
    """A linear module of the model. Its weight is [out_features, in_features]."""

    name: str  # full Hugging Face module name
    in_features: int
    out_features: int
    is_output_head: bool = False

    @property
    def is_head(self) -> bool:
        return self.is_output_head or last_component(self.name) in OUTPUT_HEAD_NAMES


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptedModule:
    """A module with an adapter: A is [dim, in_features], B is [out_features, dim], the update is scale * B @ A."""

    name: str  # full Hugging Face module name
    in_features: int
    out_features: int
    dim: int
    alpha: float
    scale: float

    @property
    def num_params(self) -> int:
        return self.dim * (self.in_features + self.out_features)


def name_matches(pattern: str, name: str) -> bool:
    """Whether the pattern matches this one name, by the rule of the module docstring."""
    if any(wildcard in pattern for wildcard in "*?["):
        return fnmatchcase(name, pattern)
    return name == pattern or name.endswith("." + pattern)


def module_matches(pattern: str, hf_name: str) -> bool:
    """Whether the pattern matches a module by its Hugging Face or by its Megatron name."""
    if name_matches(pattern, hf_name):
        return True
    megatron = megatron_name(hf_name)
    return megatron is not None and name_matches(pattern, megatron)


def resolve_targets(
    spec: LoraSpec, modules: Sequence[LinearModule], *, tied_head: bool, model_label: str, config_key: str
) -> tuple[AdaptedModule, ...]:
    """The modules that get an adapter, in module order.

    `config_key` is the dotted key of the LoRA block (`policy.dtensor_cfg.lora_cfg`), for messages. Raises
    ValueError for a target, exclude or pattern that matches nothing, a tied output head, or a fused layer matched in
    part.
    """
    targets_key, excludes_key = f"{config_key}.target_modules", f"{config_key}.exclude_modules"
    where = f"linear modules of {model_label}"
    # A tied head can never be chosen, so it is no candidate; a target that names it has its own refusal.
    offered = [m for m in modules if not (tied_head and m.is_head)]
    _require_matches(spec.excludes, modules, offered, excludes_key, where)
    kept = [m for m in modules if not any(module_matches(e, m.name) for e in spec.excludes)]
    if isinstance(spec.targets, str):
        chosen = [m for m in kept if not m.is_head]
    else:
        _require_matches(spec.targets, modules, offered, targets_key, where)
        chosen = [m for m in kept if any(module_matches(t, m.name) for t in spec.targets)]
        _refuse_tied_head(chosen, spec.targets, tied_head, config_key)
    if not chosen:
        raise ValueError(
            f"{excludes_key}={list(spec.excludes)!r}: leaves none of the {len(offered)} {where} that "
            f"{targets_key} selects. Exclude fewer modules, or set enabled=false to train without an adapter."
        )
    adapted = f"adapted modules of {model_label}"
    _require_matches(spec.rank_pattern, chosen, chosen, f"{config_key}.rank_pattern", adapted)
    _require_matches(spec.alpha_pattern, chosen, chosen, f"{config_key}.alpha_pattern", adapted)
    if spec.fused == "shared":
        _require_whole_fused_layers(spec, chosen, modules, config_key)
    return tuple(
        AdaptedModule(
            name=module.name,
            in_features=module.in_features,
            out_features=module.out_features,
            dim=spec.dim_of(module.name),
            alpha=spec.alpha_of(module.name),
            scale=spec.scale_of(module.name),
        )
        for module in chosen
    )


def resolve_trained_targets(
    spec: LoraSpec, modules: Sequence[LinearModule], *, tied_head: bool, model_label: str, config_key: str
) -> tuple[AdaptedModule, ...]:
    """As resolve_targets, for an adapter that is trained. ValueError for one of the output head: its logits exist in
    chunks alone, whose gradient is known without it."""
    adapted = resolve_targets(spec, modules, tied_head=tied_head, model_label=model_label, config_key=config_key)
    head = next((module for module in adapted if last_component(module.name) in OUTPUT_HEAD_NAMES), None)
    if head is not None:
        raise ValueError(
            f"{config_key}.target_modules={list(spec.targets)!r}: matches the output head {head.name!r}, where no "
            f"adapter is trained in this version. Drop it from the targets, or add {head.name!r} to "
            f"{config_key}.exclude_modules."
        )
    return adapted


def _require_matches(
    patterns: Collection[str], modules: Sequence[LinearModule], offered: Sequence[LinearModule], key: str, where: str
) -> None:
    for pattern in patterns:
        if any(module_matches(pattern, m.name) for m in modules):
            continue
        candidates = list(dict.fromkeys(last_component(m.name) for m in offered))
        close = difflib.get_close_matches(last_component(pattern), candidates, n=1)
        hint = f" Did you mean {close[0]!r}?" if close and close[0] != pattern else ""
        subject = "" if len(patterns) == 1 else f"{pattern!r} "
        raise ValueError(
            f"{key}={list(patterns)!r}: {subject}matches none of the {len(offered)} {where}.{hint} "
            f"Candidates: {', '.join(candidates)}."
        )


def _refuse_tied_head(chosen: Sequence[LinearModule], targets: Sequence[str], tied_head: bool, config_key: str) -> None:
    head = next((m for m in chosen if m.is_head), None)
    if head is not None and tied_head:
        raise ValueError(
            f"{config_key}.target_modules={list(targets)!r}: matches the output head {head.name!r}, which shares its "
            f"weight with the input embeddings, so an adapter there cannot be merged. Drop it from the targets, or "
            f"add {head.name!r} to {config_key}.exclude_modules."
        )


def _require_whole_fused_layers(
    spec: LoraSpec, chosen: Sequence[LinearModule], modules: Sequence[LinearModule], config_key: str
) -> None:
    """One shared A per fused layer needs every module that the layer holds, at one dim and alpha."""
    chosen_names, all_names = {m.name for m in chosen}, {m.name for m in modules}
    for module in chosen:
        layer = megatron_name(module.name)
        if layer is None or last_component(layer) not in FUSED_PARTS:
            continue
        parts = [part for part in hf_names(layer) if part in all_names]
        if missing := [part for part in parts if part not in chosen_names]:
            raise ValueError(
                f"{config_key}.exclude_modules={list(spec.excludes)!r}: {layer} has one A for "
                f"{', '.join(parts)}, so {missing[0]} cannot be left out alone. "
                f"Exclude {last_component(layer)!r}, or target the Hugging Face names, which have an A each."
            )
        if len({(spec.dim_of(part), spec.alpha_of(part)) for part in parts}) > 1:
            raise ValueError(
                f"{config_key}.rank_pattern={dict(spec.rank_pattern)!r}: {layer} has one A for "
                f"{', '.join(parts)}, so they share one dim and alpha. "
                f"Name {last_component(layer)!r} in the pattern."
            )
