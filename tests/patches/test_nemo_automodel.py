"""Changes to nemo-automodel: each test says so where a release no longer needs one."""

import inspect

import pytest
import torch
from torch import nn

from nemo_rl_lora.models.load import load_model
from nemo_rl_lora.patches.nemo_automodel import adapt, loads_without_cuda, multiply_in_ieee, save_pretrained
from nemo_rl_lora.policy.dtensor.linear import AdapterLinear


@pytest.mark.skipif(torch.cuda.is_available(), reason="the change is for machines without CUDA")
def test_loading_asks_for_cuda_without_the_change(tiny_model):
    import nemo_automodel._transformers.auto_model as auto_model

    arguments = {"use_liger_kernel": False, "use_sdpa_patching": False, "force_hf": True, "dtype": torch.float32}
    with pytest.raises((RuntimeError, AssertionError), match=r"NVIDIA|CUDA"):
        auto_model.NeMoAutoModelForCausalLM.from_pretrained(str(tiny_model("llama")), **arguments)
    with loads_without_cuda():
        assert auto_model.torch is not torch
    assert auto_model.torch is torch


def test_a_linear_module_becomes_the_class_asked_for_which_the_vendor_does_not_take():
    from nemo_automodel.components._peft.lora import patch_linear_module

    assert not [name for name in inspect.signature(patch_linear_module).parameters if "cls" in name or "class" in name]
    linear = nn.Linear(6, 4)
    weight = linear.weight
    adapted = adapt(linear, AdapterLinear, dim=2, dropout=0.0, dropout_position="pre")
    assert type(adapted) is AdapterLinear
    assert adapted is linear
    assert adapted.weight is weight
    assert (adapted.lora_A.weight.shape, adapted.lora_B.weight.shape) == ((2, 6), (4, 2))


def test_saving_needs_the_vendors_checkpointer_without_the_change(tiny_model, tmp_path):
    model = load_model(tiny_model("llama"), dtype=torch.float32, config_overrides={})
    with pytest.raises(ValueError, match="checkpointer"):
        model.save_pretrained(tmp_path)
    save_pretrained(model, tmp_path, model.state_dict())
    assert (tmp_path / "model.safetensors").is_file()


def test_its_kernels_multiply_fp32_in_tf32_without_the_change(monkeypatch):
    import triton

    monkeypatch.delenv("TRITON_F32_DEFAULT", raising=False)
    assert triton.knobs.language.fp32_default is None  # a GPU's own default, TF32
    multiply_in_ieee()
    assert triton.knobs.language.fp32_default == "ieee"
    monkeypatch.setenv("TRITON_F32_DEFAULT", "tf32x3")
    multiply_in_ieee()
    assert triton.knobs.language.fp32_default == "tf32x3"
