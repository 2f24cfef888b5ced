"""Evaluations during a run, in the three drivers: their figures are the evaluation driver's; training is as without."""

import json
import os
import signal
from dataclasses import replace
from functools import partial

import pytest
import torch

from nemo_rl_lora.algorithms.loop import TrainingLoop
from nemo_rl_lora.checkpoints.steps import SaveDeadline
from nemo_rl_lora.config.load import load_config
from nemo_rl_lora.generation.in_process import engine
from nemo_rl_lora.policy.dtensor.policy import DTensorPolicy
from nemo_rl_lora.policy.offer import OfferedTensors
from tests.config.traced_run import Reads, traced_run
from tests.driver import REWARD, TinyRun, adapter, same, without_seconds
from tests.evaluation.evaluation_runs import run_eval

ALGORITHMS = ["sft", "dpo", "grpo"]
SUMS = "dataset_name: generated_sums, num_rows: 6, seed: 7"
GREEDY = f"{{name: sums, every: 1, at_start: true, max_new_tokens: 12, data: {{{SUMS}, env_name: scored}}}}"
SAMPLED = (
    "{name: drawn, every: 2, at_end: false, max_new_tokens: 8, num_tests_per_prompt: 4, k_values: [1, 4], "
    f"solved_at: 0.75, temperature: 0.8, top_k: 20, seed: 3, max_num_prompts: 5, data: {{{SUMS}, env_name: scored}}}}"
)
MOVES = ["policy.optimizer.kwargs.lr=0.05", "policy.optimizer.kwargs.weight_decay=0.1", "checkpointing.save_period=1"]


@pytest.fixture(params=ALGORITHMS)
def run(request, tiny_llama, tmp_path):
    return make_run(tmp_path, tiny_llama, request.param)


@pytest.fixture
def sft(tiny_llama, tmp_path):
    return make_run(tmp_path, tiny_llama, "sft")


@pytest.fixture
def grpo(tiny_llama, tmp_path):
    return make_run(tmp_path, tiny_llama, "grpo")


def make_run(root, model, algorithm):
    root.mkdir(exist_ok=True)
    (root / "scored.py").write_text(REWARD)
    return TinyRun(root=root, model=model, algorithm=algorithm)


def evaluated(run, *entries, function="scored.py:reward"):
    """The overrides that evaluate so, scored by an environment that nothing else has."""
    return [f"+env.scored.reward_function={run.root}/{function}", f"evaluate=[{', '.join(entries)}]"]


def steps_of(run, name, number, experiment=1):
    """An evaluation's metrics by step, without the name."""
    lines = [line for line in run.metrics("evaluation", experiment) if f"{name}/accuracy" in line]
    found = {line["step"]: {key.removeprefix(f"{name}/"): value for key, value in line.items()} for line in lines}
    assert len(found) == len(lines) == number
    return found


def by_the_driver(run, *overrides):
    """What the evaluation driver finds on the same prompts, by model."""
    directory = run.root / f"evaluation_{len(list(run.root.glob('evaluation_*')))}"
    ended = run_eval(
        "policy.precision=float32",
        f"data.validation={{_override_: true, {SUMS}, env_name: scored}}",
        "data.default=null",
        f"+env.scored.reward_function={run.root}/scored.py:reward",
        f"eval.save_path={directory}",
        *overrides,
    )
    assert ended.code == 0, ended.err
    return json.loads((directory / "results.json").read_text())["models"]


def assert_same_figures(ours, theirs):
    figures = {"mean_num_tokens": theirs["mean_num_tokens"], "truncated_share": theirs["truncated_share"]}
    for name in ("accuracy", *(key for key in theirs if key.startswith("pass@"))):
        figures |= {name: theirs[name]["mean"], f"{name}_half_width": theirs[name]["half_width"]}
    known = {name: value for name, value in figures.items() if value is not None}
    assert {name: value for name, value in ours.items() if name in figures} == known


# What is measured


