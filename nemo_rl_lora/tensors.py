"""Tensors as bytes: names of dtypes, digests, and safetensors files, read and written a block at a time.

Contract: memory is that of a block, whatever a tensor's size. Files are read, not mapped, so that what was read does
not stay resident. What a file written holds depends on its tensors alone. Importing this imports no torch.

One rule says which bytes of a tensor a digest covers: all of them up to 64 KiB (16 pages of 4 KiB); of a larger tensor
16 pages of consecutive bytes, evenly spread from its first byte to its last, or all of them where the caller asks for
the `whole`, as for an adapter's A and B. A page has every byte of at least 511 neighbouring elements; those that its
edges cut count as outside. A tensor in memory and in a file has one digest, whatever its strides.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
METADATA = "__metadata__"
LENGTH_BYTES = 8
MAX_SHARD_BYTES = 5 * 10**9  # of a weights file, where nobody says otherwise
BLOCK_ELEMENTS = 1 << 20  # fp32 copies of it stay in a processor's cache
PAGE_BYTES = 4096
NUM_PAGES = 16
_CHUNK_BYTES = 1 << 22  # that are read at once for a digest
_MAX_HEADER_BYTES = 100 * 10**6  # the format's own limit
_WAY_OUT = "Copy or download it again."


class Dtype(NamedTuple):
    """What a dtype is called in safetensors files, and the size of an element."""

    stored: str
    num_bytes: int


DTYPES = {
    "float32": Dtype("F32", 4),
    "bfloat16": Dtype("BF16", 2),
    "float16": Dtype("F16", 2),
    "float64": Dtype("F64", 8),
    "float8_e4m3fn": Dtype("F8_E4M3", 1),
    "float8_e5m2": Dtype("F8_E5M2", 1),
    "complex64": Dtype("C64", 8),
    "int64": Dtype("I64", 8),
    "int32": Dtype("I32", 4),
    "int16": Dtype("I16", 2),
    "int8": Dtype("I8", 1),
    "uint64": Dtype("U64", 8),
    "uint32": Dtype("U32", 4),
    "uint16": Dtype("U16", 2),
    "uint8": Dtype("U8", 1),
    "bool": Dtype("BOOL", 1),
}
"""By torch's names. Files may hold others, which are copied as bytes."""

COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
"""In which models and adapters compute, by the names that configurations use."""

MERGEABLE = ("BF16", "F16", "F32", "F64")
"""In which a stored tensor can be merged or cast."""


@cache
def torch_dtype(name: str) -> torch.dtype:
    """The dtype of torch's own or safetensors' name."""
    import torch

    own = next((own for own, dtype in DTYPES.items() if dtype.stored == name), name)
    assert own in DTYPES, name
    return getattr(torch, own)


