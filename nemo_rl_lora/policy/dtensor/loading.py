"""Weights from a Hugging Face directory into a model that was built on the meta device and sharded there.

Contract: afterwards every parameter and buffer of the base holds what `models.load.load_model` gives, bit for bit,
and no process has held more of it than its own part and a block. Names and shapes are compared before anything is
read. Two ways: `all_ranks`, each process reads its own slices of the files, which all must see; `broadcast`, the first
process reads and sends, a block of rows at a time, and the others need no files.

Which tensor of the files is which of the model, transformers says. Where it computes the model's tensors from several
of the files (experts, which it stacks), the first process loads the whole model on its CPU and sends from there.

Adapters are made room for and set to zero: whoever put them in fills them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers import initialization as transformers_initialization
from transformers.utils import logging as transformers_logging

from nemo_rl_lora.models.load import empty_model
from nemo_rl_lora.models.stored import (
    MODEL_KEY,
    NUM_NAMES_SHOWN,
    AnyTensor,
    first_names,
    matched,
    num_not_finite,
    one_to_one_tensors,
    refuse_not_finite,
    ties,
)
from nemo_rl_lora.policy.dtensor.own_part import OwnPart, block_shape, messages_device, own_part, row_blocks
from nemo_rl_lora.tensors import StoredTensor, torch_dtype

How = Literal["all_ranks", "broadcast"]
Shape = tuple[int, ...]
Read = Callable[[str, tuple[slice, ...]], Tensor]  # a tensor by the model's name, and a box of it
Tensors = Mapping[str, AnyTensor]  # in files or in memory

_ADAPTER = re.compile(r"\.lora_[AB]\b")
_LOADED = "_is_hf_initialized"  # by which transformers knows a tensor that its initialization must leave alone


def load_weights(model: PreTrainedModel, path: Path, *, how: How, dtype: torch.dtype, device: torch.device) -> None:
    """Fill a model of the meta device, sharded or not, with the weights of a directory. Every process calls it.

    Parameters get `dtype`, buffers the dtype that transformers gives them. ValueError where names or shapes differ, or
    where `how` cannot be done; with `broadcast` in every process.
    """
    reference = _reference(model.config, dtype)
    tensors, plan = _found(path, reference, how)
    _make_room(model, reference, dtype, device)
    _fill(model, path, tensors, plan, how)
    _compute_buffers(model, {name for tensor in plan for name in tensor.names}, path)
    model.config.dtype = dtype


def refill_weights(model: PreTrainedModel, path: Path, *, how: How) -> None:
    """Put other weights into a model that `load_weights` filled, in the dtypes that its parameters have. As there."""
    tensors, plan = _found(path, _reference(model.config, model.dtype), how)
    _fill(model, path, tensors, plan, how)


def _found(path: Path, reference: PreTrainedModel, how: How) -> tuple[Tensors, list[_Planned]]:
    if how == "broadcast":
        return _found_by_first(path, reference)
    tensors = matched(path, reference, sliceable(path, reference))
    return tensors, _planned(tensors, reference)


def _fill(model: PreTrainedModel, path: Path, tensors: Tensors, plan: list[_Planned], how: How) -> None:
    """BadWeightsError where this process's part of a tensor is not finite."""
    parts = _parts(model, plan)
    with _reading(tensors) as read:
        (_read_own if how == "all_ranks" else _broadcast)(plan, parts, read)
    counts = {name: sum(num_not_finite(part.local) for part in own) for name, own in parts.items()}
    refuse_not_finite(f"{MODEL_KEY}={str(path)!r}", counts)


def reads_by_slices(config_or_model: Any, path: Path) -> bool:
    """Whether each tensor of the model is one tensor of the directory's safetensors files, as `all_ranks` needs it."""
    config = config_or_model.config if isinstance(config_or_model, PreTrainedModel) else config_or_model
    return one_to_one_tensors(path, _reference(config, torch.float32)) is not None


