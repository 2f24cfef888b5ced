"""The processes that share a model: how gradients are summed, who reports, how tensors reach the first of them.

Contract: every process makes the same calls in the same order, on torch.distributed's default group and on the groups
that `Ranks` was built with. Tensors are gathered on the first process alone; on the others `fetch` gives tensors of the
meta device, so that the same code runs there. With one process nothing is sent, nothing is copied and no group is
needed. This module knows no backend: who holds what is said by name, in functions that a backend provides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

_ELEMENTS_PER_MESSAGE = 64 * 2**20


def join_alone() -> None:
    """Make this process the default group, where there is none yet: megatron-core and vLLM build their groups on it. It
    lies in memory, so it serves whoever comes later too."""
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataShare:
    """Which part of a batch is one data-parallel rank's."""

    index: int = 0
    number: int = 1  # of data-parallel ranks
    # Ranks that meet in each forward pass run as many microbatches ("passes"), and of the same lengths ("tokens").
    meets: Literal["never", "passes", "tokens"] = "never"


ALONE = DataShare()


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A tensor that one process has, or can make."""

    rank: int
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among all of them; by default it is the only one."""

    rank: int = 0
    number: int = 1
    data_share: DataShare = ALONE
    reports: bool = True  # its losses and metrics count: of processes that compute the same, one reports
    # Groups whose processes each have a part of some parameters' gradient, and which those are by name; in this order.
    gradient_sums: tuple[tuple[dist.ProcessGroup, Callable[[str], bool]], ...] = ()
    counts: Callable[[str], bool] = lambda _name: True  # this process answers for a parameter that others hold too

    @property
    def is_first(self) -> bool:
        return self.rank == 0

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
        for group, includes in self.gradient_sums:
            _sum((p for name, p in trained.items() if includes(name)), group, self.device)

    def total_norm(self, named: Mapping[str, nn.Parameter]) -> Tensor:
        """The L2 norm of all gradients of the model, each element counted once, on every process."""
        norm = nn.utils.get_total_norm(
            [p.grad for name, p in named.items() if p.grad is not None and self.counts(name)]
        )
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
        return [value for reports, value in self.everybodys((self.reports, found)) if reports]

    def everybodys(self, found: Any) -> list[Any]:
        """What each process has found, in rank order, on every process. `found` can be pickled."""
        if self.number == 1:
            return [found]
        everything: list[Any] = [None] * self.number
        dist.all_gather_object(everything, found)
        return everything


def _sum(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup, device: torch.device) -> None:
    """Every gradient becomes its sum over the group, which speaks from this device wherever gradients lie."""
    if group.size() == 1:
        return
    for gradients in _messages([p.grad for p in parameters if p.grad is not None]):
        message = _flatten_dense_tensors(gradients).to(device)
        dist.all_reduce(message, group=group)
        for gradient, total in zip(gradients, _unflatten_dense_tensors(message, gradients), strict=True):
            gradient.copy_(total)


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
