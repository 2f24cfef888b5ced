"""LoRA on megatron-core's parallel layers: canonical factors inside fused layers, or one shared A.

Contract: a layer that holds several Hugging Face modules (`linear_qkv`, `linear_fc1`) has an A and a B for each of
them, unless its spec is shared: then one A, and one B in the layer's row order. Factors are fp32 masters, a rank's
shards of what one process would hold (convert.shard_adapter), cast to the adapter's dtype in the forward pass. Their
split over tensor-parallel ranks is that of NVIDIA's Megatron Bridge: A of a column-parallel base by dim, and gathered;
A of a row-parallel base by its inputs, and summed; B by its outputs. Not here: which modules are adapted, and files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.mappings import (
    all_gather_last_dim_from_tensor_parallel_region,
    all_to_all_hp2sp,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nemo_rl_lora.distributed.ranks import Shard
from nemo_rl_lora.lora.adapter_tensors import SIDES, AdapterTensors, Side, canonical_shapes, factor_shape
from nemo_rl_lora.lora.files import adapter_tensor_name
from nemo_rl_lora.lora.names import hf_names, megatron_name
from nemo_rl_lora.lora.spec import LoraSpec
from nemo_rl_lora.lora.targets import AdaptedModule
from nemo_rl_lora.policy.adapted_linear import Factor
from nemo_rl_lora.policy.adapter_state import AdapterSwitch, draw_a, keep_mask
from nemo_rl_lora.policy.low_rank import expand, project, reduce
from nemo_rl_lora.policy.master_copies import Group, MasterCopies
from nemo_rl_lora.policy.megatron.convert import (
    adapter_shard_shape,
    join_adapter,
    owners,
    shard_adapter,
    share,
    unshare,
)
from nemo_rl_lora.policy.megatron.families import Family
from nemo_rl_lora.policy.megatron.groups import MegatronRanks
from nemo_rl_lora.policy.trained import Trained
from nemo_rl_lora.tensors import torch_dtype

_ROW_PARALLEL = ("linear_proj", "linear_fc2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors(AdapterTensors):
    """The masters of one update, or a rank's shards of them."""

    name: str  # what A and dropout are drawn for
    a: nn.Parameter
    b: nn.Parameter

    def factor(self, side: Side) -> nn.Parameter:
        return self.a if side == "A" else self.b


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all adapters of a model have in common."""

    spec: LoraSpec
    switch: AdapterSwitch
    group: Any  # of the tensor-parallel ranks
    sequence_parallel: bool


class AdaptedLinear(nn.Module):
    """A parallel linear layer whose output has an update added for each module that it holds."""

    def __init__(
        self,
        base: nn.Module,
        slots: Sequence[tuple[int, Factors | None]],
        setting: Setting,
        *,
        is_row: bool,
        num_blocks: int = 1,
    ) -> None:
        """`slots`: how many rows a module has in each repetition of the layer's pattern, and its factors if any.

        `num_blocks`: of the rows of one pair of factors, of each of which tensor-parallel ranks have a part.
        """
        super().__init__()
        self.base = base
        self.parts = [factors for _, factors in slots if factors is not None]
        self.factors = nn.ParameterList(part.factor(side) for part in self.parts for side in SIDES)
        self._slots = [(width, factors is not None) for width, factors in slots]
        self._setting, self._is_row, self._num_blocks = setting, is_row, num_blocks
        self.copied: list[Factor] | None = None  # A of all parts and every B as of master_copies.py; None: the masters

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As the base: the output, and a bias that the caller adds."""
        out, bias = self.base(x, *args, **kwargs)
        if not self._setting.switch.on:
            return out, bias
        if self.copied is not None and not self._drops("pre") and not self._drops("post"):
            return self._plus_updates_at_once(out, x, self.copied), bias
        x = x.to(x.dtype if self._setting.spec.dtype is None else torch_dtype(self._setting.spec.dtype))
        return (self._plus_row_update(out, x) if self._is_row else self._plus_column_updates(out, x)), bias

    def groups(self) -> list[Group]:
        """What `copied` is made of; none where the updates cannot be one operation."""
        base_dtype = next(self.base.parameters()).dtype
        dtype = base_dtype if self._setting.spec.dtype is None else torch_dtype(self._setting.spec.dtype)
        if self._setting.group.size() > 1 or len({part.scale for part in self.parts}) > 1:
            return []
        return [Group([part.a for part in self.parts], dtype), *(Group([part.b], dtype) for part in self.parts)]

    def _plus_updates_at_once(self, out: Tensor, x: Tensor, factors: Sequence[Factor]) -> Tensor:
        """out with all updates, on a rank that has the layer whole."""
        places, number = self._places(out.shape[-1])
        if self._is_row:
            out = out.clone()  # megatron-core lets nobody write it
        (a, *all_b), scale = factors, self.parts[0].scale
        return _AddAtOnce.apply(out, x, scale, places, number, *a, *(tensor for b in all_b for tensor in b))

    def _places(self, width: int) -> tuple[list[tuple[int, int]], int]:
        """Where the parts' rows begin in each repetition of the layer's pattern, how many each has, and how many
        repetitions a layer of this width has."""
        if len(self._slots) == 1:
            return [(0, width)], 1
        places, offset = [], 0
        for rows, is_adapted in self._slots:
            if is_adapted:
                places.append((offset, rows))
            offset += rows
        return places, width // offset

    def _plus_column_updates(self, out: Tensor, x: Tensor) -> Tensor:
        """out, this rank's columns, with its updates; x [N, 1, in], or a rank's share of its N."""
        group, size = self._setting.group, self._setting.group.size()
        if self._setting.sequence_parallel:
            x = gather_from_sequence_parallel_region(x, group=group)
        elif size > 1:
            x = copy_to_tensor_model_parallel_region(x, group=group)
        inner = self._inner(x)
        if size > 1:
            inner = all_gather_last_dim_from_tensor_parallel_region(inner, group=group)
        dims = [part.a.shape[0] for part in self.parts]
        hidden = [shard.flatten(-2) for shard in inner.unflatten(-1, (size, -1)).split(dims, dim=-1)]
        if len(self._slots) == 1:
            return self._plus(out, hidden[0], self.parts[0])
        places, number = self._places(out.shape[-1])
        updates = [
            self._dropped(self._outer(h, part), part, "post", split_dim=-1).to(out.dtype)
            for h, part in zip(hidden, self.parts, strict=True)
        ]
        return _AddInPlace.apply(out, places, number, *updates)

    def _plus_row_update(self, out: Tensor, x: Tensor) -> Tensor:
        """out, whole or a rank's share of its N, with its update; x [N, 1, in], or a rank's share of its columns."""
        (part,) = self.parts
        group, in_sequence = self._setting.group, self._setting.sequence_parallel
        inner = self._inner(x, split_dim=-1)
        if group.size() == 1:
            return self._plus(out, inner, part)
        inner = reduce_from_tensor_model_parallel_region(inner, group=group)
        update = self._outer(copy_to_tensor_model_parallel_region(inner, group=group), part)
        if in_sequence and self._setting.spec.a2a:
            update = all_to_all_hp2sp(update, group=group).unflatten(0, out.shape[:-1])
            return out + self._dropped(update, part, "post", split_dim=0).to(out.dtype)
        update = self._dropped(gather_from_tensor_model_parallel_region(update, group=group), part, "post")
        if in_sequence:
            update = scatter_to_sequence_parallel_region(update, group=group)
        return out + update.to(out.dtype)

    def _inner(self, x: Tensor, split_dim: int | None = None) -> Tensor:
        """x A^T of every part side by side: one product, where dropout does not give each an x of its own."""
        if self._drops("pre"):
            dropped = (F.linear(self._dropped(x, part, "pre", split_dim), part.a.to(x.dtype)) for part in self.parts)
            return torch.cat(list(dropped), dim=-1)
        return F.linear(x, torch.cat([part.a for part in self.parts]).to(x.dtype))

    def _outer(self, inner: Tensor, part: Factors) -> Tensor:
        return F.linear(inner * part.scale, part.b.to(inner.dtype))

    def _plus(self, out: Tensor, inner: Tensor, part: Factors) -> Tensor:
        """out with the update of its only module, which this rank has whole or by columns."""
        if self._drops("post") or inner.dtype != out.dtype:
            update = self._outer(inner, part).unflatten(-1, (self._num_blocks, -1))
            return out + self._dropped(update, part, "post", split_dim=-1).flatten(-2).to(out.dtype)
        rows = torch.addmm(out.flatten(0, -2), (inner * part.scale).flatten(0, -2), part.b.to(inner.dtype).t())
        return rows.view_as(out)

    def _drops(self, position: str) -> bool:
        spec = self._setting.spec
        is_on = spec.dropout > 0.0 and self._setting.switch.dropout_seed is not None
        return is_on and spec.dropout_position == position

    def _dropped(self, x: Tensor, part: Factors, position: str, split_dim: int | None = None) -> Tensor:
        """x after dropout, where it is on at this position. Of an x that ranks split, the whole mask is drawn."""
        seed = self._setting.switch.dropout_seed
        if not self._drops(position) or seed is None:
            return x
        shape, size = list(x.shape), self._setting.group.size()
        if split_dim is not None:
            shape[split_dim] *= size
        mask = keep_mask(torch.Size(shape), probability=self._setting.spec.dropout, seed=seed, name=part.name, like=x)
        return x * (mask if split_dim is None else mask.chunk(size, dim=split_dim)[self._setting.group.rank()])


