"""benchmarks/gpu_speed.py without a GPU: what it measures, prints and writes; its arithmetic of a token."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_rl_lora.models.load import empty_model
from tests.gpu.checks import Machine

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
NAMES = ["sft_8b", "grpo_4b", "decoding", "sft_small", "kernels", "megatron"]


def run(out: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]]:
    """The script as a process of its own, and its file."""
    command = [sys.executable, str(BENCHMARKS / "gpu_speed.py"), "--cpu", "--out", str(out), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=out, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-3000:]
    return ended, json.loads((out / "gpu_speed.json").read_text())


@pytest.fixture
def load(monkeypatch):
    """Import a module of benchmarks/ by its name, as the script does."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return lambda name: __import__(name, fromlist=["_"])


@pytest.mark.slow  # a minute, where nothing else runs
@pytest.mark.timeout(900)
def test_every_measurement_has_a_number_or_a_reason_on_a_cpu(tmp_path):
    ended, entries = run(tmp_path, "--budget", "800")
    *lines, last = ended.stdout.splitlines()
    assert len(lines) == len(entries) == json.loads(last)["num_measurements"]
    assert all(f"{e['group']}: {e['name']}" in line for line, e in zip(lines, entries, strict=True))
    assert list(dict.fromkeys(entry["group"] for entry in entries)) == NAMES
    reasons = {}
    for entry in entries:
        facts = entry["facts"]
        if "skipped" in facts:
            reasons[entry["name"]] = facts["skipped"]
        else:
            assert facts.get("tokens_per_s", facts.get("times_as_fast")) > 0, entry
    allowed = ("no GPU", "trl is not installed", "no step of one side was measured: TRL")
    assert all(reason.startswith(allowed) for reason in reasons.values()), reasons
    assert not any(name.startswith("ours") for name in reasons)


@pytest.fixture
def main(load, monkeypatch):
    """The script's main in this process, whose environment is left as it is."""
    main = runpy.run_path(str(BENCHMARKS / "gpu_speed.py"))["main"]
    monkeypatch.setitem(main.__globals__, "prepare_environment", lambda *, cpu: None)
    return main


def test_after_the_budget_every_measurement_is_named_and_skipped(main, tmp_path, capsys):
    assert main(["--cpu", "--out", str(tmp_path), "--only", "grpo_4b,megatron", "--budget", "0"]) == 0
    entries = json.loads((tmp_path / "gpu_speed.json").read_text())
    assert [entry["group"] for entry in entries] == ["grpo_4b", "grpo_4b", "megatron"]
    assert {entry["facts"]["skipped"] for entry in entries} == {"out of time: --budget 0"}
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["num_failed"] == 0


def test_a_measurement_that_fails_gives_exit_code_1_and_the_others_are_made(main, monkeypatch, tmp_path):
    monkeypatch.setitem(main.__globals__, "MEASUREMENTS", {"broken": "gpu.nowhere", "megatron": "gpu.training"})
    assert main(["--cpu", "--out", str(tmp_path)]) == 1
    broken, measured = json.loads((tmp_path / "gpu_speed.json").read_text())
    assert broken["ok"] is False
    assert "gpu.nowhere" in broken["facts"]["error"]
    assert measured["facts"]["tokens_per_s"] > 0


def test_on_a_gpu_every_measurement_has_a_name_of_its_own(main, load, tmp_path):
    """Of the lists alone; nothing is computed."""
    machine = Machine(device="cuda", root=tmp_path)
    listed = {
        name: [check.name for check in main.__globals__["measurements_of"](name, machine)]
        for name in main.__globals__["MEASUREMENTS"]
    }
    assert {name: len(set(names)) for name, names in listed.items()} == {
        "sft_8b": 5,
        "grpo_4b": 2,
        "decoding": 8,
        "sft_small": 2,
        "kernels": 4,
        "megatron": 1,
    }
    assert {name.split(", ")[-1] for name in listed["decoding"]} == {"64 rows", "256 rows", "without CUDA graphs"}


