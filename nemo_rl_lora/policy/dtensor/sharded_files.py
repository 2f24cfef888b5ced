"""Checkpoints of all weights that no process ever holds whole: fp32 masters and AdamW's moments, and the model.

Contract: masters and moments are named as the Hugging Face model names its parameters, and are plain tensors or
DTensors. `write_sharded` has every process write what is its own, once where several hold the same, by torch's
distributed checkpoints in safetensors files: nothing in them is pickled. `read_sharded` fills tensors of any other
sharding, also in one process alone. `write_hf_directory` writes what `models.load.save_tensors` writes, each file by
one process, to which the others send a block of rows at a time.

Every process makes the same calls with the same names in the same order, and all see the directory. Whoever calls
makes the whole durable: it writes into a directory that is renamed when all is there.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter, revert_weight_conversion

from nemo_rl_lora.lora.files import FIRST_MOMENT, NUM_NAMES_SHOWN, SECOND_MOMENT
from nemo_rl_lora.models.load import empty_model, save_configs
from nemo_rl_lora.policy.dtensor.own_part import (
    OwnPart,
    block_shape,
    first_holders,
    messages_device,
    own_part,
    row_blocks,
)
from nemo_rl_lora.tensors import MAX_SHARD_BYTES, Shard, TensorEntry, TensorWriter, entry_of, plan_shards, write_index

Moments = Mapping[str, tuple[Tensor, Tensor]]
DiskForm = Callable[[str, Tensor], dict[str, Tensor]]
"""What files hold for a tensor of the model: mostly itself, else parts of it (experts), or under another name."""

STATE_FILE = "sharded.json"
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MAX_FILE_BYTES = 10**9  # of one process's file: each is put together in memory
_WAY_OUT = "Use another checkpoint, or start anew with checkpointing.load_path=none."


def is_sharded(directory: Path) -> bool:
    """Whether `write_sharded` wrote this directory."""
    return (directory / STATE_FILE).is_file()


def refuse_sharded(path: Path, backend: str) -> None:
    """ValueError where the policy's directory of a step has what another backend than this one cannot read."""
    if is_sharded(path / "optimizer"):
        raise ValueError(
            f"policy.backend={backend!r}: {path} has all weights as several processes of the DTensor backend write "
            f"them. Set policy.backend=dtensor, or start anew from the model in {path / 'weights'}."
        )


def write_sharded(directory: Path, masters: Mapping[str, Tensor], moments: Moments, num_steps: int) -> None:
    """Each process's part of masters and moments, into files of its own in a new directory."""
    tensors = _named(masters, moments)
    directory.mkdir(parents=True, exist_ok=True)
    files = plan_shards(_entries(tensors), _MAX_FILE_BYTES * _num_processes())
    writer = dcp.HuggingFaceStorageWriter(
        str(directory),
        fqn_to_index_mapping={tensor.name: number for number, file in enumerate(files, 1) for tensor in file.tensors},
        save_distributed=True,
    )
    with _own_errors():
        dcp.save(dict(tensors), storage_writer=writer, no_dist=not dist.is_initialized())
    with _failing_together():
        if _rank() == 0:
            state = json.dumps({"num_steps": num_steps})
            (directory / STATE_FILE).write_text(state + "\n", encoding="utf-8")


def read_sharded(directory: Path, masters: Mapping[str, Tensor], moments: Moments) -> int:
    """Fill these tensors with what `write_sharded` wrote, however it was sharded; the optimizer's number of steps.

    ValueError where names or shapes are others, or a file is missing or damaged; nothing is filled then.
    """
    tensors = _named(masters, moments)
    try:
        num_steps = int(json.loads((directory / STATE_FILE).read_text(encoding="utf-8"))["num_steps"])
        reader = dcp.HuggingFaceStorageReader(str(directory))
        _check(directory, reader.read_metadata(), tensors)
        with _own_errors():
            dcp.load(dict(tensors), storage_reader=reader, no_dist=not dist.is_initialized())
    except (OSError, json.JSONDecodeError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"{directory}: cannot be read ({error}): the checkpoint is damaged. {_WAY_OUT}") from error
    return num_steps


