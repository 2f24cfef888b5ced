"""The weights of a rank's part of the model: loaded, read back under Hugging Face names, and trained as a whole.

Contract: weights are the model's own parameters, in the dtype of the computation; nothing is copied but what a
Hugging Face tensor cannot share with a fused one (q, k and v). Not here: adapters, files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nemo_rl_lora.distributed.ranks import Shard
from nemo_rl_lora.models.stored import num_not_finite, refuse_not_finite
from nemo_rl_lora.policy.megatron.convert import (
    Shape,
    hf_tensors,
    join,
    megatron_tensors,
    megatron_weights,
    owners,
    separate,
)
from nemo_rl_lora.policy.megatron.families import Family
from nemo_rl_lora.policy.megatron.groups import MegatronRanks
from nemo_rl_lora.policy.trained import Trained


class StageWeights:
    """The parameters of a model without adapters."""

    def __init__(self, model: nn.Module, family: Family, ranks: MegatronRanks) -> None:
        self.family, self.layout, self._ranks = family, ranks.layout, ranks
        self.parameters = dict(model.named_parameters())
        self.holders = {
            name: weight
            for weight in megatron_weights(family, self.layout.pp)
            for name in weight.sources
            if not weight.is_copy
        }

    @torch.no_grad()
    def load(self, read: Callable[[str], Any], label: str) -> None:
        """Every parameter from its Hugging Face tensors, given by name; a rank reads its own rows and columns.

        BadWeightsError, by the `label` of what is read, where this rank's part of one is not finite.
        """
        missing, counts = set(self.parameters), dict[str, int]()
        for name, tensor in megatron_tensors(self.family, self.layout, read):
            self.parameters[name].copy_(tensor)
            missing.remove(name)
            if num_not_finite(self.parameters[name]):
                whole_name = self.layout.global_name(name)
                sources = next(w.sources for w in megatron_weights(self.family, self.layout.pp) if w.name == whole_name)
                parts = separate(whole_name, self.parameters[name], self.family)
                counts |= {source: num_not_finite(part) for source, part in zip(sources, parts, strict=True)}
        assert not missing, missing
        refuse_not_finite(label, counts)

    def hf_tensor(self, name: str) -> Tensor:
        """The tensor of a Hugging Face name, on the first process (`Ranks.fetch`)."""
        weight, layouts = self.holders[name], self._ranks.layouts

        def own_part() -> Tensor:
            fused = self.parameters[self.layout.local_name(weight.name)].detach()
            return separate(weight.name, fused, self.family)[list(weight.sources).index(name)]

        shards = [
            Shard(rank=rank, shape=weight.local_source(name, layouts[rank]), read=own_part)
            for rank in owners(weight.name, layouts)
        ]
        return join(self._ranks.fetch(shards, next(iter(self.parameters.values())).dtype), weight.split_dim)

    def hf_tensors(self, of: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Every Hugging Face tensor, on the first process, from what `of` says of each parameter's local name.

        Where there are several processes, in fp32 and in the host's memory, which has to hold the whole model.
        """

        def read(rank: int, name: str, shape: Shape) -> Tensor:
            shard = Shard(rank=rank, shape=shape, read=lambda: of(name))
            fetched = self._ranks.fetch([shard], torch.float32)[0]
            return fetched if self._ranks.number == 1 or fetched.is_meta else fetched.cpu()

        return hf_tensors(self.family, self._ranks.layouts, read)


class AllWeights(Trained):
    """Every weight as something to train: fp32 masters, which are the parameters themselves where those are fp32.

    Beside narrower parameters the gradients of all microbatches are added up in fp32.
    """

    def __init__(self, weights: StageWeights, *, freeze_router: bool) -> None:
        self._weights = weights
        self._masters: dict[str, nn.Parameter] = {}
        for name, parameter in weights.parameters.items():
            parameter.requires_grad_(not (freeze_router and ".router." in name))
            master = parameter
            if parameter.dtype != torch.float32:
                master = nn.Parameter(parameter.detach().float(), requires_grad=parameter.requires_grad)
            if parameter is not master and parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(partial(_pass_on, master))
            self._masters[name] = master

    def masters(self) -> dict[str, nn.Parameter]:
        return {self._weights.layout.global_name(name): master for name, master in self._masters.items()}

    def parameters(self) -> dict[str, nn.Parameter]:
        return self._weights.parameters

    def canonical(self, of: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
        return dict(self._weights.hf_tensors(lambda name: of(self._masters[name]).detach()))

    def shapes(self) -> dict[str, Shape]:
        return {name: weight.sources[name] for name, weight in self._weights.holders.items()}

    def masters_from(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[nn.Parameter, Tensor]]:
        own = megatron_tensors(self._weights.family, self._weights.layout, tensors.__getitem__)
        return ((self._masters[name], tensor) for name, tensor in own)

    @torch.no_grad()
    def apply(self) -> None:
        """Round the masters into the parameters."""
        for name, parameter in self._weights.parameters.items():
            if parameter is not self._masters[name]:
                parameter.copy_(self._masters[name])


def _pass_on(master: nn.Parameter, parameter: nn.Parameter) -> None:
    """Move a gradient that has been accumulated to its master."""
    assert parameter.grad is not None
    if master.grad is None:
        master.grad = parameter.grad.float()
    else:
        master.grad += parameter.grad
    parameter.grad = None
