"""Models that are not plain text models: refused by the drivers before a weight is loaded, with what to do."""

import pytest
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.driver import TinyRun
from tests.tiny_models import save_byte_tokenizer, save_random_model

TEXT = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 263,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 0,
}
SIGHT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def gemma3(directory):
    config = Gemma3Config(
        text_config=TEXT | {"head_dim": 12}, vision_config=SiglipVisionConfig(**SIGHT).to_dict(), image_token_index=260
    )
    Gemma3ForConditionalGeneration(config).save_pretrained(directory)


def llava(directory):
    config = LlavaConfig(
        text_config=AutoConfig.for_model("llama", **TEXT),
        vision_config=CLIPVisionConfig(**SIGHT),
        image_token_index=260,
    )
    LlavaForConditionalGeneration(config).save_pretrained(directory)


def t5(directory):
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 4, "vocab_size": 263}
    T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(directory)


def of_text(model_type, **settings):
    return lambda directory: save_random_model(AutoConfig.for_model(model_type, **(TEXT | settings)), directory)


LONG = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
REFUSED = [
    ("gemma3", gemma3, "policy.model_name='{model}': 'gemma3' wraps its text model 'gemma3_text'",
     "Save the text model and its head as a checkpoint of 'gemma3_text', and train that."),
    ("llava", llava, "policy.model_name='{model}': 'llava' wraps its text model 'llama'",
     "Save the text model and its head as a checkpoint of 'llama', and train that."),
    ("t5", t5, "policy.model_name='{model}': its config.json describes a 't5', which is no causal language model",
     "Use a model that completes text."),
    ("phi", of_text("phi"), "policy.model_name='{model}': PhiForCausalLM has an output head with a bias, which",
     "such as Llama, Qwen, Mistral, Gemma, Granite, Cohere or OLMo."),
    ("dynamic", of_text("llama", rope_parameters=LONG, max_position_embeddings=48),
     "policy.max_total_sequence_length=64: rotary positions of this model (rope_type 'dynamic') change in sequences "
     "longer than 48 tokens", "Set at most 48."),
]  # fmt: skip


@pytest.mark.parametrize(("name", "make", "begins", "ends"), REFUSED, ids=[row[0] for row in REFUSED])
def test_a_model_that_is_not_a_plain_text_model_is_refused_before_weights(
    tmp_path, monkeypatch, name, make, begins, ends
):
    make(tmp_path / "model")
    save_byte_tokenizer(tmp_path / "model")
    monkeypatch.setattr("nemo_rl_lora.policy.dtensor.policy.load_model", lambda *_, **__: pytest.fail("weights"))
    run = TinyRun(root=tmp_path, model=tmp_path / "model", algorithm="sft")

    ended, planned = run(), run("--plan")

    assert ended.code == planned.code == 2
    for said in (ended.err, planned.out + planned.err):
        unbroken = "".join(said.split())  # a plan breaks its lines, paths too
        assert "".join(begins.format(model=tmp_path / "model").split()) in unbroken, said
        assert "".join(ends.split()) in unbroken, said
