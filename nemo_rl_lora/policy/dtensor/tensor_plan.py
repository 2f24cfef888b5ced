"""Tensor-parallel plans: nemo-automodel's, and a user's own, which is held against a model before a weight is loaded.

Contract: every name of a user's plan is a module's, and nothing is trained from a part of its gradient. How a style
splits a module is torch's business.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from fnmatch import fnmatch
from importlib import import_module
from typing import Any

from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from nemo_rl_lora.config.dtensor import DTensorConfig
from nemo_rl_lora.config.errors import did_you_mean
from nemo_rl_lora.models.shapes import type_name

_KEY, _SEQUENCE_KEY = "policy.dtensor_cfg.custom_parallel_plan", "policy.dtensor_cfg.sequence_parallel"
_STYLES = "nemo_automodel.components.distributed.parallel_styles"
_REMEDIES = {  # by whether an adapter is trained
    False: f"Give them a style, as {_STYLES}.ReplicatedWithGradAllReduce, which adds them up, or train an adapter.",
    True: "Give them a style that splits them (ColwiseParallel, RowwiseParallel), or leave them out of the adapter.",
}
_FORM = "A plan is a dict of module names and parallel styles, or a function without arguments that returns one."


def tensor_plan(model: nn.Module, sequence_parallel: bool, custom_plan: str | None) -> dict[str, Any]:
    """Module names, with * for a number -> how each is split. `custom_plan` is the dotted path of a plan, or of a
    function that gives one. ValueError names the key."""
    if custom_plan is not None:
        return read_custom_plan(custom_plan)
    from nemo_automodel.components.distributed.optimized_tp_plans import PARALLELIZE_FUNCTIONS

    architecture = type(model).__name__.replace("Mistral", "Llama")  # of the same modules
    for name, function in PARALLELIZE_FUNCTIONS.items():
        if name.startswith("transformers.") and name.endswith(f".{architecture}"):
            return dict(function(model, sequence_parallel))
    raise AssertionError(f"no plan for {architecture}: the configuration is refused before")


def read_custom_plan(path: str) -> dict[str, Any]:
    """The plan at a dotted path, or what a function there gives: module names -> parallel styles. ValueError by the
    key's name."""
    from torch.distributed.tensor.parallel import ParallelStyle

    key = f"{_KEY}={path!r}"
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
        plan = found() if callable(found) else found
    except (Exception, SystemExit) as error:  # whatever the user's code does
        said = f"{type(error).__name__}: {error}"
        raise ValueError(f"{key}: {said}. Give the dotted path of a plan that can be imported. {_FORM}") from error
    if not isinstance(plan, dict) or not plan:
        raise ValueError(f"{key}: is {'empty' if plan == {} else f'a {type(plan).__name__}'}. {_FORM}")
    for part, style in plan.items():
        if not (isinstance(part, str) and isinstance(style, ParallelStyle)):
            raise ValueError(f"{key}: {part!r} has {style!r}, and a module's name has a ParallelStyle. {_FORM}")
    return plan


def planned_modules(model: nn.Module, plan: Mapping[str, Any]) -> dict[str, list[str]]:
    """The modules of a model that torch's parallelize_module finds for each name of a plan."""
    names = [(name, name.split(".")) for name, _ in model.named_modules()]

    def matching(pattern: str) -> Iterator[str]:
        tokens = pattern.split(".")
        for name, parts in names:
            if len(parts) == len(tokens) and bool(name) == bool(pattern) and all(map(fnmatch, parts, tokens)):
                yield name

    return {pattern: list(matching(pattern)) for pattern in plan}


