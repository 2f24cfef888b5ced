"""`policy.generation.lora_sync: auto`: which form an adapter is served in, why, and that a resume keeps to it."""

from __future__ import annotations

import json

import pytest
import torch

from nemo_rl_lora.config.errors import ConfigError
from nemo_rl_lora.config.load import load_config
from nemo_rl_lora.export.parity import layer_shares
from nemo_rl_lora.generation.sync_mode import choose_sync, expected_share, surviving_share
from nemo_rl_lora.generation.vllm.generation import adapter_problems
from nemo_rl_lora.lora.merge import Survival
from nemo_rl_lora.lora.spec import LoraSpec
from nemo_rl_lora.lora.targets import AdaptedModule
from tests.driver import TinyRun, run_driver, without_seconds

AUTO = "policy.generation.lora_sync=auto"
MODULE = AdaptedModule(name="q_proj", in_features=64, out_features=64, dim=16, alpha=32, scale=2.0)
SPEC = LoraSpec(dim=16, alpha=32)
UNSERVED = ["policy.generation.lora_sync='adapter': vLLM serves ranks up to 512."]

# (overrides, engine, spec, problems) -> (mode, whether the first update is measured, words of the reason)
RULE = {
    "asked for": (["lora_sync=merged"], "in_process", SPEC, [], "merged", False, "as asked for"),
    "by NeMo RL's name": (["lora_refit_mode=native"], "vllm", SPEC, [], "adapter", False, "as asked for"),
    "no adapter": ([], "in_process", None, [], "merged", False, "there is no adapter"),
    "replay": ([], "replay", SPEC, [], "merged", False, "serves nothing"),
    "bf16": ([], "in_process", SPEC, [], "adapter", True, "merging in bfloat16 would keep about 75"),
    "bf16 vLLM": ([], "vllm", SPEC, [], "adapter", True, "merging in bfloat16 would keep about 75"),
    "bf16 vLLM that cannot": ([], "vllm", SPEC, UNSERVED, "merged", True, "vLLM cannot serve this adapter; merging in"),
    "vLLM's limits elsewhere": ([], "in_process", SPEC, UNSERVED, "adapter", True, "merging in bfloat16"),
    "a branch in fp32": (
        [],
        "in_process",
        LoraSpec(dim=16, alpha=32, dtype="float32"),
        [],
        "adapter",
        False,
        "float32",
    ),
}


@pytest.mark.parametrize("case", RULE)
def test_the_rule(case):
    overrides, engine, spec, problems, mode, is_open, reason = RULE[case]
    set_here = [f"policy.generation.{override}" for override in overrides or ["lora_sync=auto"]]
    config = load_config(None, ["policy.precision=bfloat16", *set_here], "grpo")
    chosen = choose_sync(config.policy, engine, spec, [MODULE], problems, lr=2.5e-4, typical_weight=0.1)
    assert (chosen.mode, chosen.is_open) == (mode, is_open)
    assert reason in chosen.reason
    assert (chosen.warning is not None) == (case == "bf16 vLLM that cannot")


@pytest.mark.parametrize("engine", ["in_process", "vllm"])
def test_an_engine_in_fp32_is_sent_merged_weights(engine):
    config = load_config(None, ["policy.precision=float32", AUTO], "grpo")
    chosen = choose_sync(config.policy, engine, SPEC, [MODULE], UNSERVED, lr=2.5e-4, typical_weight=0.1)
    assert (chosen.mode, chosen.is_open, chosen.warning) == ("merged", False, None)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("has_gpu", [True, False])
