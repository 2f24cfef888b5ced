"""Loading a model: the precision asked for is the precision of every weight, whatever the files have."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_rl_lora.models.load import load_model, load_model_config, model_of_tensors, save_tensors


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("asked", [torch.float32, torch.bfloat16])
def test_every_weight_has_the_dtype_asked_for(tiny_model, tmp_path, saved, asked) -> None:
    AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=saved).save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype=asked, config_overrides={})
    assert {parameter.dtype for parameter in model.parameters()} == {asked}
    assert model.dtype == model.config.dtype == asked
    head = model.get_output_embeddings()
    assert head is not None
    assert head.weight is model.get_input_embeddings().weight
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}  # rotary frequencies stay exact


@pytest.mark.parametrize("size", [5 * 10**9, 20_000])
def test_tensors_are_saved_as_transformers_reads_them(tiny_model, tmp_path, size) -> None:
    """Two of them share a storage, as the parts of a fused weight do."""
    path, config = tiny_model("qwen2"), load_model_config(tiny_model("qwen2"), {})
    tensors = dict(load_model(path, dtype=torch.float32, config_overrides={}).state_dict())
    names = [f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up")]
    tensors |= dict(zip(names, torch.cat([tensors[name] for name in names]).chunk(2), strict=True))
    save_tensors(path, config, tensors, tmp_path, max_shard_bytes=size)
    assert (tmp_path / "model.safetensors").exists() == (size > 10**9)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in tensors.items())


def test_a_model_over_tensors_shares_them(tiny_model) -> None:
    stock = load_model(tiny_model("llama"), dtype=torch.float32, config_overrides={})
    tensors = {name: p.detach() for name, p in stock.named_parameters()}
    path = tiny_model("llama")
    model = model_of_tensors(path, load_model_config(path, {}), tensors)
    token_ids = torch.arange(30)[None]
    assert torch.equal(model(token_ids).logits, stock(token_ids).logits)
    assert model.get_input_embeddings().weight.data_ptr() == tensors["model.embed_tokens.weight"].data_ptr()
    assert model.generation_config.to_dict() == stock.generation_config.to_dict()
    assert not any(p.requires_grad for p in model.parameters())
