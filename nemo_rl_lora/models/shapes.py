"""A model's modules and parameters from its config.json alone: built on the meta device, so nothing is allocated."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from nemo_rl_lora.lora.names import megatron_name
from nemo_rl_lora.lora.targets import AdaptedModule, LinearModule
from nemo_rl_lora.models.families import has_tied_head
from nemo_rl_lora.models.load import described_model, linear_modules
from nemo_rl_lora.models.own_forward import read_head

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleType:
    """The modules of one name and shape, which differ only in their layer."""

    name: str  # Hugging Face name with * for layer and expert numbers
    megatron_name: str | None  # the Megatron layer that holds them, or None where it has no counterpart
    num_modules: int
    weight_shape: tuple[int, ...]  # of one module, [out_features, in_features] for a linear one
    dim: int | None  # None: no adapter
    scale: float | None
    num_trainable_params: int  # of all modules of the type


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShapes:
    """What a model is made of. Tied weights count once."""

    config: Any  # the transformers config
    linears: tuple[LinearModule, ...]
    stacked: tuple[tuple[str, tuple[int, ...]], ...]  # parameters of three dimensions: experts held in one tensor
    has_tied_head: bool
    head_problem: str | None  # why its log-probabilities cannot be computed in chunks; None: they can
    num_params: int

    @property
    def architecture(self) -> str:
        """The model's class, as its config.json says it."""
        names = getattr(self.config, "architectures", None) or [f"{self.config.model_type} (architecture not named)"]
        return str(names[0])

    @property
    def quantization(self) -> str | None:
        """The method by which the checkpoint is quantized, or None."""
        settings = getattr(self.config, "quantization_config", None)
        if settings is None:
            return None
        method = settings["quant_method"] if isinstance(settings, dict) else settings.quant_method
        return str(getattr(method, "value", method))


def read_model_shapes(path: Path, config_overrides: dict[str, Any], label: str | None = None) -> ModelShapes:
    """The shapes of the model in a directory that holds at least config.json. As in `load.described_model`."""
    model = described_model(path, config_overrides, label)
    return shapes_of(model, model.config)


def shapes_of(model: PreTrainedModel, config: Any) -> ModelShapes:
    """The shapes of a model that exists, on the meta device or not."""
    return ModelShapes(
        config=config,
        linears=tuple(linear_modules(model)),
        stacked=tuple((name, tuple(p.shape)) for name, p in model.named_parameters() if p.dim() == 3),
        has_tied_head=has_tied_head(config),
        head_problem=_head_problem(model),
        num_params=sum(p.numel() for p in model.parameters()),
    )


def _head_problem(model: PreTrainedModel) -> str | None:
    try:
        read_head(model)
    except ValueError as error:
        return f"{type(model).__name__} {error}"
    return None


def adapted_types(modules: Iterable[AdaptedModule], shared_a: bool) -> tuple[ModuleType, ...]:
    """Adapted modules by type, in module order. With `shared_a`, what a fused layer holds counts its A once."""
    counted_a: set[str] = set()
    rows = []
    for module in modules:
        layer = megatron_name(module.name) if shared_a else None
        counts_a = layer is None or layer not in counted_a
        if layer is not None:
            counted_a.add(layer)
        num_params = module.dim * (module.out_features + (module.in_features if counts_a else 0))
        rows.append((module.name, (module.out_features, module.in_features), module.dim, module.scale, num_params))
    return _by_type(rows)


def left_out_types(shapes: ModelShapes, adapted: Iterable[AdaptedModule]) -> tuple[ModuleType, ...]:
    """Linear modules without an adapter, and stacked experts, by type."""
    taken = {m.name for m in adapted}
    rest = [(m.name, (m.out_features, m.in_features)) for m in shapes.linears if m.name not in taken]
    return _by_type((name, shape, None, None, 0) for name, shape in [*rest, *shapes.stacked])


def _by_type(rows: Iterable[tuple[str, tuple[int, ...], int | None, float | None, int]]) -> tuple[ModuleType, ...]:
    """From a module's name, weight's shape, dim, scale and number of trained parameters, a row each."""
    trained: dict[tuple[Any, ...], list[int]] = {}
    for name, shape, dim, scale, num_params in rows:
        layer = megatron_name(name)
        key = (type_name(name), None if layer is None else type_name(layer), shape, dim, scale)
        trained.setdefault(key, []).append(num_params)
    return tuple(
        ModuleType(
            name=name,
            megatron_name=layer,
            num_modules=len(counts),
            weight_shape=shape,
            dim=dim,
            scale=scale,
            num_trainable_params=sum(counts),
        )
        for (name, layer, shape, dim, scale), counts in trained.items()
    )


def type_name(name: str) -> str:
    """A module's name with * for the numbers of layers and experts."""
    return _NUMBER.sub("*", name)