def test_a_steps_figures_are_those_of_the_evaluation_driver_on_its_checkpoint(run):
    ended = run(*MOVES, *evaluated(run, GREEDY, SAMPLED), "policy.max_total_sequence_length=64")

    assert ended.code == 0, ended.err
    steps = [str(run.checkpoints / f"step_{step}") for step in (1, 2)]
    model = [f"policy.model_name={run.model}", "policy.max_total_sequence_length=64"]
    greedy = by_the_driver(run, *model, f"eval.adapters=[{','.join(steps)}]", "policy.generation.max_new_tokens=12")
    ours = steps_of(run, "sums", 3)
    for step, name in enumerate(["(base)", *steps]):
        assert_same_figures(ours[step], greedy[name])
    assert len({model["accuracy"]["mean"] for model in greedy.values()}) > 1  # the adapter says other things
    sampled = by_the_driver(
        run,
        *model,
        f"eval.adapters=[{steps[1]}]",
        "policy.generation.max_new_tokens=8",
        "policy.generation.val_temperature=0.8",
        "policy.generation.val_top_k=20",
        *("eval.num_tests_per_prompt=4", "eval.k_values=[1,4]", "eval.solved_at=0.75"),
        *("eval.seed=3", "eval.max_num_prompts=5"),
    )
    assert_same_figures(steps_of(run, "drawn", 1)[2], sampled[steps[1]])


@pytest.mark.parametrize("algorithm", ["sft", "grpo"])
def test_all_weights_are_evaluated_too(tiny_llama, tmp_path, algorithm):
    run = make_run(tmp_path, tiny_llama, algorithm)
    settings = [
        "policy.dtensor_cfg.lora_cfg.enabled=false",
        "policy.dtensor_cfg.lora_cfg.dim=8",
        "policy.max_total_sequence_length=64",
    ]

    ended = run(*settings, *MOVES, "policy.optimizer.kwargs.lr=0.01", *evaluated(run, GREEDY))

    assert ended.code == 0, ended.err
    ours = steps_of(run, "sums", 3)
    for step, weights in ((0, run.model), (2, run.checkpoints / "step_2" / "policy" / "weights")):
        theirs = by_the_driver(
            run,
            f"policy.model_name={weights}",
            f"policy.tokenizer.name={run.model}",
            "policy.max_total_sequence_length=64",
            "policy.generation.max_new_tokens=12",
        )
        assert_same_figures(ours[step], theirs["(base)"])
    assert ours[0]["accuracy"] != ours[2]["accuracy"]


UNIFIED = ["policy.dtensor_cfg.lora_cfg.enabled=false", "policy.lora.dim=4"]
ELSEWHERE = {"megatron": [*UNIFIED, "policy.backend=megatron"], "two processes": ["cluster.gpus_per_node=2"]}


@pytest.mark.slow
@pytest.mark.parametrize("where", ELSEWHERE.values(), ids=ELSEWHERE.keys())
def test_what_trains_elsewhere_is_evaluated_in_the_drivers_process(sft, where):
    ended = sft(*where, *MOVES, *evaluated(sft, GREEDY), "policy.max_total_sequence_length=64")

    assert ended.code == 0, ended.err
    step = str(sft.checkpoints / "step_2")
    limits = ["policy.max_total_sequence_length=64", "policy.generation.max_new_tokens=12"]
    theirs = by_the_driver(sft, f"policy.model_name={sft.model}", f"eval.adapters=[{step}]", *limits)
    ours = steps_of(sft, "sums", 3)
    assert_same_figures(ours[0], theirs["(base)"])
    assert_same_figures(ours[2], theirs[step])


AHEAD = ["grpo.async_grpo.enabled=true", "grpo.async_grpo.max_trajectory_age_steps=1"]


