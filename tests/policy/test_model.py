"""Loading a model: the precision asked for is the precision of every weight, whatever the files have."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_rl_lora.policy.model import load_model


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
