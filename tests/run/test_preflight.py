"""The checks before weights load: one list, of which a start raises the first problem and a plan shows them all."""

import pytest

from nemo_rl_lora.config.load import load_config
from nemo_rl_lora.run.drivers import train
from nemo_rl_lora.run.preflight import check_start, plan_run
from tests.driver import run_driver

WRONG = {
    "configuration": ["cluster.gpus_per_node=3"],
    "engine": ["policy.generation.backend=replay", "policy.generation.replay_path={tmp}/none.jsonl"],
    "tokenizer": ["policy.tokenizer.name={tmp}/none"],
    "data": ["grpo.num_prompts_per_step=64"],
    "log directory": ["logger.log_dir={tmp}/file/below"],
    "checkpoint directory": ["checkpointing.checkpoint_dir={tmp}/file/below"],
    "checkpoint": ["checkpointing.load_path={tmp}/none"],
    "initial adapter": ["policy.adapter.init_from={tmp}/none"],
}


@pytest.mark.parametrize("overrides", WRONG.values(), ids=WRONG.keys())
def test_a_plan_shows_what_a_start_raises(tiny_run, tmp_path, overrides):
    (tmp_path / "file").write_text("")
    config = load_config(None, tiny_run.arguments(*(text.format(tmp=tmp_path) for text in overrides)), "grpo")

    with pytest.raises(ValueError) as caught:
        check_start(config)
    assert plan_run(config).problems == tuple(str(caught.value).splitlines())


def test_a_plan_shows_every_problem_once(tiny_run, tmp_path):
    overrides = ["policy.tokenizer.name=none/none", f"checkpointing.load_path={tmp_path}/none"]
    problems = plan_run(load_config(None, tiny_run.arguments(*overrides), "grpo")).problems

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
