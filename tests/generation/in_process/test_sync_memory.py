"""What a sync of merged weights holds at a time: the tensors of one layer, never all of them beside those before."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from nemo_rl_lora.generation.in_process import engine as engine_module
from nemo_rl_lora.generation.in_process import projections
from nemo_rl_lora.policy.offer import offer
from nemo_rl_lora.types import WeightsRef
from tests.generation.engine_inputs import adapted_modules, adapter_tensors, parameters_of
from tests.generation.live_bytes import peak_bytes
from tests.tiny_models import sampling_model

NUM_LAYERS = 12


def deep_model() -> Any:
    return sampling_model("llama", num_hidden_layers=NUM_LAYERS, hidden_size=256, intermediate_size=512)


def published(model: Any, version: int) -> WeightsRef:
    """As a policy publishes: merged when it is read."""
    return offer(
        version,
        "merged",
        adapter_tensors(model, version),
        adapted=adapted_modules(model),
        weight_of=model.get_parameter,
        dtype=next(model.parameters()).dtype,
    )


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("decoder", ["fast", "plain"])
def test_a_merged_sync_needs_memory_for_a_layer_and_not_for_the_model(make_engine, monkeypatch, decoder, packed):
    if not packed:  # as on a GPU
        monkeypatch.setattr(projections, "can_pack", lambda device, dtype: False)
    if decoder == "plain":
        monkeypatch.setattr(engine_module, "unsupported_reason", lambda model: "a test asks for it")
    model = deep_model()
    engine = make_engine(model, lora=True)
    one = published(model, 2)
    layer = sum(info.num_bytes for info in one.manifest if ".layers.3." in info.name)
    assert sum(info.num_bytes for info in one.manifest) == NUM_LAYERS * layer

    peak = peak_bytes(partial(engine.sync_weights, published(model, 1)), partial(engine.sync_weights, one))

    assert peak < 2 * layer, (peak, layer)
    assert engine._version == 2


def test_new_weights_of_all_parameters_need_memory_for_a_layer_too(make_engine):
    model = deep_model()
    engine = make_engine(model)
    layer = sum(p.numel() * 4 for name, p in model.named_parameters() if ".layers.3." in name)
    moved = {name: parameter + 0.01 for name, parameter in parameters_of(model).items()}
    refs = [
        offer(version, "merged", moved, adapted=None, weight_of=model.get_parameter, dtype=torch.float32)
        for version in (2, 3)
    ]
    assert peak_bytes(*(partial(engine.sync_weights, ref) for ref in refs)) < 2 * layer
    name = "model.layers.3.mlp.up_proj.weight"
    assert torch.equal(engine._decoder.held(name), moved[name])
