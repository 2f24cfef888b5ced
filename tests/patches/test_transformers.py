"""Changes to transformers: the test says so where a release no longer needs one."""

import torch
from transformers import AutoModelForCausalLM

from nemo_rl_lora.patches.transformers import checkpoint_activations


def runs_of_a_norm(model) -> int:
    """How often the first norm runs in a forward and backward pass."""
    runs = []
    handle = model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: runs.append(1))
    model(torch.arange(6)[None], use_cache=False).logits.sum().backward()
    handle.remove()
    return len(runs)


def test_activations_of_a_model_in_evaluation_mode_are_checkpointed_by_the_change_alone(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32).eval()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert runs_of_a_norm(model) == 1
    checkpoint_activations(model)
    assert runs_of_a_norm(model) == 2
    assert not model.model.layers[0].self_attn.training  # where a model's dropout is