@pytest.mark.parametrize(
    ("algorithm", "more"),
    [("sft", []), ("dpo", []), ("grpo", []), ("grpo", AHEAD)],
    ids=["sft", "dpo", "grpo", "ahead"],
)
def test_training_is_bit_for_bit_what_it_is_without(tiny_llama, tmp_path, algorithm, more):
    settings = [*MOVES, *more, "policy.dtensor_cfg.lora_cfg.dropout=0.3", f"{algorithm}.max_num_steps=4"]
    plain, watched = (make_run(tmp_path / name, tiny_llama, algorithm) for name in ("plain", "watched"))

    assert plain(*settings).code == 0
    assert watched(*settings, *evaluated(watched, GREEDY, SAMPLED)).code == 0

    steps_of(watched, "sums", 5)
    assert without_seconds(plain.metrics()) == without_seconds(watched.metrics())
    assert [line.keys() for line in plain.metrics()] == [line.keys() for line in watched.metrics()]
    for step in plain.steps():
        assert same(adapter(plain.checkpoints / step), adapter(watched.checkpoints / step))


def test_every_and_the_start_and_the_end_say_when(sft):
    ended = sft(
        "sft.max_num_steps=5",
        *evaluated(
            sft,
            GREEDY.replace("every: 1, at_start: true", "every: 2"),
            SAMPLED,
            GREEDY.replace("name: sums", "name: first").replace("every: 1", "every: 9, at_end: false"),
        ),
    )

    assert ended.code == 0, ended.err
    assert list(steps_of(sft, "sums", 3)) == [2, 4, 5]
    assert list(steps_of(sft, "drawn", 2)) == [2, 4]
    assert list(steps_of(sft, "first", 1)) == [0]


def test_a_run_that_its_validation_ends_is_evaluated_at_its_end(grpo):
    reached = ["grpo.stop_at_validation_metric=accuracy", "grpo.stop_at_validation_threshold=0.0"]

    ended = grpo("grpo.max_num_steps=4", "grpo.val_period=1", *reached, *evaluated(grpo, GREEDY.replace("1", "3", 1)))

    assert ended.code == 0, ended.err
    assert list(steps_of(grpo, "sums", 2)) == [0, 1]
    assert "eval:sums/accuracy" in recorded(grpo, 1)["metrics"]


def recorded(run, step):
    return json.loads((run.checkpoints / f"step_{step}" / "training_info.json").read_text())


# What is proven


@pytest.mark.parametrize("mode", ["merged", "adapter"])
def test_an_engine_that_serves_the_base_in_the_place_of_the_adapter_ends_the_run(sft, monkeypatch, mode):
    """It reads the weights of the start, whose B is zero, whatever is offered."""
    first: dict[str, torch.Tensor] = {}

    class Base(engine.InProcessGeneration):
        def sync_weights(self, ref):
            assert ref.tensors is not None
            if not first:
                first.update({info.name: ref.tensors[info.name].clone() for info in ref.manifest})
            offered = OfferedTensors({name: partial(first.__getitem__, name) for name in first}, ref.mode)
            for info in ref.manifest:
                ref.tensors[info.name]
            return super().sync_weights(replace(ref, tensors=offered, handed=offered.handed))

    monkeypatch.setattr(engine, "InProcessGeneration", Base)

    ended = sft(*MOVES, *evaluated(sft, GREEDY), f"policy.generation.lora_sync={mode}")

    assert ended.code == 1
    assert f"policy.generation.lora_sync='{mode}': the engine confirmed version 1 (" in ended.err
    assert list(steps_of(sft, "sums", 1)) == [0]


# How a run ends and goes on


def test_a_resumed_run_evaluates_as_the_whole_one(tiny_llama, tmp_path):
    for algorithm in ("sft", "grpo"):
        whole, parts = (
            make_run(tmp_path / f"{algorithm}_{name}", tiny_llama, algorithm) for name in ("whole", "parts")
        )
        every_other = GREEDY.replace("every: 1", "every: 2")
        assert whole(*MOVES, *evaluated(whole, every_other, SAMPLED), f"{algorithm}.max_num_steps=4").code == 0
        for steps in (2, 4):
            settings = evaluated(parts, every_other, SAMPLED)
            assert parts(*MOVES, *settings, f"{algorithm}.max_num_steps={steps}").code == 0

        lines = [*parts.metrics("evaluation", 1), *parts.metrics("evaluation", 2)]
        assert without_seconds(lines) == without_seconds(whole.metrics("evaluation"))
        assert [line["step"] for line in parts.metrics("evaluation", 2)] == [4, 4]


