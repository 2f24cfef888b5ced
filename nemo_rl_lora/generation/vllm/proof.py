"""What makes a sync a proof: every tensor's bytes, and what the engine's own kernels compute from them.

Contract: a `Push` is a ref read once and checked before an engine is touched. An engine reports the digest of each
tensor from the bytes that it received, and a few columns of each weight as its kernels see them (a product with
one-hot rows is exact, so packing, fusing and scaling are all seen through). `Witness` compares these columns with those
of the version that was sent, of the version before it and of the base, and names what differs. Any engine can be asked.
What this does not see: arithmetic outside the probed weights; `gen_kl_error` measures that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from torch import Tensor

from nemo_rl_lora.tensors import stored_tensors, tensors_digest
from nemo_rl_lora.types import SyncMode, WeightsRef

PROBE_COLUMNS = 8
NAMED_AT_MOST = 5
_EXPLAINED = 0.5  # a multiple of the update is named where it leaves less than this share of what is shown
_OTHER_FACTOR = 0.05  # away from 1: nearer than that, rounding to bfloat16 may be all that differs
_EXACT = 1e-6  # relative: one-hot products round nothing, so this only forgives the sign of zero

Columns = Mapping[str, Tensor]  # tensor name -> [rows, at most PROBE_COLUMNS], as the engine holds them
Verdict = Literal["confirmed", "undecided"]


class SyncMismatch(RuntimeError):  # noqa: N818
    """The engine does not serve what it was sent. No rollout may be used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Push:
    """Everything that a ref offers, read once. `digests` are those of the policy's side."""

    version: int
    mode: SyncMode
    tensors: Mapping[str, Tensor]
    digests: Mapping[str, str]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def require_received(self, received: Mapping[str, str]) -> None:
        """SyncMismatch unless the engine's digests are those of what was sent."""
        if wrong := [name for name, digest in self.digests.items() if received.get(name) != digest]:
            raise SyncMismatch(
                f"weights of version {self.version}: the engine received other bytes in {len(wrong)} of "
                f"{len(self.digests)} tensors: {_some(wrong)}. No rollout was used."
            )


@torch.no_grad()
def read_push(ref: WeightsRef) -> Push:
    """Read every tensor of a ref. ValueError where one is not what the manifest says."""
    if ref.tensors is None:
        raise ValueError(f"weights of version {ref.version}: no tensors of this process to read, and no engine asked.")
    tensors: dict[str, Tensor] = {}
    for info in ref.manifest:
        tensor = ref.tensors[info.name].detach()
        if (tuple(tensor.shape), tensor.dtype) != (tuple(info.shape), info.dtype):
            raise ValueError(
                f"weights of version {ref.version}: {info.name!r} has shape {tuple(tensor.shape)} and {tensor.dtype}, "
                f"not {tuple(info.shape)} and {info.dtype} as announced. The engine keeps its version."
            )
        tensors[info.name] = tensor
    return Push(version=ref.version, mode=ref.mode, tensors=tensors, digests=digests_of(tensors, ref.mode))


def digests_of(tensors: Mapping[str, Tensor], mode: SyncMode) -> dict[str, str]:
    """The digest of each tensor (tensors.py): of every byte of A and B, of the sampled pages of merged weights."""
    return {name: tensors_digest({name: tensor}, whole=mode == "adapter") for name, tensor in tensors.items()}


def probed_span(name: str, num_columns: int) -> slice:
    """The columns of a matrix that are probed: always the same ones, elsewhere in each block of the model, and alike in
    the projections that an engine may fuse."""
    width = min(PROBE_COLUMNS, num_columns)
    block = name.rsplit(".", 2)[0]
    start = int.from_bytes(hashlib.blake2b(block.encode(), digest_size=4).digest(), "big") % (num_columns - width + 1)
    return slice(start, start + width)