def _reference(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The model as transformers builds it, on the meta device: class, names, whole shapes and dtypes."""
    config = copy.deepcopy(config)
    config.dtype = dtype
    return empty_model(config)


# What the directory holds


@dataclass(frozen=True, slots=True, kw_only=True)
class _Planned:
    """A tensor that is read once, and the model's tensors that it fills: several where they are tied."""

    names: tuple[str, ...]
    shape: Shape
    dtype: torch.dtype  # in which it is read and sent

    @property
    def name(self) -> str:
        return self.names[0]


def _planned(tensors: Tensors, reference: PreTrainedModel) -> list[_Planned]:
    tied: dict[str, list[str]] = {}
    for name, source in ties(reference).items():
        tied.setdefault(source, []).append(name)
    return [
        _Planned(
            names=(name, *tied.get(name, ())),
            shape=tuple(tensor.shape),
            dtype=torch_dtype(tensor.dtype) if isinstance(tensor, StoredTensor) else tensor.dtype,
        )
        for name, tensor in tensors.items()
    ]


def _found_by_first(path: Path, reference: PreTrainedModel) -> tuple[Tensors, list[_Planned]]:
    """What the first process finds, on others nothing, and the plan; the first one's ValueError in every process."""
    tensors: Tensors = {}
    outcome: list[list[_Planned] | str] = [""]
    if _is_first():
        try:
            stored = one_to_one_tensors(path, reference)
            tensors = matched(path, reference, _loaded(path, reference) if stored is None else stored)
            outcome = [_planned(tensors, reference)]
        except ValueError as error:
            outcome = [str(error)]
    if dist.is_initialized():
        dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], str):
        raise ValueError(outcome[0])
    return tensors, outcome[0]


def sliceable(path: Path, reference: PreTrainedModel) -> dict[str, StoredTensor]:
    """The tensors of a directory by the model's names, of which each process can read its part. ValueError by the key
    where there are none."""
    stored = one_to_one_tensors(path, reference)
    if stored is None:
        raise ValueError(
            f"policy.dtensor_cfg.load='all_ranks': the tensors of {type(reference).__name__} are not, one to one, "
            f"those of safetensors files in {str(path)!r}, so no process can read its part alone. Set "
            "policy.dtensor_cfg.load=broadcast: the first process loads the model and sends the others their parts."
        )
    return stored


def _loaded(path: Path, reference: PreTrainedModel) -> dict[str, Tensor]:
    """All tensors of the model on the CPU, as transformers loads it."""
    transformers_logging.disable_progress_bar()
    config = copy.deepcopy(reference.config)
    load: Any = AutoModelForCausalLM.from_pretrained
    try:
        model, report = load(path, config=config, dtype=reference.config.dtype, output_loading_info=True)
    except (RuntimeError, OSError) as error:  # shapes that differ, files that are missing
        raise ValueError(
            f"policy.model_name={str(path)!r}: transformers cannot load it ({error}). Use a directory that its "
            "from_pretrained loads."
        ) from error
    tensors = model.state_dict()
    for name in report["missing_keys"]:
        del tensors[name]
    return tensors | {name: torch.empty(0) for name in report["unexpected_keys"]}


# Reading and sending


@contextmanager
def _reading(tensors: Tensors) -> Iterator[Read]:
    """Reads boxes of these tensors, of a tensor without axes its one element as a row."""
    with ExitStack() as stack:
        files: dict[Path, Any] = {}

        def read(name: str, box: tuple[slice, ...]) -> Tensor:
            tensor = tensors[name]
            if isinstance(tensor, Tensor):
                return tensor[box] if tensor.dim() else tensor.view(1)
            if tensor.path not in files:  # read, not mapped: mapped pages stay resident
                files[tensor.path] = stack.enter_context(safe_open(tensor.path, framework="pt", backend="pread"))
            file = files[tensor.path]
            return file.get_slice(tensor.name)[box] if tensor.shape else file.get_tensor(tensor.name).view(1)

        yield read


def _parts(model: PreTrainedModel, plan: Sequence[_Planned]) -> dict[str, list[OwnPart]]:
    """By the planned name, this process's parts of the model's tensors that it fills."""
    held = dict(_named_tensors(model))
    return {
        tensor.name: [own_part(each) for each in {id(held[name]): held[name] for name in tensor.names}.values()]
        for tensor in plan
    }


