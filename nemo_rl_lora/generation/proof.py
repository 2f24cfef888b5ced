"""What makes a sync a proof: every tensor's bytes, and what the engine's own kernels compute from them.

Contract: a `Push` is read one tensor at a time, and notes of each what an engine has to show of it. An engine reports
the digest of each tensor from the bytes that it received or holds, and a few columns of each weight as its kernels see
them (a product with one-hot rows is exact, so packing, fusing and scaling are all seen through). `Witness` compares
these columns with those of the version that was sent, of the version before it and of the base, and names what differs.
Both engines are asked.
What this does not see: arithmetic outside the probed weights; `gen_kl_error` measures that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from torch import Tensor

from nemo_rl_lora.tensors import LazyTensors, stored_tensors, tensors_digest
from nemo_rl_lora.types import SyncMode, TensorInfo, WeightsRef

PROBE_COLUMNS = 8
NAMED_AT_MOST = 5
_EXPLAINED = 0.5  # a multiple of the update is named where it leaves less than this share of what is shown
_OTHER_FACTOR = 0.05  # away from 1: nearer than that, rounding to bfloat16 may be all that differs
_EXACT = 1e-6  # relative: one-hot products round nothing, so this only forgives the sign of zero

Columns = Mapping[str, Tensor]  # tensor name -> [rows, probed columns], as an engine holds them
Verdict = Literal["confirmed", "undecided"]


class SyncMismatch(RuntimeError):  # noqa: N818
    """The engine does not serve what it was sent. No rollout may be used."""


class Incoming(LazyTensors):
    """The tensors of a sync by name, each made when it is read and kept by nobody here: who holds them in turn needs
    memory for one."""

    def __init__(self, computations: Mapping[str, Callable[[], Tensor]]) -> None:
        super().__init__(computations)
        self._unread = dict.fromkeys(computations)

    def __getitem__(self, name: str) -> Tensor:
        self._unread.pop(name, None)
        return super().__getitem__(name)

    def read_rest(self) -> None:
        """Make what nobody has read, so that it is known to be missing."""
        for name in list(self._unread):
            self[name]


class Push(Incoming):
    """What a ref offers. Of each tensor that was read, `digests` has the digest of the policy's side, and `columns`
    what an engine has to show, as `shown` makes it. ValueError where a tensor is not what the manifest says."""

    def __init__(self, ref: WeightsRef, shown: Callable[[str, Tensor], Mapping[str, Tensor]]) -> None:
        if ref.tensors is None:
            raise ValueError(f"weights of version {ref.version}: no tensors of this process to read.")
        super().__init__({info.name: partial(self._read, ref.tensors, info) for info in ref.manifest})
        self.ref, self._shown = ref, shown
        self.digests: dict[str, str] = {}
        self.columns: dict[str, Tensor] = {}

    @torch.no_grad()
    def _read(self, tensors: Mapping[str, Tensor], info: TensorInfo) -> Tensor:
        tensor = tensors[info.name].detach()
        if (tuple(tensor.shape), tensor.dtype) != (tuple(info.shape), info.dtype):
            raise ValueError(
                f"weights of version {self.ref.version}: {info.name!r} has shape {tuple(tensor.shape)} and "
                f"{tensor.dtype}, not {tuple(info.shape)} and {info.dtype} as announced."
            )
        self.digests[info.name] = self.ref.handed[info.name]
        self.columns |= self._shown(info.name, tensor)
        return tensor


def require_received(version: int, sent: Mapping[str, str], received: Sequence[Mapping[str, str]]) -> None:
    """SyncMismatch unless the digests of each of the engine's ranks are those of what was sent."""
    for rank, digests in enumerate(received):
        require_bytes(version, sent, digests, _whose(rank, received))


def require_bytes(version: int, sent: Mapping[str, str], found: Mapping[str, str], whose: str = "the engine") -> None:
    """SyncMismatch unless these digests are those of what was sent."""
    if wrong := [name for name, digest in sent.items() if found.get(name) != digest]:
        raise SyncMismatch(
            f"weights of version {version}: {whose} received other bytes in {len(wrong)} of {len(sent)} tensors: "
            f"{_some(wrong)}. No rollout was used."
        )


