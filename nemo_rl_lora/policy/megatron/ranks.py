"""The processes that share a model: what each holds, how gradients are summed, how tensors reach the first of them.

Contract: every process makes the same calls in the same order. Tensors are gathered on the first process alone; on
the others `fetch` gives tensors of the meta device, so that the same code runs there. With one process nothing is
sent and nothing is copied. Names of parameters are global, and may go on after that: `<layer>.<anything>`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from nemo_rl_lora.policy.megatron.convert import ParallelLayout, Shape, owners
from nemo_rl_lora.policy.microbatches import DataShare

_ELEMENTS_PER_MESSAGE = 64 * 2**20
_TIED = ("embedding.word_embeddings.weight", "output_layer.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A tensor that one process has, or can make."""

    rank: int
    shape: Shape
    read: Callable[[], Tensor]


class Ranks:
    """This process among all of them."""

    def __init__(self, layout: ParallelLayout, *, sequence_parallel: bool, has_tied_head: bool) -> None:
        self.layout = layout
        self.sequence_parallel = sequence_parallel
        self._has_copied_head = has_tied_head and layout.pp > 1
        self.rank, self.number = dist.get_rank(), dist.get_world_size()
        self.tensor_group = _group(parallel_state.get_tensor_model_parallel_group())
        self.context_group = _group(parallel_state.get_context_parallel_group())
        # Ranks that share experts, or an expert, meet in every forward pass.
        self.data_share = DataShare(
            index=parallel_state.get_data_parallel_rank(),
            number=parallel_state.get_data_parallel_world_size(),
            in_step=_group(parallel_state.get_expert_tensor_and_model_parallel_group()).size() > 1,
        )
        self.layouts: tuple[ParallelLayout, ...] = (layout,)
        if self.number > 1:
            found: list[Any] = [None] * self.number
            dist.all_gather_object(found, layout)
            self.layouts = tuple(found)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.layout.pp_rank == self.layout.pp - 1

    @property
    def reports(self) -> bool:
        """Whether losses and metrics of this process count: of processes that compute the same, one reports."""
        return self.is_last_stage and self.layout.tp_rank == 0 and self.context_group.rank() == 0

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def fetch(self, shards: Sequence[Shard], dtype: torch.dtype) -> list[Tensor]:
        """The shards, on the first process: a message from each other process that has any."""
        if self.number == 1:
            return [shard.read() for shard in shards]
        out = [torch.empty(shard.shape, dtype=dtype, device="meta") for shard in shards]
        for rank in sorted({shard.rank for shard in shards}):
            places = [place for place, shard in enumerate(shards) if shard.rank == rank]
            if self.rank == rank:
                own = [shards[place].read().detach().to(dtype) for place in places]
                if not self.is_first:
                    dist.send(_flatten_dense_tensors(own), dst=0)
            elif self.is_first:
                templates = [out[place] for place in places]
                message = torch.empty(sum(t.numel() for t in templates), dtype=dtype, device=self.device)
                dist.recv(message, src=rank)
                own = _unflatten_dense_tensors(message, templates)
            else:
                continue
            if self.is_first:
                for place, tensor in zip(places, own, strict=True):
                    out[place] = tensor
        return out

    def sum_gradients(self, named: Mapping[str, nn.Parameter]) -> None:
        """Make every gradient that of the whole batch. A process that had no microbatch adds zeros."""
        if self.number == 1:
            return
        trained = {name: p for name, p in named.items() if p.requires_grad}
        for p in trained.values():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        all_data = _group(parallel_state.get_data_parallel_group(with_context_parallel=True))
        self._sum((p for name, p in trained.items() if "local_experts" not in name), all_data)
        if any("local_experts" in name for name in trained):
            expert_data = _group(parallel_state.get_expert_data_parallel_group())
            self._sum((p for name, p in trained.items() if "local_experts" in name), expert_data)
        self._sum((p for name, p in trained.items() if self._is_partial(name)), self.tensor_group)
        if self._has_copied_head and self.layout.pp_rank in (0, self.layout.pp - 1):
            embeddings = _group(parallel_state.get_embedding_group())
            self._sum((p for name, p in trained.items() if name in _TIED), embeddings)

    def total_norm(self, named: Mapping[str, nn.Parameter]) -> Tensor:
        """The L2 norm of all gradients of the model, each element counted once, on every process."""
        own = [p.grad for name, p in named.items() if p.grad is not None and self._counts(name)]
        norm = nn.utils.get_total_norm(own)
        if self.number == 1:
            return norm
        squared = norm.to(self.device).double().square()
        dist.all_reduce(squared)
        return squared.sqrt().float()

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over the processes that report, on every process and on the CPU."""
        if self.number == 1:
            return tensor
        tensor = (tensor if self.reports else torch.zeros_like(tensor)).to(self.device)
        dist.all_reduce(tensor)
        return tensor.cpu()

    def reported(self, found: Any) -> list[Any]:
        """What each process that reports has found, in rank order, on every process."""
        if self.number == 1:
            return [found]
        everything: list[Any] = [None] * self.number
        dist.all_gather_object(everything, (self.reports, found))
        return [value for reports, value in everything if reports]

    def _sum(self, parameters: Iterable[nn.Parameter], group: dist.ProcessGroup) -> None:
        if group.size() == 1:
            return
        for gradients in _messages([p.grad for p in parameters if p.grad is not None]):
            message = _flatten_dense_tensors(gradients)
            dist.all_reduce(message, group=group)
            for gradient, total in zip(gradients, _unflatten_dense_tensors(message, gradients), strict=True):
                gradient.copy_(total)

    def _is_partial(self, name: str) -> bool:
        """Whether tensor-parallel ranks each have a part of the gradient of a parameter that they all hold."""
        if "q_layernorm" in name or "k_layernorm" in name:
            return True  # of its own heads
        return self.sequence_parallel and ("layernorm" in name or ".router." in name)  # of its own tokens

    def _counts(self, name: str) -> bool:
        """Whether this process answers for a parameter of which others may hold the same elements."""
        if self._has_copied_head and name == "output_layer.weight":
            return False
        return self.rank in owners(name, self.layouts)


def _group(found: Any) -> dist.ProcessGroup:
    """One of megatron-core's groups, which this process is in."""
    assert isinstance(found, dist.ProcessGroup), found
    return found


def _messages(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in runs that are worth one message each."""
    run: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if run and size + tensor.numel() > _ELEMENTS_PER_MESSAGE:
            yield run
            run, size = [], 0
        run.append(tensor)
        size += tensor.numel()
    if run:
        yield run