STOPS = """
import os, signal
from pathlib import Path

def stops(prompt, completion, row):
    seen = Path(__file__).with_name("seen")
    if not seen.exists():
        seen.touch()
        os.kill(os.getpid(), signal.SIGTERM)
    return 1.0

def fails(prompt, completion, row):
    if Path(__file__).with_name("failing").exists():
        raise RuntimeError("no judge")
    return 1.0
"""


def test_a_signal_during_an_evaluation_ends_the_run_with_its_step_saved(sft):
    (sft.root / "stops.py").write_text(STOPS)
    settings = evaluated(sft, GREEDY.replace("at_start: true, ", ""), function="stops.py:stops")

    ended = sft(*settings)

    assert ended.code == 128 + signal.SIGTERM
    assert (sft.steps(), recorded(sft, 1)["reason"]) == (["step_1"], "signal")
    assert recorded(sft, 1)["metrics"]["eval:sums/accuracy"] == 1.0
    assert sft(*settings).code == 0
    assert list(steps_of(sft, "sums", 1, experiment=2)) == [2]  # that of step 1 was made


@pytest.mark.parametrize("algorithm", ["sft", "grpo"])
def test_a_signal_in_a_step_saves_it_and_leaves_its_evaluation_to_the_run_that_continues(
    tiny_llama, tmp_path, monkeypatch, algorithm
):
    run, whole = (make_run(tmp_path / name, tiny_llama, algorithm) for name in ("run", "whole"))
    more = [f"{algorithm}.max_num_steps=3", f"{algorithm}.val_period=1"]
    settings = {each: [*MOVES, *more, *evaluated(each, GREEDY)] for each in (run, whole)}
    assert whole(*settings[whole]).code == 0
    train_step, save, measured = DTensorPolicy.train_step, TrainingLoop._save, []

    def stopped(self, batch, loss_fn):
        if len(run.steps()) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(self, batch, loss_fn)

    def seen(self, reason):
        measured.extend((reason, name) for name in self._newest if name.startswith(("val:", "eval:")))
        return save(self, reason)

    monkeypatch.setattr(DTensorPolicy, "train_step", stopped)
    monkeypatch.setattr(TrainingLoop, "_save", seen)
    assert run(*settings[run]).code == 128 + signal.SIGTERM
    monkeypatch.undo()
    assert (run.steps(), recorded(run, 2)["reason"]) == (["step_1", "step_2"], "signal")
    assert {reason for reason, _ in measured} == {"period"}  # on the signal nothing was measured before
    assert [line["step"] for line in run.metrics("validation")] == [1, 2]
    assert list(steps_of(run, "sums", 2)) == [0, 1]
    assert run(*settings[run]).code == 0
    assert list(steps_of(run, "sums", 2, experiment=2)) == [2, 3]
    for step in (2, 3):
        ours, theirs = (recorded(each, step)["metrics"] for each in (run, whole))
        assert {name: value for name, value in without_seconds([ours])[0].items() if "timing" not in name} == {
            name: value for name, value in without_seconds([theirs])[0].items() if "timing" not in name
        }
    assert same(*(adapter(each.checkpoints / "step_3") for each in (run, whole)))


def test_a_deadline_that_is_near_saves_before_an_evaluation(sft, monkeypatch):
    monkeypatch.setattr(SaveDeadline, "is_near", lambda self, seconds: True)
    ended = sft(*evaluated(sft, GREEDY))
    assert "stopped to be in time for checkpointing.checkpoint_must_save_by" in ended.out
    assert (sft.steps(), recorded(sft, 1)["reason"]) == (["step_1"], "deadline")
    assert list(steps_of(sft, "sums", 1)) == [0]


