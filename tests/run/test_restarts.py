"""Runs that lose a training process or an engine: ended with one paragraph, or started again to the run that lost none.

The first tests lose a process in truth. The others, of which step a restart begins with, raise what a loss raises.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from nemo_rl_lora.config import support
from nemo_rl_lora.config.errors import ConfigError
from nemo_rl_lora.distributed.lost import ProcessesLost
from nemo_rl_lora.generation.in_process import engine
from nemo_rl_lora.generation.protocol import GenerationFailed
from nemo_rl_lora.policy.dtensor.policy import DTensorPolicy
from nemo_rl_lora.run import start
from tests.driver import Ended, TinyRun, adapter, same, without_seconds

ROOT = Path(__file__).parents[2]
NUM_STEPS = 60
RUN = [
    "policy.backend=megatron",
    "policy.dtensor_cfg.lora_cfg.enabled=false",
    "policy.lora={dim: 4, dropout: 0.2}",
    "cluster.gpus_per_node=2",
    "checkpointing.save_period=2",
    "checkpointing.metric_name=null",
    "sft.max_num_epochs=100",
    f"sft.max_num_steps={NUM_STEPS}",
]


def losing_processes(tiny: TinyRun, *overrides: str, num_losses: int = 1) -> Ended:
    """The driver, each of whose first `num_losses` starts loses a training process in the middle of a step."""
    pytest.importorskip("ray")
    driver = subprocess.Popen(
        [sys.executable, f"examples/run_{tiny.algorithm}.py", *tiny.arguments(*RUN, *overrides)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for number in range(1, num_losses + 1):
            log = tiny.logs / f"exp_{number:03d}" / "metrics.jsonl"
            wait_until(lambda log=log: num_train_lines(log) >= 3, driver)
            rank = next(
                p for p in psutil.Process(driver.pid).children(recursive=True) if "ray::RankProcess" in title(p)
            )
            rank.suspend()  # the step that needs it next hangs
            time.sleep(0.5)
            rank.kill()
        out, err = driver.communicate(timeout=400)
    finally:
        driver.kill()
    return Ended(code=driver.returncode, out=out, err=err)


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # gone meanwhile
        return ""


def num_train_lines(log: Path) -> int:
    return log.read_text().count('"split": "train"') if log.exists() else 0


def wait_until(condition: Callable[[], bool], driver: subprocess.Popen[str], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert driver.poll() is None, driver.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def steps_of(tiny: TinyRun) -> dict[int, dict[str, Any]]:
    """The last line of each training step, over all starts."""
    files = sorted(tiny.logs.glob("exp_*/metrics.jsonl"))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return {line["step"]: line for line in without_seconds(lines) if line["split"] == "train"}


@pytest.fixture
def interrupted(tiny_llama, tmp_path):
    return TinyRun(root=tmp_path, model=tiny_llama, algorithm="sft")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_that_is_started_again_is_the_run_that_lost_no_process(interrupted, tmp_path_factory):
    whole = TinyRun(root=tmp_path_factory.mktemp("whole"), model=interrupted.model, algorithm="sft")
    (whole.root / "rows.jsonl").symlink_to(interrupted.root / "rows.jsonl")

    ended = losing_processes(interrupted, "cluster.max_restarts=3", num_losses=2)

    assert ended.code == 0, ended.err
    assert "Traceback" not in ended.err
    assert whole(*RUN).code == 0
    assert steps_of(interrupted) == steps_of(whole)
    assert sorted(steps_of(whole)) == list(range(1, NUM_STEPS + 1))
    assert same(*(adapter(tiny.checkpoints / f"step_{NUM_STEPS}") for tiny in (interrupted, whole)))
    for number in (1, 2):
        (restart,) = interrupted.metrics("restart", experiment=number + 1)
        saved = interrupted.checkpoints / f"step_{restart['step']}"
        assert (restart["num_restarts"], restart["num_left"]) == (number, 3 - number)
        assert interrupted.metrics(experiment=number + 1)[0]["step"] == restart["step"] + 1
        again = rf"The run starts again \(cluster.max_restarts: {number} of 3, from {saved}\)"
        assert re.search(rf"training process \d \(node [\d.]+\) of 2 .* {again}", ended.err)
        assert re.search(rf"Restart: +{number} of 3, from {saved}: training process \d \(node [\d.]+\) of 2", ended.out)
        log = (interrupted.logs / f"exp_{number + 1:03d}" / "run.log").read_text()
        assert f"restart {number} of 3, from {saved}: training process" in log


@pytest.mark.timeout(900)
def test_without_a_restart_left_one_paragraph_says_what_was_lost_and_how_to_go_on(interrupted):
    ended = losing_processes(interrupted)

    assert ended.code == 1
    said = ended.err[ended.err.index("The run failed:") :]
    num_steps = len(steps_of(interrupted))
    newest = interrupted.checkpoints / f"step_{num_steps // 2 * 2}"
    assert re.match(r"The run failed: training process \d \(node [\d.]+\) of 2 ", said)
    assert f"{num_steps} of {NUM_STEPS} steps were complete. cluster.max_restarts=0: it is not started again. " in said
    assert f"The newest checkpoint is {newest}. Continue with: uv run examples/run_sft.py policy.model_name=" in said
    assert said.splitlines()[1:] == [f"The traceback is in {interrupted.logs}/exp_001/run.log."]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_run_without_checkpoints_starts_again_from_its_beginning(interrupted):
    ended = losing_processes(interrupted, "cluster.max_restarts=1", "checkpointing.enabled=false")

    assert ended.code == 0, ended.err
    assert "1 of 1, from the beginning: it has saved no checkpoint" in ended.err
    assert [line["step"] for line in interrupted.metrics(experiment=2)] == list(range(1, NUM_STEPS + 1))


@pytest.fixture
def alone(monkeypatch):
    """One process, which has nothing to lose, is allowed to have restarts."""
    monkeypatch.setattr(support, "cluster_problems", lambda config: [])


@pytest.fixture
def lose(monkeypatch, alone):
    """Makes optimizer steps fail as if processes were lost, by their number over all starts (from 1)."""

    def install(*steps: int) -> None:
        numbers, train_step = itertools.count(1), DTensorPolicy.train_step

        def step(policy, batch, loss_fn):
            if next(numbers) in steps:
                raise ProcessesLost("training process 1 (node 10.0.0.2) of 2 ended.")
            return train_step(policy, batch, loss_fn)

        monkeypatch.setattr(DTensorPolicy, "train_step", step)

    return install


EVERY_STEP = ["checkpointing.save_period=1", "checkpointing.metric_name=null", "sft.max_num_steps=3"]


def test_a_restart_goes_on_from_the_runs_own_steps_and_from_no_others(tiny_sft, lose):
    assert tiny_sft(*EVERY_STEP).code == 0
    lose(1, 3)  # before the first save, and after it

    ended = tiny_sft(*EVERY_STEP, "checkpointing.load_path=none", "cluster.max_restarts=2")

    assert ended.code == 0, ended.err
    assert [[line["step"] for line in tiny_sft.metrics(experiment=number)] for number in (2, 3, 4)] == [[], [1], [2, 3]]
    assert (tiny_sft.checkpoints / "set_aside_001" / "step_3").is_dir()
    lines = [tiny_sft.metrics("restart", experiment=number) for number in (2, 3, 4)]
    restart = {"split": "restart"}
    assert lines == [
        [],
        [restart | {"step": 0, "num_restarts": 1, "num_left": 1}],
        [restart | {"step": 1, "num_restarts": 2, "num_left": 0}],
    ]
    assert re.search(r"Restart: +1 of 2, from the beginning: it has saved no checkpoint: training process 1", ended.out)
    assert re.search(rf"Restart: +2 of 2, from {tiny_sft.checkpoints}/step_1: training process 1", ended.out)


def test_a_run_ends_when_no_restart_is_left(tiny_sft, lose):
    lose(2, 3)

    ended = tiny_sft(*EVERY_STEP, "cluster.max_restarts=1")

    assert ended.code == 1
    newest = tiny_sft.checkpoints / "step_1"
    assert (
        "The run failed: training process 1 (node 10.0.0.2) of 2 ended. 1 of 3 steps were complete. "
        f"cluster.max_restarts=1: no restart is left. The newest checkpoint is {newest}. Continue with: "
    ) in ended.err


def test_a_run_that_was_asked_to_stop_is_not_started_again(tiny_sft, monkeypatch, alone):
    def step(policy, batch, loss_fn):
        os.kill(os.getpid(), signal.SIGTERM)  # as a scheduler does to every process of a job
        raise ProcessesLost("training process 1 of 2 ended.")

    monkeypatch.setattr(DTensorPolicy, "train_step", step)

    ended = tiny_sft(*EVERY_STEP, "cluster.max_restarts=1")

    assert ended.code == 1
    assert (
        "It is not started again, since SIGTERM had asked it to stop. The same command starts it again, " in ended.err
    )
    assert len(list(tiny_sft.logs.iterdir())) == 1


def test_processes_that_are_lost_before_the_first_step_end_the_run(tiny_sft, monkeypatch, alone):
    def lost(*arguments):
        raise ProcessesLost("training process 1 of 2 did not start.")

    monkeypatch.setattr("nemo_rl_lora.run.start.build_policy", lost)

    ended = tiny_sft(*EVERY_STEP, "cluster.max_restarts=1")

    assert ended.code == 1
    assert "The run failed: ProcessesLost: training process 1 of 2 did not start.\n" in ended.err
    assert len(list(tiny_sft.logs.iterdir())) == 1


def test_a_cluster_that_is_too_small_for_a_restart_ends_the_run(tiny_sft, lose, monkeypatch):
    built = start.build_policy

    def build_once(*arguments):
        monkeypatch.setattr(start, "build_policy", refused)
        return built(*arguments)

    def refused(*arguments):
        raise ConfigError("cluster.num_nodes=2: Ray has 1 node.")

    monkeypatch.setattr(start, "build_policy", build_once)
    lose(2)

    ended = tiny_sft(*EVERY_STEP, "cluster.max_restarts=2")

    assert ended.code == 1
    assert "were complete. It cannot start again: cluster.num_nodes=2: Ray has 1 node.\n" in ended.err


def test_a_run_whose_engine_is_lost_for_good_starts_again_after_its_last_step(tiny_run, monkeypatch, alone):
    sound = engine.InProcessGeneration

    class Lost(sound):
        def collect(self, tickets):
            if self._version == 2:
                monkeypatch.setattr(engine, "InProcessGeneration", sound)
                raise GenerationFailed("policy.generation.max_generation_failures=1: the engine ended, twice in a row.")
            return super().collect(tickets)

    monkeypatch.setattr(engine, "InProcessGeneration", Lost)

    ended = tiny_run("grpo.max_num_steps=4", "checkpointing.save_period=100", "cluster.max_restarts=1")

    assert ended.code == 0, ended.err
    assert f"(cluster.max_restarts: 1 of 1, from {tiny_run.checkpoints / 'step_2'})" in ended.err
    assert [line["step"] for line in tiny_run.metrics(experiment=2)] == [3, 4]
