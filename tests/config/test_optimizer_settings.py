"""Which optimizer and schedule a run on Megatron has, and what of `policy.megatron_cfg` is refused."""

from __future__ import annotations

import pytest
import torch

from nemo_rl_lora.config.errors import ConfigError
from nemo_rl_lora.config.layers import Layers
from nemo_rl_lora.config.load import CONFIG_DIR, load_config, resolved_tree
from nemo_rl_lora.config.megatron import MegatronSchedulerConfig
from nemo_rl_lora.config.optimizer_settings import (
    adam_settings,
    effective_values,
    megatron_adam_settings,
    megatron_lr,
)
from nemo_rl_lora.config.support import check_runnable, megatron_problems

MEGATRON = ["policy.backend=megatron", "policy.lora.dim=4"]
OPTIMIZER, SCHEDULER = "policy.megatron_cfg.optimizer", "policy.megatron_cfg.scheduler"
STEPS = range(0, 60, 7)


def loaded(*overrides: str, algorithm="grpo"):
    return load_config(None, [*MEGATRON, *overrides], algorithm)


@pytest.mark.parametrize("algorithm", ["sft", "dpo", "grpo"])
def test_the_quick_start_runs_with_the_optimizer_of_both_backends(algorithm):
    config = loaded("policy.scheduler={name: linear, warmup_steps: 5, total_steps: 50}", algorithm=algorithm)
    assert check_runnable(config) == []
    ours, usual = megatron_adam_settings(config, lora=True), adam_settings(config.policy, lora=True)
    assert [ours.lr_at(step) for step in STEPS] == [usual.lr_at(step) for step in STEPS]
    assert ours.weight_decay_at(3) == usual.weight_decay_at(3)
    assert (ours.betas, ours.eps, ours.max_grad_norm) == (usual.betas, usual.eps, usual.max_grad_norm)


def test_explicit_values_of_the_optimizer_win_one_by_one():
    schedule = "policy.scheduler={name: linear, warmup_steps: 5, total_steps: 50}"
    plain = megatron_adam_settings(loaded(schedule), lora=True)
    values = {"lr": 3e-3, "weight_decay": 0.7, "adam_beta1": 0.5, "adam_beta2": 0.6, "adam_eps": 1e-3, "clip_grad": 9.0}
    asked = megatron_adam_settings(
        loaded(schedule, *(f"{OPTIMIZER}.{key}={value}" for key, value in values.items())), lora=True
    )
    assert asked.lr_at(4) == pytest.approx(3e-3)  # the schedule stays that of the policy
    assert asked.lr_at(30) == pytest.approx(plain.lr_at(30) / plain.lr_at(4) * 3e-3)
    assert (asked.weight_decay_at(9), asked.betas, asked.eps, asked.max_grad_norm) == (0.7, (0.5, 0.6), 1e-3, 9.0)
    one = megatron_adam_settings(loaded(f"{OPTIMIZER}.adam_beta1=0.5"), lora=True)
    assert one.betas == (0.5, plain.betas[1])
    assert one.eps == plain.eps
    assert megatron_adam_settings(loaded(f"{OPTIMIZER}.clip_grad=0"), lora=True).max_grad_norm is None


def test_an_explicit_schedule_replaces_the_whole_one():
    config = loaded(f"{SCHEDULER}.lr_decay_style=linear", f"{SCHEDULER}.lr_decay_iters=40", f"{OPTIMIZER}.min_lr=1e-9")
    settings, section = megatron_adam_settings(config, lora=True), config.policy.megatron_cfg.scheduler
    peak = config.policy.optimizer.kwargs.lr
    assert section.lr_warmup_iters == 13
    assert settings.lr_at(0) == section.lr_warmup_init
    assert settings.lr_at(13) == pytest.approx(peak)
    assert settings.lr_at(40) == pytest.approx(1e-9)
    with_lr = loaded(f"{SCHEDULER}.lr_warmup_iters=3", f"{OPTIMIZER}.lr=1e-2")
    assert megatron_adam_settings(with_lr, lora=True).lr_at(50) == 1e-2


def test_recipes_of_megatron_have_their_own_values():
    file = CONFIG_DIR / "recipes" / "llm" / "sft-llama3.1-8b-1n8g-megatron-lora.yaml"
    config = load_config(file, ["cluster.gpus_per_node=1"], "sft")
    settings = megatron_adam_settings(config, lora=True)
    assert (settings.lr_at(50), settings.weight_decay_at(0), settings.eps) == (2e-5, 0.01, 1e-8)
    assert settings.betas == config.policy.optimizer.kwargs.betas
    assert megatron_problems(config) == []