def test_an_evaluation_that_failed_is_made_up_for_by_the_next_start(sft):
    (sft.root / "stops.py").write_text(STOPS)
    (sft.root / "failing").touch()
    ranked = ["checkpointing.metric_name=eval:sums/accuracy", "checkpointing.higher_is_better=true"]
    entry = GREEDY.replace("every: 1, at_start: true", "every: 1, at_end: false")
    settings = [*evaluated(sft, entry, function="stops.py:fails"), *ranked, "checkpointing.keep_top_k=1"]

    ended = sft(*settings)

    assert (ended.code, sft.steps()) == (1, ["step_1"])
    assert "no judge" in ended.err
    (sft.root / "failing").unlink()
    (sft.root / "stops.py").write_text(
        STOPS + "\n\nscores = [1.0] * 6 + [0.5] * 99\n\ndef fails(p, c, r):\n    return scores.pop(0)\n"
    )
    ended = sft(*settings, "sft.max_num_steps=3", "checkpointing.save_period=1")
    assert ended.code == 0, ended.err
    assert list(steps_of(sft, "sums", 3, experiment=2)) == [1, 2, 3]
    assert recorded(sft, 1)["metrics"]["eval:sums/accuracy"] == 1.0
    assert sft.steps() == ["step_1", "step_3"]  # the best, and the newest
    assert f"Best checkpoint: {sft.checkpoints / 'step_1'}\n" in ended.out


@pytest.mark.parametrize("algorithm", ["sft", "grpo"])
def test_a_continued_run_may_evaluate_otherwise(tiny_llama, tmp_path, algorithm):
    run, steps = make_run(tmp_path, tiny_llama, algorithm), f"{algorithm}.max_num_steps"
    assert run().code == 0

    ended = run(f"{steps}=3", *evaluated(run, GREEDY))

    assert ended.code == 0, ended.err
    assert [line["step"] for line in run.metrics(experiment=2)] == [3]
    assert list(steps_of(run, "sums", 2, experiment=2)) == [2, 3]
    (run.root / "scored.py").write_text(REWARD + "\n# changed\n")
    changed = run(f"{steps}=4", *evaluated(run, GREEDY))
    assert changed.code == 0, changed.err
    assert "env.scored" in changed.err  # the code that scores is another one
    assert run(f"{steps}=5").code == 0


def test_what_scores_training_may_not_change_in_a_continued_run(grpo):
    assert grpo().code == 0

    ended = grpo("grpo.max_num_steps=3", f"env.tiny.reward_function={grpo.root}/scored.py:reward")

    assert ended.code == 2
    assert "env.tiny.reward_function" in ended.err


def test_each_phase_is_evaluated_with_the_weights_that_it_trains(sft):
    phases = "[{train: full, steps: 1, lr: 0.01}, {train: lora, steps: 2}]"

    ended = sft(f"sft.phases={phases}", "~sft.max_num_steps", *MOVES, *evaluated(sft, GREEDY))

    assert ended.code == 0, ended.err
    ours = steps_of(sft, "sums", 4)
    weights = sft.checkpoints / "step_1" / "policy" / "weights"
    for model, adapters, step in ((weights, [], 1), (sft.checkpoints / "base_of_phase_2" / "weights", [3], 3)):
        named = ",".join(str(sft.checkpoints / f"step_{number}") for number in adapters)
        theirs = by_the_driver(
            sft,
            f"policy.model_name={model}",
            f"policy.tokenizer.name={sft.model}",
            f"eval.adapters=[{named}]",
            *("policy.max_total_sequence_length=64", "policy.generation.max_new_tokens=12"),
        )
        assert_same_figures(ours[step], theirs[named or "(base)"])


# What is kept of it


