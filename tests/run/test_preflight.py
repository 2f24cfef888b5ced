"""The checks before weights load: one list, of which a start says every problem, as a plan does."""

import contextlib
import shutil
from types import SimpleNamespace

import pytest
from filelock import FileLock

from nemo_rl_lora.checkpoints.steps import LOCK_FILE
from nemo_rl_lora.config.load import load_config
from nemo_rl_lora.policy.dtensor.sharded_files import STATE_FILE
from nemo_rl_lora.run.drivers import train
from nemo_rl_lora.run.preflight import PREFLIGHT, Start, check_start, plan_of
from nemo_rl_lora.run.start import _read, _written
from tests.driver import run_driver
from tests.policy.dtensor.test_loading import make_directory

WRONG = {
    "configuration": ["policy.dtensor_cfg.context_parallel_size=2"],
    "engine": ["policy.generation.backend=replay", "policy.generation.replay_path={tmp}/none.jsonl"],
    "tokenizer": ["policy.tokenizer.name={tmp}/none"],
    "data": ["grpo.num_prompts_per_step=64"],
    "log directory": ["logger.log_dir={tmp}/file/below"],
    "checkpoint directory": ["checkpointing.checkpoint_dir={tmp}/file/below"],
    "checkpoint": ["checkpointing.load_path={tmp}/none"],
    "initial adapter": ["policy.adapter.init_from={tmp}/none"],
}


def planned(config):
    return plan_of(Start(config))


@pytest.mark.parametrize("overrides", WRONG.values(), ids=WRONG.keys())
def test_a_plan_shows_what_a_start_raises(tiny_run, tmp_path, overrides):
    (tmp_path / "file").write_text("")
    config = load_config(None, tiny_run.arguments(*(text.format(tmp=tmp_path) for text in overrides)), "grpo")

    with pytest.raises(ValueError) as caught:
        check_start(config)
    assert planned(config).problems == tuple(str(caught.value).splitlines())


def test_a_start_says_every_problem_at_once_and_takes_nothing(tiny_run, tmp_path):
    overrides = [
        "policy.dtensor_cfg.context_parallel_size=2",
        f"policy.generation.replay_path={tmp_path}/none.jsonl",
        "policy.generation.backend=replay",
        "grpo.num_prompts_per_step=64",
        f"policy.adapter.init_from={tmp_path}/none",
        f"checkpointing.checkpoint_dir={tmp_path}/new",
    ]
    config = load_config(None, tiny_run.arguments(*overrides), "grpo")
    with pytest.raises(ValueError) as caught:
        check_start(config)
    keys = [line.split(":")[0].split("=")[0] for line in str(caught.value).splitlines()]
    assert keys == [
        "policy.dtensor_cfg.context_parallel_size",
        "policy.generation.replay_path",
        "grpo.num_prompts_per_step",
        "policy.adapter.init_from",
    ]
    assert list((tmp_path / "new").iterdir()) == []


def test_without_a_model_the_rest_is_said_all_the_same(tiny_run, tmp_path):
    overrides = [f"policy.model_name={tmp_path}/none", "policy.dtensor_cfg.context_parallel_size=2"]
    config = load_config(None, tiny_run.arguments(*overrides), "grpo")
    for start in (check_start, planned):
        with pytest.raises(ValueError, match=r"(?s)^policy\.model_name=.*\npolicy\.dtensor_cfg\.context_parallel"):
            start(config)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["checkpointing.metric_name=val:pass@k"], "checkpointing.metric_name='val:pass@k': no validation of this run"),
        (
            ["grpo.val_at_start=true", "grpo.stop_at_validation_metric=x", "grpo.stop_at_validation_threshold=1"],
            "grpo.stop_at_validation_metric='x': no validation of this run measures it. Validation measures",
        ),
        (["checkpointing.metric_name=val:accuracy", "data.validation=null"], "Set data.validation and grpo.val_period"),
        (["checkpointing.metric_name=val:accuracy", "grpo.val_period=0"], "Set data.validation and grpo.val_period"),
    ],
)
def test_a_metric_that_no_validation_has_is_refused(tiny_run, overrides, said):
    problems = planned(load_config(None, tiny_run.arguments(*overrides), "grpo")).problems
    assert any(said in problem for problem in problems), problems


@pytest.mark.parametrize("algorithm", ["sft", "dpo", "grpo"])
def test_validation_measures_what_it_says(algorithm, tiny_run, tiny_sft, tiny_dpo):
    run = {"sft": tiny_sft, "dpo": tiny_dpo, "grpo": tiny_run}[algorithm]
    overrides = [f"{algorithm}.val_at_end=true", f"{algorithm}.max_num_steps=1", "checkpointing.enabled=false"]
    start = Start(load_config(None, run.arguments(*overrides), algorithm))
    assert start.loader.num_batches_per_epoch
    assert run(*overrides).code == 0
    measured = {name for name in run.metrics("validation")[-1] if not name.startswith(("timing/", "step", "split"))}
    assert measured == set(start.algorithm.validation_metrics)