@pytest.mark.parametrize("rows_of_microbatch", [1, 2, 4])
def test_a_microbatch_has_as_many_full_rows_as_it_says(load, monkeypatch, tmp_path, rows_of_microbatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    training, shapes = load("gpu.training"), load("gpu.shapes")
    config = shapes.LLAMA_1B.config(toy=True)
    machine = Machine(device="cpu", root=tmp_path)
    policy = training.dtensor_policy(machine, config, 64, microbatch_tokens=64 * rows_of_microbatch)
    portion = policy.cutting.portions(training.full_rows(config, 4, 64, prompt_tokens=1), "train")[0]
    assert [len(micro.rows) for micro in portion.microbatches()] == [rows_of_microbatch] * (4 // rows_of_microbatch)


@pytest.mark.parametrize("name", ["LLAMA_8B", "LLAMA_1B", "QWEN3_4B", "QWEN2_HALF_B"])
def test_a_token_costs_four_flop_for_each_weight_of_a_linear_layer(load, name):
    """Beside the weights of transformers' own model, the head as a layer of its own."""
    shapes = load("gpu.shapes")
    config = getattr(shapes, name).config(toy=False)
    linear = [module for module in empty_model(config).modules() if isinstance(module, torch.nn.Linear)]
    assert shapes.flop_of_token(config, 0) == 4 * sum(module.weight.numel() for module in linear)


def test_attention_costs_its_two_products_three_times(load):
    """Causal: token t has t + 1 keys, so the mean over T tokens is about T / 2; a product is 2 FLOP a number."""
    shapes = load("gpu.shapes")
    config = shapes.LLAMA_8B.config(toy=False)
    products = 2 * 2 * (4096 / 2) * (32 * 128) * 32
    assert shapes.flop_of_token(config, 4096) - shapes.flop_of_token(config, 0) == 3 * products


def test_too_little_memory_is_a_reason_and_other_errors_are_not(load):
    timing = load("gpu.timing")

    def raises(error):
        def ask():
            raise error

        return timing.measurement("m", ask).ask

    answer = raises(torch.OutOfMemoryError("tried to allocate\n  2 GiB"))()
    assert (answer.ok, answer.facts) == (None, {"skipped": "out of memory: tried to allocate 2 GiB"})
    with pytest.raises(ValueError, match="wrong"):
        raises(ValueError("wrong"))()


def test_a_rate_stands_beside_the_card_and_the_published_one(load, monkeypatch, tmp_path):
    timing, shapes = load("gpu.timing"), load("gpu.shapes")
    card = "NVIDIA H100 80GB HBM3"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: card)
    machine = Machine(device="cuda", root=tmp_path)
    found = timing.Timed(seconds=2.0, peak_gib=40.0)
    config = shapes.LLAMA_8B.config(toy=False)
    facts = timing.beside_published(machine, timing.training_facts(machine, config, found, 4, 4096), 4096.0, "a page")
    assert (facts["tokens_per_s"], facts["of_published"]) == (8192.0, 2.0)
    assert facts["mfu"] == pytest.approx(8192 * (4 * 7.5047e9 + 3.2212e9) / 989.5e12, rel=1e-4)
    card = "a card of tomorrow"
    assert "a card of tomorrow" in timing.training_facts(machine, config, found, 4, 4096)["mfu"]


def test_the_best_of_both_sides_is_compared(load):
    sft = load("gpu.trl_sft")
    rates = {("ours", 1): 10.0, ("ours", 2): 30.0, ("TRL", 1): 20.0, ("TRL", 2): 15.0}
    assert sft.beside_best(rates) == {"times_as_fast": 1.5, "our_micro_batch": 2, "trl_micro_batch": 1}
    assert sft.beside_best({("ours", 1): 10.0}) == {"skipped": "no step of one side was measured: TRL"}