def test_steps_are_ranked_by_an_evaluation(sft):
    (sft.root / "ranks.py").write_text(
        "calls = 0\n"
        "def reward(prompt, completion, row):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    return [0.25, 1.0, 0.5][(calls - 1) // 6]\n"
    )
    ranked = ["checkpointing.metric_name=eval:sums/accuracy", "checkpointing.higher_is_better=true"]
    other = GREEDY.replace("name: sums", "name: other").replace("scored", "last_number")
    entry = GREEDY.replace("every: 1, at_start: true", "every: 2")
    settings = evaluated(sft, other, entry, function="ranks.py:reward")

    ended = sft("sft.max_num_steps=6", *ranked, "checkpointing.keep_top_k=1", "checkpointing.save_period=1", *settings)

    assert ended.code == 0, ended.err
    assert sft.steps() == ["step_4", "step_6"]  # the best, and the newest to continue from
    assert f"Best checkpoint: {sft.checkpoints / 'step_4'}\n" in ended.out
    assert "step 5 has no eval:sums/* metric, so it ranks last" in ended.err


def test_a_run_shows_its_evaluations(sft):
    settings = ["logger.plot.enabled=true", "logger.tensorboard_enabled=true", "logger.num_val_samples_to_print=1"]

    ended = sft(*settings, *evaluated(sft, GREEDY, SAMPLED))

    assert ended.code == 0, ended.err
    line = next(line for line in ended.out.splitlines() if line.startswith("evaluation drawn at step 2"))
    assert "drawn/accuracy" in line
    assert "drawn/pass@4" in line
    assert "evaluation sums/accuracy" in ended.out
    assert "## Step 2, evaluation, sample 1" in (sft.logs / "exp_001" / "rollouts.md").read_text()
    assert (sft.logs / "exp_001" / "curves.png").exists()
    assert any((sft.logs / "exp_001" / "tensorboard").iterdir())


def test_the_time_of_an_evaluation_is_in_no_step(sft):
    (sft.root / "slow.py").write_text("import time\ndef reward(p, c, r):\n    time.sleep(1)\n    return 1.0\n")

    entry = GREEDY.replace("at_start: true", "max_num_prompts: 3")

    assert sft(*evaluated(sft, entry, function="slow.py:reward")).code == 0

    for line in sft.metrics("evaluation"):
        assert line["timing/sums/total_evaluation_time"] > line["timing/sums/reward_calculation"] > 3
    assert all(line["timing/total_step_time"] < 3 for line in sft.metrics())


# What is checked before the start


def test_the_plan_shows_evaluations_and_loads_no_weight(run, monkeypatch):
    monkeypatch.setattr("nemo_rl_lora.run.start.build_run", None)
    monkeypatch.setenv("COLUMNS", "400")

    ended = run("--plan", *evaluated(run, GREEDY.replace("sums, every: 1", "sums, every: 5"), SAMPLED))

    assert ended.code == 0, ended.out
    said = " ".join(ended.out.split())
    assert (
        "sums (generated_sums) every 5 steps and at the start and the end: 6 prompts, 1 completion(s) each, greedy, of "
        "at most 12 tokens; scored by scored" in said
    )
    assert "drawn (generated_sums) every 2 steps: 5 prompts, 4 completion(s) each, at temperature 0.8, of" in said
    assert "1 in_process, in the trainer's process" in said
    assert not list(run.root.glob("**/step_*"))


