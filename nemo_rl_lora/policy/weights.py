"""What a policy offers to a generation engine: names, shapes, a digest, and tensors computed when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nemo_rl_lora.lora.files import adapter_tensor_name
from nemo_rl_lora.lora.merge import merged_weight
from nemo_rl_lora.lora.targets import AdaptedModule
from nemo_rl_lora.tensors import entry_of, tensors_digest, write_tensors
from nemo_rl_lora.types import SyncMode, TensorInfo, WeightsRef


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor that `compute` makes when it is read, and what it will look like."""

    info: TensorInfo
    compute: Callable[[], Tensor]


def cast_entry(name: str, tensor: Tensor, dtype: torch.dtype) -> LazyTensor:
    """A tensor that exists, cast when it is read."""
    info = TensorInfo(name=name, shape=tuple(tensor.shape), dtype=dtype)
    return LazyTensor(info, lambda: tensor.detach().to(dtype))


def merged_entry(
    module: AdaptedModule, tensors: Mapping[str, Tensor], weight_of: Callable[[str], Tensor], dtype: torch.dtype
) -> LazyTensor:
    """A weight with its adapter merged in, when it is read. `tensors` holds A and B, `weight_of` the base's weights."""
    name = f"{module.name}.weight"
    a, b = (tensors[adapter_tensor_name(module.name, side)] for side in "AB")

    def merge() -> Tensor:
        weight = weight_of(name).detach()
        return merged_weight(weight, a.to(weight.device), b.to(weight.device), module.scale)

    return LazyTensor(TensorInfo(name=name, shape=(module.out_features, module.in_features), dtype=dtype), merge)


class LazyTensors(Mapping[str, Tensor]):
    """Names to tensors, each computed at every read; nothing is kept."""

    def __init__(self, entries: Mapping[str, LazyTensor]) -> None:
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> Tensor:
        return self._entries[name].compute()

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def offer(
    version: int,
    mode: SyncMode,
    tensors: Mapping[str, Tensor],
    *,
    adapted: Sequence[AdaptedModule] | None,
    weight_of: Callable[[str], Tensor],
    dtype: torch.dtype,
) -> WeightsRef:
    """merged: `<module>.weight` in `dtype`, merged when read; adapter: A and B, which are `tensors`, in fp32.

    `adapted` None: there is no adapter, and `tensors`, every weight, are offered as merged.
    """
    if adapted is None:
        if mode == "adapter":
            raise ValueError(
                "policy.generation.lora_sync='adapter': there is no adapter to send. "
                "Enable LoRA, or set policy.generation.lora_sync=merged."
            )
        entries = {name: cast_entry(name, tensor, dtype) for name, tensor in tensors.items()}
    elif mode == "adapter":
        entries = {name: cast_entry(name, tensor, torch.float32) for name, tensor in tensors.items()}
    else:
        entries = {f"{m.name}.weight": merged_entry(m, tensors, weight_of, dtype) for m in adapted}
    return make_ref(version, mode, entries, tensors_digest(tensors, whole=adapted is not None))


def make_ref(version: int, mode: SyncMode, entries: Mapping[str, LazyTensor], digest: str) -> WeightsRef:
    """A reference within this process."""
    manifest = tuple(entry.info for entry in entries.values())
    return WeightsRef(
        version=version,
        mode=mode,
        manifest=manifest,
        digest=digest,
        num_bytes=sum(info.num_bytes for info in manifest),
        tensors=LazyTensors(entries),
    )


def write_ref(path: Path, ref: WeightsRef) -> None:
    """A safetensors file of what a reference within this process offers, one tensor in memory at a time."""
    assert ref.tensors is not None
    source, dtypes = ref.tensors, {info.name: info.dtype for info in ref.manifest}
    entries = [entry_of(info.name, info.shape, info.dtype) for info in ref.manifest]
    write_tensors(path, entries, lambda name: source[name].detach().to(dtypes[name]))
