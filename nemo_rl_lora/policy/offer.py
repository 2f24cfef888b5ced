"""What a policy offers to a generation engine: names, shapes, a digest, and tensors computed when asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from nemo_rl_lora.lora.adapter_tensors import AdapterTensors
from nemo_rl_lora.lora.targets import AdaptedModule
from nemo_rl_lora.tensors import LazyTensors, entry_of, tensors_digest, write_tensors
from nemo_rl_lora.types import SyncMode, TensorInfo, WeightsRef


class OfferedTensors(LazyTensors):
    """Keeps, in `handed`, the digest of each tensor as its last reader got it: whole for A and B."""

    def __init__(self, computations: Mapping[str, Callable[[], Tensor]], mode: SyncMode) -> None:
        super().__init__(computations)
        self._whole = mode == "adapter"
        self.handed: dict[str, str] = {}

    def __getitem__(self, name: str) -> Tensor:
        tensor = super().__getitem__(name)
        self.handed[name] = tensors_digest({name: tensor}, whole=self._whole)
        return tensor


def offer(
    version: int,
    mode: SyncMode,
    tensors: Mapping[str, Tensor],
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    adapted: Sequence[AdaptedModule] | None,
    weight_of: Callable[[str], Tensor],
    dtype: torch.dtype,
) -> WeightsRef:
    """merged: `<module>.weight` in `dtype`, merged when read; adapter: A and B, which are `tensors`, in fp32.

    `shapes`: of tensors that are gathered when they are read; None: they are there.
    `adapted` None: there is no adapter, and `tensors`, every weight, are offered as merged.
    """
    if adapted is None and mode == "adapter":
        raise ValueError(
            "policy.generation.lora_sync='adapter': there is no adapter to send. "
            "Enable LoRA, or set policy.generation.lora_sync=merged."
        )
    computations: dict[str, Callable[[], Tensor]]
    if adapted is None or mode == "adapter":
        dtype = torch.float32 if mode == "adapter" else dtype
        shapes = shapes or {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        computations = {name: partial(_cast, tensors, name, dtype) for name in tensors}
    else:
        shapes = {f"{module.name}.weight": (module.out_features, module.in_features) for module in adapted}
        computations = {f"{module.name}.weight": partial(_merged, module, tensors, weight_of) for module in adapted}
    manifest = tuple(TensorInfo(name=name, shape=shape, dtype=dtype) for name, shape in shapes.items())
    offered = OfferedTensors(computations, mode)
    return WeightsRef(
        version=version,
        mode=mode,
        manifest=manifest,
        digest=tensors_digest(tensors, whole=adapted is not None),
        num_bytes=sum(info.num_bytes for info in manifest),
        tensors=offered,
        handed=offered.handed,
    )


def _cast(tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype) -> Tensor:
    return tensors[name].detach().to(dtype)


def _merged(module: AdaptedModule, tensors: Mapping[str, Tensor], weight_of: Callable[[str], Tensor]) -> Tensor:
    adapter = AdapterTensors.of(module.name, module.scale, tensors)
    return adapter.merged(weight_of(f"{module.name}.weight").detach())


def write_ref(path: Path, ref: WeightsRef) -> None:
    """A safetensors file of what a reference within this process offers, one tensor in memory at a time."""
    assert ref.tensors is not None
    source, dtypes = ref.tensors, {info.name: info.dtype for info in ref.manifest}
    entries = [entry_of(info.name, info.shape, info.dtype) for info in ref.manifest]
    write_tensors(path, entries, lambda name: source[name].detach().to(dtypes[name]))
