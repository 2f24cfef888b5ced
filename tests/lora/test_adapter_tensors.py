"""An adapter's tensors: their names and shapes, what they add to a layer, and that merging adds the same."""

import torch

from nemo_rl_lora.lora.adapter_tensors import AdapterTensors, canonical_shapes, canonical_tensors
from nemo_rl_lora.lora.targets import AdaptedModule

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
MODULES = [
    AdaptedModule(name=Q, in_features=6, out_features=4, dim=2, alpha=6, scale=3.0),
    AdaptedModule(name=DOWN, in_features=5, out_features=7, dim=3, alpha=3, scale=1.0),
]


def drawn(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in canonical_shapes(MODULES).items()}


def test_names_and_shapes_are_those_of_peft():
    assert canonical_shapes(MODULES) == {
        f"base_model.model.{Q}.lora_A.weight": (2, 6),
        f"base_model.model.{Q}.lora_B.weight": (4, 2),
        f"base_model.model.{DOWN}.lora_A.weight": (3, 5),
        f"base_model.model.{DOWN}.lora_B.weight": (7, 3),
    }


def test_canonical_tensors_become_adapters_by_module_and_come_back():
    tensors = drawn()
    adapters = {m.name: AdapterTensors.of(m.name, m.scale, tensors) for m in MODULES}
    assert adapters[Q].a.shape == (2, 6)
    assert adapters[DOWN].b.shape == (7, 3)
    back = canonical_tensors(adapters)
    assert list(back) == list(tensors)
    assert all(back[name] is tensors[name] for name in tensors)


def test_the_update_and_the_merged_weight_are_scale_times_b_a():
    adapter = AdapterTensors.of(Q, 3.0, drawn()).to(torch.float64)
    weight, x = torch.randn(4, 6, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    expected = torch.einsum("ni,di,od->no", x, adapter.a, adapter.b) * 3.0
    torch.testing.assert_close(adapter.update(x), expected)
    merged = adapter.to(torch.float32).merged(weight.float())
    torch.testing.assert_close(x @ merged.double().T, x @ weight.T + expected, atol=1e-5, rtol=0)
