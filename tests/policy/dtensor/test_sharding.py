"""How a model is split among processes, where one process can tell."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from nemo_rl_lora.distributed.ranks import join_alone
from nemo_rl_lora.policy.dtensor.sharding import split_as


def test_what_is_split_as_a_parameter_stays_in_its_memory_though_the_mesh_is_of_another_device():
    join_alone()
    elsewhere = init_device_mesh("meta", (1,))  # as a GPU is, where the weights stay on the CPU
    parameter, moment = distribute_tensor(torch.zeros(4, 2), elsewhere), torch.zeros(4, 2)
    shared = split_as(parameter, moment)
    assert isinstance(shared, DTensor)
    assert (shared.shape, shared.placements) == (parameter.shape, parameter.placements)
    shared.to_local().fill_(3.0)
    assert moment.eq(3.0).all()
