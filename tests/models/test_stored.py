"""Tensors of files against the model: forms that transformers loads pass, and what it would fill or drop is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DeepseekV3Config, MixtralConfig, PretrainedConfig, Qwen3MoeConfig

from nemo_rl_lora.models.load import described_model
from nemo_rl_lora.models.stored import BadWeightsError, check_weights, num_not_finite
from nemo_rl_lora.policy.dtensor.loading import How, load_weights
from tests.policy.dtensor.test_loading import KINDS, SIZES, make_directory
from tests.tiny_models import nemotron_h, save_random_model

ALL_HEADS: dict[str, Any] = SIZES | {"num_key_value_heads": 4}
EXPERTS = {
    "qwen3_moe": Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
    "deepseek_v3": DeepseekV3Config(
        **ALL_HEADS,
        n_routed_experts=4,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
    "nemotron_h": nemotron_h(211),
}


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("kind", KINDS)
def test_every_form_that_transformers_loads_passes(kind, tmp_path):
    make_directory(kind, tmp_path)
    assert check_weights(tmp_path, described_model(tmp_path, {})) > 10


@pytest.mark.parametrize("partial", [False, True])
def test_an_adapter_beside_whole_weights_is_refused(tmp_path, partial):
    """transformers would load both."""
    make_directory(next(iter(KINDS)), tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="^policy.model_name=.*: holds an adapter_config.json besides whole weights"):
        check_weights(tmp_path, described_model(tmp_path, {}), partial=partial)


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_in_tensors_of_their_own_are_compared_one_by_one(family, tmp_path):
    config: PretrainedConfig = EXPERTS[family]
    save_random_model(config, tmp_path)
    model = described_model(tmp_path, {})
    assert check_weights(tmp_path, model) > 10
    name = next(name for name in load_file(tmp_path / "model.safetensors") if ".experts.2." in name)

    rewrite(tmp_path, lambda t: t.update({name: t[name].T.contiguous()}))
    with pytest.raises(ValueError, match=r"1 of another shape: .*experts\.2\."):
        check_weights(tmp_path, model)
    rewrite(tmp_path, lambda t: t.update({name.replace(".2.", ".9."): t.pop(name)}))
    with pytest.raises(ValueError, match=r"1 missing: .*experts\.2\..*; 1 unexpected: .*experts\.9\."):
        check_weights(tmp_path, model)


def test_quantized_weights_are_compared_by_module(tmp_path, tiny_model):
    path = Path(tiny_model("llama"))
    model = described_model(path, {})
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    tensors = load_file(path / "model.safetensors")
    scaled = tensors | {f"{name}.absmax": torch.ones(1) for name in tensors if "proj" in name}
    save_file(scaled, tmp_path / "model.safetensors")
    assert check_weights(tmp_path, model) == len(scaled)

    lacking = {name: tensor for name, tensor in scaled.items() if ".1.self_attn.q_proj" not in name}
    save_file(lacking | {"model.layers.9.self_attn.q_proj.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    says = (
        r"\(1 missing: model.layers.1.self_attn.q_proj.weight; 1 unexpected: model.layers.9.self_attn.q_proj.weight\)"
    )
    with pytest.raises(ValueError, match=says):
        check_weights(tmp_path, model)


@pytest.mark.parametrize("how", ["all_ranks", "broadcast"])
def test_a_sharded_load_names_what_is_not_finite(how: How, tmp_path):
    make_directory("untied", tmp_path)
    rewrite(tmp_path, lambda t: t["model.layers.1.mlp.up_proj.weight"][7, 3:6].fill_(float("nan")))
    with pytest.raises(
        BadWeightsError, match=r"1 of its tensors hold NaN or infinity \(model.layers.1.mlp.up_proj.weight: 3\)"
    ):
        load_weights(described_model(tmp_path, {}), tmp_path, how=how, dtype=torch.bfloat16, device=torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_numbers_that_are_not_finite_are_counted(dtype):
    tensor = torch.ones(5, 7).to(dtype)
    assert num_not_finite(tensor) == 0
    tensor = torch.ones(5, 7)
    tensor[1, 2], tensor[3, 3] = float("nan"), float("-inf") if dtype != torch.float8_e4m3fn else float("nan")
    assert num_not_finite(tensor.to(dtype)) == 2
    assert num_not_finite(torch.zeros(0)) == num_not_finite(torch.ones(3, dtype=torch.uint8)) == 0