@torch.no_grad()
def _read_own(plan: Sequence[_Planned], parts: Mapping[str, Sequence[OwnPart]], read: Read) -> None:
    for tensor in plan:
        for part in parts[tensor.name]:
            if part.is_empty:
                continue
            for start, stop in row_blocks(part.local.shape, tensor.dtype.itemsize):
                rows, *rest = part.ranges
                box = slice(rows.start + start, rows.start + stop)
                part.local[start:stop].copy_(read(tensor.name, (box, *rest)))


@torch.no_grad()
def _broadcast(plan: Sequence[_Planned], parts: Mapping[str, Sequence[OwnPart]], read: Read) -> None:
    is_first, device = _is_first(), messages_device()
    for tensor in plan:
        for start, stop in row_blocks(tensor.shape, tensor.dtype.itemsize):
            if is_first:
                block = read(tensor.name, (slice(start, stop),)).to(device).contiguous()
            else:
                block = torch.empty(block_shape(tensor.shape, start, stop), dtype=tensor.dtype, device=device)
            if dist.is_initialized():
                dist.broadcast(block.view(torch.uint8), src=0)  # as bytes: not every dtype can be sent
            for part in parts[tensor.name]:
                part.take(start, block)


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


# The model


def _named_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of the base; a tied one under each of its names."""
    for name, tensor in [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]:
        if not _ADAPTER.search(name):
            yield name, tensor


def _make_room(model: PreTrainedModel, reference: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> None:
    """Memory for every tensor of the model, in the dtype that it is to have; adapters zero. What was tied stays so."""
    held, expected = dict(_named_tensors(model)), dict(_named_tensors(reference))
    assert set(held) == set(expected), sorted(set(held) ^ set(expected))[:NUM_NAMES_SHOWN]
    in_fp32 = reference._get_dtype_plan(dtype)
    dtypes = {
        id(tensor): dtype if isinstance(tensor, torch.nn.Parameter) else _buffer_dtype(name, expected[name], in_fp32)
        for name, tensor in held.items()
    }
    model._apply(lambda tensor: torch.empty_like(tensor, dtype=dtypes.get(id(tensor), tensor.dtype), device=device))
    owners: dict[int, str] = {}
    for name, tensor in held.items():  # by what they were before
        first = owners.setdefault(id(tensor), name)
        if first != name and model.get_parameter(first) is not model.get_parameter(name):
            module, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(module), attribute, model.get_parameter(first))
    for name, parameter in model.named_parameters():
        if _ADAPTER.search(name):
            own_part(parameter).local.zero_()


def _buffer_dtype(name: str, reference: Tensor, in_fp32: Mapping[str, torch.dtype]) -> torch.dtype:
    """As transformers loads it: what its class made it, unless the class keeps buffers of this name in fp32."""
    matching = (dtype for pattern, dtype in in_fp32.items() if re.search(pattern.replace("*", ".*"), name))
    return next(matching, reference.dtype)


@torch.no_grad()
def _compute_buffers(model: PreTrainedModel, loaded: Collection[str], path: Path) -> None:
    """Buffers that no file holds (rotary frequencies), as transformers computes them when it loads a model."""
    held = dict(_named_tensors(model))
    computed = {name for name in held if name not in loaded}
    assert not any(isinstance(held[name], torch.nn.Parameter) for name in computed), sorted(computed)
    kept = [tensor for name, tensor in [*model.named_parameters(), *held.items()] if name not in computed]
    for tensor in kept:
        setattr(tensor, _LOADED, True)
    for name in computed:
        if held[name].is_floating_point():
            held[name].fill_(torch.nan)
    owners: dict[str, PreTrainedModel] = {}
    with transformers_initialization.guard_torch_init_functions():
        for name, module in model.named_modules():
            parent = owners.get(name.rpartition(".")[0], model)
            owners[name] = module if isinstance(module, PreTrainedModel) else parent
            if any(f"{name}.{buffer}".lstrip(".") in computed for buffer, _ in module.named_buffers(recurse=False)):
                owners[name]._init_weights(module)
    for tensor in kept:
        vars(tensor).pop(_LOADED, None)
    if unknown := [name for name in computed if held[name].is_floating_point() and held[name].isnan().any()]:
        raise ValueError(
            f"policy.model_name={str(path)!r}: its class {type(model).__name__} does not compute the buffers "
            f"{first_names(unknown)} when it is loaded, and its files do not hold them. Use a model whose class is "
            "transformers' own."
        )
