"""One adapter in three forms: PEFT's, and megatron-bridge's with an A per Hugging Face module or per fused layer.

Contract: `plan` says of a conversion whether it is bit-exact, exact with rank growth, or impossible and why, before
`convert` does it. Exact means the same update of every weight in exact arithmetic: tensors are renamed, reordered,
stacked, padded with zeros or scaled by powers of two, never summed. Sides meet in the canonical form: A [dim, in], B
[out, dim] and a scale of each Hugging Face module.

A Megatron adapter has one dim and one alpha for all layers, as NeMo RL's `peft` block. Its tensor names are those of
megatron-bridge's LoRA and CanonicalLoRA (no file was loaded there).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor

from nemo_rl_lora.lora.adapter_tensors import AdapterTensors, canonical_tensors
from nemo_rl_lora.lora.files import ADAPTER_CONFIG_FILE, ADAPTER_FILE, AdapterBase, read_adapter
from nemo_rl_lora.lora.files import write_adapter as write_peft
from nemo_rl_lora.lora.fit import adapter_directory, fit_itself
from nemo_rl_lora.lora.names import FUSED_PARTS, hf_names, last_component, megatron_name
from nemo_rl_lora.lora.peft_config import spec_to_peft_config
from nemo_rl_lora.lora.spec import LoraSpec
from nemo_rl_lora.lora.targets import AdaptedModule
from nemo_rl_lora.policy.megatron.convert import fuse, megatron_weights, separate
from nemo_rl_lora.policy.megatron.families import Family

Form = Literal["peft", "megatron-shared", "megatron-canonical"]
Label = Literal["bit-exact", "exact with rank growth", "impossible"]
FORMS: tuple[Form, ...] = ("peft", "megatron-shared", "megatron-canonical")
_PARTS = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "gate_proj": "gate", "up_proj": "up"}
_IN, _OUT = "linear_in.weight", "linear_out.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFile:
    """An adapter in canonical form, and the form in which it was found."""

    form: Form
    factors: Mapping[str, AdapterTensors]  # by full Hugging Face module name
    base_name: str
    peft_config: Mapping[str, Any] = field(default_factory=dict)  # of PEFT's form


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a conversion would be."""

    label: Label
    reasons: tuple[str, ...]  # why it is not bit-exact
    dim: int  # of the result; the largest, where PEFT's has several


def plan(adapter: AdapterFile, to: Form, family: Family) -> Plan:
    """Judge a conversion. Reads tensors where As have to be compared, and computes nothing."""
    dims = [len(factors.a) for factors in adapter.factors.values()]
    if to == "peft" or to == adapter.form:
        return Plan(label="bit-exact", reasons=(), dim=max(dims))
    if problem := _problem(adapter, family):
        return Plan(label="impossible", reasons=(problem,), dim=max(dims))
    if to == "megatron-canonical":
        grows = min(dims) < max(dims)
        reasons = (f"dims from {min(dims)} to {max(dims)} become one",) if grows else ()
        return Plan(label=_label(reasons), reasons=reasons, dim=max(dims))
    reasons, needed = [], max(dims)
    for layer, parts in _by_layer(adapter).items():
        rows = sum(len(a) for a in _distinct(parts))
        absent = [part for part in hf_names(layer) if part not in parts]
        if absent:
            reasons.append(f"{layer} gets zeros for {', '.join(map(last_component, absent))}")
        if rows > max(len(factors.a) for factors in parts.values()):
            reasons.append(f"{layer} stacks {rows} rows, since its modules' A differ")
        needed = max(needed, rows)
    if not reasons and min(dims) < needed:
        reasons.append(f"dims from {min(dims)} to {needed} become one")
    return Plan(label=_label(reasons), reasons=tuple(reasons), dim=needed)


def convert(adapter: AdapterFile, to: Form, family: Family, planned: Plan) -> dict[str, Tensor]:
    """The tensors of a Megatron form, as planned."""
    assert planned.label != "impossible", planned
    assert to != "peft", "PEFT's form is the canonical one"
    scale = next(iter(adapter.factors.values())).scale
    tensors: dict[str, Tensor] = {}
    for layer, parts in _by_layer(adapter).items():
        unit = {name: AdapterTensors(a=f.a, b=f.b * (f.scale / scale), scale=scale) for name, f in parts.items()}
        if to == "megatron-canonical" or last_component(layer) not in FUSED_PARTS:
            for name, factors in unit.items():
                prefix = _canonical_prefix(layer, name)
                tensors[prefix + _IN] = _padded(factors.a, planned.dim, 0)
                tensors[prefix + _OUT] = _padded(factors.b, planned.dim, 1)
            continue
        distinct = _distinct(unit)
        starts = [sum(len(a) for a in distinct[:index]) for index in range(len(distinct))]
        rows = _rows(layer, family)
        blocks = []
        for name in hf_names(layer):
            block = torch.zeros(rows[name], planned.dim)
            if name in unit:
                index = next(i for i, a in enumerate(distinct) if torch.equal(a, unit[name].a))
                block[:, starts[index] : starts[index] + len(unit[name].a)] = unit[name].b
            blocks.append(block)
        tensors[f"{layer}.adapter.{_IN}"] = _padded(torch.cat(distinct), planned.dim, 0)
        tensors[f"{layer}.adapter.{_OUT}"] = fuse(layer, blocks, family)
    return tensors


