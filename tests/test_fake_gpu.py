"""The fake GPU tells devices apart, counts as a real one would, and has gradients."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def test_tensors_of_the_cpu_and_of_the_gpu_do_not_mix(on_gpu):
    x = torch.ones(3, device="cuda")
    with pytest.raises(AssertionError, match=r"add has tensors of the CPU.*tests/test_fake_gpu\.py"):
        x + torch.ones(3)
    assert (x + torch.tensor(2.0)).is_cuda  # a number goes along with the launch


def test_it_counts_launches_copies_and_waits_where_they_are_asked_for(on_gpu):
    x = torch.arange(6).to("cuda").float()
    y = (x.view(2, 3) * 2)[0]
    assert on_gpu.launches == {"_to_copy": 1, "mul": 1}  # views are none
    assert on_gpu.copies.total() == on_gpu.waits.total() == 1
    assert y.sum().item() == 0.5
    assert y.tolist() == [0.0] * 3
    assert x[torch.tensor([1, 2])].shape == (2,)  # torch brings the index there
    assert on_gpu.copies.total() == 2
    assert on_gpu.waits.total() == 4
    assert all(place.startswith("tests/test_fake_gpu.py:") for place in on_gpu.waits)


def test_nothing_waits_for_a_copy_from_pinned_memory(on_gpu):
    pinned = torch.empty(8, dtype=torch.uint8, pin_memory=True)
    assert pinned.is_pinned()
    assert pinned[4:].to("cuda", non_blocking=True).is_cuda
    assert on_gpu.copies.total() == 1
    assert not on_gpu.waits
    pinned.to("cuda")
    torch.empty(8, dtype=torch.uint8).to("cuda", non_blocking=True)
    assert on_gpu.waits.total() == 2


def test_gradients_reach_the_leaves_and_are_added_up(on_gpu):
    layer = nn.Linear(4, 3).to("cuda")
    for number in (1, 2):
        layer(torch.ones(2, 4, device="cuda")).sum().backward()
        assert layer.weight.grad.shape == (3, 4)
        assert layer.weight.grad.is_cuda
        assert on_gpu.launches["add_"] == 2 * (number - 1)  # weight and bias


def test_what_is_checkpointed_is_computed_twice(on_gpu):
    x = torch.ones(3, device="cuda", requires_grad=True)
    out = checkpoint(lambda x: x.exp().sin(), x, use_reentrant=False, preserve_rng_state=False)
    out.sum().backward()
    assert x.grad.shape == (3,)
    assert on_gpu.launches["exp"] == 2
