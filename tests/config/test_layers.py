"""Who set what: what the user set is honoured or refused by name, and what was only inherited gives way."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
import yaml

from nemo_rl_lora.checkpoints.record import config_differences
from nemo_rl_lora.config.errors import ConfigError
from nemo_rl_lora.config.load import CONFIG_DIR, algorithm_of, load_config, resolved_tree, resolved_yaml
from nemo_rl_lora.config.optimizer_settings import adam_settings, megatron_adam_settings
from nemo_rl_lora.config.support import check_runnable

RECIPES = CONFIG_DIR / "recipes" / "llm"
MEGATRON = ["policy.backend=megatron", "policy.lora.dim=4"]
OPTIMIZER, SCHEDULER = "policy.megatron_cfg.optimizer", "policy.megatron_cfg.scheduler"
STEPS = (0, 1, 12, 13, 29, 49, 50, 60)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def quick(*overrides: str, algorithm="grpo"):
    return load_config(None, list(overrides), algorithm)


def on_megatron(*overrides: str, algorithm="grpo"):
    return megatron_adam_settings(quick(*MEGATRON, *overrides, algorithm=algorithm), lora=True)


def of_recipe(name: str):
    file = RECIPES / f"{name}.yaml"
    config = load_config(file, ["cluster.gpus_per_node=1"], algorithm_of(file))
    return config, megatron_adam_settings(config, lora=True)


# Layers


def test_layers_are_base_file_quick_start_files_and_command_line_in_this_order(tmp_path):
    mine = write(
        tmp_path / "mine.yaml", f"defaults: {CONFIG_DIR}/quickstart/grpo.yaml\ngrpo: {{seed: 1, val_period: 2}}"
    )
    top = write(tmp_path / "top.yaml", f"defaults: {mine.name}\ngrpo: {{val_period: 3}}")
    config = load_config(top, ["grpo.val_batch_size=4"], "grpo")
    keys = ["loss_fn.ratio_clip_min", "grpo.max_num_epochs", "grpo.seed", "grpo.val_period", "grpo.val_batch_size"]
    assert [config.layers.layer_of(key) for key in keys] == [0, 1, 2, 3, 4]
    assert [config.is_set(key) for key in keys] == [False, False, True, True, True]
    assert [layer.name for layer in config.layers.layers] == [
        "quickstart/grpo.yaml",
        str(tmp_path / "mine.yaml"),
        str(top),
        "command line",
    ]


@pytest.mark.parametrize(
    ("overrides", "key", "is_set"),
    [
        (["policy.scheduler=null"], "policy.scheduler", True),
        (["policy.scheduler.min_lr_ratio=0.5"], "policy.scheduler", True),
        (["policy.scheduler=null"], "policy.scheduler.name", True),
        (["policy.optimizer.kwargs.betas.1=0.9"], "policy.optimizer.kwargs.betas", True),
        (["policy.optimizer={kwargs: {eps: 0.1}}"], "policy.optimizer.kwargs.eps", True),
        (["policy.optimizer={kwargs: {eps: 0.1}}"], "policy.optimizer.kwargs.lr", False),
        (["policy.optimizer.kwargs.lr=1", "~policy.optimizer.kwargs.lr"], "policy.optimizer.kwargs.lr", False),
        (["~policy.megatron_cfg.peft"], "policy.megatron_cfg.peft.dim", False),
        (["data.train={_override_: true, dataset_name: gsm8k}"], "data.train.low", False),
        (["policy.optimizer.kwargs.lr=2.5e-4"], "policy.optimizer.kwargs.lr", True),  # the value it has anyway
    ],
)
def test_the_command_line_sets_what_it_writes(overrides, key, is_set):
    assert quick(*overrides).is_set(key) is is_set


def test_layers_survive_copies_and_do_not_change_equality():
    config = quick("grpo.seed=42")
    for twin in (
        config.model_copy(),
        config.model_copy(deep=True),
        copy.copy(config),
        pickle.loads(pickle.dumps(config)),
    ):
        assert twin.is_set("grpo.seed")
    assert config == quick()
    assert not type(config).model_validate(config.model_dump(by_alias=True)).is_set("grpo.seed")


# One thing, two keys


def test_a_learning_rate_that_equals_a_base_files_is_honoured():
    settings = on_megatron(f"{OPTIMIZER}.lr=5e-6")
    assert settings.lr_at(0) == 5e-6
    assert settings.lr_at(30) == pytest.approx(5e-7)  # the quick start's schedule
    assert on_megatron().lr_at(0) == 2.5e-4


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ("weight_decay=0.01", lambda settings: settings.weight_decay_at(0) == 0.01),
        ("adam_beta2=0.999", lambda settings: settings.betas == (0.7, 0.999)),
        ("adam_eps=1e-8", lambda settings: settings.eps == 1e-8),
        ("clip_grad=1.0", lambda settings: settings.max_grad_norm == 1.0),
    ],
)
def test_every_value_of_megatrons_optimizer_may_be_the_inherited_one(value, read, tmp_path):
    lower = "{max_grad_norm: 7.0, optimizer: {kwargs: {weight_decay: 0.5, betas: [0.7, 0.8], eps: 0.1}}}"
    file = write(tmp_path / "x.yaml", f"defaults: {CONFIG_DIR}/quickstart/grpo.yaml\npolicy: {lower}")
    config = load_config(file, [*MEGATRON, f"{OPTIMIZER}.{value}"], "grpo")
    assert read(megatron_adam_settings(config, lora=True))


def test_the_later_layer_wins_and_in_one_layer_megatrons_own_key(tmp_path):
    own = f"policy: {{megatron_cfg: {{optimizer: {{lr: 1e-3}}}}}}\ndefaults: {CONFIG_DIR}/quickstart/grpo.yaml"
    file = write(tmp_path / "x.yaml", own)
    ours, theirs = "policy.optimizer.kwargs.lr=1e-2", f"{OPTIMIZER}.lr=1e-1"
    for overrides, lr in (([], 1e-3), ([ours], 1e-2), ([theirs], 1e-1), ([ours, theirs], 1e-1), ([theirs, ours], 1e-1)):
        config = load_config(file, [*MEGATRON, *overrides], "grpo")
        assert megatron_adam_settings(config, lora=True).lr_at(0) == lr
        assert check_runnable(config) == []


@pytest.mark.parametrize("norm", ["0.5", "null"])
def test_a_clip_that_the_base_file_takes_from_the_policy_follows_it(norm):
    assert on_megatron(f"policy.max_grad_norm={norm}").max_grad_norm == yaml.safe_load(norm)


def test_weight_decay_has_three_keys_on_megatron():
    ours, theirs = "policy.optimizer.kwargs.weight_decay=0.3", f"{OPTIMIZER}.weight_decay=0.4"
    both = [f"{SCHEDULER}.start_weight_decay=0.5", f"{SCHEDULER}.end_weight_decay=0.5"]
    asked = {0.0: [], 0.3: [ours], 0.4: [ours, theirs], 0.5: [ours, theirs, *both]}
    for value, overrides in asked.items():
        assert on_megatron(*overrides).weight_decay_at(3) == value


@pytest.mark.parametrize("algorithm", ["sft", "dpo", "grpo"])
def test_a_quick_start_trains_the_same_on_both_backends(algorithm):
    ours, usual = on_megatron(algorithm=algorithm), adam_settings(quick(algorithm=algorithm).policy, lora=True)
    assert [ours.lr_at(step) for step in STEPS] == [usual.lr_at(step) for step in STEPS]
    assert (ours.weight_decay_at(0), ours.betas, ours.eps) == (usual.weight_decay_at(0), usual.betas, usual.eps)


@pytest.mark.parametrize("warmup", [13, 50])
def test_a_warmup_is_honoured_though_it_was_inherited_already(warmup, tmp_path):
    base = RECIPES / "grpo-qwen3-8b-base-1n8g-megatron-lora.yaml"  # it sets 50 over the base file's 13
    file = write(tmp_path / "mine.yaml", f"defaults: {base}\npolicy: {{scheduler: {{name: constant}}}}")
    plain = megatron_adam_settings(load_config(file, [], "grpo"), lora=True)
    assert [plain.lr_at(step) for step in STEPS] == [5e-6] * len(STEPS)
    asked = megatron_adam_settings(load_config(file, [f"{SCHEDULER}.lr_warmup_iters={warmup}"], "grpo"), lora=True)
    assert asked.lr_at(0) == 5e-7
    assert asked.lr_at(warmup - 1) < asked.lr_at(warmup) == 5e-6


def test_full_fine_tuning_has_the_learning_rate_that_was_set_last():
    lr = "policy.optimizer.kwargs.lr=2.5e-4"
    assert quick().policy.optimizer.learning_rate(lora=False) == 2e-6
    assert quick(lr).policy.optimizer.learning_rate(lora=False) == 2.5e-4
    both = quick(lr, "policy.optimizer.full_finetuning_lr=2e-6")
    assert both.policy.optimizer.learning_rate(lora=False) == 2e-6


# NeMo RL's recipes


def judge(peak: float, start: float, warmup: int):
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    return OptimizerParamScheduler(
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0),
        init_lr=start,
        max_lr=peak,
        min_lr=start,
        lr_warmup_steps=warmup,
        lr_decay_steps=1000,
        lr_decay_style="constant",
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=1000,
        wd_incr_style="constant",
    )


@pytest.mark.parametrize(
    ("name", "peak", "start", "warmup", "others"),
    [
        ("sft-llama3.1-8b-1n8g-megatron-lora", 2e-5, 4.9999e-6, 50, (0.01, (0.9, 0.98), 1e-8)),
        ("dpo-llama3.1-8b-instruct-1n8g-megatron-lora", 2e-5, 2e-6, 20, (0.1, (0.9, 0.98), 1e-8)),
        ("grpo-nanov3-30BA3B-2n8g-megatron-lora", 5e-6, 5e-7, 13, (0.01, (0.9, 0.999), 1e-8)),
        ("grpo-qwen3-8b-base-1n8g-megatron-lora", 5e-6, 5e-7, 50, (0.01, (0.9, 0.999), 1e-8)),
    ],
)
def test_recipes_train_on_megatron_as_nemo_rl_trains_them(name, peak, start, warmup, others):
    _, settings = of_recipe(name)
    scheduler = judge(peak, start, warmup)
    for step in range(70):
        assert settings.lr_at(step) == pytest.approx(scheduler.get_lr({}), rel=1e-12), step
        scheduler.step(1)
    assert (settings.weight_decay_at(0), settings.betas, settings.eps) == others
    assert settings.max_grad_norm == 1.0


def test_a_warmup_that_was_inherited_does_not_start_above_the_peak():
    name = "sft-llama3.1-8b-1n8g-megatron-lora"
    config = load_config(RECIPES / f"{name}.yaml", [f"{OPTIMIZER}.lr=1e-6", "cluster.gpus_per_node=1"], "sft")
    assert {megatron_adam_settings(config, lora=True).lr_at(step) for step in STEPS} == {1e-6}
    assert check_runnable(config) == []
    asked = quick(*MEGATRON, f"{SCHEDULER}.lr_warmup_init=1")
    (problem,) = check_runnable(asked)
    assert problem.startswith(f"{SCHEDULER}.lr_warmup_init=1.0: is where the warm-up")


# What gives way


@pytest.mark.parametrize("algorithm", ["sft", "dpo"])
def test_the_inherited_loop_of_adamw_gives_way_to_what_the_device_has(algorithm):
    config = quick(algorithm=algorithm)
    settings = adam_settings(config.policy, lora=True)
    assert (settings.foreach, settings.fused) == (None, None)
    asked = quick("policy.optimizer.kwargs.fused=false", algorithm=algorithm)
    settings = adam_settings(asked.policy, lora=True)
    assert (settings.foreach, settings.fused) == (None, False)
    loop = {"policy": {"optimizer": {"kwargs": {"foreach": False, "fused": False}}}}
    assert (
        config_differences(loop | {"x": 1}, resolved_tree(config))
        .keys()
        .isdisjoint({"policy.optimizer.kwargs.foreach", "policy.optimizer.kwargs.fused"})
    )


@pytest.mark.parametrize("part", ["train", "validation"])
def test_an_inherited_split_gives_way_to_a_file(part, tmp_path):
    file = f"data.{part}.data_path={tmp_path}/rows.jsonl"
    assert getattr(quick(file, algorithm="sft").data, part).split is None
    split = f"data.{part}.split=train"
    assert getattr(quick(file, split, algorithm="sft").data, part).split == "train"  # refused when the file is read
    directory = quick(f"data.{part}.data_path={tmp_path}", algorithm="sft").data
    assert getattr(directory, part).split == {"train": "train", "validation": "test"}[part]


@pytest.mark.parametrize(
    ("algorithm", "override", "kept"),
    [
        ("grpo", "data.train.dataset_name=OpenMathInstruct-2", {"seed": 42}),
        ("grpo", "data.train={dataset_name: jsonl, data_path: x.jsonl}", {"data_path": "x.jsonl"}),
        ("grpo", "data.train={dataset_name: reasoning_gym, task: chain_sum}", {"task": "chain_sum", "num_rows": 1000}),
        ("sft", "data.train.dataset_name=squad", {"data_path": None, "split": None}),
        ("sft", "data.train={dataset_name: openai_format, data_path: x}", {"data_path": "x", "split": "train"}),
        ("dpo", "data.train.dataset_name=HelpSteer3", {"data_path": None, "split_validation_size": 0.2}),
        (
            "sft",
            "data.train.dataset_name=gsm8k",
            {"data_path": "examples/data/gsm8k", "split": "train"},
        ),  # as inherited
    ],
)
def test_inherited_keys_of_another_dataset_give_way(algorithm, override, kept):
    section = quick(override, algorithm=algorithm).data.train
    assert {key: getattr(section, key) for key in kept} == kept


def test_inherited_sizes_of_megatrons_groups_give_way_in_one_process():
    base, on_megatron = CONFIG_DIR / "dpo.yaml", ["policy.backend=megatron", "policy.megatron_cfg.peft.enabled=true"]
    size, shared = "policy.megatron_cfg.tensor_model_parallel_size", "policy.megatron_cfg.sequence_parallel"
    for overrides, expected in (
        ([], (1, False)),
        (["cluster.gpus_per_node=2"], (2, True)),
        ([f"{size}=2", f"{shared}=true"], (2, True)),
    ):
        megatron = load_config(base, [*on_megatron, *overrides], "dpo").policy.megatron_cfg
        assert (megatron.tensor_model_parallel_size, megatron.sequence_parallel) == expected


def test_keys_of_another_dataset_that_the_user_set_are_refused():
    with pytest.raises(ConfigError, match=r"^data.train.low=3: has no meaning with dataset_name='OpenMathInstruct-2'"):
        quick("data.train.dataset_name=OpenMathInstruct-2", "data.train.low=3")


@pytest.mark.parametrize(
    "scheduler", ["name: constant", "name: wsd, decay_steps: 3", "name: torch.optim.lr_scheduler.LinearLR"]
)
def test_inherited_keys_of_another_schedule_give_way(scheduler):
    assert quick(f"policy.scheduler={{{scheduler}}}").policy.scheduler.name == scheduler.split()[1].strip(",")
    with pytest.raises(ConfigError, match="total_steps"):
        quick("policy.scheduler={name: constant, total_steps: 9}")


# What is not used


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["policy.megatron_cfg.peft.dim=16"], "policy.megatron_cfg.peft.dim=16"),  # the quick start's value
        (["policy.megatron_cfg.peft.dim=32"], "policy.megatron_cfg.peft.dim=32"),  # the schema's
        (["policy.megatron_cfg.peft.dim=8"], "policy.megatron_cfg.peft.dim=8"),  # the base file's
        (["policy.megatron_cfg.optimizer.lr=5e-6"], "policy.megatron_cfg.optimizer.lr=5e-06"),
        (
            ["policy.generation.vllm_cfg.gpu_memory_utilization=0.6"],
            "policy.generation.vllm_cfg.gpu_memory_utilization",
        ),
        (["policy.generation.timeout_seconds=1800"], "policy.generation.timeout_seconds=1800.0"),
    ],
)
def test_a_key_of_an_unused_block_is_refused_whatever_its_value(overrides, named):
    (problem,) = check_runnable(quick("policy.dtensor_cfg.lora_cfg.enabled=true", *overrides))
    assert problem.startswith(named)
    assert ": is read by nothing, since " in problem


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["policy.dtensor_cfg.lora_cfg.dim=16"], "policy.dtensor_cfg.lora_cfg.dim=16"),
        (["policy.lora.dim=4", "policy.dtensor_cfg.lora_cfg.dim=16"], "policy.dtensor_cfg.lora_cfg.dim=16"),
        ([*MEGATRON, "policy.megatron_cfg.peft.dim=16"], "policy.megatron_cfg.peft.dim=16"),
        ([*MEGATRON, "policy.dtensor_cfg.lora_cfg.dim=16"], "policy.dtensor_cfg.lora_cfg.dim=16"),
    ],
)
def test_a_key_of_a_lora_block_that_is_off_is_refused(overrides, named):
    (problem,) = check_runnable(quick(*overrides))
    assert problem.startswith(f"{named}: is read by nothing, since ")


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["policy.megatron_cfg.enabled=false", "policy.dtensor_cfg.enabled=true"],
        ["policy.lora=null"],
        ["policy.megatron_cfg.peft.enabled=false", "policy.dtensor_cfg.lora_cfg.enabled=true"],
        ["policy.dtensor_cfg.lora_cfg={enabled: false, dim: 4}"],  # switched off on purpose
        [*MEGATRON, "policy.dtensor_cfg.lora_cfg={enabled: false, dim: 4}"],
        ["~policy.megatron_cfg"],
    ],
)
def test_switches_and_deletions_are_no_values(overrides):
    assert check_runnable(quick(*overrides)) == []


# Resolved files


@pytest.mark.parametrize(
    ("algorithm", "overrides"),
    [
        ("grpo", [*MEGATRON, f"{OPTIMIZER}.lr=5e-6", "grpo.seed=42"]),
        ("grpo", [*MEGATRON, f"{SCHEDULER}.lr_warmup_iters=13"]),
        ("sft", MEGATRON),
        ("dpo", ["policy.dtensor_cfg.lora_cfg.enabled=true"]),
        ("grpo", ["policy.megatron_cfg.peft.dim=16"]),
        ("sft", ["data.train.data_path=x.jsonl"]),
    ],
)
def test_a_resolved_file_loads_to_the_same_configuration_and_decisions(algorithm, overrides, tmp_path):
    config = quick(*overrides, algorithm=algorithm)
    again = load_config(write(tmp_path / "config.yaml", resolved_yaml(config)), [], algorithm)
    assert again == config
    assert again.layers.layers == config.layers.layers
    assert check_runnable(again) == check_runnable(config)
    ours, theirs = (megatron_adam_settings(one, lora=True) for one in (config, again))
    assert [ours.lr_at(step) for step in STEPS] == [theirs.lr_at(step) for step in STEPS]
    assert config_differences(resolved_tree(config), resolved_tree(again)) == {}
    later = load_config(tmp_path / "config.yaml", ["policy.optimizer.kwargs.lr=1"], algorithm)
    assert megatron_adam_settings(later, lora=True).lr_at(50) != ours.lr_at(50)  # the command line is the last layer


def test_a_record_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"^set_by=\[1\]: .* records here who set which key"):
        load_config(write(tmp_path / "x.yaml", f"defaults: {CONFIG_DIR}/sft.yaml\nset_by: [1]"), [], "sft")


def saved(*overrides: str, algorithm="grpo") -> dict:
    return yaml.safe_load(yaml.safe_dump(resolved_tree(quick(*overrides, algorithm=algorithm))))


def test_continuing_compares_what_is_in_force():
    plain, asked = saved(*MEGATRON), saved(*MEGATRON, f"{OPTIMIZER}.lr=5e-6")
    assert config_differences(plain, asked) == {"policy.optimizer.kwargs.lr": (2.5e-4, 5e-6)}
    other_words = saved(*MEGATRON, "policy.optimizer.kwargs.lr=5e-6")
    assert config_differences(asked, other_words) == {}
    assert config_differences(saved("policy.lora.dim=4"), saved(*MEGATRON)) == {}
    schedule = config_differences(plain, saved(*MEGATRON, f"{SCHEDULER}.lr_warmup_iters=13"))
    assert {"policy.scheduler.name", f"{SCHEDULER}.lr_warmup_iters"} <= schedule.keys()


@pytest.mark.parametrize("overrides", [["policy.lora.dim=4"], MEGATRON, [*MEGATRON, f"{OPTIMIZER}.lr=1e-3"]])
def test_checkpoints_of_the_version_before_continue(overrides, tmp_path):
    old = saved(*overrides)
    del old["set_by"]
    assert config_differences(old, saved(*overrides)) == {}
    file = write(tmp_path / "config.yaml", yaml.safe_dump(old))
    problems = "\n".join(check_runnable(load_config(file, [], "grpo")))
    assert "says with `set_by: []` that nothing in it was chosen" in problems
    file = write(tmp_path / "config.yaml", yaml.safe_dump(old | {"set_by": []}))
    assert check_runnable(load_config(file, [], "grpo")) == []


def test_continuing_an_old_checkpoint_by_its_own_file_never_changes_the_learning_rate_in_silence():
    old = saved(*MEGATRON)
    now = old | {"set_by": []}
    del old["set_by"]
    assert config_differences(old, now)["policy.optimizer.kwargs.lr"] == (2.5e-4, 5e-6)
