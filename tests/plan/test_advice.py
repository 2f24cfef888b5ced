"""Advice of a plan: said for settings far from use, silent for usual ones, and never a problem."""

import math

import pytest
from transformers import LlamaConfig

from nemo_rl_lora.config.load import load_config
from nemo_rl_lora.plan.plan import make_plan
from nemo_rl_lora.plan.show import render_plan
from tests.plan.test_plan import TINY, _text

LORA = "policy.dtensor_cfg.lora_cfg"
USUAL = (f"{LORA}.enabled=true", f"{LORA}.dim=16", f"{LORA}.alpha=32", "policy.optimizer.kwargs.lr=2e-4")
SMALL = ("policy.optimizer.kwargs.lr=1e-6", "policy.scheduler=null")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model of real widths, so that A's elements are as small as they are in use."""
    path = tmp_path_factory.mktemp("model")
    LlamaConfig(**TINY | {"hidden_size": 512, "intermediate_size": 1024}).save_pretrained(path)
    return path


def _advice(model, *overrides, algorithm="sft"):
    plan = make_plan(load_config(None, [f"policy.model_name={model}", *overrides], algorithm))
    assert plan.problems == ()
    assert render_plan(plan)
    return plan.advice


def test_usual_settings_get_no_advice(model):
    assert _advice(model, *USUAL, "policy.precision=float32") == ()
    assert _advice(model, "policy.optimizer.full_finetuning_lr=5e-6") == ()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["policy.optimizer.kwargs.lr=5e-6"], "learning rate 5e-06: that of full fine-tuning"),
        ([f"{LORA}.dim=1", f"{LORA}.alpha=1"], f"{LORA}.dim=1: ranks in use are 4 to 256"),
        ([f"{LORA}.dim=1024", f"{LORA}.alpha=1024"], "vLLM serves such an adapter not at all"),
        ([f"{LORA}.alpha=1600"], f"{LORA}.alpha=1600: B A is multiplied by 100"),
        ([f"{LORA}.dim=24"], "vLLM serves such an adapter as one of rank 32 (its ranks: 1, 8, 16, 32"),
        (
            [f"{LORA}.match_all_linear=false", f"{LORA}.target_modules=[q_proj]"],
            # a layer has 512 x 512 twice and 512 x 256 twice in attention, 3 x 512 x 1024 in the MLP, and two norms
            f"the adapter reaches {512 * 512 / (512 * 512 * 3 + 3 * 512 * 1024):.0%} of the weights",
        ),
    ],
)
def test_settings_far_from_use_are_named_with_a_source(model, overrides, said):
    found = _advice(model, *USUAL, "policy.precision=float32", *overrides)
    assert any(said in sentence for sentence in found), found


def test_full_fine_tuning_at_an_adapters_rate_is_named(model):
    (sentence,) = _advice(model, "policy.optimizer.full_finetuning_lr=null", "policy.optimizer.kwargs.lr=2e-4")
    assert sentence.startswith("learning rate 0.0002: that of an adapter")


def test_steps_that_a_merge_rounds_away_are_counted(model):
    """By hand: bf16 keeps 8 bits, so half of the spacing at 0.02 is 0.02 / 256; a step moves B by lr, and B A by
    scale * sqrt(dim) * std(A) of it; of q, k, v, o, gate, up and down only down has 1024 columns."""
    change = 1e-6 * 2 * math.sqrt(16) * math.sqrt(2 / (512 + 16))
    num_steps = math.ceil(0.02 / 256 / change) - 1
    found = _advice(model, *USUAL, *SMALL, "policy.precision=bfloat16", "sft.max_num_steps=1000")
    assert any(f"a merged export in bfloat16: about {num_steps} steps change" in sentence for sentence in found), found

    merged = ("policy.precision=bfloat16", "policy.generation.lora_sync=merged")
    rollouts = _advice(model, *USUAL, *SMALL, *merged, "grpo.max_num_steps=10", algorithm="grpo")
    assert any("lora_sync=merged in bfloat16: all 10 steps" in sentence for sentence in rollouts), rollouts
    adapter = "policy.generation.lora_sync=adapter"
    spared = _advice(model, *USUAL, *SMALL, adapter, "policy.precision=bfloat16", algorithm="grpo")
    assert not any("lora_sync=merged" in sentence for sentence in spared)


def test_advice_is_shown(model):
    plan = make_plan(load_config(None, [f"policy.model_name={model}", *USUAL, *SMALL], "sft"))
    assert "Advice: - learning rate 1e-06: that of full fine-tuning" in _text(plan)
