"""Rollouts ahead of training: which weights sample what, what a resume repeats, and what overlaps."""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from nemo_rl_lora.algorithms.ahead import AHEAD_FILE
from nemo_rl_lora.config.load import load_config
from nemo_rl_lora.config.support import check_runnable
from nemo_rl_lora.environments.reward_function import RewardFunctionEnvironment
from nemo_rl_lora.generation.in_process.engine import InProcessGeneration
from nemo_rl_lora.policy.dtensor.policy import DTensorPolicy
from tests.driver import TinyRun, adapter, same, without_seconds

AHEAD = ("grpo.async_grpo.enabled=true", "grpo.max_num_steps=5", "policy.optimizer.kwargs.lr=0.01")
CORRECTED = "loss_fn.use_importance_sampling_correction=true"


def of_age(age: int) -> tuple[str, ...]:
    return (*AHEAD, f"grpo.async_grpo.max_trajectory_age_steps={age}")


def weights(run: TinyRun) -> dict[str, torch.Tensor]:
    return adapter(run.checkpoints / run.steps()[-1])


@pytest.fixture
def another(tiny_run, tmp_path):
    """A second run of the same kind, elsewhere."""

    def make(name: str) -> TinyRun:
        (tmp_path / name).mkdir()
        run = TinyRun(root=tmp_path / name, model=tiny_run.model)
        tiny_run.arguments()  # writes the rewards, whose place is part of what a run is
        shutil.copy(tmp_path / "rewards.py", run.root)
        return run

    return make


def test_at_age_0_it_is_the_synchronous_run(tiny_run, another):
    ahead, synchronous = another("ahead"), another("synchronous")
    assert ahead(*of_age(0), CORRECTED).code == 0
    assert synchronous(*AHEAD[1:], CORRECTED).code == 0

    assert without_seconds(ahead.metrics()) == without_seconds(synchronous.metrics())
    assert same(weights(ahead), weights(synchronous))


@pytest.mark.parametrize("age", [1, 2])
def test_a_step_trains_on_what_the_weights_of_so_many_steps_before_have_sampled(tiny_run, monkeypatch, age):
    asked = []  # (version that is served, the first seed of the request)
    submit = InProcessGeneration.submit

    def remember(self, request):
        asked.append((self._version, request.seeds[0]))
        return submit(self, request)

    monkeypatch.setattr(InProcessGeneration, "submit", remember)
    assert tiny_run(*of_age(age)).code == 0

    versions = [version for version, _ in asked[::4]]  # four groups a step
    assert versions == [max(0, step - age) for step in range(5)]
    lines = tiny_run.metrics()
    assert [line["trajectory_age_max"] for line in lines] == [min(step, age) for step in range(5)]
    assert lines[-1][f"token_share_of_age_{age}"] == 1
    assert lines[-1]["token_share_of_age_0"] == 0


def test_the_groups_of_a_step_are_those_of_the_synchronous_run_while_weights_stay(tiny_run, another):
    """With a learning rate of 0 every version is the first, so that age changes nothing at all."""
    still = "policy.optimizer.kwargs.lr=0"
    runs = another("ahead"), another("synchronous")
    assert runs[0](*of_age(2), still).code == 0
    assert runs[1](*AHEAD[1:], CORRECTED, still).code == 0
    rewards = [[line["reward"] for line in run.metrics()] for run in runs]
    lengths = [[line["num_sampled_tokens"] for line in run.metrics()] for run in runs]
    assert rewards[0] == rewards[1]
    assert lengths[0] == lengths[1]


def test_two_runs_of_one_seed_are_equal(tiny_run, another):
    one, other = another("one"), another("other")
    assert one(*of_age(2)).code == 0
    assert other(*of_age(2)).code == 0
    assert without_seconds(one.metrics()) == without_seconds(other.metrics())
    assert same(weights(one), weights(other))