def digests_of(tensors: Mapping[str, Tensor], mode: SyncMode) -> dict[str, str]:
    """The digest of each tensor (tensors.py): of every byte of A and B, of the sampled pages of merged weights."""
    return {name: tensors_digest({name: tensor}, whole=mode == "adapter") for name, tensor in tensors.items()}


def probed_columns(name: str, num_columns: int, num_ranks: int = 1) -> list[int]:
    """The columns of a matrix that are probed, ascending: always the same ones, elsewhere in each block of the model,
    and alike in the projections that an engine may fuse. With several ranks as many in each rank's share of the
    columns, at least one: an engine may split a matrix by its columns."""
    parts = num_ranks if num_columns % num_ranks == 0 and not name.endswith(".lora_B.weight") else 1
    share = num_columns // parts
    width = min(max(1, PROBE_COLUMNS // parts), share)
    block = name.rsplit(".", 2)[0]
    start = int.from_bytes(hashlib.blake2b(block.encode(), digest_size=4).digest(), "big") % (share - width + 1)
    return [part * share + start + i for part in range(parts) for i in range(width)]


@cache
def one_hot(columns: tuple[int, ...], width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[PROBE_COLUMNS, width] or more rows: a product with it shows these columns, unrounded, one a row; what is left of
    its rows is zero."""
    x = torch.zeros(max(PROBE_COLUMNS, len(columns)), width, dtype=dtype, device=device)
    x[range(len(columns)), columns] = 1
    return x


def columns_of(name: str, tensor: Tensor, dtype: torch.dtype, num_ranks: int = 1) -> Tensor:
    """What a probe of this tensor must show on an engine of this dtype: a copy, since the policy goes on training. A
    vector counts as one column."""
    columns = tensor[:, None] if tensor.dim() == 1 else tensor[:, probed_columns(name, tensor.shape[1], num_ranks)]
    return columns.detach().to("cpu", dtype, copy=True)


@dataclass(frozen=True, slots=True)
class Shown:
    """What one rank of an engine shows of a tensor: these rows of the whole one, and these of its probed columns."""

    values: Tensor
    rows: tuple[int, int]
    columns: tuple[int, int]

    @classmethod
    def whole(cls, values: Tensor) -> Shown:
        """All of a tensor's probed columns, where one process has it all."""
        return cls(values, (0, values.shape[0]), (0, values.shape[1]))

    def of(self, whole: Tensor) -> Tensor:
        """The same part of the tensor's probed columns."""
        return whole[slice(*self.rows), slice(*self.columns)]


RankShown = Mapping[str, Shown]  # by a tensor's name


def base_columns(model_path: Path, dtype: torch.dtype, num_ranks: int = 1) -> dict[str, Tensor]:
    """The probed columns of every weight in a Hugging Face directory."""
    stored = stored_tensors(model_path)
    found: dict[str, Tensor] = {}
    for path in sorted({tensor.path for tensor in stored.values()}):
        with safe_open(path, framework="pt") as file:
            for name, tensor in stored.items():
                if tensor.path != path or len(tensor.shape) not in (1, 2):
                    continue
                part = file.get_slice(name)
                if len(tensor.shape) == 2:
                    probed = probed_columns(name, tensor.shape[1], num_ranks)
                    rows = part[:, probed[0] : probed[-1] + 1][:, [index - probed[0] for index in probed]]
                else:
                    rows = part[:][:, None]
                found[name] = rows.to(dtype)
    return found


class Witness:
    """Knows, apart from the engine, what the engine has to show: now, one version ago, and without any adapter."""

    def __init__(self, base: Columns) -> None:
        self._base = base
        self._version: int | None = None
        self._is_proven = False
        self._told_apart: bool | None = None  # found at the first judgement of a version
        self._current: Columns = {}
        self._previous: Columns = {}

    def expect(self, version: int, columns: Columns) -> None:
        """From now on the engine has to show these. A version that is sent again has the same one before it."""
        if self._is_proven and version != self._version:
            self._previous = self._current
        self._version, self._current, self._is_proven, self._told_apart = version, columns, False, None

    def judge_base(self, served: Sequence[RankShown]) -> None:
        """SyncMismatch unless an engine that has just started shows the base, in every tensor that each rank has."""
        for rank, shown in enumerate(served):
            if wrong := [name for name, one in shown.items() if not _same(one.values, one.of(self._base[name]))]:
                raise SyncMismatch(
                    f"{_whose(rank, served, base=True)} is not the policy's: {len(wrong)} of {len(shown)} tensors "
                    f"differ, {_some(wrong)}. No rollout was used."
                )

    def judge(self, served: Sequence[RankShown]) -> Verdict:
        """Whether the probes of all ranks confirm the version. SyncMismatch where one shows anything else.

        `undecided`: they agree, but the version shows no other number than the one before it or the base does.
        """
        self._require_whole(served)
        for rank, shown in enumerate(served):
            wrong = {
                name: self._what_it_is(name, shown[name])
                for name in self._current.keys() & shown.keys()
                if not _same(shown[name].values, shown[name].of(self._current[name]))
            }
            if wrong:
                raise SyncMismatch(self._report({n: wrong[n] for n in self._current if n in wrong}, rank, served))
        self._is_proven = True
        if self._told_apart is None:
            self._told_apart = self._tell_apart()
        return "confirmed" if self._told_apart else "undecided"

    def _tell_apart(self) -> bool:
        """Whether the version shows other numbers than the one before it, and than the base."""
        others = [other for other in (self._previous, self._base_of(self._current)) if other]
        told_apart = all(
            any(not _same(columns, other[name]) for name, columns in self._current.items() if name in other)
            for other in others
        )
        return bool(others) and told_apart

    def _require_whole(self, served: Sequence[RankShown]) -> None:
        """Together the ranks have to show every number that is expected."""
        for name, columns in self._current.items():
            parts = {(shown[name].rows, shown[name].columns) for shown in served if name in shown}
            sizes = [(rows[1] - rows[0]) * (across[1] - across[0]) for rows, across in parts]
            assert sum(sizes) == columns.numel(), (name, parts, tuple(columns.shape))

    def _base_of(self, names: Columns) -> Columns:
        """The base's columns; of an adapter's A there are none, and its B is nothing on the base."""
        found = {name: self._base[name] for name in names if name in self._base}
        return found | {name: torch.zeros_like(c) for name, c in names.items() if name.endswith(".lora_B.weight")}

    def _what_it_is(self, name: str, shown: Shown) -> str:
        """A few words for a tensor that is not as sent: what it is nearest to."""
        whole = self._base_of({name: self._current[name]}).get(name)
        sent, base = shown.of(self._current[name]).double(), None if whole is None else shown.of(whole)
        served = shown.values.double()
        if served.shape != sent.shape or not bool(served.isfinite().all()):
            return f"of shape {tuple(served.shape)} or not finite"
        if name in self._previous and _same(served, shown.of(self._previous[name]).double()):
            return "as the version before had it"
        if base is None:
            return "unlike any version"
        base = base.double()
        if _same(served, base):
            return "as the base has it"
        update, difference = sent - base, served - base
        size = update.square().sum()
        if size == 0:
            return "changed, and no update of it was sent"
        factor = float((difference * update).sum() / size)  # least squares: factor x update
        unexplained = float((difference - factor * update).norm())
        if unexplained < _EXPLAINED * float(difference.norm()) and abs(factor - 1) > _OTHER_FACTOR:
            return f"with an update {factor:.2f} times the one sent"
        return "unlike any version"

    def _report(self, wrong: Mapping[str, str], rank: int, served: Sequence[RankShown]) -> str:
        named = "; ".join(f"{name} is {what}" for name, what in list(wrong.items())[:NAMED_AT_MOST])
        return (
            f"weights of version {self._version}: {_whose(rank, served)}'s kernels show something else in {len(wrong)} "
            f"of {len(self._current.keys() & served[rank].keys())} probed tensors: {named}. No rollout was used."
        )


def _whose(rank: int, ranks: Sequence[object], *, base: bool = False) -> str:
    """The engine, or one of its ranks, as an error names it."""
    one = f"rank {rank} of " if len(ranks) > 1 else ""
    return f"the base of {one}the engine" if base and one else "the engine's base" if base else f"{one}the engine"


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    if one.dtype == other.dtype and torch.equal(one, other):
        return True  # nearly always, and much the quickest to see
    one, other = one.double(), other.double()
    if torch.allclose(one, other, rtol=0, atol=0, equal_nan=True):  # a weight that is not finite arrives as any other
        return True
    return bool((one - other).norm() <= _EXACT * other.norm())


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED_AT_MOST} more" if len(names) > NAMED_AT_MOST else ""
    return ", ".join(names[:NAMED_AT_MOST]) + more