@pytest.mark.parametrize("held", [True, False])
def test_a_plan_says_that_the_checkpoints_directory_is_in_use(tiny_run, held):
    config = load_config(None, tiny_run.arguments(), "grpo")
    check_start(config).checkpointer.close()
    with FileLock(tiny_run.checkpoints / LOCK_FILE) if held else contextlib.nullcontext():
        problems = planned(config).problems
    assert [problem.partition(" (process")[0] for problem in problems] == [
        f"checkpointing.checkpoint_dir='{tiny_run.checkpoints}': is in use by a run that is still alive"
    ] * held


def test_a_plan_says_that_a_checkpoint_does_not_fit_on_the_disk(tiny_run, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=2**40, used=2**40, free=1000))
    (problem,) = planned(load_config(None, tiny_run.arguments("policy.dtensor_cfg.lora_cfg.dim=4"), "grpo")).problems
    assert "has 1,000 bytes free, and one checkpoint needs" in problem


def test_a_plan_shows_every_problem_once(tiny_run, tmp_path):
    overrides = ["policy.tokenizer.name=none/none", f"checkpointing.load_path={tmp_path}/none"]
    problems = planned(load_config(None, tiny_run.arguments(*overrides), "grpo")).problems

    assert [problem.split(":")[0].split("=")[0] for problem in problems] == [
        "policy.tokenizer.name",
        "checkpointing.load_path",
    ]


def test_a_run_from_python_says_how_it_ended_and_the_plan_says_where_it_continues(tiny_sft):
    config = load_config(None, tiny_sft.arguments(), "sft")
    result = train(config)

    assert (result.outcome, result.is_complete, result.step, result.exit_code) == ("completed", True, 2, 0)
    assert result.checkpoint == tiny_sft.checkpoints / "step_2"
    assert result.log_directory == tiny_sft.logs / "exp_001"
    again = train(config)
    assert (again.is_complete, again.step, again.log_directory) == (True, 2, None)

    planned = run_driver("--plan", *tiny_sft.arguments("sft.max_num_steps=3"), algorithm="sft")
    assert planned.code == 0, planned.err
    assert "checkpoint: the run continues after step 2, from" in " ".join(planned.out.split())
    assert train(load_config(None, tiny_sft.arguments("sft.max_num_steps=3"), "sft")).step == 3


def test_experts_that_are_stacked_are_not_read_by_all_ranks(tiny_run, tmp_path):
    experts = make_directory("stacked experts", tmp_path)
    base, several = dict(PREFLIGHT)["base"], [f"policy.model_name={experts}", "cluster.gpus_per_node=2"]

    def found(*overrides):
        return base(Start(load_config(None, tiny_run.arguments(*several, *overrides), "grpo")))

    assert found() == found("policy.dtensor_cfg.load=broadcast")
    with pytest.raises(ValueError, match=r"policy.dtensor_cfg.load='all_ranks': the tensors of Qwen3MoeForCausalLM"):
        found("policy.dtensor_cfg.load=all_ranks")


def test_all_weights_of_several_processes_are_not_read_by_the_other_backend(tiny_sft):
    settings = ["policy.dtensor_cfg.lora_cfg.enabled=false", "sft.max_num_steps=1", "checkpointing.save_period=1"]
    assert tiny_sft(*settings).code == 0
    (tiny_sft.checkpoints / "step_1" / "policy" / "optimizer" / STATE_FILE).write_text("{}")
    settings[1] = "sft.max_num_steps=2"
    assert planned(load_config(None, tiny_sft.arguments(*settings), "sft")).problems == ()
    (problem,) = planned(load_config(None, tiny_sft.arguments(*settings, "policy.backend=megatron"), "sft")).problems
    assert problem.startswith("policy.backend='megatron': ")
    assert "has all weights as several processes of the DTensor backend write them" in problem


def test_what_every_node_has_to_see_has_its_key(tiny_sft, tmp_path):
    outside = f"checkpointing.load_path={tmp_path}/elsewhere/step_5"
    arguments = tiny_sft.arguments(outside, "checkpointing.enabled=false", "logger.record_digests=true")
    config = load_config(None, arguments, "sft")
    start = SimpleNamespace(config=config, phase=None, resume=SimpleNamespace(path=tmp_path / "elsewhere" / "step_5"))
    label = f"checkpointing.load_path='{tmp_path}/elsewhere/step_5'"
    assert _read(start) == {tmp_path / "elsewhere" / "step_5": label}
    assert _written(config) == {tiny_sft.logs: f"logger.record_digests=True, in logger.log_dir='{tiny_sft.logs}'"}
    plain = load_config(None, tiny_sft.arguments(), "sft")
    assert list(_written(plain)) == [tiny_sft.checkpoints]
