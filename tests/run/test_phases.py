"""Runs in phases: each phase is the run that it would be by itself, wherever the whole one is broken off."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import weakref

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from nemo_rl_lora.lora.files import read_moments
from nemo_rl_lora.policy.dtensor.policy import DTensorPolicy
from nemo_rl_lora.run import crossing, start
from nemo_rl_lora.seeds import derive_seed
from tests.driver import Ended, TinyRun, adapter, run_command, run_driver, same, without_seconds

ADAM = [
    "policy.optimizer.kwargs={lr: 0.01, weight_decay: 0.1, betas: [0.9, 0.99], eps: 1.0e-8}",
    "policy.optimizer.full_finetuning_lr=0.01",
    "policy.dtensor_cfg.lora_cfg.dropout=0.1",
]
ALL = [
    "sft.phases=["
    "{train: full, tokens: 100, warmup_pct: 0.5, decay_pct: 0.3},"
    "{train: lora, steps: 2, at_end: merge},"
    "{train: lora, steps: 2, lora: {dim: 2, alpha: 8}}]",
    "checkpointing.save_period=1",
    "checkpointing.keep_top_k=null",
]


class Phased:
    """Runs of one model in a directory; without the length that a tiny run has otherwise."""

    def __init__(self, tiny: TinyRun) -> None:
        self.tiny = tiny
        self.rows = tiny.root / "rows.jsonl"
        self._own_rows = str(self.rows)

    def arguments(self, *overrides: str) -> list[str]:
        kept = [text for text in self.tiny.arguments() if "max_num_steps" not in text and "enabled=true" not in text]
        arguments = [*(text.replace(self._own_rows, str(self.rows)) for text in kept), *ADAM, *overrides]
        has_adapter = any("train: lora" in text or "lora_cfg.enabled" in text for text in overrides)
        has_adapter = has_adapter and "policy.backend=megatron" not in overrides
        return [text for text in arguments if has_adapter or "lora_cfg" not in text]

    def __call__(self, *overrides: str) -> Ended:
        return run_driver(*self.arguments(*overrides), algorithm="sft")

    def with_steps_until(self, other: Phased, step: int, *, bases_of: int) -> None:
        """Have what a run that was ended after a step had: its rows, its steps so far, and so many bases."""
        self.rows = other.rows
        shutil.copytree(other.tiny.checkpoints, self.tiny.checkpoints)
        for path in self.tiny.checkpoints.glob("*_*"):
            kind, _, number = path.name.rpartition("_")
            if int(number) > (step if kind == "step" else bases_of):
                shutil.rmtree(path)


@pytest.fixture
def phased(tiny_sft) -> Phased:
    return Phased(tiny_sft)


@pytest.fixture(scope="module")
def whole(tiny_llama, tmp_path_factory) -> Phased:
    """A run in three phases, with every step kept."""
    run = Phased(TinyRun(root=tmp_path_factory.mktemp("whole"), model=tiny_llama, algorithm="sft"))
    ended = run(*ALL)
    assert ended.code == 0, ended.err
    return run


def weights_of(directory) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def record_of(step) -> dict:
    return json.loads((step / "training_info.json").read_text())


def test_the_phases_follow_each_other_in_one_run(whole):
    lines, steps = whole.tiny.metrics(), whole.tiny.checkpoints
    assert [(line["step"], line["phase"]) for line in lines] == [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (6, 3)]
    tokens = [line["total_num_tokens"] for line in lines[:2]]
    assert sum(tokens) >= 100 > tokens[0]
    # warm-up over 50 of 100 tokens, decay over the last 30
    expected = [
        min(1.0, after / 50, (100 - before) / 30) * 0.01 for before, after in ((0, tokens[0]), (tokens[0], 1e9))
    ]
    assert [line["lr"] for line in lines[:2]] == pytest.approx(expected, rel=1e-12)
    assert [line["lr"] for line in lines[2:]] == [0.01] * 4
    begins = [record_of(steps / f"step_{step}")["phase_begin"] for step in range(1, 7)]
    assert [(begin["index"], begin["step"], begin["base"]) for begin in begins] == [
        *[(0, 0, None)] * 2,
        *[(1, 2, "base_of_phase_2")] * 2,
        *[(2, 4, "base_of_phase_3")] * 2,
    ]
    assert [record_of(steps / f"step_{step}")["reason"] for step in (2, 4, 6)] == ["period"] * 3
    crossings = whole.tiny.metrics("phase")
    assert [(line["step"], line["phase"]) for line in crossings] == [(2, 2), (4, 3)]
    assert crossings[0]["loss_shift"] == 0  # fp32 frozen in fp32, B = 0: the forward pass is the same, bit for bit
    assert 0 < abs(crossings[1]["loss_shift"]) < 1e-6


def test_the_first_two_phases_are_two_runs(whole, phased):
    """All weights, and an adapter on what came out, each by a run of its own."""
    steps, tiny = whole.tiny.checkpoints, phased.tiny
    lr = ["policy.scheduler={_override_: true, name: constant}"]
    full = phased("sft.phases=[{train: full, tokens: 100, warmup_pct: 0.5, decay_pct: 0.3}]")
    assert full.code == 0, full.err
    weights = tiny.checkpoints / "step_2" / "policy" / "weights"
    assert same(weights_of(weights), weights_of(steps / "step_2" / "policy" / "weights"))
    assert same(weights_of(weights), weights_of(steps / "base_of_phase_2" / "weights"))
    alone = run_driver(
        *phased.arguments(*lr, "policy.dtensor_cfg.lora_cfg.enabled=true"),
        f"policy.model_name={weights}",
        f"policy.tokenizer.name={tiny.model}",
        "sft.max_num_steps=2",
        f"sft.seed={derive_seed(42, 'phase', 1)}",
        f"checkpointing.checkpoint_dir={tiny.root}/alone",
        algorithm="sft",
    )
    assert alone.code == 0, alone.err
    assert same(adapter(tiny.root / "alone" / "step_2"), adapter(steps / "step_4"))


def test_a_merge_is_that_of_peft(whole):
    steps = whole.tiny.checkpoints
    base = AutoModelForCausalLM.from_pretrained(steps / "base_of_phase_2" / "weights", dtype=torch.float64)
    merged = PeftModel.from_pretrained(base, steps / "step_4" / "policy" / "adapter").merge_and_unload().state_dict()
    made = weights_of(steps / "base_of_phase_3" / "weights")
    changed = 0
    for name, tensor in made.items():
        error = float((tensor.double() - merged[name]).norm() / merged[name].norm())
        assert error < 1e-7, name  # fp32 has 24 bits: half a unit in the last place is 6e-8
        changed += not torch.equal(tensor, weights_of(steps / "base_of_phase_2" / "weights")[name])
    assert changed == 14  # seven projections of two layers
    assert adapter(steps / "step_6").keys() == adapter(steps / "step_4").keys()
    assert {tensor.shape[0] for name, tensor in adapter(steps / "step_6").items() if "lora_A" in name} == {2}


@pytest.mark.parametrize(
    ("step", "bases_of"),
    [
        pytest.param(1, 0, id="within the first phase"),
        pytest.param(2, 0, id="at the first boundary, before the base was made"),
        pytest.param(2, 2, id="at the first boundary, after the base was made"),
        pytest.param(3, 2, id="within the second phase"),
        pytest.param(4, 2, id="at the second boundary"),
        pytest.param(5, 3, id="within the third phase"),
    ],
)
def test_a_run_that_was_broken_off_goes_on_as_it_would_have(whole, phased, step, bases_of):
    phased.with_steps_until(whole, step, bases_of=bases_of)
    ended = phased(*ALL)
    assert ended.code == 0, ended.err
    for number in range(step + 1, 7):
        ours, theirs = (run.tiny.checkpoints / f"step_{number}" for run in (phased, whole))
        kind = "weights/model" if number <= 2 else "adapter/adapter_model"
        for file in (
            f"policy/{kind}.safetensors",
            f"policy/optimizer/{'weights' if number <= 2 else 'adapter'}.safetensors",
        ):
            if (theirs / file).exists():
                assert same(load_file(ours / file), load_file(theirs / file)), (number, file)
        assert record_of(ours)["counters"] == record_of(theirs)["counters"]
        assert record_of(ours)["phase_begin"] == record_of(theirs)["phase_begin"]
    assert without_seconds(phased.tiny.metrics()) == without_seconds(whole.tiny.metrics()[step:])
    again = phased(*ALL)
    assert (again.code, "is finished: 6 steps in 3 phases" in again.out) == (0, True)


def test_nothing_at_a_boundary_goes_on_with_weights_and_moments(phased):
    """At a rate of 0 AdamW moves nothing and its moments go on."""
    phases = "sft.phases=[{train: full, steps: 2}, {train: full, steps: 1, lr: 0.0}]"
    ended = phased(phases, "checkpointing.keep_top_k=null")
    assert ended.code == 0, ended.err
    steps = [phased.tiny.checkpoints / f"step_{step}" / "policy" for step in (2, 3)]
    before, after = (weights_of(step / "weights") for step in steps)
    assert same(before, after)
    moments = [read_moments(step / "optimizer", expected=before.keys(), aliases={}) for step in steps]
    assert [num_steps for _, num_steps in moments] == [2, 3]
    for name, (first, _) in moments[0][0].items():
        moved = moments[1][0][name][0] - 0.9 * first  # what the gradient of the third step added
        assert 0 < float(moved.norm()) < float("inf"), name
    assert not list(phased.tiny.checkpoints.glob("base_of_*"))
    assert phased.tiny.metrics("phase")[0]["loss_shift"] == 0


def test_an_adapter_goes_on_on_other_rows(phased, tmp_path):
    rows = tmp_path / "other.jsonl"
    rows.write_text("".join(json.dumps({"input": f"{i}?", "output": "yes " * (i % 3 + 1)}) + "\n" for i in range(8)))
    data = f"{{dataset_name: ResponseDataset, data_path: '{rows}'}}"
    ended = phased(
        f"sft.phases=[{{train: lora, steps: 2}}, {{train: lora, steps: 2, name: other, data: {data}}}]",
        "checkpointing.keep_top_k=null",
    )
    assert ended.code == 0, ended.err
    digests = [record_of(phased.tiny.checkpoints / f"step_{step}")["data_digests"]["data.train"] for step in (2, 4)]
    assert digests[0] != digests[1]
    assert phased.tiny.metrics("phase")[0]["loss_shift"] == 0
    assert "other begins after step 2" in ended.out


@pytest.mark.parametrize("backend", ["dtensor", "megatron"])
def test_frozen_in_bfloat16_and_merged_in_it(phased, backend):
    """What the casts do is said, and bounded."""
    lora = [text for text in ADAM if "lora_cfg" in text and backend == "megatron"]
    arguments = [text for text in phased.arguments() if text not in lora and "lora_cfg.dim" not in text]
    phases = "sft.phases=[{train: full, steps: 2}, {train: lora, steps: 2, at_end: merge}, {train: lora, steps: 1}]"
    shared = [*arguments, phases, f"policy.backend={backend}", "policy.precision=bfloat16"]
    ended = run_driver(*shared, algorithm="sft")
    assert ended.code == 0, ended.err
    inject, merge = phased.tiny.metrics("phase")
    assert 1e-4 < inject["relative_rounding_error"] < 4e-3  # bf16 has 8 bits: at most 2**-9 of each weight
    assert merge["surviving_share"] == pytest.approx(1, abs=0.05)
    for line in (inject, merge):
        assert line["loss_shift"] == pytest.approx(line["loss_after"] - line["loss_before"])
        assert abs(line["loss_shift"]) < 0.05
    base = weights_of(phased.tiny.checkpoints / "base_of_phase_2" / "weights")
    trained = weights_of(phased.tiny.checkpoints / "step_2" / "policy" / "weights")
    assert all(torch.equal(base[name], tensor.bfloat16()) for name, tensor in trained.items())

    bounded = run_driver(
        *shared, "sft.max_phase_loss_shift=1e-9", f"checkpointing.checkpoint_dir={phased.tiny.root}/b", algorithm="sft"
    )
    assert bounded.code == 1
    assert "sft.max_phase_loss_shift=1e-09: the loss of 12 fixed rows is" in bounded.err
    assert (phased.tiny.root / "b" / "step_2").is_dir()
    more = run_driver(
        *shared, "sft.max_phase_loss_shift=1", f"checkpointing.checkpoint_dir={phased.tiny.root}/b", algorithm="sft"
    )
    assert more.code == 0, more.err
    last = [
        load_file(next(place.glob("step_5/policy/adapter/*.safetensors")))
        for place in (phased.tiny.checkpoints, phased.tiny.root / "b")
    ]
    assert same(*last)


def test_the_weights_of_a_phase_are_let_go_before_the_next_ones_are_loaded(phased, monkeypatch):
    build, policies, alive = start.build_run, [], []

    def building(*arguments):
        alive.append(sum(policy() is not None for policy in policies))
        run = build(*arguments)
        policies.append(weakref.ref(run.policy))
        return run

    monkeypatch.setattr(start, "build_run", building)
    ended = phased(
        "sft.phases=[{train: full, steps: 1}, {train: lora, steps: 1, at_end: merge}, {train: full, steps: 1}]"
    )
    assert ended.code == 0, ended.err
    assert alive == [0, 0, 0]


def test_a_base_goes_when_no_step_needs_it(phased):
    phases = "sft.phases=[{train: full, steps: 1}, {train: lora, steps: 1, at_end: merge}, {train: lora, steps: 2}]"
    ended = phased(phases, "checkpointing.save_period=1", "checkpointing.keep_top_k=1")
    assert ended.code == 0, ended.err
    left = sorted(path.name for path in phased.tiny.checkpoints.iterdir() if path.is_dir())
    assert left == ["base_of_phase_3", "step_4"]


def test_a_new_run_in_the_same_place_loses_nothing(whole, phased):
    phased.with_steps_until(whole, 6, bases_of=3)
    ended = phased(*ALL, "checkpointing.load_path=none", "sft.seed=7")
    assert ended.code == 0, ended.err
    aside = phased.tiny.checkpoints / "set_aside_001"
    assert sorted(path.name for path in aside.iterdir()) == [
        "base_of_phase_2",
        "base_of_phase_3",
        *(f"step_{step}" for step in range(1, 7)),
    ]
    assert same(adapter(aside / "step_6"), adapter(whole.tiny.checkpoints / "step_6"))
    assert not same(adapter(phased.tiny.checkpoints / "step_6"), adapter(aside / "step_6"))


@pytest.mark.parametrize("file", ["notes.txt", pytest.param("phase_base.json", id="the base of another phase")])
def test_what_is_in_the_way_is_left_alone(phased, file):
    mine = phased.tiny.checkpoints / "base_of_phase_2"
    mine.mkdir(parents=True)
    (mine / file).write_text('{"step": 4, "index": 2}')
    ended = phased("sft.phases=[{train: full, steps: 1}, {train: lora, steps: 1}]")
    assert ended.code == 2
    assert f"{mine} is in the way, and was not made by a run" in ended.err
    assert [path.name for path in mine.iterdir()] == [file]
    assert phased.tiny.steps() == []


def test_steps_that_were_set_aside_keep_what_they_build_on(whole, phased, tmp_path):
    phased.with_steps_until(whole, 6, bases_of=3)
    ended = phased(*ALL, f"checkpointing.load_path={phased.tiny.checkpoints}/step_3", "checkpointing.keep_top_k=1")
    assert ended.code == 0, ended.err
    aside = phased.tiny.checkpoints / "set_aside_001"
    assert sorted(path.name for path in aside.iterdir()) == ["base_of_phase_3", "step_4", "step_5", "step_6"]
    here = whole.tiny.checkpoints / "base_of_phase_2"
    away = here.rename(here.with_name("away"))
    try:
        exported = run_command("export", f"--adapter-ckpt={aside}/step_4", f"--hf-ckpt-path={tmp_path}/merged")
    finally:
        away.rename(here)
    assert exported.code == 0, exported.err
    again = phased(*ALL, f"checkpointing.load_path={aside}/step_4", f"checkpointing.checkpoint_dir={tmp_path}/on")
    assert again.code == 0, again.err
    assert same(adapter(tmp_path / "on" / "step_6"), adapter(whole.tiny.checkpoints / "step_6"))


def test_what_cannot_be_merged_is_found_before_it_is_trained(phased, tmp_path):
    model = shutil.copytree(phased.tiny.model, tmp_path / "model")
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    ended = phased(
        "sft.phases=[{train: lora, steps: 1, at_end: merge}, {train: lora, steps: 1}]", f"policy.model_name={model}"
    )
    assert ended.code == 2
    assert f"policy.model_name='{model}': " in ended.err
    assert "holds no safetensors file, and a phase whose adapter is merged into it needs one." in ended.err


def test_what_is_merged_into_a_base_that_the_run_makes_needs_no_safetensors_files_of_the_model(phased, tmp_path):
    model = shutil.copytree(phased.tiny.model, tmp_path / "model")
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    phases = "sft.phases=[{train: full, steps: 1}, {train: lora, steps: 1, at_end: merge}, {train: lora, steps: 1}]"
    ended = phased(phases, f"policy.model_name={model}")
    assert ended.code == 0, ended.err
    assert (phased.tiny.checkpoints / "step_3" / "policy" / "adapter").is_dir()
    later = (
        "sft.phases=[{train: lora, steps: 1}, {name: b, train: lora, steps: 1, at_end: merge}, {train: full, steps: 1}]"
    )
    ended = phased(later, f"policy.model_name={model}", "checkpointing.load_path=none")
    assert ended.code == 2
    assert "holds no safetensors file" in ended.err


def test_a_full_disk_and_a_signal_at_a_boundary_lose_nothing(whole, phased, monkeypatch):
    write, what = crossing.write_frozen, []

    def disturbed(*arguments):
        if what[0] == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        os.kill(os.getpid(), signal.SIGTERM)
        return write(*arguments)

    monkeypatch.setattr(crossing, "write_frozen", disturbed)
    phased.rows = whole.rows
    what[:] = ["full"]
    ended = phased(*ALL)
    assert ended.code == 1
    assert "no space left to make base_of_phase_2, what the next phase builds on. The newest checkpoint" in ended.err
    what[:] = ["signal"]
    ended = phased(*ALL)
    assert ended.code == 128 + signal.SIGTERM, ended.err
    assert "stopped by SIGTERM" in ended.out
    assert "Continue with:" in ended.out
    monkeypatch.undo()
    ended = phased(*ALL)
    assert ended.code == 0, ended.err
    assert same(adapter(phased.tiny.checkpoints / "step_6"), adapter(whole.tiny.checkpoints / "step_6"))


@pytest.mark.parametrize("is_saved", [False, True])
def test_the_way_on_from_a_step_elsewhere_is_that_step_until_a_step_is_saved(
    whole, phased, tmp_path, monkeypatch, is_saved
):
    phased.rows = whole.rows
    step = tmp_path / "a, (b)" / "step_2"
    shutil.copytree(whole.tiny.checkpoints / "step_2", step)
    owner, name = (DTensorPolicy, "train_step") if is_saved else (crossing, "write_frozen")
    disturbed = getattr(owner, name)

    def stopped(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return disturbed(*arguments)

    monkeypatch.setattr(owner, name, stopped)
    arguments = phased.arguments(*ALL, f"checkpointing.load_path={json.dumps(str(step))}")
    monkeypatch.setattr(sys, "argv", ["examples/run_sft.py", *arguments])
    ended = run_driver(*arguments, algorithm="sft")
    assert ended.code == 128 + signal.SIGTERM, ended.err
    monkeypatch.undo()
    given = re.search(r"Continue with: +(.*)", ended.out)[1]
    again = shlex.split(given)[3:]
    (load_path,) = [text for text in again if text.startswith("checkpointing.load_path=")]
    assert load_path.endswith("=auto") == is_saved, load_path
    ended = run_driver(*again, algorithm="sft")
    assert ended.code == 0, ended.err
    assert same(adapter(phased.tiny.checkpoints / "step_6"), adapter(whole.tiny.checkpoints / "step_6"))


@pytest.mark.parametrize("error", [FloatingPointError, RuntimeError])  # which says that no weight has moved, or not
def test_a_phase_that_fails_at_once_leaves_the_last_step_of_the_one_before(whole, phased, monkeypatch, error):
    phased.with_steps_until(whole, 2, bases_of=0)
    step = phased.tiny.checkpoints / "step_2"
    before = record_of(step), weights_of(step / "policy" / "weights")

    def fails(self, batch, loss_fn):
        raise error("of the phase's first step")

    monkeypatch.setattr(DTensorPolicy, "train_step", fails)
    ended = phased(*ALL, "checkpointing.save_period=0")
    assert ended.code == 1
    assert f"Step 2, the last complete one, is saved: {step}." in ended.err
    assert record_of(step) == before[0]
    assert same(weights_of(step / "policy" / "weights"), before[1])
    monkeypatch.undo()
    again = phased(*ALL)
    assert again.code == 0, again.err
    assert same(adapter(phased.tiny.checkpoints / "step_6"), adapter(whole.tiny.checkpoints / "step_6"))


def test_a_validation_of_a_boundary_is_made_once(whole, phased):
    first = phased(*ALL, "sft.val_at_end=true", "checkpointing.save_period=0")
    assert first.code == 0, first.err
    assert [line["step"] for line in phased.tiny.metrics("validation")] == [2, 4, 6]
    for name in ("step_4", "step_6", "base_of_phase_2", "base_of_phase_3"):
        shutil.rmtree(phased.tiny.checkpoints / name)
    again = phased(*ALL, "sft.val_at_end=true", "checkpointing.save_period=0")
    assert again.code == 0, again.err
    assert [line["step"] for line in phased.tiny.metrics("validation", experiment=2)] == [4, 6]


def test_an_adapter_to_start_from_is_recorded_in_every_phase_that_goes_on_with_it(whole, phased):
    base = whole.tiny.checkpoints / "base_of_phase_2" / "weights"
    shared = [f"policy.model_name={base}", f"policy.adapter.init_from={whole.tiny.checkpoints}/step_4"]
    still, other = "{train: lora, steps: 1, lr: 0}", "{train: lora, steps: 1, lora: {dim: 4}}"
    ended = phased(
        f"sft.phases=[{still}, {{name: more, {still[1:]}, {other}]",
        *shared,
        "checkpointing.keep_top_k=null",
    )
    assert ended.code == 0, ended.err
    records = [record_of(phased.tiny.checkpoints / f"step_{step}")["initial_adapter"] for step in (1, 2, 3)]
    assert records[0] == records[1] is not None
    assert records[2] is None
    assert same(adapter(phased.tiny.checkpoints / "step_2"), adapter(whole.tiny.checkpoints / "step_4"))


def test_steps_of_phases_are_refused_by_verify_resume(whole):
    ended = run_command("verify-resume", f"--checkpoint={whole.tiny.checkpoints}/step_2", "--steps=1")
    assert ended.code == 2
    assert "is a step of a run in phases" in ended.err


def test_an_export_finds_the_base_of_its_phase(whole, tmp_path):
    ended = run_command(
        "export", f"--adapter-ckpt={whole.tiny.checkpoints}/step_6", f"--hf-ckpt-path={tmp_path}/merged"
    )
    assert ended.code == 0, ended.err
    base, merged = weights_of(whole.tiny.checkpoints / "base_of_phase_3" / "weights"), weights_of(tmp_path / "merged")
    assert sum(not torch.equal(merged[name], tensor) for name, tensor in base.items()) == 14
    moved = shutil.copytree(whole.tiny.checkpoints, tmp_path / "elsewhere")
    here = whole.tiny.checkpoints / "base_of_phase_3"
    away = here.rename(here.with_name("away"))
    try:
        ended = run_command("export", f"--adapter-ckpt={moved}/step_6", f"--hf-ckpt-path={tmp_path}/of_moved")
    finally:
        away.rename(here)
    assert ended.code == 0, ended.err
    assert same(weights_of(tmp_path / "of_moved"), merged)


def test_a_schedule_that_continues(phased):
    phases = (
        "sft.phases=[{train: full, steps: 2, warmup_pct: 0.4, decay_pct: 0.4},"
        " {train: lora, steps: 3, schedule: continue, lr: 0.002}]"
    )
    ended = phased(phases)
    assert ended.code == 0, ended.err
    shares = [min(1, (step + 1) / 2, (5 - step) / 2) for step in range(5)]
    rates = [0.01, 0.01, 0.002, 0.002, 0.002]
    found = [line["lr"] for line in phased.tiny.metrics()]
    assert found == pytest.approx([share * rate for share, rate in zip(shares, rates, strict=True)], rel=1e-12)


def test_a_schedule_in_tokens_is_not_eaten_by_the_last_step_of_the_phase_before(phased):
    phases = "sft.phases=[{train: full, tokens: 60, decay_pct: 0.5}, {train: full, tokens: 100, schedule: continue}]"
    ended = phased(phases)
    assert ended.code == 0, ended.err
    lines = phased.tiny.metrics()
    second = [line for line in lines if line["phase"] == 2]
    assert sum(line["total_num_tokens"] for line in lines if line["phase"] == 1) > 60
    seen, expected = 0, []
    for line in second:
        expected.append(0.01 * min(1, (160 - 60 - seen) / 80))
        seen += line["total_num_tokens"]
    assert [line["lr"] for line in second] == pytest.approx(expected, rel=1e-12)


def test_the_plan_of_a_run_that_continues_begins_where_its_phase_did(phased):
    phases = (
        "sft.phases=[{train: full, steps: 4, decay_pct: 1, name: '[/b]'}, {train: lora, steps: 4, schedule: continue}]"
    )
    assert phased(phases).code == 0
    shutil.rmtree(phased.tiny.checkpoints / "step_8")
    assert "[/b]" in phased(phases, "--plan").out
    (record,) = phased.tiny.checkpoints.glob("step_4/training_info.json")
    assert json.loads(record.read_text())["phase_begin"]["name"] == "[/b]"
    planned = phased(phases, "checkpointing.checkpoint_dir=" + str(phased.tiny.root / "none"), "--plan")
    curve = planned.out.split("Learning rate\n")[1].splitlines()
    assert re.fullmatch(r"\s+step └0 \[/b\]\s+└4 phase_2\s+└8", curve[5]), curve[5]


def test_the_runs_own_schedule_begins_anew_or_goes_on(phased):
    own = "policy.scheduler={_override_: true, name: linear, warmup_steps: 2, total_steps: 6}"
    factors = [0.5, 1.0, 1.0, 0.75]
    for schedule, expected in (("restart", factors[:2] * 2), ("continue", factors)):
        ended = phased(
            own,
            f"sft.phases=[{{train: full, steps: 2}}, {{train: full, steps: 2, schedule: {schedule}}}]",
            f"checkpointing.checkpoint_dir={phased.tiny.root}/{schedule}",
        )
        assert ended.code == 0, ended.err
        number = 1 if schedule == "restart" else 2
        found = [line["lr"] for line in phased.tiny.metrics(experiment=number)]
        assert found == pytest.approx([0.01 * factor for factor in expected])


def test_the_plan_shows_every_phase(phased):
    planned = phased(*ALL, "--plan")
    assert planned.code == 0, planned.out
    assert re.search(r"phase_1\s+all weights\s+49,536\s+\S+ KiB\s+2\s+\d+\s+inject", planned.out), planned.out
    assert re.search(r"phase_2\s+LoRA, dim 4\s+5,760\s+\S+ KiB\s+2\s+\d+\s+merge", planned.out)
    assert re.search(r"phase_3\s+LoRA, dim 2\s+2,880\s+\S+ KiB\s+2\s+\d+\s+nothing", planned.out)
    curve = planned.out.split("Learning rate\n")[1].splitlines()
    assert curve[0].startswith(" 1.0e-02 │")
    assert re.fullmatch(r"\s+step └0 phase_1\s+└2 phase_2\s+└4 phase_3\s+└6", curve[5]), curve[5]
    assert not phased.tiny.steps()


def test_curves_mark_where_phases_begin(whole):
    from nemo_rl_lora.run import plots

    marked = []

    class Axes:
        def axvline(self, place, **_):
            marked.append(place)

        def text(self, *_, **__): ...

        def get_xaxis_transform(self): ...

    plots._mark_phases(Axes(), plots.read_metrics(whole.tiny.logs / "exp_001"))
    assert marked == [2.5, 4.5]
    assert plots.draw_curves(whole.tiny.logs / "exp_001").stat().st_size > 10_000


WRONG = {
    "{train: full}": "sft.phases.0.tokens=None, steps=None and epochs=None: a phase has one length.",
    "{train: full, steps: 1, tokens: 5}": "sft.phases.0.tokens=5, steps=1: a phase has one length.",
    "{train: half, steps: 1}": "sft.phases.0.train='half'",
    "{train: full, steps: 1, lora: {dim: 2}}": "lora: this phase trains all weights (train='full').",
    "{train: lora, steps: 1, lora: {enabled: false}}": "lora.enabled=False: `train` says whether there is an adapter.",
    "{train: full, steps: 1, warmup_pct: 0.7, decay_pct: 0.7}": "warmup_pct=0.7: warm-up and decay (0.7) are together",
    "{train: full, steps: 1, decay_pct: 20}": "sft.phases.0.decay_pct=20",
    "{train: full, steps: 1, at_end: merge}, {train: lora, steps: 1}": "sft.phases.0.at_end='merge': a phase with",
    "{train: full, steps: 1, at_end: inject}": "sft.phases.0.at_end='inject': no phase follows.",
    "{train: full, steps: 1, at_end: inject}, {train: full, steps: 1}": "at_end='inject': the next phase trains all",
    "{train: lora, steps: 1, at_end: nothing}, {train: full, steps: 1}": "at_end='nothing': this phase trains an",
    "{train: lora, steps: 1, at_end: nothing}, {train: lora, steps: 1, lora: {dim: 2}}": "sft.phases.1.lora: the phase",
    "{train: full, steps: 1, schedule: continue}": "sft.phases.0.schedule='continue': there is no phase before it.",
    "{train: full, steps: 1, decay_pct: 0.1}, {train: lora, tokens: 9, schedule: continue}": "need lengths in one unit",
    "{train: full, steps: 1}, {train: lora, steps: 1, schedule: continue, decay_pct: 0.1}": "its shape is that of the",
    "{train: full, steps: 1, name: a}, {train: lora, steps: 1, name: a}": "sft.phases.1.name='a': an earlier phase has",
    "{train: lora, steps: 1, lora: {dims: 2}}": "dims",
    "{train: lora, steps: 1}, {train: lora, steps: 1, lora: {target_modules: [q_prj]}}": "q_prj",
    "{train: full, steps: 1}, {train: lora, steps: 1, data: {dataset_name: gsm9k}}": (
        "sft.phases.1 (phase_2): sft.phases.1.data.dataset_name='gsm9k'"
    ),
    "{train: full, steps: 1}, {train: lora, steps: 1, name: b, data: {dataset_name: jsonl, data_path: no.jsonl}}": (
        "sft.phases.1 (b): "
    ),
}


@pytest.mark.parametrize("phases", WRONG)
def test_wrong_phases_are_refused_before_anything_is_written(phased, phases):
    ended = phased(f"sft.phases=[{phases}]")
    assert ended.code == 2, ended.err
    assert WRONG[phases] in ended.err, ended.err
    assert "Traceback" not in ended.err
    assert not phased.tiny.steps()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sft.max_num_steps=9", "sft.max_num_steps=9: the phases say how long the run is."),
        ("sft.max_num_tokens=9", "sft.max_num_tokens=9: the phases say how long the run is."),
        ("checkpointing.enabled=false", "checkpointing.enabled=False: what a phase has trained goes to the next one"),
        ("policy.adapter.init_from=x", "policy.adapter.init_from='x': "),
        ("policy.megatron_cfg.peft.dim=3", "policy.megatron_cfg.peft.dim=3: is read by nothing"),
    ],
)
def test_keys_that_phases_leave_without_a_meaning(phased, override, said):
    for flag in ([], ["--plan"]):
        ended = phased("sft.phases=[{train: full, steps: 1}, {train: lora, steps: 1}]", override, *flag)
        assert ended.code == 2, ended.err
        assert said in " ".join((ended.err + ended.out).split())


@pytest.mark.parametrize("step", [2, 3, 5])
def test_a_run_that_goes_on_elsewhere_leaves_the_first_one_alone(whole, phased, tmp_path, step):
    """From a step of another directory: at a boundary, and on a base that lies there."""
    phased.rows = whole.rows
    first = shutil.copytree(whole.tiny.checkpoints, tmp_path / "first")
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*")}
    ended = phased(*ALL, f"checkpointing.load_path={first}/step_{step}")
    assert ended.code == 0, ended.err
    assert same(adapter(phased.tiny.checkpoints / "step_6"), adapter(first / "step_6"))
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*")} == before
    ended = run_command(
        "export", f"--adapter-ckpt={phased.tiny.checkpoints}/step_6", f"--hf-ckpt-path={tmp_path}/merged"
    )
    assert ended.code == 0, ended.err
    again = phased(*ALL)
    assert (again.code, "is finished" in again.out) == (0, True)


def test_other_phases_are_another_run(whole, phased):
    phased.with_steps_until(whole, 3, bases_of=2)
    ended = phased(ALL[0].replace("steps: 2, at_end", "steps: 3, at_end"), *ALL[1:])
    assert ended.code == 2
    assert "was written with another configuration: sft.phases was" in ended.err


def test_a_base_that_is_gone(whole, phased):
    phased.with_steps_until(whole, 3, bases_of=0)
    ended = phased(*ALL)
    assert ended.code == 2
    assert "its phase builds on" in ended.err
    assert "base_of_phase_2, which is not there. Put it back" in ended.err


def test_a_base_of_other_weights(whole, phased):
    phased.with_steps_until(whole, 3, bases_of=2)
    file = phased.tiny.checkpoints / "base_of_phase_2" / "weights" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    ended = phased(*ALL)
    assert ended.code == 2
    assert "was trained on other base weights" in ended.err


def test_two_epochs_are_counted(phased):
    ended = phased("sft.phases=[{train: lora, epochs: 2, decay_pct: 1}]")
    assert ended.code == 0, ended.err
    lines = phased.tiny.metrics()
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]  # 12 rows, 4 a step
    assert [line["lr"] for line in lines] == pytest.approx([0.01 * (6 - step) / 6 for step in range(6)])
    assert not math.isnan(lines[-1]["loss"])


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(["policy.backend=dtensor"], id="dtensor"),
        pytest.param(["policy.backend=megatron"], id="megatron", marks=pytest.mark.slow),
        pytest.param(
            ["policy.backend=megatron", "policy.megatron_cfg.pipeline_model_parallel_size=2"],
            id="megatron pp2",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_two_processes_cross_as_one_does_and_go_on_from_the_boundary(phased, tmp_path, settings):
    lora = "sft.phases=[{train: full, steps: 2}, {train: lora, steps: 2, lora: {dim: 4, dropout: 0.0}}]"
    arguments = [text for text in phased.arguments() if "lora_cfg" not in text]

    def run(place: str, *overrides: str):
        directory = tmp_path / place
        shared = [lora, f"checkpointing.checkpoint_dir={directory}", "checkpointing.keep_top_k=null", settings[0]]
        ended = run_driver(*arguments, *shared, *overrides, algorithm="sft")
        assert ended.code == 0, ended.err
        return directory

    in_two = ["cluster.gpus_per_node=2", *settings[1:]]
    one, two = run("one"), run("two", *in_two)
    for name, tensor in adapter(one / "step_4").items():
        torch.testing.assert_close(adapter(two / "step_4")[name], tensor, atol=1e-4, rtol=1e-3, msg=name)
    again = tmp_path / "again"
    shutil.copytree(two, again)
    shutil.rmtree(again / "step_4")
    shutil.rmtree(again / "base_of_phase_2")
    run("again", *in_two)
    assert same(adapter(again / "step_4"), adapter(two / "step_4"))
    base = [weights_of(place / "base_of_phase_2" / "weights") for place in (again, two)]
    assert same(*base)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["dtensor", "megatron"])
def test_twenty_kills_around_a_boundary(tiny_llama, tmp_path, backend):
    program = [sys.executable, "-m", "tests.run.killed_phases", str(tmp_path), str(tiny_llama), "20"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [*program, f"policy.backend={backend}"], capture_output=True, text=True, env=environment, check=False
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 20, done.stderr
    assert all(line["killed"] == -9 for line in lines), lines
    assert all(line["equal"] for line in lines), lines
    left = {tuple(name for name in line["left"] if not name.startswith("tmp_")) for line in lines}
    assert {(), ("step_2",), ("base_of_phase_2", "step_2")} <= left
    assert any(name.startswith("tmp_") for line in lines for name in line["left"])