def write_hf_directory(
    directory: Path,
    model: PreTrainedModel,
    masters: Mapping[str, Tensor],
    *,
    source: Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """A Hugging Face directory of these masters, with the configurations of the one that they started from.

    Tensors have the names and shapes that transformers' save_pretrained gives them.
    """
    unsharded = empty_model(copy.deepcopy(model.config))  # FSDP gives a model another class
    tensors = {**masters, **kept_buffers(model, unsharded, masters)}
    parts = [own_part(tensor) for tensor in tensors.values()]
    sent = {
        name: _Sent(shape=tensor.shape, dtype=tensor.dtype, part=part if is_first else None)
        for (name, tensor), part, is_first in zip(tensors.items(), parts, first_holders(parts), strict=True)
    }
    directory.mkdir(parents=True, exist_ok=True)
    disk_form, files, failures = _disk_form_of(unsharded), [], []
    for number, planned in enumerate(plan_shards(_entries(tensors), max_shard_bytes)):
        of_file = {tensor.name: sent[tensor.name] for tensor in planned.tensors}
        file, failure = _write_file(directory / planned.file_name, of_file, disk_form, number % _num_processes())
        files.append(file)
        failures += [] if failure is None else [failure]
    with _failing_together():
        if failures:
            raise failures[0]
        if _rank() == 0:
            save_configs(source, model.config, next(iter(masters.values())).dtype, directory)
            write_index(directory, files)


def kept_buffers(
    model: PreTrainedModel, unsharded: PreTrainedModel, masters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Buffers that files hold: nothing trains them, and the model is not whole without them."""
    names = {name for name, _ in unsharded.named_buffers()} & set(unsharded.state_dict())
    return {name: model.get_buffer(name) for name in sorted(names - set(masters))}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sent:
    """A whole tensor that processes send to one of them. `part` None: others send what this one has."""

    shape: torch.Size
    dtype: torch.dtype
    part: OwnPart | None

    def empty(self) -> Tensor:
        """The whole tensor without memory."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    def blocks(self, receiver: int) -> Iterator[Tensor]:
        """Blocks of its rows, whole on the receiver alone."""
        for start, stop in row_blocks(self.shape, self.dtype.itemsize):
            block = torch.zeros(block_shape(self.shape, start, stop), dtype=self.dtype, device=messages_device())
            if self.part is not None:
                self.part.give(start, block)
            if dist.is_initialized():  # each element is one process's: a sum of bits and zeros is exact, -0.0 included
                dist.reduce(block.view(_INTEGERS[self.dtype.itemsize]), dst=receiver)
            yield block


def _disk_form_of(unsharded: Any) -> DiskForm:
    mapping = get_model_conversion_mapping(unsharded, add_legacy=False)
    mapping = [entry for entry in mapping if not isinstance(entry, PrefixChange)]  # as save_pretrained has it
    if any(isinstance(entry, WeightConverter) and len(entry.target_patterns) > 1 for entry in mapping):
        mapping = []  # of several tensors together; transformers loads its own form as well
    if not mapping:
        return lambda name, tensor: {name: tensor}
    unsharded._weight_conversions = mapping
    return lambda name, tensor: revert_weight_conversion(unsharded, {name: tensor})


@torch.no_grad()
def _write_file(
    path: Path, tensors: Mapping[str, _Sent], disk_form: DiskForm, writer_rank: int
) -> tuple[Shard[TensorEntry], OSError | None]:
    """One file, by one process, from what all have of these tensors; why it could not be written."""
    whole = {name: tensor.empty() for name, tensor in tensors.items()}
    stored = {name: disk_form(name, empty) for name, empty in whole.items()}
    entries = _entries({name: piece for form in stored.values() for name, piece in form.items()})
    is_writer, failure = _rank() == writer_rank, None

    def pieces() -> Iterator[Tensor]:
        for name, tensor in tensors.items():
            blocks = tensor.blocks(writer_rank)
            if not is_writer or next(iter(stored[name].values())) is whole[name]:  # under another name at most
                yield from blocks
            else:
                yield from disk_form(name, torch.cat([block.cpu() for block in blocks])).values()

    received = pieces()
    try:
        if is_writer:
            with closing(TensorWriter(path, entries)) as writer:
                for piece in received:
                    writer.write(piece)
                writer.finish()
    except OSError as error:
        failure = error
    for _ in received:  # a process that does not write, or cannot, sends its part all the same
        pass
    return Shard(file_name=path.name, tensors=entries), failure


@contextmanager
def _failing_together() -> Iterator[None]:
    """An OSError of one process is raised in all, so that none waits for it."""
    failure: OSError | None = None
    try:
        yield
    except OSError as error:
        failure = error
    failures = [failure]
    if dist.is_initialized():
        failures = [None] * dist.get_world_size()
        dist.all_gather_object(failures, failure)
    if first := next((failure for failure in failures if failure is not None), None):
        raise first


@contextmanager
def _own_errors() -> Iterator[None]:
    """An error of some process as itself, in all: torch wraps it in what is not an Exception. No word on one alone."""
    with warnings.catch_warnings(action="ignore"):
        try:
            yield
        except CheckpointException as error:
            first, _ = next(iter(error.failures.values()))
            raise first from error


def _named(masters: Mapping[str, Tensor], moments: Moments) -> dict[str, Tensor]:
    assert set(masters) == set(moments), sorted(set(masters) ^ set(moments))[:NUM_NAMES_SHOWN]
    tensors = {name: master.detach() for name, master in masters.items()}
    for index, suffix in enumerate((FIRST_MOMENT, SECOND_MOMENT)):
        tensors |= {name + suffix: pair[index].detach() for name, pair in moments.items()}
    return tensors


def _check(directory: Path, metadata: Metadata, tensors: Mapping[str, Tensor]) -> None:
    """ValueError unless the files hold these names in these shapes, every element once."""
    found = metadata.state_dict_metadata
    missing, unexpected = sorted(set(tensors) - set(found)), sorted(set(found) - set(tensors))
    incomplete, others = [], []
    for name in sorted(set(tensors) & set(found)):
        entry = found[name]
        assert isinstance(entry, TensorStorageMetadata), type(entry)
        if tuple(entry.size) != tuple(tensors[name].shape):
            others.append(f"{name} {tuple(entry.size)} instead of {tuple(tensors[name].shape)}")
        elif sum(prod(chunk.sizes) for chunk in entry.chunks) != prod(entry.size):
            incomplete.append(name)
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": others}
    if parts := [f"{len(names)} {kind}: {_first_names(names)}" for kind, names in kinds.items() if names]:
        raise ValueError(
            f"{directory}: its tensors are not those of this run ({'; '.join(parts)}). Resume with the model of that "
            "run, or start anew with checkpointing.load_path=none."
        )
    if incomplete:
        raise ValueError(
            f"{directory}: holds not all of {_first_names(incomplete)}: a file is missing and the checkpoint damaged. "
            f"{_WAY_OUT}"
        )


def _entries(tensors: Mapping[str, Tensor]) -> tuple[TensorEntry, ...]:
    return tuple(entry_of(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items())


def _first_names(names: Collection[str]) -> str:
    return ", ".join(sorted(names)[:NUM_NAMES_SHOWN]) + ", ..." * (len(names) > NUM_NAMES_SHOWN)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _num_processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
