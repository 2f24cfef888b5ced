"""Weights between Hugging Face and megatron-core, one tensor at a time. Pure tensor work: no process group.

Contract: `megatron_weights` lists every parameter of a megatron-core GPTModel (local layer names) with the Hugging Face
tensors that it holds. `megatron_tensors` gives one rank's parameters, reading only that rank's slices; `hf_tensors` is
the way back, from the parameters of all ranks. Both are exact: slices, concatenations and copies, no arithmetic.

The rule that carries everything: a rank's shard of a fused parameter is the fusion of its shards of the Hugging Face
tensors. `linear_fc1` is gate then up. `linear_qkv` is, for each key-value group, its query heads, then k, then v, and
a rank has whole groups. It holds for weights, biases and the B of an adapter alike.

Adapters travel in canonical form: full A [dim, in] and B [out, dim] of each Hugging Face module. `shard_adapter` and
`join_adapter` go between a full tensor and tensor-parallel shards; `share` and `unshare` between the modules of a
fused layer and one shared A with a fused B. Optimizer moments go the same ways, but a shared A's.

Names here are global (layer 13, expert 40) unless called local, which is how a rank's own modules number them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from nemo_rl_lora.config.megatron import MegatronConfig
from nemo_rl_lora.lora.adapter_tensors import Side
from nemo_rl_lora.lora.names import FUSED_PARTS, hf_names
from nemo_rl_lora.models.stored import refuse_other_tensors
from nemo_rl_lora.policy.megatron.families import Family, layer_ranges
from nemo_rl_lora.tensors import SINGLE_FILE, weight_files

Shape = tuple[int, ...]

_LAYER = re.compile(r"(?<=decoder\.layers\.)\d+")
_EXPERT = re.compile(r"(?<=local_experts\.)\d+")
_SPLIT_BY_OUTPUT = ("linear_qkv", "linear_fc1", "word_embeddings", "output_layer")
_SPLIT_BY_INPUT = ("linear_proj", "linear_fc2")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelLayout:
    """Where one process stands among those that share the model, and which part of it is its own."""

    tp: int = 1  # tensor-parallel ranks
    tp_rank: int = 0
    expert_tp: int = 1  # tensor-parallel ranks of an expert
    expert_tp_rank: int = 0
    pp: int = 1  # pipeline stages
    pp_rank: int = 0
    layers: range  # global numbers of this stage's layers
    experts: range = range(0)  # global numbers of this rank's experts

    def local_name(self, name: str) -> str:
        """The name on this rank of a parameter or module with this global name."""
        return _renumber(name, -self.layers.start, -self.experts.start)

    def global_name(self, local_name: str) -> str:
        """The inverse of `local_name`."""
        return _renumber(local_name, self.layers.start, self.experts.start)

    def holds(self, name: str) -> bool:
        """Whether this rank has the parameter or module of this global name, or a shard of it."""
        layer, expert = _LAYER.search(name), _EXPERT.search(name)
        if layer is None:
            return self.pp_rank == (0 if name.startswith("embedding.") else self.pp - 1)
        return int(layer[0]) in self.layers and (expert is None or int(expert[0]) in self.experts)

    def split_of(self, name: str) -> tuple[int, int]:
        """Tensor-parallel size and rank of a parameter or module."""
        return (self.expert_tp, self.expert_tp_rank) if _EXPERT.search(name) else (self.tp, self.tp_rank)


def layout_of(
    family: Family, megatron: MegatronConfig, *, tp_rank: int, pp_rank: int, ep_rank: int = 0, expert_tp_rank: int = 0
) -> ParallelLayout:
    """The layout of the process at these ranks of megatron-core's groups. The sizes must have been judged."""
    num_experts = 0 if family.experts is None else family.experts.num_experts
    own_experts = num_experts // megatron.expert_model_parallel_size
    return ParallelLayout(
        tp=megatron.tensor_model_parallel_size,
        tp_rank=tp_rank,
        expert_tp=megatron.expert_tensor_parallel_size,
        expert_tp_rank=expert_tp_rank,
        pp=megatron.pipeline_model_parallel_size,
        pp_rank=pp_rank,
        layers=layer_ranges(family.num_layers, megatron)[pp_rank],
        experts=range(ep_rank * own_experts, (ep_rank + 1) * own_experts),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MegatronWeight:
    """One parameter of the whole model, before it is split over tensor-parallel ranks."""

    name: str
    sources: Mapping[str, Shape]  # the Hugging Face tensors that it holds, in Megatron's order
    is_copy: bool = False  # the tied head of a last stage: a second copy of the embeddings

    @property
    def split_dim(self) -> int | None:
        """The dimension along which ranks split each source; None where every rank has all of it."""
        if _has_part(self.name, _SPLIT_BY_OUTPUT):
            return 0
        return 1 if _has_part(self.name, _SPLIT_BY_INPUT) else None

    def local_source(self, source: str, layout: ParallelLayout) -> Shape:
        """The shape of a rank's shard of one of the tensors that this parameter holds."""
        shape = list(self.sources[source])
        if self.split_dim is not None:
            shape[self.split_dim] //= layout.split_of(self.name)[0]
        return tuple(shape)

    def local_shape(self, layout: ParallelLayout) -> Shape:
        """The shape of this parameter on a rank that holds it."""
        shapes = [self.local_source(source, layout) for source in self.sources]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def megatron_weights(family: Family, pp: int) -> Iterator[MegatronWeight]:
    """Every parameter of the model, each once: embeddings, layers by number, final norm, head.

    A tied head is a parameter of its own only where it stands on another stage than the embeddings (`pp` > 1).
    """
    vocabulary = (family.vocab_size, family.hidden_size)
    embeddings = {"model.embed_tokens.weight": vocabulary}
    yield MegatronWeight(name="embedding.word_embeddings.weight", sources=embeddings)
    for layer in range(family.num_layers):
        yield from _layer_weights(family, layer)
    norm = {"model.norm.weight": (family.hidden_size,)}
    yield MegatronWeight(name="decoder.final_layernorm.weight", sources=norm)
    if not family.has_tied_head:
        yield MegatronWeight(name="output_layer.weight", sources={"lm_head.weight": vocabulary})
    elif pp > 1:
        yield MegatronWeight(name="output_layer.weight", sources=embeddings, is_copy=True)


def _layer_weights(family: Family, layer: int) -> Iterator[MegatronWeight]:
    megatron, hf = f"decoder.layers.{layer}", f"model.layers.{layer}"
    q, kv = family.num_heads * family.head_dim, family.num_kv_heads * family.head_dim
    hidden = family.hidden_size
    yield _vector(f"{megatron}.input_layernorm.weight", f"{hf}.input_layernorm.weight", hidden)
    yield from _linear(f"{megatron}.self_attention.linear_qkv", (q, kv, kv), hidden, family.has_qkv_bias)
    if family.has_qk_norm:
        for part in "qk":
            name = f"{megatron}.self_attention.{part}_layernorm.weight"
            yield _vector(name, f"{hf}.self_attn.{part}_norm.weight", family.head_dim)
    yield from _linear(f"{megatron}.self_attention.linear_proj", (hidden,), q)
    yield _vector(f"{megatron}.pre_mlp_layernorm.weight", f"{hf}.post_attention_layernorm.weight", hidden)
    if family.experts is None or not family.has_experts(layer):
        yield from _mlp(f"{megatron}.mlp", family.ffn_size, hidden)
        return
    router = {f"{hf}.mlp.gate.weight": (family.experts.num_experts, hidden)}
    yield MegatronWeight(name=f"{megatron}.mlp.router.weight", sources=router)
    for expert in range(family.experts.num_experts):
        yield from _mlp(f"{megatron}.mlp.experts.local_experts.{expert}", family.experts.ffn_size, hidden)


def _mlp(block: str, ffn: int, hidden: int) -> Iterator[MegatronWeight]:
    yield from _linear(f"{block}.linear_fc1", (ffn, ffn), hidden)
    yield from _linear(f"{block}.linear_fc2", (hidden,), ffn)


def _linear(module: str, outputs: Sequence[int], inputs: int, bias: bool = False) -> Iterator[MegatronWeight]:
    parts = dict(zip(hf_names(module), outputs, strict=True))
    weights = {f"{part}.weight": (rows, inputs) for part, rows in parts.items()}
    yield MegatronWeight(name=f"{module}.weight", sources=weights)
    if bias:
        yield MegatronWeight(name=f"{module}.bias", sources={f"{part}.bias": (rows,) for part, rows in parts.items()})


def _vector(name: str, hf_name: str, size: int) -> MegatronWeight:
    return MegatronWeight(name=name, sources={hf_name: (size,)})


def megatron_tensors(
    family: Family, layout: ParallelLayout, read: Callable[[str], Any]
) -> Iterator[tuple[str, Tensor]]:
    """This rank's parameters under their local names, in the checkpoint's dtype.

    `read` gives a Hugging Face tensor, or a safetensors slice of it, by name; only this rank's rows or columns are
    indexed. A result may share memory with what was read.
    """
    for weight in megatron_weights(family, layout.pp):
        if layout.holds(weight.name):
            size, rank = layout.split_of(weight.name)
            parts = [
                _own_part(read(name), shape, weight.split_dim, size, rank) for name, shape in weight.sources.items()
            ]
            yield layout.local_name(weight.name), fuse(weight.name, parts, family)


def hf_tensors(
    family: Family,
    layouts: Sequence[ParallelLayout],
    read: Callable[[int, str, Shape], Tensor],
    only: Collection[str] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors under their Hugging Face names; a tied head once, as the embeddings.

    `layouts` has one entry a rank, and `read(rank, local_name, shape)` gives the parameter of that name on that rank:
    the same calls in the same order for the same arguments, so every rank may iterate and answer by communicating.
    Tensors on the meta device go through, for ranks that only send. `only`: the Hugging Face names that are wanted.
    A result may share memory with what was read.
    """
    for weight in megatron_weights(family, layouts[0].pp):
        if weight.is_copy or not (only is None or any(name in only for name in weight.sources)):
            continue
        shards = [
            read(rank, layouts[rank].local_name(weight.name), weight.local_shape(layouts[rank]))
            for rank in owners(weight.name, layouts)
        ]
        pieces = zip(*(separate(weight.name, shard, family) for shard in shards), strict=True)
        for name, piece in zip(weight.sources, pieces, strict=True):
            if only is None or name in only:
                yield name, join(piece, weight.split_dim)


def owners(name: str, layouts: Sequence[ParallelLayout]) -> list[int]:
    """The ranks whose shards make up a parameter or module, in the order of the shards; of replicas the first."""
    by_shard: dict[int, int] = {}
    for rank, layout in enumerate(layouts):
        if layout.holds(name):
            by_shard.setdefault(layout.split_of(name)[1], rank)
    is_split = _has_part(name, (*_SPLIT_BY_OUTPUT, *_SPLIT_BY_INPUT))
    return [by_shard[shard] for shard in sorted(by_shard)][: None if is_split else 1]


def fuse(name: str, parts: Sequence[Tensor], family: Family) -> Tensor:
    """Rows of the Hugging Face modules of a layer, whole or a rank's shards, in Megatron's order.

    `name` is a parameter or module, local or global; `parts` are [out, ...] each, in the order of `hf_names`.
    """
    if _has_part(name, ("linear_qkv",)):
        rest = parts[0].shape[1:]
        num_groups = parts[1].shape[0] // family.head_dim
        return torch.cat([part.reshape(num_groups, -1, *rest) for part in parts], dim=1).flatten(0, 1)
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


def separate(name: str, fused: Tensor, family: Family) -> tuple[Tensor, ...]:
    """The inverse of `fuse`. The parts of `linear_fc1` share memory with `fused`."""
    if _has_part(name, ("linear_qkv",)):
        queries = family.num_heads // family.num_kv_heads
        grouped = fused.reshape(-1, (queries + 2) * family.head_dim, *fused.shape[1:])
        sizes = [queries * family.head_dim, family.head_dim, family.head_dim]
        return tuple(part.flatten(0, 1) for part in grouped.split(sizes, dim=1))
    return fused.chunk(2) if _has_part(name, ("linear_fc1",)) else (fused,)


def shard_adapter(module: str, side: Side, tensor: Tensor, layout: ParallelLayout) -> Tensor:
    """This rank's shard of the full A [dim, in] or B [out, dim] of a Hugging Face module held by Megatron's `module`.

    B is split over its outputs. A is split over its inputs where the base is (`linear_proj`, `linear_fc2`), otherwise
    over dim, which tensor parallelism must then divide.
    """
    size, rank = layout.split_of(module)
    return _own_part(tensor, tuple(tensor.shape), _adapter_split_dim(module, side), size, rank)


def adapter_shard_shape(module: str, side: Side, shape: tuple[int, int], layout: ParallelLayout) -> Shape:
    """The shape of a rank's shard of a factor of this whole shape."""
    sizes = list(shape)
    sizes[_adapter_split_dim(module, side)] //= layout.split_of(module)[0]
    return tuple(sizes)


def join_adapter(module: str, side: Side, shards: Sequence[Tensor]) -> Tensor:
    """The inverse of `shard_adapter`: shards in the order of `owners`."""
    return join(shards, _adapter_split_dim(module, side))


def share(module: str, side: Side, parts: Sequence[Tensor], family: Family) -> Tensor:
    """One A, or the fused B, of a fused layer from the A or B of its modules, whole or a rank's shards.

    Raises ValueError where the modules' A differ: then the adapter has an A each and no shared form.
    """
    if side == "B":
        return fuse(module, parts, family)
    if any(not torch.equal(part, parts[0]) for part in parts[1:]):
        raise ValueError(
            f"adapter of {module}: has an A for each of {', '.join(_hf_parts(module))}, and they differ, so they "
            f"cannot become one shared A. Name those modules in the targets in place of the fused layer."
        )
    return parts[0]


def unshare(module: str, side: Side, tensor: Tensor, family: Family) -> tuple[Tensor, ...]:
    """The inverse of `share`: the A of every module is a copy of the shared one."""
    if side == "B":
        return separate(module, tensor, family)
    return tuple(tensor.clone() for _ in _hf_parts(module))


@contextmanager
def open_checkpoint(directory: Path) -> Iterator[dict[str, Any]]:
    """The safetensors slices of a Hugging Face directory by tensor name; nothing is read before they are indexed."""
    files = weight_files(directory) or [SINGLE_FILE]
    if missing := [file for file in files if not (directory / file).is_file()]:
        raise ValueError(
            f"policy.model_name={str(directory)!r}: holds no {missing[0]}, and the Megatron backend reads safetensors "
            f"alone. Save the model again with save_pretrained of transformers."
        )
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(directory / file, framework="pt")) for file in files]
        yield {name: file.get_slice(name) for file in opened for name in file.keys()}  # noqa: SIM118