def test_without_an_optimizer_of_the_policy_megatrons_is_the_one(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text(
        f"defaults: {CONFIG_DIR}/sft.yaml\n"
        "policy:\n  optimizer: null\n  megatron_cfg: {enabled: true, optimizer: {lr: 2.0e-5}}\n"
        "  dtensor_cfg: {enabled: false}\n"
    )
    config = load_config(file, [], "sft")
    settings, there = megatron_adam_settings(config, lora=False), config.policy.megatron_cfg
    assert (settings.lr_at(50), settings.weight_decay_at(0)) == (2e-5, 0.1)
    assert (settings.betas, settings.eps) == ((0.9, 0.98), 1e-5)
    assert settings.lr_at(0) == there.scheduler.lr_warmup_init
    assert check_runnable(config) == []
    both = load_config(file, ["policy.scheduler=null"], "sft")
    assert megatron_adam_settings(both, lora=False).lr_at(0) == there.scheduler.lr_warmup_init
    own = load_config(file, ["policy.scheduler={name: constant}"], "sft")
    assert megatron_adam_settings(own, lora=False).lr_at(0) == 2e-5
    later = load_config(file, ["policy.optimizer.kwargs.lr=1e-3"], "sft")
    settings = megatron_adam_settings(later, lora=False)
    assert (settings.lr_at(50), settings.betas, settings.eps) == (1e-3, (0.9, 0.98), 1e-5)
    with pytest.raises(ConfigError, match=r"^policy.optimizer=None: the DTensor backend has no other description"):
        load_config(None, ["policy.optimizer=null"], "sft")


def test_a_run_without_an_optimizer_of_the_policy_continues_as_one_with_the_same_values(tmp_path):
    file = tmp_path / "x.yaml"
    values = "weight_decay: 0.1, adam_beta1: 0.9, adam_beta2: 0.98, adam_eps: 1.0e-5, lr: 2.0e-5"
    megatron = f"megatron_cfg: {{enabled: true, optimizer: {{{values}}}}}\n  dtensor_cfg: {{enabled: false}}\n"
    trees = []
    for optimizer in ("optimizer: null", "optimizer: {kwargs: {foreach: null}}"):
        file.write_text(f"defaults: {CONFIG_DIR}/sft.yaml\npolicy:\n  {optimizer}\n  {megatron}")
        trees.append(resolved_tree(load_config(file, [], "sft")))
    first, second = (effective_values(tree, Layers()) for tree in trees)
    kwargs = {key for key in second if key.startswith("policy.optimizer.kwargs.f")}
    assert first == {key: value for key, value in second.items() if key not in kwargs}


@pytest.mark.parametrize("style", ["constant", "linear", "cosine", "inverse-square-root"])
@pytest.mark.parametrize("warmup", [0, 7])
def test_learning_rates_are_megatron_cores(style, warmup):
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    section = MegatronSchedulerConfig(
        lr_decay_style=style, lr_warmup_iters=warmup, lr_decay_iters=40, lr_warmup_init=1e-5
    )
    judge = OptimizerParamScheduler(
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0),
        init_lr=1e-5,
        max_lr=1e-3,
        min_lr=1e-4,
        lr_warmup_steps=warmup,
        lr_decay_steps=40,
        lr_decay_style=style,
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=40,
        wd_incr_style="constant",
    )
    for step in range(50):
        assert megatron_lr(section, 1e-3, 1e-4, step) == pytest.approx(judge.get_lr({}), rel=1e-12), step
        judge.step(1)


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        ([f"{SCHEDULER}.lr_decay_style=WSD"], f"{SCHEDULER}.lr_decay_style='WSD': no key says"),
        (
            [f"{SCHEDULER}.lr_decay_style=cosine", f"{SCHEDULER}.lr_decay_iters=13"],
            f"{SCHEDULER}.lr_decay_iters=13: the cosine schedule has to end after its warm-up of 13 steps",
        ),
        (
            [f"{SCHEDULER}.lr_decay_style=linear", f"{OPTIMIZER}.lr=1e-8"],
            f"{OPTIMIZER}.min_lr=5e-07: is where the learning rate of 1e-08 decays to",
        ),
        ([f"{SCHEDULER}.end_weight_decay=0.5"], f"{SCHEDULER}.end_weight_decay=0.5: weight decay is constant here"),
        (["policy.megatron_cfg.sequence_parallel=true"], "policy.megatron_cfg.sequence_parallel=True: "),
        (["policy.lora.a2a=true"], "policy.lora.a2a=True: one all-to-all"),
        (["policy.dtensor_cfg.activation_checkpointing=true"], "policy.dtensor_cfg.activation_checkpointing=True: is"),
    ],
)
def test_what_is_not_run_is_refused_by_name(overrides, error):
    problems = check_runnable(loaded(*overrides))
    assert [problem for problem in problems if problem.startswith(error)], problems
    assert len(problems) == 1


@pytest.mark.parametrize(
    "override",
    [
        f"{OPTIMIZER}.params_dtype=bfloat16",
        "policy.megatron_cfg.distributed_data_parallel_config.grad_reduce_in_fp32=true",
    ],
)
def test_what_the_backend_has_no_setting_for_is_refused_when_the_file_is_loaded(override):
    with pytest.raises(
        ConfigError, match=rf"^{override.split('=')[0]}=.*: only .* The Megatron backend .* remove the k"
    ):
        loaded(override)


def test_what_is_done_anyway_may_be_asked_for():
    asked = ["use_fused_linear_logprobs=true", "bias_activation_fusion=false", "freeze_moe_router=false"]
    asked.append("optimizer.use_distributed_optimizer=auto")
    assert check_runnable(loaded(*(f"policy.megatron_cfg.{key}" for key in asked))) == []
