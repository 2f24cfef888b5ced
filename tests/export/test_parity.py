"""The certificate of what merging costs, against numbers by hand."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_rl_lora.export.parity import Distance, _verdict, certify, layer_shares
from nemo_rl_lora.lora.targets import AdaptedModule
from nemo_rl_lora.models.source import load_tokenizer, resolve_model
from tests.generation.engine_inputs import adapted_modules, adapter_tensors


def one_module(update: float) -> tuple[dict, dict, list[AdaptedModule]]:
    """A weight of ones, whose next bf16 number is 1 + 2**-7, and an update that is the same everywhere."""
    module = AdaptedModule(name="x", in_features=4, out_features=3, dim=1, alpha=1.0, scale=1.0)
    tensors = {
        "base_model.model.x.lora_A.weight": torch.ones(1, 4),
        "base_model.model.x.lora_B.weight": torch.full((3, 1), update),
    }
    return {"x.weight": torch.ones(3, 4)}, tensors, [module]


@pytest.mark.parametrize(
    ("update", "share", "changed"),
    [(2.0**-7, 1.0, 1.0), (2.0**-9, 0.0, 0.0), (0.75 * 2.0**-7, 4 / 3, 1.0)],
)
def test_share_of_an_update_is_what_rounding_leaves_of_it(update, share, changed):
    (layer,), whole = layer_shares(*one_module(update))
    assert layer.surviving_share == pytest.approx(share)
    assert whole == pytest.approx(share)
    assert layer.relative_error == pytest.approx(abs(share - 1))
    assert layer.changed_share == changed


@pytest.fixture(scope="module")
def tiny(tiny_llama):
    return tiny_llama, load_tokenizer(resolve_model(str(tiny_llama)), None, None)


@pytest.mark.parametrize(("size", "verdict"), [(1.0, "merge"), (1e-4, "adapter")])
def test_an_update_that_rounding_loses_is_not_to_be_merged(tiny, size, verdict):
    path, tokenizer = tiny
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    adapted, tensors = adapted_modules(model), adapter_tensors(model)
    tensors = {name: tensor * (size if "lora_B" in name else 1.0) for name, tensor in tensors.items()}
    certificate = certify(model, tokenizer, tensors, adapted)
    assert certificate.verdict == verdict
    assert certificate.num_tokens == len(certificate.logprob_errors["merged_bf16"])
    assert (certificate.surviving_share > 0.9) == (verdict == "merge")
    far = certificate.distances["base_fp32"].mean_kl
    assert (far > 10 * certificate.distances["merged_bf16"].mean_kl) == (verdict == "merge")
    assert all(math.isfinite(error) for errors in certificate.logprob_errors.values() for error in errors)


@pytest.mark.parametrize(
    ("share", "merged", "verdict"),
    [(0.91, 1.9e-3, "merge"), (0.89, 1e-4, "adapter"), (0.95, 2.1e-3, "adapter"), (1.0, 0.0, "merge")],
)
def test_the_verdict_needs_most_of_the_update_and_no_more_than_twice_the_noise(share, merged, verdict):
    distances = {
        name: Distance(mean_kl=kl, mean_abs_logprob_error=0.0, max_abs_logprob_error=0.0)
        for name, kl in (("split_bf16", 1e-3), ("merged_bf16", merged))
    }
    assert _verdict(share, distances)[0] == verdict


@pytest.mark.parametrize(
    ("limit", "code"),
    [("max_gen_kl_error=1e-9", 1), ("max_token_mult_prob_error=1.00001", 1), ("max_gen_kl_error=1", 0)],
)
def test_a_run_stops_where_the_engine_is_too_far_from_the_trainer(tiny_run, limit, code):
    ended = tiny_run("policy.precision=bfloat16", f"policy.generation.parity.{limit}", "grpo.max_num_steps=1")

    assert ended.code == code, ended.err
    assert len(tiny_run.metrics()) == 1 - code
    if code:
        assert f"policy.generation.parity.{limit.partition('=')[0]}=" in ended.err
        assert "so the engine did not sample what the trainer computes" in ended.err