class _AddInPlace(torch.autograd.Function):
    """Updates [.., n * width] added to their places in each of the n repetitions of a fused layer's output.

    The layer's output is nobody else's yet, so it is written: a copy of it would cost more than the updates.
    """

    @staticmethod
    def forward(ctx, out: Tensor, places: Sequence[tuple[int, int]], number: int, *updates: Tensor) -> Tensor:
        ctx.places, ctx.number = places, number
        ctx.mark_dirty(out)
        pattern = out.unflatten(-1, (number, -1))
        for (offset, width), update in zip(places, updates, strict=True):
            pattern.narrow(-1, offset, width).add_(update.unflatten(-1, (number, width)))
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        pattern = grad.unflatten(-1, (ctx.number, -1))
        return grad, None, None, *(pattern.narrow(-1, *place).flatten(-2) for place in ctx.places)


class _AddAtOnce(torch.autograd.Function):
    """The same with the updates computed here: scale * (x A^T) B^T of each part, where A has the rows of all parts."""

    @staticmethod
    def forward(
        ctx: Any,
        out: Tensor,
        x: Tensor,
        scale: float,
        places: Sequence[tuple[int, int]],
        number: int,
        _tracked: Tensor,
        a: Tensor,
        *flat: Tensor,
    ) -> Tensor:
        all_b, rows = flat[1::2], x.flatten(0, -2)
        h = project(rows, a, scale, dtype=a.dtype)
        pattern = out.flatten(0, -2).unflatten(-1, (number, -1))
        for part, place, b in zip(h.split([b.shape[1] for b in all_b], dim=1), places, all_b, strict=True):
            target = pattern.narrow(-1, *place)  # [T, number, width]
            if number == 1:
                expand(part, b, 1.0, base=target[:, 0])
            elif b.dtype == out.dtype:
                factors = b.unflatten(0, (number, -1)).transpose(1, 2)
                target.transpose(0, 1).baddbmm_(part.expand(number, *part.shape), factors)
            else:
                target.add_(torch.mm(part, b.t()).unflatten(-1, (number, -1)))
        ctx.mark_dirty(out)
        ctx.save_for_backward(rows, h, a, *all_b)
        ctx.scale, ctx.places, ctx.number = scale, places, number
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, h, a, *all_b = ctx.saved_tensors
        pattern = grad.flatten(0, -2).unflatten(-1, (ctx.number, -1))
        updates = [pattern.narrow(-1, *place).flatten(-2) for place in ctx.places]
        parts = [project(d, b.t(), ctx.scale, dtype=a.dtype) for d, b in zip(updates, all_b, strict=True)]
        d_h = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        d_x = None
        if ctx.needs_input_grad[1]:
            d_x = project(d_h, a.t(), 1.0, dtype=rows.dtype).unflatten(0, grad.shape[:-1])
        hidden = h.split([b.shape[1] for b in all_b], dim=1)
        d_all_b = [reduce(part, d, 1.0, transposed=True) for part, d in zip(hidden, updates, strict=True)]
        d_factors = [gradient for d_b in d_all_b for gradient in (d_b, None)]
        return grad, d_x, None, None, None, reduce(d_h, rows, 1.0), None, *d_factors


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Modules of the whole model that one pair of factors updates: several share their A."""

    layer: str  # Megatron's name of the layer that holds them
    modules: tuple[AdaptedModule, ...]

    @property
    def name(self) -> str:
        """What A and dropout are drawn for."""
        return self.modules[0].name if len(self.modules) == 1 else self.layer

    def parameter(self, side: Side) -> str:
        return f"{self.layer}.{self.name}.lora_{side}"

    def tensor_names(self, side: Side) -> list[str]:
        return [adapter_tensor_name(module.name, side) for module in self.modules]

    def shape(self, side: Side) -> tuple[int, int]:
        """Of the whole factor."""
        rows, columns = factor_shape(self.modules[0], side)
        return (rows, columns) if side == "A" else (sum(m.out_features for m in self.modules), columns)


class Adapters(Trained):
    """Every adapter of a rank's part of the model, and the way between its factors and canonical tensors."""

    def __init__(
        self,
        model: GPTModel,
        adapted: Sequence[AdaptedModule],
        spec: LoraSpec,
        *,
        family: Family,
        ranks: MegatronRanks,
        seed: int,
    ) -> None:
        """Freeze the model and put adapters into it, with A drawn and B zero."""
        self._family, self._ranks, self._layout, self._seed = family, ranks, ranks.layout, seed
        self.adapted = tuple(adapted)
        self.switch = AdapterSwitch()
        self._setting = Setting(
            spec=spec, switch=self.switch, group=ranks.tensor_group, sequence_parallel=ranks.sequence_parallel
        )
        model.requires_grad_(False)
        by_layer: dict[str, dict[str, AdaptedModule]] = {}
        for module in adapted:
            layer = megatron_name(module.name)
            assert layer is not None, module.name
            by_layer.setdefault(layer, {})[module.name] = module
        self._held = [
            Held(layer=layer, modules=modules)
            for layer, by_name in by_layer.items()
            for modules in ([tuple(by_name.values())] if spec.fused == "shared" else [(m,) for m in by_name.values()])
        ]
        shared = [held.tensor_names("A") for held in self._held]
        self.aliases = {further: first for first, *others in shared for further in others}
        self._factors: dict[str, Factors] = {}
        for layer, by_name in by_layer.items():
            if self._layout.holds(layer):
                self._install(model, layer, by_name)
        linears = [module for module in model.modules() if isinstance(module, AdaptedLinear)]
        groups = [linear.groups() for linear in linears]
        self.copies = MasterCopies([group for of_linear in groups for group in of_linear])
        factors = iter(self.copies.factors)
        for linear, of_linear in zip(linears, groups, strict=True):
            linear.copied = [next(factors) for _ in of_linear] or None

    def masters(self) -> dict[str, nn.Parameter]:
        return {
            held.parameter(side): self._factors[held.name].factor(side)
            for held in self._held
            if held.name in self._factors
            for side in SIDES
        }

    def canonical(self, of: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
        """As in `Trained`. A shared A is a copy for each of its modules."""
        places: list[tuple[Held, Side]] = [(held, side) for held in self._held for side in SIDES]
        shards = [self._shards(held, side, of) for held, side in places]
        fetched = iter(self._ranks.fetch([shard for one in shards for shard in one], torch.float32))
        canonical: dict[str, Tensor] = {}
        for (held, side), of_place in zip(places, shards, strict=True):
            pieces = zip(*(self._separated(held, side, next(fetched)) for _ in of_place), strict=True)
            whole = [join_adapter(held.layer, side, piece) for piece in pieces]
            canonical |= zip(held.tensor_names(side), whole, strict=True)
        return canonical

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return canonical_shapes(self.adapted)

    def masters_from(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """As in `Trained`. ValueError where modules that share an A have several."""
        for held in self._held:
            if (part := self._factors.get(held.name)) is None:
                continue
            for side in SIDES:
                layer = held.layer
                shards = [shard_adapter(layer, side, tensors[name], self._layout) for name in held.tensor_names(side)]
                yield part.factor(side), shards[0] if len(shards) == 1 else share(layer, side, shards, self._family)

    def _shards(self, held: Held, side: Side, of: Callable[[nn.Parameter], Tensor]) -> list[Shard]:
        layouts = self._ranks.layouts

        def read() -> Tensor:
            return of(self._factors[held.name].factor(side)).detach()

        return [
            Shard(rank=rank, shape=adapter_shard_shape(held.layer, side, held.shape(side), layouts[rank]), read=read)
            for rank in owners(held.layer, layouts)
        ]

    def _separated(self, held: Held, side: Side, tensor: Tensor) -> tuple[Tensor, ...]:
        return (tensor,) if len(held.modules) == 1 else unshare(held.layer, side, tensor, self._family)

    def _install(self, model: nn.Module, layer: str, modules: Mapping[str, AdaptedModule]) -> None:
        parent, _, leaf = self._layout.local_name(layer).rpartition(".")
        holder = model.get_submodule(parent)
        base = holder.get_submodule(leaf)
        device = next(base.parameters()).device
        num_blocks = 1
        if self._setting.spec.fused == "shared":
            num_blocks = 2 if leaf == "linear_fc1" else 1  # gate and up; q, k and v lie by heads
            slots = [(0, self._draw(Held(layer=layer, modules=tuple(modules.values())), device))]
        else:
            slots = [
                (width, self._draw(Held(layer=layer, modules=(modules[name],)), device) if name in modules else None)
                for name, width in zip(hf_names(layer), self._widths(leaf), strict=True)
            ]
        is_row = leaf in _ROW_PARALLEL
        setattr(holder, leaf, AdaptedLinear(base, slots, self._setting, is_row=is_row, num_blocks=num_blocks))

    def _draw(self, held: Held, device: torch.device) -> Factors:
        dim, in_features = held.shape("A")
        a = draw_a(self._setting.spec, name=held.name, in_features=in_features, dim=dim, seed=self._seed)
        b = torch.zeros(adapter_shard_shape(held.layer, "B", held.shape("B"), self._layout))
        a = shard_adapter(held.layer, "A", a, self._layout).contiguous()
        a, b = (nn.Parameter(factor.to(device)) for factor in (a, b))
        self._factors[held.name] = Factors(name=held.name, a=a, b=b, scale=held.modules[0].scale)
        return self._factors[held.name]

    def _widths(self, leaf: str) -> tuple[int, ...]:
        """Rows of each module of a layer in one repetition of its pattern, on this rank."""
        head = self._family.head_dim
        if leaf == "linear_qkv":
            return self._family.num_heads // self._family.num_kv_heads * head, head, head
        return (self._family.ffn_size // self._layout.tp,) * 2 if leaf == "linear_fc1" else (0,)
