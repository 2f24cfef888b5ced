"""Engines on models whose attention or cache is of their own kind: the model's own logits, or a refusal."""

import pytest
import torch
from transformers import AutoConfig

from tests.generation.engine_inputs import request
from tests.tiny_models import random_model

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
CAPS = {"head_dim": 8, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 2.0}
SINKS = {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.mark.parametrize(("model_type", "settings"), [("gemma2", CAPS), ("gpt_oss", SINKS), ("cohere", {})])
def test_sampled_logprobs_are_those_of_the_eager_model(make_engine, model_type, settings):
    config = AutoConfig.for_model(model_type, attn_implementation="eager", **(SIZES | settings))
    model = random_model(config, seed=7, moved=0.2).eval()
    model.generation_config.eos_token_id = None
    engine = make_engine(model)
    (group,) = engine.collect([engine.submit(request((5, 9, 3, 7), num_completions=2))])
    for completion in group.completions:
        sequence = torch.tensor([[*group.prompt.token_ids, *completion.token_ids]])
        logprobs = torch.log_softmax(model(input_ids=sequence, use_cache=False).logits[0].float(), -1)
        expected = logprobs[3:-1].gather(1, sequence[0, 4:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected.detach(), atol=1e-5, rtol=0)


def test_a_model_whose_cache_the_engine_does_not_keep_is_refused(make_engine):
    config = AutoConfig.for_model("mamba", hidden_size=32, num_hidden_layers=2, state_size=8, vocab_size=97)
    model = random_model(config, moved=0.2).eval()
    with pytest.raises(ValueError, match=r"MambaForCausalLM (decoded|cannot be decoded).*backend=vllm"):
        make_engine(model)