def stored_dtype(dtype: torch.dtype) -> Dtype:
    """What a dtype is in a safetensors file."""
    return DTYPES[str(dtype).removeprefix("torch.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """A tensor as a safetensors header says it."""

    name: str
    dtype: str  # safetensors' own name: BF16, F32, ...
    shape: tuple[int, ...]
    num_bytes: int

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_rows(self) -> int:
        """Of the tensor as a matrix: its first axis, and all others."""
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        return self.num_bytes // max(self.num_rows, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor(TensorEntry):
    """A tensor in a safetensors file."""

    path: Path
    offset: int  # of its first byte in the file


def entry_of(name: str, shape: Sequence[int], dtype: torch.dtype) -> TensorEntry:
    """A tensor of torch, to be written."""
    stored = stored_dtype(dtype)
    num_bytes = math.prod(shape) * stored.num_bytes
    return TensorEntry(name=name, dtype=stored.stored, shape=tuple(shape), num_bytes=num_bytes)


class LazyTensors(Mapping[str, "Tensor"]):
    """Names to tensors, each computed at every read; nothing is kept."""

    def __init__(self, computations: Mapping[str, Callable[[], Tensor]]) -> None:
        self._computations = dict(computations)

    def __getitem__(self, name: str) -> Tensor:
        return self._computations[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._computations

    def __iter__(self) -> Iterator[str]:
        return iter(self._computations)

    def __len__(self) -> int:
        return len(self._computations)


def cpu_multiplies_bfloat16() -> bool:
    """Whether PyTorch has fast products of bfloat16 matrices on this processor."""
    import torch

    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def tensors_digest(tensors: Mapping[str, Tensor | StoredTensor], *, whole: bool = False) -> str:
    """SHA-256 over sorted names, shapes, dtypes and bytes; of which bytes, the rule above says.

    Empty for tensors of the meta device, whose bytes another process has. Every tensor is read even then.
    """
    digest, elsewhere = hashlib.sha256(), False
    with TensorReader() as reader:
        for name in sorted(tensors):
            tensor = tensors[name]
            if isinstance(tensor, StoredTensor):
                entry, read = tensor, partial(_stored_spans, reader, tensor)
            elif tensor.is_meta:
                elsewhere = True
                continue
            else:
                entry, read = entry_of(name, tensor.shape, tensor.dtype), partial(_spans, tensor)
            digest.update(f"{name} {list(entry.shape)} {entry.dtype}\n".encode())
            for block in read(digested_spans(entry.num_bytes, whole=whole)):
                digest.update(block)
    return "" if elsewhere else digest.hexdigest()


def combined_digest(digests: Mapping[str, str]) -> str:
    """SHA-256 over the digests of tensors by their names."""
    return hashlib.sha256("".join(f"{name} {digests[name]}\n" for name in sorted(digests)).encode()).hexdigest()


def digested_spans(num_bytes: int, *, whole: bool) -> list[tuple[int, int]]:
    """(start, stop) of the bytes of a tensor that its digest covers."""
    if whole or num_bytes <= NUM_PAGES * PAGE_BYTES:
        return [(start, min(start + _CHUNK_BYTES, num_bytes)) for start in range(0, num_bytes, _CHUNK_BYTES)]
    starts = [(num_bytes - PAGE_BYTES) * page // (NUM_PAGES - 1) for page in range(NUM_PAGES)]
    return [(start, start + PAGE_BYTES) for start in starts]


def _stored_spans(reader: TensorReader, tensor: StoredTensor, spans: Sequence[tuple[int, int]]) -> Iterator[memoryview]:
    return (reader.read_bytes(tensor, start, stop) for start, stop in spans)


def _spans(tensor: Tensor, spans: Sequence[tuple[int, int]]) -> Iterator[memoryview]:
    """These bytes of a tensor. From a GPU pages come together, in one copy that is waited for once."""
    import torch

    data = _flat_bytes(tensor)
    parts = [data[start:stop] for start, stop in spans]
    if not data.is_cpu and all(stop - start == PAGE_BYTES for start, stop in spans):
        parts = [torch.cat(parts)] if parts else []
    return (part.cpu().numpy().data for part in parts)


def _flat_bytes(tensor: Tensor) -> Tensor:
    import torch

    return tensor.detach().contiguous().flatten().view(torch.uint8)


def file_digest(*paths: Path) -> str:
    """SHA-256 of the bytes of files, one after the other, read a block at a time."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def weight_files(directory: Path) -> list[str]:
    """Names of the safetensors files of a directory's model, whether or not each is there; none without safetensors.

    ValueError where the index cannot be read.
    """
    if (directory / SINGLE_FILE).is_file():
        return [SINGLE_FILE]
    return sorted(set(_weight_map(directory).values()))


def _weight_map(directory: Path) -> Mapping[str, str]:
    index = directory / INDEX_FILE
    if not index.is_file():
        return {}
    try:
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index}: cannot be read ({error}). {_WAY_OUT}") from error


def stored_tensors(directory: Path, *, partial: bool = False) -> dict[str, StoredTensor]:
    """Every tensor of the directory's model, in the order of the files and of their bytes; empty without safetensors.

    ValueError where a file is missing (with `partial` it is passed over) or not whole, or where two hold one tensor.
    """
    files = weight_files(directory)
    if partial:
        files = [name for name in files if (directory / name).is_file()]
    found: dict[str, StoredTensor] = {}
    for name in files:
        tensors = file_tensors(directory / name)
        if twice := sorted(found.keys() & tensors.keys()):
            where = f"{found[twice[0]].path.name} and {name} both hold {twice[0]}"
            raise ValueError(f"{directory / INDEX_FILE}: {where}. Keep one of them.")
        found |= tensors
    weight_map = {} if files == [SINGLE_FILE] else _weight_map(directory)
    if absent := sorted(name for name in set(weight_map) - set(found) if weight_map[name] in files):
        where = f"names {absent[0]}, which {weight_map[absent[0]]} does not hold"
        raise ValueError(f"{directory / INDEX_FILE}: {where}. {_WAY_OUT}")
    return found


def absent_tensors(directory: Path) -> list[str]:
    """The tensors that an index places in files that are not there."""
    if (directory / SINGLE_FILE).is_file():
        return []
    return [name for name, file in _weight_map(directory).items() if not (directory / file).is_file()]


def file_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, in the order of their bytes. ValueError where it is missing or not whole."""
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(LENGTH_BYTES), "little")
            if header_bytes > _MAX_HEADER_BYTES:
                raise ValueError("it does not begin with a header")
            header: dict[str, Any] = json.loads(file.read(header_bytes))
        header.pop(METADATA, None)
        start = LENGTH_BYTES + header_bytes
        tensors = [_stored(path, name, entry, start) for name, entry in header.items()]
    except FileNotFoundError:
        raise ValueError(f"{path}: is missing. {_WAY_OUT}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: cannot be read as safetensors ({error}). {_WAY_OUT}") from error
    expected = max((tensor.offset + tensor.num_bytes for tensor in tensors), default=start)
    if (size := path.stat().st_size) != expected:
        raise ValueError(f"{path}: has {size:,} bytes instead of {expected:,}. {_WAY_OUT}")
    return {tensor.name: tensor for tensor in sorted(tensors, key=lambda tensor: tensor.offset)}


def _stored(path: Path, name: str, entry: Mapping[str, Any], start: int) -> StoredTensor:
    first, end = entry["data_offsets"]
    return StoredTensor(
        name=name,
        path=path,
        dtype=entry["dtype"],
        shape=tuple(entry["shape"]),
        offset=start + first,
        num_bytes=end - first,
    )


class TensorReader(AbstractContextManager["TensorReader"]):
    """Reads stored tensors by rows or by bytes, valid until the next read by the same reader, or whole, to be kept."""

    def __init__(self) -> None:
        self._files: dict[Path, IO[bytes]] = {}
        self._buffer = bytearray()

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def read_bytes(self, tensor: StoredTensor, start: int, stop: int) -> memoryview:
        """Bytes [start, stop) of a tensor."""
        if len(self._buffer) < stop - start:
            self._buffer = bytearray(stop - start)
        view = memoryview(self._buffer)[: stop - start]
        self._fill(view, tensor, start)
        return view

    def read_tensor(self, tensor: StoredTensor) -> Tensor:
        """All of a tensor, in memory of its own."""
        import torch

        whole = torch.empty(tensor.shape, dtype=torch_dtype(tensor.dtype))
        self._fill(_flat_bytes(whole).numpy().data, tensor, 0)
        return whole

    def _fill(self, view: memoryview, tensor: StoredTensor, start: int) -> None:
        """The bytes of a tensor from `start` on, as many as the view has."""
        if tensor.path not in self._files:
            self._files[tensor.path] = tensor.path.open("rb", buffering=0)
        num_read = 0
        while num_read < len(view):
            got = os.preadv(self._files[tensor.path].fileno(), [view[num_read:]], tensor.offset + start + num_read)
            if got == 0:
                raise OSError(f"{tensor.path} ended within {tensor.name}: it changed while it was read")
            num_read += got

    def read_block(self, tensor: StoredTensor, start: int, stop: int) -> memoryview:
        """The bytes of rows [start, stop) of a tensor."""
        return self.read_bytes(tensor, start * tensor.row_bytes, stop * tensor.row_bytes)

    def read_rows(self, tensor: StoredTensor, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor of a mergeable dtype, [rows, elements of a row]."""
        import torch

        block = self.read_block(tensor, start, stop)
        return torch.frombuffer(block, dtype=torch_dtype(tensor.dtype)).view(stop - start, -1)


def row_blocks(tensor: TensorEntry) -> Iterator[tuple[int, int]]:
    """(start, stop) of blocks of a tensor's rows: of BLOCK_ELEMENTS, or a row where that is longer."""
    width = tensor.num_elements // max(tensor.num_rows, 1)
    step = max(1, BLOCK_ELEMENTS // max(width, 1))
    return ((start, min(start + step, tensor.num_rows)) for start in range(0, tensor.num_rows, step))


EntryT = TypeVar("EntryT", bound=TensorEntry)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard(Generic[EntryT]):
    """A safetensors file to write: its name, and its tensors in their order."""

    file_name: str
    tensors: tuple[EntryT, ...]

    @property
    def num_bytes(self) -> int:
        return len(_header(self.tensors)) + sum(tensor.num_bytes for tensor in self.tensors)


def plan_shards(tensors: Iterable[EntryT], max_shard_bytes: int = MAX_SHARD_BYTES) -> tuple[Shard[EntryT], ...]:
    """Tensors in their order, as many to a file as fit; one that is larger has a file of its own."""
    groups: list[list[EntryT]] = [[]]
    used = 0
    for tensor in tensors:
        if groups[-1] and used + tensor.num_bytes > max_shard_bytes:
            groups.append([])
            used = 0
        groups[-1].append(tensor)
        used += tensor.num_bytes
    return tuple(
        Shard(
            file_name=SINGLE_FILE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors",
            # wide elements first: then every tensor begins at a multiple of its element's size
            tensors=tuple(sorted(group, key=lambda t: -(t.num_bytes // max(t.num_elements, 1)))),
        )
        for number, group in enumerate(groups, start=1)
    )


def write_index(directory: Path, shards: Sequence[Shard[Any]]) -> None:
    """model.safetensors.index.json, where there are several files."""
    if len(shards) == 1:
        return
    total = sum(tensor.num_bytes for shard in shards for tensor in shard.tensors)
    weight_map = {tensor.name: shard.file_name for shard in shards for tensor in shard.tensors}
    document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX_FILE).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def write_tensors(path: Path, tensors: Sequence[TensorEntry], tensor_of: Callable[[str], Tensor]) -> None:
    """A safetensors file of these tensors, each asked for once, in their order, and let go when it is written."""
    with closing(TensorWriter(path, tensors)) as writer:
        for tensor in tensors:
            writer.write(tensor_of(tensor.name))
        writer.finish()


class TensorWriter:
    """Writes a safetensors file, in the order of its tensors, from blocks of them."""

    def __init__(self, path: Path, tensors: Sequence[TensorEntry], *, hashed: bool = False) -> None:
        header = _header(tensors)
        self._missing_bytes = len(header) + sum(tensor.num_bytes for tensor in tensors)
        self._digest = hashlib.sha256() if hashed else None
        self._file = path.open("wb", buffering=0)
        self.write(memoryview(header))

    def write(self, block: memoryview | Tensor) -> None:
        """The next bytes of the file."""
        view = block if isinstance(block, memoryview) else _flat_bytes(block).cpu().numpy().data
        if self._digest is not None:
            self._digest.update(view)
        self._missing_bytes -= len(view)
        while view:
            view = view[self._file.write(view) :]

    def finish(self) -> str:
        """SHA-256 of what was written, where that was asked for. Every byte has to be there."""
        assert self._missing_bytes == 0, self._missing_bytes
        return "" if self._digest is None else self._digest.hexdigest()

    def close(self) -> None:
        self._file.close()


def _header(tensors: Iterable[TensorEntry]) -> bytes:
    """How a safetensors file of these tensors begins."""
    header: dict[str, Any] = {METADATA: {"format": "pt"}}
    end = 0
    for tensor in tensors:
        first, end = end, end + tensor.num_bytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [first, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)  # the data begins aligned
    return len(text).to_bytes(LENGTH_BYTES, "little") + text
