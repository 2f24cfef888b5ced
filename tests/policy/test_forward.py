"""The forward pass against transformers' eager one, for architectures with heads and attentions of their own kind."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from nemo_rl_lora.models.families import changing_positions
from nemo_rl_lora.models.own_forward import HeadForm, read_head
from nemo_rl_lora.policy.forward import ForwardPass
from nemo_rl_lora.policy.head import Head, target_logprobs
from tests.policy.batches import microbatches_of
from tests.policy.dtensor.test_policy import make_policy, randomise_b, spec
from tests.policy.test_attention import PLANS, reference
from tests.tiny_models import LLAMA3, VOCABULARY, random_model, save_random_model

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
BLOOM = {"hidden_size": 48, "n_layer": 3, "n_head": 4, "vocab_size": VOCABULARY}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
# model_type -> (its settings, its head, the attention that padded rows get)
KINDS = {
    "gemma2": (
        {"head_dim": 12, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.0, "sliding_window": 8},
        HeadForm(soft_cap=2.0),
        "eager",
    ),
    "gemma3_text": ({"head_dim": 12, "sliding_window": 8}, HeadForm(), "sdpa"),
    "cohere": ({"logit_scale": 0.25}, HeadForm(scale=0.25), "sdpa"),
    "cohere2": ({"logit_scale": 0.25, "sliding_window": 8}, HeadForm(scale=0.25), "sdpa"),
    "granite": (
        {"logits_scaling": 4.0, "attention_multiplier": 0.5, "residual_multiplier": 0.6, "embedding_multiplier": 3.0},
        HeadForm(scale=0.25),
        "sdpa",
    ),
    "minicpm3": (
        {"num_key_value_heads": 4, "head_dim": 8, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8}
        | {"qk_rope_head_dim": 8, "v_head_dim": 12, "dim_model_base": 12},
        HeadForm(scale=0.25),
        "sdpa",
    ),
    "vaultgemma": ({"head_dim": 12}, HeadForm(soft_cap=30.0), "eager"),
    "gpt_oss": ({"head_dim": 12, "sliding_window": 8} | EXPERTS, HeadForm(), "eager"),
    "llama4_text": (
        {"head_dim": 12, "attention_chunk_size": 8, "intermediate_size_mlp": 80, "num_local_experts": 2},
        HeadForm(),
        "sdpa",
    ),
    "bloom": (BLOOM, HeadForm(), "eager"),
    "falcon": ({"num_kv_heads": 2, "alibi": True}, HeadForm(), "eager"),
    "gpt2": ({"n_embd": 48, "n_layer": 3, "n_head": 4, "vocab_size": VOCABULARY}, HeadForm(), "sdpa"),
    "gpt_neox": ({}, HeadForm(), "sdpa"),
    "opt": ({"ffn_dim": 80, "word_embed_proj_dim": 48}, HeadForm(), "sdpa"),
    "olmo2": ({}, HeadForm(), "sdpa"),
    "nemotron": ({}, HeadForm(), "sdpa"),
    "mistral": ({"sliding_window": 8}, HeadForm(), "sdpa"),
    "mamba": ({"num_hidden_layers": 2, "state_size": 8}, HeadForm(), "eager"),
}


def config_of(model_type, **settings):
    sizes = {} if model_type in ("bloom", "gpt2") else SIZES
    return AutoConfig.for_model(model_type, attn_implementation="eager", **(sizes | settings))


@pytest.mark.parametrize("model_type", KINDS)
def test_padded_rows_equal_the_models_own_eager_pass(groups_batch, model_type):
    settings, head, attention = KINDS[model_type]
    model = random_model(config_of(model_type, **settings), moved=0.1).eval()
    weights = torch.randn(groups_batch.token_ids.shape, generator=torch.Generator().manual_seed(2))
    expected, gradients = reference(model, groups_batch, weights)
    model.zero_grad()
    forward = ForwardPass(model=model, flat=False, temperature=1.0, chunk_tokens=16)

    forward.verify()

    assert forward.form == head
    assert forward.model.config._attn_implementation == attention
    for micro in microbatches_of(groups_batch, PLANS["sorted"]):
        values = forward(micro, groups_batch.token_ids.shape[1])
        (values * weights[micro.rows]).sum().backward()
        torch.testing.assert_close(values, expected[micro.rows], atol=1e-5, rtol=0)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert (parameter.grad - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6


@pytest.mark.parametrize("model_type", ["gemma2", "granite"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_policy_has_the_logprobs_of_the_eager_model(groups_batch, tmp_path, model_type, precision):
    path = save_random_model(config_of(model_type, **KINDS[model_type][0]), tmp_path, moved=0.1)
    policy = make_policy(path, spec=spec(), precision=precision)
    randomise_b(policy)
    judge = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    expected, _ = reference(judge, groups_batch, groups_batch.loss_mask.float())
    error = (policy.reference_logprobs(groups_batch) - expected).abs().max()
    assert error <= (1e-5 if precision == "float32" else 0.1), error


@pytest.mark.parametrize(
    ("model_type", "settings", "reason"),
    [
        ("phi", {}, "has an output head with a bias"),
        ("gptj", {"n_embd": 48, "n_layer": 1, "n_head": 4, "rotary_dim": 4}, "has an output head with a bias"),
        ("bert", {"is_decoder": True}, "has an output head with a bias"),
    ],
)
def test_a_head_of_another_kind_is_refused_by_the_model_on_the_meta_device(model_type, settings, reason):
    sizes = SIZES if model_type != "gptj" else {"vocab_size": VOCABULARY}
    config = AutoConfig.for_model(model_type, **(sizes | settings))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=reason):
        read_head(model)


def test_a_head_that_adds_something_else_is_refused():
    model = random_model(config_of("llama"))

    class Shifted(type(model)):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits + torch.linspace(0, 1e-3, output.logits.shape[-1])
            return output

    model.__class__ = Shifted
    with pytest.raises(ValueError, match="neither a factor nor a soft cap"):
        read_head(model)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("gemma2", "Gemma2Attention asks for softcap"),
        ("gpt_oss", "GptOssAttention asks for s_aux"),
        ("mistral", r"MistralAttention differs from its own by 0\.\d"),
        ("bloom", "has an attention that cannot be replaced"),
    ],
)
def test_flat_segments_of_an_attention_that_they_do_not_compute_are_refused(model_type, reason):
    model = random_model(config_of(model_type, **KINDS[model_type][0])).eval()
    forward = ForwardPass(model=model, flat=True, temperature=1.0, chunk_tokens=16)
    with pytest.raises(ValueError, match=reason):
        forward.verify()


def test_a_model_that_looks_ahead_is_refused():
    model = random_model(config_of("llama")).eval()
    for layer in model.model.layers:
        own = layer.self_attn.forward
        layer.self_attn.forward = lambda *args, own=own, **kwargs: own(*args, **(kwargs | {"attention_mask": None}))
    with pytest.raises(ValueError, match="gives other numbers by itself than here"):
        ForwardPass(model=model, flat=False, temperature=1.0, chunk_tokens=16).verify()


def test_adapters_that_no_text_reaches_are_named(tmp_path):
    sizes = {"d_model": 48, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 80}
    config = AutoConfig.for_model("bart", **sizes, vocab_size=VOCABULARY, max_position_embeddings=128)
    path = save_random_model(config, tmp_path)  # its attention to an encoder has none here
    with pytest.raises(ValueError, match=r"selects model\.decoder\.layers\.\*\.encoder_attn\.k_proj.*exclude_modules"):
        make_policy(path, spec=spec())
    make_policy(path, spec=spec(excludes=("*encoder_attn*",)))


@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("form", [HeadForm(scale=0.3), HeadForm(soft_cap=1.5), HeadForm(scale=2.0, soft_cap=3.0)])
def test_chunked_head_of_any_form_equals_dense_log_softmax(form, train_head):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 12, generator=generator).requires_grad_()
    weight = torch.randn(50, 12, generator=generator).requires_grad_(train_head)
    target = torch.randint(0, 50, (37,), generator=generator)
    outer = torch.randn(37, generator=generator)
    values = target_logprobs(hidden, Head(weight=weight, temperature=0.7, chunk_tokens=8, form=form), target)
    (values * outer).sum().backward()
    h64, w64 = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logits = form.scale * (h64 @ w64.T)
    if form.soft_cap is not None:
        logits = form.soft_cap * torch.tanh(logits / form.soft_cap)
    dense = torch.log_softmax(logits / 0.7, -1).gather(1, target[:, None])[:, 0]
    (dense * outer).sum().backward()
    torch.testing.assert_close(values.double(), dense, atol=1e-5, rtol=0)
    torch.testing.assert_close(hidden.grad.double(), h64.grad, atol=1e-5, rtol=0)
    if train_head:
        torch.testing.assert_close(weight.grad.double(), w64.grad, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("rotary", "longest"),
    [
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, 512),
        (LLAMA3, None),
        ({"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}, None),
    ],
)
def test_positions_that_turn_otherwise_in_long_sequences_are_known(rotary, longest):
    config = config_of("llama", rope_parameters=rotary)
    assert changing_positions(config, 512) is None
    assert changing_positions(config, 513) == (None if longest is None else (rotary["rope_type"], longest))


def test_positions_of_phi3_change_at_the_length_of_its_first_training():
    factors = {"short_factor": [1.0] * 6, "long_factor": [4.0] * 6}
    rotary = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64, **factors}
    config = config_of("phi3", rope_parameters=rotary, original_max_position_embeddings=64)
    assert changing_positions(config, 64) is None
    assert changing_positions(config, 65) == ("longrope", 64)