def read(path: Path, family: Family | None) -> AdapterFile:
    """An adapter of any form. `family` is needed for Megatron's. ValueError names the file."""
    directory = adapter_directory(path)
    config = json.loads((directory / ADAPTER_CONFIG_FILE).read_text(encoding="utf-8"))
    if config.get("form") in FORMS:
        assert family is not None, "the caller reads the family of a Megatron adapter"
        return _read_megatron(directory, config, family)
    tensors, config = read_adapter(directory)
    adapted = fit_itself(tensors, config)
    factors = {module.name: AdapterTensors.of(module.name, module.scale, tensors) for module in adapted}
    base_name = config.get("base_model_name_or_path") or ""
    return AdapterFile(form="peft", factors=factors, base_name=base_name, peft_config=config)


def write(directory: Path, adapter: AdapterFile, to: Form, family: Family, planned: Plan) -> None:
    """Write the result of a planned conversion into a directory that does not exist."""
    directory.mkdir(parents=True)
    if to == "peft":
        base = AdapterBase(name=adapter.base_name) if adapter.base_name else None
        peft_config = dict(adapter.peft_config) or _peft_config(adapter)
        write_peft(directory, canonical_tensors(adapter.factors), peft_config, base)
        return
    scale = next(iter(adapter.factors.values())).scale
    targets = list(dict.fromkeys(last_component(layer) for layer in _by_layer(adapter)))
    config = {"form": to, "dim": planned.dim, "alpha": scale * planned.dim, "target_modules": targets}
    text = json.dumps(config | {"base_model_name_or_path": adapter.base_name}, indent=2, sort_keys=True)
    (directory / ADAPTER_CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    tensors = {name: t.contiguous() for name, t in convert(adapter, to, family, planned).items()}
    (directory / ADAPTER_FILE).write_bytes(save(tensors, metadata={"format": "pt"}))


def _read_megatron(directory: Path, config: Mapping[str, Any], family: Family) -> AdapterFile:
    from safetensors.torch import load_file

    tensors, scale = load_file(directory / ADAPTER_FILE), config["alpha"] / config["dim"]
    factors: dict[str, AdapterTensors] = {}
    for name in (name for name in tensors if name.endswith(_IN)):
        layer, _, part = name.removesuffix(_IN).partition(".adapter.")
        a, b, modules = tensors[name], tensors[name.removesuffix(_IN) + _OUT], hf_names(layer)
        if part:
            modules = tuple(m for m in modules if _canonical_prefix(layer, m) == f"{layer}.adapter.{part}")
            parts: tuple[Tensor, ...] = (b,)
        else:
            parts = separate(layer, b, family)
        if not modules:
            raise ValueError(f"{directory / ADAPTER_FILE}: {name} is no tensor of a Megatron adapter. Write it again.")
        for module, rows in zip(modules, parts, strict=True):
            factors[module] = AdapterTensors(a=a.clone(), b=rows.contiguous(), scale=scale)
    return AdapterFile(form=config["form"], factors=factors, base_name=config["base_model_name_or_path"])


def _problem(adapter: AdapterFile, family: Family) -> str | None:
    known = {source for weight in megatron_weights(family, 1) for source in weight.sources}
    scale = next(iter(adapter.factors.values())).scale
    for name, factors in adapter.factors.items():
        if megatron_name(name) is None or f"{name}.weight" not in known:
            return f"{name} is no layer of Megatron's"
        if math.frexp(factors.scale / scale)[0] != 0.5:
            return (
                f"{name} has scale {factors.scale:g} and others {scale:g}: a Megatron adapter has one scale, and the "
                "ratio, which is no power of two, would round B"
            )
    return None


def _label(reasons: Any) -> Label:
    return "exact with rank growth" if reasons else "bit-exact"


def _by_layer(adapter: AdapterFile) -> dict[str, dict[str, AdapterTensors]]:
    layers: dict[str, dict[str, AdapterTensors]] = {}
    for name, factors in adapter.factors.items():
        layer = megatron_name(name)
        assert layer is not None, name
        layers.setdefault(layer, {})[name] = factors
    return layers


def _distinct(parts: Mapping[str, AdapterTensors]) -> list[Tensor]:
    found: list[Tensor] = []
    for factors in parts.values():
        if not any(torch.equal(factors.a, a) for a in found):
            found.append(factors.a)
    return found


def _rows(layer: str, family: Family) -> dict[str, int]:
    """Outputs of the modules that a layer holds."""
    weight = next(weight for weight in megatron_weights(family, 1) if weight.name == f"{layer}.weight")
    return {name.removesuffix(".weight"): shape[0] for name, shape in weight.sources.items()}


def _canonical_prefix(layer: str, module: str) -> str:
    part = _PARTS.get(last_component(module)) if last_component(layer) in FUSED_PARTS else None
    return f"{layer}.adapter." if part is None else f"{layer}.adapter.adapter_{part}."


def _padded(tensor: Tensor, dim: int, axis: int) -> Tensor:
    shape = list(tensor.shape)
    shape[axis] = dim - shape[axis]
    return torch.cat([tensor, torch.zeros(shape)], dim=axis)


def _peft_config(adapter: AdapterFile) -> dict[str, Any]:
    first = next(iter(adapter.factors.values()))
    dim, alpha = len(first.a), first.scale * len(first.a)
    modules = [
        AdaptedModule(
            name=name, in_features=f.a.shape[1], out_features=f.b.shape[0], dim=dim, alpha=alpha, scale=f.scale
        )
        for name, f in adapter.factors.items()
    ]
    spec = LoraSpec(dim=dim, alpha=alpha, targets=tuple(adapter.factors))
    return spec_to_peft_config(spec, adapter.base_name, modules)