def columns_of(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """What a probe of this tensor must show on an engine of this dtype: a copy, since the policy goes on training. A
    vector counts as one column."""
    columns = tensor[:, None] if tensor.dim() == 1 else tensor[:, probed_span(name, tensor.shape[1])]
    return columns.detach().to("cpu", dtype, copy=True)


def base_columns(model_path: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """The probed columns of every weight in a Hugging Face directory."""
    stored = stored_tensors(model_path)
    found: dict[str, Tensor] = {}
    for path in sorted({tensor.path for tensor in stored.values()}):
        with safe_open(path, framework="pt") as file:
            for name, tensor in stored.items():
                if tensor.path != path or len(tensor.shape) not in (1, 2):
                    continue
                part = file.get_slice(name)
                span = probed_span(name, tensor.shape[1]) if len(tensor.shape) == 2 else None
                rows = part[:, span] if span is not None else part[:][:, None]
                found[name] = rows.to(dtype)
    return found


class Witness:
    """Knows, apart from the engine, what the engine has to show: now, one version ago, and without any adapter."""

    def __init__(self, base: Columns) -> None:
        self._base = base
        self._version: int | None = None
        self._is_proven = False
        self._current: Columns = {}
        self._previous: Columns = {}

    def expect(self, version: int, columns: Columns) -> None:
        """From now on the engine has to show these."""
        if self._is_proven:
            self._previous = self._current
        self._version, self._current, self._is_proven = version, columns, False

    def judge_base(self, served: Columns) -> None:
        """SyncMismatch unless an engine that has just started shows the base, in every tensor that it has."""
        if wrong := [name for name, columns in served.items() if not _same(columns, self._base[name])]:
            raise SyncMismatch(
                f"the engine's base is not the policy's: {len(wrong)} of {len(served)} tensors differ, "
                f"{_some(wrong)}. No rollout was used."
            )

    def judge(self, served: Columns) -> Verdict:
        """Whether the probes confirm the version. SyncMismatch where the engine shows anything else.

        `undecided`: they agree, but the version shows no other number than the one before it or the base does.
        """
        missing = [name for name in self._current if name not in served]
        assert not missing, missing[:NAMED_AT_MOST]
        wrong = {
            name: self._what_it_is(name, served[name])
            for name, columns in self._current.items()
            if not _same(served[name], columns)
        }
        if wrong:
            raise SyncMismatch(self._report(wrong))
        self._is_proven = True
        others = [other for other in (self._previous, self._base_of(self._current)) if other]
        told_apart = all(
            any(not _same(columns, other[name]) for name, columns in self._current.items() if name in other)
            for other in others
        )
        return "confirmed" if others and told_apart else "undecided"

    def _base_of(self, names: Columns) -> Columns:
        """The base's columns; of an adapter's A there are none, and its B is nothing on the base."""
        found = {name: self._base[name] for name in names if name in self._base}
        return found | {name: torch.zeros_like(c) for name, c in names.items() if name.endswith(".lora_B.weight")}

    def _what_it_is(self, name: str, served: Tensor) -> str:
        """A few words for a tensor that is not as sent: what it is nearest to."""
        sent, base = self._current[name].double(), self._base_of({name: self._current[name]}).get(name)
        served = served.double()
        if served.shape != sent.shape or not bool(served.isfinite().all()):
            return f"of shape {tuple(served.shape)} or not finite"
        if name in self._previous and _same(served, self._previous[name].double()):
            return "as the version before had it"
        if base is None:
            return "unlike any version"
        base = base.double()
        if _same(served, base):
            return "as the base has it"
        update, shown = sent - base, served - base
        size = update.square().sum()
        factor = float((shown * update).sum() / size) if size > 0 else 0.0  # least squares: shown is factor x update
        unexplained = float((shown - factor * update).norm())
        if unexplained < _EXPLAINED * float(shown.norm()) and abs(factor - 1) > _OTHER_FACTOR:
            return f"with an update {factor:.2f} times the one sent"
        return "unlike any version"

    def _report(self, wrong: Mapping[str, str]) -> str:
        named = "; ".join(f"{name} is {what}" for name, what in list(wrong.items())[:NAMED_AT_MOST])
        return (
            f"weights of version {self._version}: the engine's kernels show something else in {len(wrong)} of "
            f"{len(self._current)} probed tensors: {named}. No rollout was used."
        )


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    difference = (one.double() - other.double()).norm()
    return bool(difference <= _EXACT * other.double().norm())


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED_AT_MOST} more" if len(names) > NAMED_AT_MOST else ""
    return ", ".join(names[:NAMED_AT_MOST]) + more
