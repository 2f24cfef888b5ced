"""The same policy on both backends, with the same adapter, for comparing them."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_rl_lora.policy.dtensor.policy import DTensorPolicy
from nemo_rl_lora.policy.megatron.policy import MegatronPolicy
from tests.policy.dtensor.test_policy import make_policy, spec

Twin = DTensorPolicy | MegatronPolicy
BOTH = {"dtensor": DTensorPolicy, "megatron": MegatronPolicy}


def make_twins(path, **settings) -> tuple[DTensorPolicy, MegatronPolicy]:
    """Both backends, with one adapter whose B is not zero, or without any."""
    settings = {"spec": spec(), **settings}
    dtensor, megatron = (make_policy(path, backend=backend, **settings) for backend in BOTH.values())
    if settings["spec"] is not None:
        set_masters(dtensor, random_adapter(dtensor))
        set_masters(megatron, random_adapter(dtensor))
    return dtensor, megatron


def masters(policy: Twin) -> dict[str, Tensor]:
    """Canonical name -> what is trained."""
    return policy._trained.canonical(lambda master: master)


def gradients(policy: Twin) -> dict[str, Tensor]:
    return policy._trained.canonical(lambda master: master.grad)


def moments(policy: Twin) -> dict[str, tuple[Tensor, Tensor]]:
    first, second = (
        policy._trained.canonical(lambda master, index=index: policy._optimizer.moments_of(master)[index])
        for index in (0, 1)
    )
    return {name: (first[name], second[name]) for name in first}


@torch.no_grad()
def set_masters(policy: Twin, tensors: dict[str, Tensor]) -> None:
    for master, tensor in policy._trained.masters_from(tensors):
        master.copy_(tensor)
    policy._trained.refresh()


def random_adapter(policy: Twin, seed: int = 3) -> dict[str, Tensor]:
    """The policy's A, and a B that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tensor.shape, generator=generator) * 0.1 if ".lora_B." in name else tensor.clone()
        for name, tensor in sorted(masters(policy).items())
    }


def distance(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative L2 distance over tensors."""
    assert actual.keys() == expected.keys()
    return max(float((actual[name] - expected[name]).norm() / expected[name].norm()) for name in expected)
