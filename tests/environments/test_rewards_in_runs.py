"""Rewards of one's own in whole runs of the GRPO driver."""

import json
import os
import subprocess

import pytest
from transformers import AutoTokenizer

from tests.driver import TinyRun

RECORDS = """
import json
from pathlib import Path

def reward(prompt, completion, row, token_ids):
    with Path(__file__).with_name("seen.jsonl").open("a") as file:
        file.write(json.dumps([completion, token_ids]) + "\\n")
    return len(completion) % 7
"""
LEAVES = """
import sys

def reward(prompt, completion, row):
    if len(calls) == 16:
        sys.exit(0)
    calls.append(completion)
    return len(completion) % 7

calls = []
"""
HANGS = """
import time
from pathlib import Path

def reward(prompt, completion, row):
    with Path(__file__).with_name("calls").open("a+") as calls:
        calls.write("x")
        calls.flush()
        while calls.tell() % 17 == 0:  # in the second step, and twice as many calls later
            time.sleep(1)
    return len(completion) % 7
"""


@pytest.mark.parametrize("skip", [True, False])
def test_rewards_see_token_ids_and_special_tokens_where_they_are_asked_for(tmp_path, tiny_llama, skip):
    run = TinyRun(root=tmp_path, model=tiny_llama)
    (tmp_path / "rewards.py").write_text(RECORDS)
    key = f"policy.generation.skip_special_tokens={str(skip).lower()}"
    ended = run(key, "policy.generation.max_new_tokens=48", "grpo.max_num_steps=1")
    assert ended.code == 0, ended.err
    seen = [json.loads(line) for line in (tmp_path / "seen.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    for text, token_ids in seen:
        kept = token_ids[:-1] if token_ids[-1] == tokenizer.eos_token_id else token_ids
        assert text == tokenizer.decode(kept, skip_special_tokens=skip)
    assert len(seen) == 16
    assert any("<|user|>" in text or "<|a|>" in text for text, _ in seen) is not skip


def test_sys_exit_in_a_reward_is_a_failure_that_keeps_the_last_step(tmp_path, tiny_llama):
    run = TinyRun(root=tmp_path, model=tiny_llama)
    (tmp_path / "rewards.py").write_text(LEAVES)
    ended = run("checkpointing.save_period=1")
    assert ended.code == 1
    assert f"{tmp_path}/rewards.py:reward': raised SystemExit (0) for row" in ended.err
    assert run.steps() == ["step_1"]


def test_a_hang_ends_the_run_which_goes_on_from_its_last_step_with_a_reward_for_hangs(tmp_path, tiny_llama):
    run = TinyRun(root=tmp_path, model=tiny_llama)
    (tmp_path / "rewards.py").write_text(HANGS)
    limit = ["checkpointing.save_period=1", "grpo.max_num_steps=3", "+env.tiny.num_workers=1"]
    ended = run(*limit, "+env.tiny.timeout_seconds=3")
    assert ended.code == 1
    message = f"env.tiny.timeout_seconds=3.0: {tmp_path}/rewards.py:reward took longer for row"
    assert message in ended.err
    assert "set env.tiny.on_failure to the reward of such a completion." in ended.err
    assert run.steps() == ["step_1"]
    ended = run(*limit, "+env.tiny.timeout_seconds=2.5", "+env.tiny.on_failure=-1")
    assert ended.code == 0, ended.err
    assert run.steps() == ["step_1", "step_2", "step_3"]
    assert [line["tiny_timeouts"] for line in run.metrics(experiment=2)] == [0.0, 1.0]
    found = subprocess.run(["pgrep", "-P", str(os.getpid()), "-f", "environments.worker"], capture_output=True)
    assert found.stdout == b""
