"""How a model is split among processes, where one process can tell."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from nemo_rl_lora.distributed.ranks import join_alone
from nemo_rl_lora.models.load import empty_model
from nemo_rl_lora.policy.dtensor.sharding import layers_of, split_as
from tests.tiny_models import mamba, zamba


def test_what_is_split_as_a_parameter_stays_in_its_memory_though_the_mesh_is_of_another_device():
    join_alone()
    elsewhere = init_device_mesh("meta", (1,))  # as a GPU is, where the weights stay on the CPU
    parameter, moment = distribute_tensor(torch.zeros(4, 2), elsewhere), torch.zeros(4, 2)
    shared = split_as(parameter, moment)
    assert isinstance(shared, DTensor)
    assert (shared.shape, shared.placements) == (parameter.shape, parameter.placements)
    shared.to_local().fill_(3.0)
    assert moment.eq(3.0).all()


def test_the_layers_of_a_model_are_outermost_and_share_no_parameter():
    nested, shared = empty_model(mamba(97)), empty_model(zamba(97))
    assert set(nested._no_split_modules or ()) == {"MambaBlock", "MambaMixer"}
    assert list(layers_of(nested)) == list(nested.get_submodule("backbone.layers").children())
    one, two = (layer for layer in shared.get_submodule("model.layers").children() if hasattr(layer, "shared_transf"))
    assert next(one.shared_transf.parameters()) is next(two.shared_transf.parameters())
    assert [type(layer).__name__ for layer in layers_of(shared)] == 6 * ["ZambaMambaDecoderLayer"]
