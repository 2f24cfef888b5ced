"""Adapter and moment files: what stock PEFT makes of them, and what is refused."""

import json

import pytest
import safetensors.torch
import torch

from nemo_rl_lora.lora.files import read_adapter, read_moments, write_adapter, write_moments

DIM, ALPHA = 4, 12
PEFT_CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": DIM,
    "lora_alpha": ALPHA,
    "lora_dropout": 0.0,
    "target_modules": ("q_proj", "down_proj"),
    "bias": "none",
    "base_model_name_or_path": "tiny",
}


def names(module):
    return [f"base_model.model.{module}.lora_{side}.weight" for side in "AB"]


def adapter(*shapes, seed=0):
    """{module: (in, out)} -> canonical tensors with B != 0."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (num_in, num_out) in shapes:
        a, b = names(module)
        tensors[a] = torch.randn(DIM, num_in, generator=generator)
        tensors[b] = torch.randn(num_out, DIM, generator=generator)
    return tensors


@pytest.fixture
def small():
    return adapter(("layers.0.q_proj", (8, 6)), ("layers.0.down_proj", (5, 8)))


def test_stock_peft_loads_what_is_written_and_gives_our_logits(tmp_path):
    from peft import PeftModel
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    base = LlamaForCausalLM(config).eval()
    modules = [name for name, _ in base.named_modules() if name.endswith(("q_proj", "down_proj"))]
    shapes = [(name, (base.get_submodule(name).in_features, base.get_submodule(name).out_features)) for name in modules]
    tensors = adapter(*shapes)
    write_adapter(tmp_path, tensors, PEFT_CONFIG)

    merged = LlamaForCausalLM(config).eval()
    merged.load_state_dict(base.state_dict())
    for name in modules:
        a, b = (tensors[tensor_name] for tensor_name in names(name))
        merged.get_submodule(name).weight.data += ALPHA / DIM * b @ a
    ids = torch.randint(0, 64, (2, 9))
    with torch.no_grad():
        expected, plain = merged(ids).logits, base(ids).logits
        loaded = PeftModel.from_pretrained(base, str(tmp_path)).eval()(ids).logits
    assert (expected - plain).abs().max() > 0.05  # the adapter does something
    assert (loaded - expected).norm() / expected.norm() < 1e-6


def test_an_adapter_comes_back_bit_for_bit_with_its_config(tmp_path, small):
    write_adapter(tmp_path, small, PEFT_CONFIG)
    tensors, config = read_adapter(tmp_path, expected=small.keys())
    assert tensors.keys() == small.keys()
    assert all(torch.equal(tensors[name], small[name]) for name in small)
    assert config["target_modules"] == ["q_proj", "down_proj"]


def test_tensors_are_fp32_on_disk_whatever_they_were(tmp_path, small):
    write_adapter(tmp_path, {name: tensor.bfloat16() for name, tensor in small.items()}, PEFT_CONFIG)
    on_disk = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in on_disk.values()} == {torch.float32}


def test_one_tensor_under_two_names_is_written_twice(tmp_path):
    shared = torch.ones(DIM, 8)
    tensors = adapter(("q_proj", (8, 6)), ("k_proj", (8, 6)))
    tensors[names("q_proj")[0]] = tensors[names("k_proj")[0]] = shared
    write_adapter(tmp_path, tensors, PEFT_CONFIG)
    read, _ = read_adapter(tmp_path)
    assert all(torch.equal(read[names(module)[0]], shared) for module in ("q_proj", "k_proj"))


def test_names_that_differ_are_listed_five_of_each(tmp_path):
    write_adapter(tmp_path, adapter(*((f"old.{i}", (3, 2)) for i in range(4))), PEFT_CONFIG)
    expected = adapter(*((f"new.{i}", (3, 2)) for i in range(2)))
    with pytest.raises(ValueError) as caught:
        read_adapter(tmp_path, expected=expected.keys())
    message = str(caught.value)
    assert "4 missing" in message
    assert "8 unexpected" in message
    assert message.count("model.old.") == 5
    assert "adapter_model.safetensors" in message


def test_an_a_without_its_b_is_refused(tmp_path, small):
    del small[names("layers.0.q_proj")[1]]
    with pytest.raises(ValueError, match="1 missing.*layers.0.q_proj.lora_B"):
        write_adapter(tmp_path, small, PEFT_CONFIG)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["model.q_proj.lora_A.weight", "base_model.model.q_proj.lora_magnitude_vector.weight"])
def test_a_name_that_is_not_canonical_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="not of the form"):
        write_adapter(tmp_path, {name: torch.ones(2, 2)}, PEFT_CONFIG)


def test_a_rank_that_differs_between_a_and_b_is_refused(tmp_path, small):
    a, _ = names("layers.0.q_proj")
    small[a] = small[a][:2]
    with pytest.raises(ValueError, match=r"lora_A \(2, 8\) and lora_B \(6, 4\)"):
        write_adapter(tmp_path, small, PEFT_CONFIG)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_file_is_named(tmp_path, small, keep):
    write_adapter(tmp_path, small, PEFT_CONFIG)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="adapter_model.safetensors: cannot be read"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_missing_file_is_named(tmp_path, small, file):
    write_adapter(tmp_path, small, PEFT_CONFIG)
    (tmp_path / file).unlink()
    with pytest.raises(ValueError, match=f"{file}: is missing"):
        read_adapter(tmp_path)


def test_moments_come_back_with_the_step_under_names_of_the_adapter(tmp_path, small):
    moments = {name: (tensor + 1, tensor.square()) for name, tensor in small.items()}
    write_moments(tmp_path, moments, 17)
    read, step = read_moments(tmp_path, expected=small.keys())
    assert step == 17
    assert all(torch.equal(read[name][i], moments[name][i]) for name in small for i in (0, 1))
    on_disk = safetensors.torch.load_file(tmp_path / "adapter.safetensors")
    assert set(on_disk) == {f"{name}.{kind}" for name in small for kind in ("exp_avg", "exp_avg_sq")}


def test_shared_moments_are_stored_once_and_read_under_every_name(tmp_path):
    owner, alias = names("q_proj")[0], names("k_proj")[0]
    pair = (torch.rand(2, 3), torch.rand(2, 3))
    write_moments(tmp_path, {owner: pair}, 3, aliases={alias: owner})
    assert len(safetensors.torch.load_file(tmp_path / "adapter.safetensors")) == 2
    read, _ = read_moments(tmp_path, expected={owner, alias})
    assert torch.equal(read[alias][0], pair[0])
    assert torch.equal(read[alias][1], pair[1])


def test_moments_of_other_modules_are_refused(tmp_path, small):
    write_moments(tmp_path, {name: (tensor, tensor) for name, tensor in small.items()}, 1)
    with pytest.raises(ValueError, match="1 missing: base_model.model.new.lora_A.weight"):
        read_moments(tmp_path, expected=[*small, names("new")[0]])


def test_a_first_moment_without_its_second_is_refused(tmp_path):
    name = names("q_proj")[0]
    safetensors.torch.save_file(
        {f"{name}.exp_avg": torch.ones(2)}, tmp_path / "adapter.safetensors", metadata={"step": "1"}
    )
    with pytest.raises(ValueError, match="1 missing: .*exp_avg_sq"):
        read_moments(tmp_path)


def test_moments_without_a_step_are_refused(tmp_path):
    safetensors.torch.save_file({"x.exp_avg": torch.ones(2)}, tmp_path / "adapter.safetensors")
    with pytest.raises(ValueError, match="no readable optimizer step"):
        read_moments(tmp_path)


def test_the_config_is_plain_json(tmp_path, small):
    write_adapter(tmp_path, small, PEFT_CONFIG | {"exclude_modules": {"b", "a"}})
    assert json.loads((tmp_path / "adapter_config.json").read_text())["exclude_modules"] == ["a", "b"]