def modules_split_by_rows(model: nn.Module, plan: Mapping[str, Any]) -> list[str]:
    """The modules of whose weight each tensor-parallel rank has some rows."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    kinds = {nn.Linear: ColwiseParallel, nn.Embedding: RowwiseParallel}
    return [
        name
        for pattern, names in planned_modules(model, plan).items()
        for name in names
        for kind, style in kinds.items()
        if isinstance(model.get_submodule(name), kind) and isinstance(plan[pattern], style)
    ]


def custom_plan_problems(sizes: DTensorConfig, model: PreTrainedModel, adapted: Collection[str] | None) -> list[str]:
    """A paragraph for each reason why the plan is none, or none of this model, which may be on the meta device.

    `adapted`: the modules that have adapters; None: all weights are trained.
    """
    assert sizes.custom_parallel_plan is not None
    try:
        plan = read_custom_plan(sizes.custom_parallel_plan)
    except ValueError as error:
        return [str(error)]
    key = f"{_KEY}={sizes.custom_parallel_plan!r}"
    planned, kinds = planned_modules(model, plan), {type_name(name) for name, _ in model.named_modules()}
    problems = [
        f"{key}: {pattern!r} matches no module of {type(model).__name__}. {did_you_mean(pattern, kinds)}Correct it, or "
        "leave it out."
        for pattern, modules in planned.items()
        if not modules
    ]
    splits = any(map(_splits_sequences, plan.values()))
    if splits != sizes.sequence_parallel and (splits or all(map(_is_known, plan.values()))):
        problems.append(
            f"{_SEQUENCE_KEY}={sizes.sequence_parallel}: {_KEY}={sizes.custom_parallel_plan!r} "
            f"{'splits' if splits else 'does not split'} sequences, axis 1 of activations. Set "
            f"{_SEQUENCE_KEY}={str(splits).lower()}, or give another plan."
        )
    if partial := _partly_trained(model, plan, planned, splits, adapted):
        problems.append(
            f"{key}: has no style for {', '.join(partial)}, beside which it splits activations: a rank may compute a "
            f"part of their gradients, and nothing would add the parts up. {_REMEDIES[adapted is not None]}"
        )
    return problems


def _partly_trained(
    model: nn.Module,
    plan: Mapping[str, Any],
    planned: Mapping[str, list[str]],
    splits_sequences: bool,
    adapted: Collection[str] | None,
) -> list[str]:
    """Trained modules without a style that compute from a part of the activations: of a sequence, wherever they are;
    of what a layer beside them gives, where not only matrices are trained, which take no part of their input."""
    from nemo_automodel.components.distributed.parallel_styles import ReplicatedWithGradAllReduce

    blocks = {*([""] if splits_sequences else ()), *(_split_blocks(model, plan, planned) if adapted is None else ())}
    styled = {  # what adds up a module's gradients does not add up those of an adapter on it
        pattern: names
        for pattern, names in planned.items()
        if adapted is None or not isinstance(plan[pattern], ReplicatedWithGradAllReduce)
    }
    named = {name for names in styled.values() for name in names}
    partial = []
    for name, module in model.named_modules():
        is_trained = any(True for _ in module.parameters(recurse=False)) if adapted is None else name in adapted
        within: list[str] = []  # the module, and those that it is part of
        for outer in (*_outwards(name), ""):
            if is_trained and outer in blocks and named.isdisjoint(within):
                partial.append(type_name(name))
            within.append(outer)
    return list(dict.fromkeys(partial))


def _outwards(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.rpartition(".")[0]


def _split_blocks(model: Any, plan: Mapping[str, Any], planned: Mapping[str, list[str]]) -> Iterator[str]:
    """The modules in which a layer gives each rank a part of its output."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import ColwiseParallel

    head = model.get_output_embeddings()
    for pattern, style in plan.items():
        if isinstance(style, ColwiseParallel) and any(isinstance(layout, Shard) for layout in style.output_layouts):
            for name in planned[pattern]:
                if model.get_submodule(name) is not head:  # nothing reads the head's output but the loss
                    yield name.rpartition(".")[0]


def _splits_sequences(style: Any) -> bool:
    from torch.distributed.tensor import Shard

    return any(isinstance(leaf, Shard) and leaf.dim == 1 for leaf in tree_leaves(_attributes(style)))


def _attributes(style: Any) -> list[Any]:
    """What a style is made of; one may be made of others."""
    from torch.distributed.tensor.parallel import ParallelStyle

    return [_attributes(value) if isinstance(value, ParallelStyle) else value for value in vars(style).values()]


def _is_known(style: Any) -> bool:
    """Whether it is torch's or nemo-automodel's, which say what they split."""
    return type(style).__module__.startswith(("torch.", "nemo_automodel."))