@pytest.mark.parametrize("age", [1, 2])
@pytest.mark.parametrize("saved", [2, 4])
def test_a_run_that_is_continued_is_the_run_that_was_not_stopped(tiny_run, age, saved):
    arguments = (*of_age(age), "checkpointing.save_period=2", "grpo.val_period=2")
    assert tiny_run(*arguments).code == 0
    whole = tiny_run.metrics(), tiny_run.metrics("validation"), weights(tiny_run)
    for step in ("step_4", "step_5")[saved // 4 :]:
        shutil.rmtree(tiny_run.checkpoints / step)
    rows = json.loads((tiny_run.checkpoints / f"step_{saved}" / AHEAD_FILE).read_text())
    assert [row["step"] for row in rows] == list(range(saved, min(saved + age, 5)))
    assert all(len(row["groups"]) == 4 for row in rows)

    went_on = tiny_run(*arguments)

    assert went_on.code == 0, went_on.err
    assert without_seconds(tiny_run.metrics(experiment=2)) == without_seconds(whole[0])[saved:]
    assert without_seconds(tiny_run.metrics("validation", 2)) == without_seconds(whole[1])[saved // 2 :]
    assert same(weights(tiny_run), whole[2])


def test_what_was_not_there_at_an_urgent_save_is_asked_again(tiny_run, monkeypatch):
    """The environment of the third step's groups waits until the run has been told to stop, and saved."""
    score, calls, stopped = RewardFunctionEnvironment.score, [], threading.Event()

    def slow(self, *arguments):
        calls.append(1)
        if len(calls) == 3 and not stopped.is_set():
            assert stopped.wait(60)
        return score(self, *arguments)

    train_step = DTensorPolicy.train_step

    def stops(self, batch, loss_fn):
        output = train_step(self, batch, loss_fn)
        if len(calls) >= 2 and not stopped.is_set():
            signal.raise_signal(signal.SIGTERM)
        return output

    write = Path.write_text

    def written(path, *arguments, **named):
        done = write(path, *arguments, **named)
        if path.name == AHEAD_FILE:
            stopped.set()
        return done

    monkeypatch.setattr(RewardFunctionEnvironment, "score", slow)
    monkeypatch.setattr(DTensorPolicy, "train_step", stops)
    monkeypatch.setattr(Path, "write_text", written)
    assert tiny_run(*of_age(2)).code == 128 + signal.SIGTERM
    (step,) = tiny_run.steps()
    rows = json.loads((tiny_run.checkpoints / step / AHEAD_FILE).read_text())
    again = [row["step"] for row in rows if row["groups"] is None]
    assert 2 in again
    first = next(row for row in rows if row["step"] == 2)
    monkeypatch.undo()

    asked = []
    submit = InProcessGeneration.submit
    monkeypatch.setattr(InProcessGeneration, "submit", lambda s, r: (asked.append(r), submit(s, r))[1])
    went_on = tiny_run(*of_age(2))
    assert went_on.code == 0, went_on.err
    log = (tiny_run.logs / "exp_002" / "run.log").read_text()
    assert "were not complete when the run stopped. Their prompts are asked again" in log
    assert "were not asked for" not in log
    assert [r.prompt.index for r in asked[:4]] == [record["prompt_index"] for record in first["prompts"]]
    assert [line["step"] for line in tiny_run.metrics(experiment=2)][-1] == 5


def test_a_finished_run_that_is_given_more_steps_says_which_come_from_newer_weights(tiny_run):
    assert tiny_run(*of_age(2), "grpo.max_num_steps=2").code == 0
    assert tiny_run(*of_age(2)).code == 0
    log = (tiny_run.logs / "exp_002" / "run.log").read_text()
    assert "the groups of step 3, 4 were not asked for before the run stopped, which was to end there" in log
    assert [line["trajectory_age_max"] for line in tiny_run.metrics(experiment=2)] == [0, 1, 2]


def test_completions_go_on_under_new_weights_and_say_which_tokens_are_whose(tiny_run, monkeypatch):
    """The second step's groups are sampled token by token until the first step's weights wait for their turn."""
    seen, draw = [], InProcessGeneration._draw

    def waits(self, rows, logits):
        draw(self, rows, logits)
        seen.append([row.versions[-1][1] for row in rows])
        end = time.monotonic() + 60
        while len(seen) == 9 and not self._turns._num_updates:  # six tokens are the first step's
            assert time.monotonic() < end
            time.sleep(0.01)

    monkeypatch.setattr(InProcessGeneration, "_draw", waits)
    ended = tiny_run(*of_age(1), "grpo.async_grpo.in_flight_weight_updates=true")

    assert ended.code == 0, ended.err
    second = tiny_run.metrics()[1]
    assert 0 < second["token_share_of_age_0"] < 1
    assert second["token_share_of_age_0"] + second["token_share_of_age_1"] == pytest.approx(1)
    assert 0 < second["trajectory_age_mean"] < 1


def test_new_weights_wait_for_what_is_sampled_without_updates_in_flight(tiny_run, monkeypatch):
    sync, open_rows = InProcessGeneration.sync_weights, []

    def remember(self, ref):
        open_rows.append(len(self._waiting))
        return sync(self, ref)

    monkeypatch.setattr(InProcessGeneration, "sync_weights", remember)
    assert tiny_run(*of_age(2)).code == 0
    assert open_rows == [0] * 5
    assert all(line["trajectory_age_max"] == line["trajectory_age_mean"] for line in tiny_run.metrics())


def test_weights_that_did_not_sample_what_they_were_to_end_the_run(tiny_run, monkeypatch):
    """An engine that stays on its first version and gives another's number to what it samples."""
    completion = InProcessGeneration._completion

    def lies(self, *arguments):
        return completion(self, *arguments[:-1], [(len(arguments[1]), 0)])

    monkeypatch.setattr(InProcessGeneration, "_completion", lies)
    ended = tiny_run(*of_age(1))
    assert ended.code == 1
    assert "tokens of step 3 come from weights that are [2] steps old, and [1] were to be sampled" in ended.err


@pytest.mark.parametrize("failure", ["score", "generate"])
def test_an_error_beside_a_step_ends_the_run_with_its_own_words_and_the_last_step_saved(tiny_run, monkeypatch, failure):
    owner, name = (RewardFunctionEnvironment, "score") if failure == "score" else (InProcessGeneration, "_run")
    real, calls = getattr(owner, name), []

    def fails(self, *arguments):
        calls.append(1)
        if len(calls) == 4:
            raise ValueError("of the fourth rollout")
        return real(self, *arguments)

    monkeypatch.setattr(owner, name, fails)
    threads = set(threading.enumerate())
    ended = tiny_run(*of_age(1))
    assert ended.code == 1
    assert "of the fourth rollout" in ended.err
    assert tiny_run.steps() in (["step_2"], ["step_3"])
    for thread in set(threading.enumerate()) - threads:
        thread.join(30)
        assert not thread.is_alive(), thread
    monkeypatch.undo()
    assert tiny_run(*of_age(1)).code == 0


def test_a_reward_that_hangs_keeps_no_process_from_ending(tiny_run, monkeypatch):
    """The environment hangs at the third step's groups; the run has ended by then for another reason."""
    score, calls, hangs, goes_on = RewardFunctionEnvironment.score, [], threading.Event(), threading.Event()

    def hanging(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            hangs.set()
            assert goes_on.wait(60)
        return score(self, *arguments)

    def fails(self, batch, loss_fn):
        assert hangs.wait(60)
        raise ValueError("of the first step")

    monkeypatch.setattr(RewardFunctionEnvironment, "score", hanging)
    monkeypatch.setattr(DTensorPolicy, "train_step", fails)
    threads = set(threading.enumerate())
    try:
        assert tiny_run(*of_age(2)).code == 1
        left = [thread for thread in set(threading.enumerate()) - threads if thread.is_alive()]
        assert left  # the one that hangs
        assert all(thread.daemon for thread in left)
    finally:
        goes_on.set()


def test_a_run_ends_where_the_rows_end(tiny_run):
    ended = tiny_run(*of_age(2), "grpo.max_num_steps=100", "data.train.num_rows=16", "grpo.max_num_epochs=1")
    assert ended.code == 0, ended.err
    assert [line["step"] for line in tiny_run.metrics()] == [1, 2, 3, 4]
    assert tiny_run.metrics()[-1]["trajectory_age_max"] == 2


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("loss_fn.use_importance_sampling_correction=false",), "the loss has to account for it"),
        (("grpo.use_dynamic_sampling=true",), "is known only once they are scored"),
        (("policy.generation.parity.max_gen_kl_error=0.1",), "parity.max_gen_kl_error=0.1: compares the engine with"),
        (
            ("policy.generation.parity.max_token_mult_prob_error=2",),
            "an earlier one has sampled, from which it has moved",
        ),
        (("loss_fn.vespo={}",), "Choose another objective than loss_fn.vespo"),
        (
            ("grpo.async_grpo.in_flight_weight_updates=true", "grpo.async_grpo.max_trajectory_age_steps=0"),
            "nothing is sampled while weights change",
        ),
        (("grpo.async_grpo.recompute_kv_cache_after_weight_updates=true",), "no completion outlives its weights"),
        (
            (
                "grpo.async_grpo.recompute_kv_cache_after_weight_updates=true",
                "grpo.async_grpo.in_flight_weight_updates=true",
            ),
            "the in-process engine keeps the keys and values that it has",
        ),
        (("policy.generation.backend=vllm",), "vLLM has to sample while this process trains. Set it to false"),
        (("grpo.async_grpo.max_trajectory_age_steps=-1",), "must be at least 0"),
        (("grpo.async_grpo.max_generation_failures=1",), "Use policy.generation.max_generation_failures"),
    ],
)
def test_what_does_not_go_together_is_refused(tiny_run, overrides, words):
    refused = tiny_run("grpo.async_grpo.enabled=true", *overrides)
    assert refused.code == 2
    assert words in refused.err


def test_on_a_gpu_the_sampling_thread_does_not_share_the_deterministic_switch(tiny_run, monkeypatch):
    asked = load_config(None, tiny_run.arguments(*of_age(1), "policy.deterministic=true"), "grpo")
    assert check_runnable(asked) == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (said,) = check_runnable(asked)
    assert said.startswith("policy.deterministic=True: the engine samples in a thread of the process that trains")
    synchronous = load_config(None, tiny_run.arguments(*of_age(0), "policy.deterministic=true"), "grpo")
    assert check_runnable(synchronous) == []


def test_the_correction_comes_with_it_and_the_resolved_file_says_so(tiny_run):
    assert tiny_run(*of_age(1), "grpo.max_num_steps=1").code == 0
    assert "use_importance_sampling_correction: true" in (tiny_run.logs / "exp_001" / "config.yaml").read_text()