DATA = "{name: a, every: 1, data: {dataset_name: jsonl, data_path: ROOT/none.jsonl, env_name: math}}"
LONG = "dataset_name: jsonl, data_path: ROOT/long.jsonl, output_key: output"
# fmt: off
WRONG = {
    "a file that is missing": ((f"evaluate=[{GREEDY}, {DATA}]",),
     "evaluate.1.data.data_path='{root}/none.jsonl': there is no such file or directory (looked for "
     "{root}/none.jsonl). Correct it."),
    "a metric that no evaluation measures": ((f"evaluate=[{GREEDY}]", "checkpointing.metric_name=eval:sums/accurcy"),
     "checkpointing.metric_name='eval:sums/accurcy': no evaluation of this run measures it. Did you mean "
     "'sums/accuracy'? Evaluations measure sums/accuracy, sums/pass@1, sums/mean_num_tokens, sums/truncated_share."),
    "the direction of another metric": ((f"evaluate=[{GREEDY}]", "checkpointing.metric_name=eval:sums/accuracy"),
     "checkpointing.higher_is_better=False: is inherited, for another metric. Say it for eval:sums/accuracy."),
    "a metric without evaluations": (("checkpointing.metric_name=eval:sums/accuracy", "~env.scored"),
     "checkpointing.metric_name='eval:sums/accuracy': no evaluation of this run measures it. Add one to `evaluate`, "
     "or name another metric."),
    "an environment that scores nothing": ((),
     ": is read by nothing, since SFT scores nothing without `evaluate`. Remove it."),
    "sampling that evaluations do not take": ((f"evaluate=[{GREEDY}]", "policy.generation.val_temperature=0.5"),
     "policy.generation.val_temperature=0.5: is read by nothing, since SFT samples for `evaluate` alone, whose entries "
     "have temperature, top_p and top_k of their own. Remove the change."),
    "rollouts from a file": ((f"evaluate=[{GREEDY}]", "policy.generation.backend=replay",
                              "policy.generation.replay_path=x"),
     "policy.generation.backend='replay': it has its file's completions and no model, and evaluate asks the policy "
     "(evaluate.0.name='sums'). Choose another, or remove evaluate."),
    "more than the model has positions for": ((f"evaluate=[{GREEDY.replace(SUMS, LONG)}]",
                                               "policy.max_total_sequence_length=400"),
     "evaluate.0.data.dataset_name='jsonl': a prompt has 302 tokens, and the model 256 positions "
     "(max_position_embeddings). Set data.on_long_prompt=drop and policy.max_total_sequence_length=256 or less, or "
     "give other data."),
    "prompts that are too long": ((f"evaluate=[{GREEDY}]", "data.max_input_seq_length=4"),
     "data.on_long_prompt='error': 6 of 6 prompts of evaluate.0.data cannot be asked, being longer than 4 tokens or "
     "leaving no room for a completion in policy.max_total_sequence_length=64; the first is"),
}
# fmt: on


@pytest.mark.parametrize(("overrides", "says"), WRONG.values(), ids=WRONG.keys())
def test_what_cannot_be_evaluated_is_refused_before_weights(sft, monkeypatch, overrides, says):
    monkeypatch.setattr("nemo_rl_lora.run.start.build_run", None)
    scored = f"+env.scored.reward_function={sft.root}/scored.py:reward"
    (sft.root / "long.jsonl").write_text(json.dumps({"input": "3" * 300, "output": "7"}) + "\n")

    ended = sft(scored, *(override.replace("ROOT", str(sft.root)) for override in overrides))

    assert ended.code == 2, ended.err
    assert says.format(root=sft.root) in ended.err


def test_prompts_that_are_too_long_are_left_out_where_that_is_asked_for(sft):
    rows = sft.root / "asked.jsonl"
    rows.write_text("".join(json.dumps({"input": "3 + 4" * n, "output": "7"}) + "\n" for n in (1, 40)))
    data = f"{{dataset_name: jsonl, data_path: '{rows}', output_key: output, env_name: last_number}}"
    entry = f"evaluate=[{{name: sums, every: 1, data: {data}}}]"

    assert sft().code == 0
    more = ("--plan", "sft.max_num_steps=3", entry)  # of a run that goes on
    refused, ended = sft(*more), sft(*more, "data.on_long_prompt=drop")

    assert (refused.code, ended.code) == (2, 0), ended.out
    assert "1 of 2 prompts of evaluate.0.data cannot be asked" in " ".join(refused.out.split())
    assert "1 prompts, 1 completion(s) each" in " ".join(ended.out.split())


def test_every_key_of_an_entry_is_read(sft):
    reads, overrides = Reads(), sft.arguments(*evaluated(sft, SAMPLED), "sft.max_num_steps=2")

    assert traced_run(reads, overrides, algorithm="sft") == 0

    config = load_config(None, overrides, "sft")
    keys = {f"evaluate.{key}" for key in type(config.evaluate[0]).model_fields}
    assert len(keys) == 14
    assert keys - reads.keys == set()