def test_an_adapter_in_fp32_is_refused_by_vllm_on_a_gpu_alone(precision, has_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    asked = ["policy.generation.backend=vllm", f"policy.generation.vllm_cfg.precision={precision}"]
    config = load_config(None, asked, "grpo")
    assert config.policy.generation is not None
    problems = adapter_problems(config.policy.generation, SPEC, [MODULE])
    if has_gpu and precision == "float32":
        (problem,) = problems
        assert problem.startswith("policy.generation.lora_sync='adapter': vLLM's LoRA kernels for GPUs take no fp32")
    else:
        assert problems == []


@pytest.mark.parametrize("change", [1e-5, 1e-4, 1e-3])
def test_the_expected_share_is_near_what_rounding_keeps(change):
    """Weights that are normal, and changes of one size and either sign."""
    torch.manual_seed(0)
    weight = (0.05 * torch.randn(1000, 1000)).to(torch.bfloat16)
    update = change * torch.randn(1000, 1000).sign()
    found = Survival()
    found.add(update, (weight.float() + update).to(torch.bfloat16).float() - weight.float())
    assert found.share == pytest.approx(expected_share(change, 0.05, "bfloat16"), abs=0.03)


def test_the_measured_share_is_that_of_the_certificate():
    torch.manual_seed(0)
    weights = {"q_proj.weight": 0.05 * torch.randn(64, 64)}
    adapter = {
        "base_model.model.q_proj.lora_A.weight": torch.randn(16, 64) / 8,
        "base_model.model.q_proj.lora_B.weight": 1e-4 * torch.randn(64, 16),
    }
    _, certified = layer_shares(weights, adapter, [MODULE])
    assert 0.2 < certified < 0.9
    assert surviving_share(adapter, [MODULE], weights.__getitem__, torch.bfloat16) == certified
    assert surviving_share(adapter, [MODULE], weights.__getitem__, torch.float32) > 0.999


@pytest.mark.parametrize(("refit", "sync"), [("native", "merged"), ("merged", "adapter")])
def test_two_names_that_disagree_are_refused(refit, sync):
    overrides = [f"policy.generation.lora_refit_mode={refit}", f"policy.generation.lora_sync={sync}"]
    with pytest.raises(ConfigError, match=f"policy.generation.lora_refit_mode='{refit}': is NeMo RL's name of"):
        load_config(None, overrides, "grpo")


def test_two_names_that_agree_are_one():
    both = ["policy.generation.lora_refit_mode=native", "policy.generation.lora_sync=adapter"]
    assert load_config(None, both, "grpo").policy.generation.asked_sync == "adapter"


BF16 = (AUTO, "policy.precision=bfloat16", "policy.optimizer.kwargs.lr=1e-4")


def log_of(tiny_run: TinyRun, experiment: int = 1) -> str:
    return (tiny_run.logs / f"exp_{experiment:03d}" / "run.log").read_text()


@pytest.mark.parametrize(
    ("overrides", "said"), [(BF16, "adapter (merging in bfloat16 would keep about"), ((AUTO,), "merged (")]
)
def test_the_plan_says_which_and_why(tiny_run, overrides, said):
    ended = run_driver("--plan", *tiny_run.arguments(*overrides))
    assert ended.code == 0, ended.err
    assert f"policy.generation.lora_sync=auto: {said}" in " ".join(ended.out.split())


def test_fp32_is_served_merged(tiny_run):
    assert tiny_run(AUTO).code == 0
    assert "policy.generation.lora_sync: merged (merging in float32 keeps an update" in log_of(tiny_run)
    assert all(line["gen_kl_error"] < 1e-9 for line in tiny_run.metrics())
    assert not list(tiny_run.checkpoints.rglob("lora_sync.json"))


def test_bf16_is_served_as_the_adapter_which_the_trainer_computes(tiny_run):
    assert tiny_run(*BF16, "grpo.max_num_steps=4").code == 0
    merged = tiny_run.arguments(*BF16, "grpo.max_num_steps=4", "policy.generation.lora_sync=merged")
    assert run_driver(*merged, "checkpointing.enabled=false").code == 0

    assert "policy.generation.lora_sync=auto: adapter (merging in bfloat16 would keep" in log_of(tiny_run)
    assert "of the update at step 1)" in log_of(tiny_run)
    errors = [[line["gen_kl_error"] for line in tiny_run.metrics(experiment=i)[1:]] for i in (1, 2)]
    assert max(errors[0]) < min(errors[1]), errors


@pytest.mark.parametrize(("lr", "mode"), [("1e-4", "adapter"), ("0.3", "merged")])
def test_a_run_that_continues_serves_as_it_was_decided(tiny_run, tmp_path, lr, mode):
    """At a large rate merging keeps the first update, and the run goes over; what a later adapter would say is not
    asked."""
    usual = (AUTO, "policy.precision=bfloat16", f"policy.optimizer.kwargs.lr={lr}", "checkpointing.save_period=1")
    whole = [*usual, "grpo.max_num_steps=4", f"checkpointing.checkpoint_dir={tmp_path}/whole"]
    assert tiny_run(*whole).code == 0
    assert tiny_run(*usual, "grpo.max_num_steps=2").code == 0
    decided = json.loads((tiny_run.checkpoints / "step_2" / "lora_sync.json").read_text())
    assert (decided["mode"], decided["step"]) == (mode, 1)
    assert (decided["surviving_share"] >= 0.9) == (mode == "merged")
    assert tiny_run(*usual, "grpo.max_num_steps=4").code == 0

    assert f"policy.generation.lora_sync=auto: {mode}, as decided at step 1" in log_of(tiny_run, 3)
    straight, continued = (without_seconds(tiny_run.metrics(experiment=i)) for i in (1, 3))
    for line in (*straight[2:], *continued):
        line.pop("sync_confirmed", None)  # an engine that has just started has no version before
    assert straight[2:] == continued
