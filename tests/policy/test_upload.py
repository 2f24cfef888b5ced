from __future__ import annotations

import torch

from nemo_rl_lora.policy.microbatches import Microbatch, Segment
from nemo_rl_lora.policy.upload import _packed, _views, upload
from tests.fake_gpu import GPU, fake_gpu


def microbatch() -> Microbatch:
    return Microbatch(
        rows=torch.arange(2),
        token_ids=torch.arange(8),
        position_ids=torch.tensor([0, 1, 2, 3, 4, 0, 1, 2]),
        segments=(Segment(start=0, length=5, parent=None), Segment(start=5, length=3, parent=None)),
        predictor=torch.tensor([3, 6]),
        loss_row=torch.tensor([0, 1]),
        loss_column=torch.tensor([4, 2]),
        target=torch.tensor([4, 7]),
        num_padding_tokens=0,
    )


def test_tensors_of_any_dtype_and_size_lie_side_by_side_in_the_buffer():
    tensors = [
        torch.tensor([True, False, True]),
        torch.arange(5),
        torch.tensor(0.25),
        torch.zeros(0, dtype=torch.int64),
        torch.randn(3, 7)[:, ::2],
        torch.randn(2, 3).bfloat16(),
        torch.arange(6, dtype=torch.int32),
    ]
    packed = _packed(tensors, pinned=False)
    views = list(_views(packed, tensors))
    for tensor, view in zip(tensors, views, strict=True):
        assert view.dtype == tensor.dtype
        assert torch.equal(view, tensor)
        assert view.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()


def test_a_gpu_gets_all_tensors_in_one_copy_that_nothing_waits_for():
    micro = microbatch()
    with fake_gpu() as gpu:
        there = upload((micro, "a name", (micro.target, 3)), GPU)
        assert gpu.copies.total() == 1
        assert gpu.waits.total() == 0
        moved, name, (target, three) = there
        assert (name, three, moved.segments) == ("a name", 3, micro.segments)
        assert all(isinstance(segment, Segment) for segment in moved.segments)
        assert moved.target is target
        for field in ("rows", "token_ids", "position_ids", "predictor", "loss_row", "loss_column", "target"):
            here, its = getattr(micro, field), getattr(moved, field)
            assert its.is_cuda
            assert (its.shape, its.dtype) == (here.shape, here.dtype)
        assert upload(there, GPU) is there


def test_nothing_is_copied_for_the_cpu():
    micro = microbatch()
    assert upload(micro, torch.device("cpu")) is micro
