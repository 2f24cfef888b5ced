"""How AdamW runs over the masters: which implementation, and where its numbers lie. A GPU's tensors are fake ones."""

import pytest
import torch
from torch import nn

from nemo_rl_lora.config.optimizer_settings import AdamSettings
from nemo_rl_lora.policy.optimizer import MasterAdam


def settings(**more) -> AdamSettings:
    return AdamSettings(
        lr_at=lambda _: 1e-3, weight_decay_at=lambda _: 0.1, betas=(0.9, 0.99), eps=1e-8, max_grad_norm=1.0, **more
    )


def adam_on(device, **more) -> tuple[nn.Parameter, MasterAdam]:
    master = nn.Parameter(torch.empty(3, device=device))
    return master, MasterAdam([master], settings(**more))


@pytest.mark.parametrize(
    ("device", "asked", "fused"),
    [
        ("cuda", {}, True),
        ("cuda", {"fused": False}, False),
        ("cuda", {"foreach": True}, None),
        ("cuda", {"foreach": False}, True),
        ("cpu", {}, None),
        ("cpu", {"fused": True}, True),
    ],
)
def test_it_is_one_kernel_on_a_gpu_unless_the_user_says_how(on_gpu, device, asked, fused):
    _, adam = adam_on(device, **asked)
    assert adam.defaults["fused"] is fused
    assert adam.defaults["foreach"] is asked.get("foreach")


@pytest.mark.parametrize(("asked", "place"), [({}, "cuda"), ({"fused": False}, "cpu"), ({"foreach": True}, "cpu")])
def test_a_continued_run_has_the_number_of_steps_where_the_kernel_reads_it(on_gpu, asked, place):
    master, adam = adam_on("cuda", **asked)
    adam.set_moments(master, torch.zeros(3), torch.ones(3))
    state = adam.state[master]
    assert state["step"].device.type == place
    assert state["exp_avg"].device.type == state["exp_avg_sq"].device.type == "cuda"


def test_no_master_at_all_is_no_gpu():
    assert MasterAdam([], settings()).defaults["fused"] is None