def check_checkpoint(family: Family, found: Mapping[str, Shape], where: str) -> None:
    """ValueError unless a checkpoint's names and shapes are those of the family.

    Let through: the rotary frequencies of old Llama files, and a tied head that was written all the same.
    """
    ignored = {"lm_head.weight"} if family.has_tied_head else set[str]()
    ignored |= {name for name in found if name.endswith(".rotary_emb.inv_freq")}
    expected = {name: shape for weight in megatron_weights(family, 1) for name, shape in weight.sources.items()}
    present = {name: shape for name, shape in found.items() if name not in ignored}
    kinds = {
        "missing": expected.keys() - present.keys(),
        "unexpected": present.keys() - expected.keys(),
        "of another shape": {
            f"{name} {shape} instead of {expected[name]}"
            for name, shape in present.items()
            if name in expected and shape != expected[name]
        },
    }
    refuse_other_tensors(f"policy.model_name={where!r}", family.architecture, kinds)


def _renumber(name: str, layers: int, experts: int) -> str:
    name = _LAYER.sub(lambda number: str(int(number[0]) + layers), name)
    return _EXPERT.sub(lambda number: str(int(number[0]) + experts), name)


def _has_part(name: str, parts: Collection[str]) -> bool:
    return not set(parts).isdisjoint(name.split("."))


def _hf_parts(module: str) -> tuple[str, ...]:
    return FUSED_PARTS[module.rsplit(".", 1)[-1]]


def _adapter_split_dim(module: str, side: Side) -> int:
    return 1 if side == "A" and _has_part(module, _SPLIT_BY_INPUT) else 0


def _own_part(source: Any, shape: Shape, dim: int | None, size: int, rank: int) -> Tensor:
    if dim is None or size == 1:
        return source[:]
    assert shape[dim] % size == 0, f"{shape} does not split into {size} along {dim}"
    own = slice(shape[dim] // size * rank, shape[dim] // size * (rank + 1))
    return source[own] if dim == 0 else source[:, own]


def join(shards: Sequence[Tensor], dim: int | None) -> Tensor:
    """Shards in the order of `owners`, split along `dim`; None: every rank has all of it."""
    return shards[0] if dim is None or len(shards) == 1 else torch.cat(list(shards), dim=dim)
