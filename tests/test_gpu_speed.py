"""benchmarks/gpu_speed.py without a GPU: what it measures, prints and writes; its arithmetic of a token."""

from __future__ import annotations

import json
import os
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


@pytest.mark.slow  # imports of a process of its own
def test_after_the_budget_every_measurement_is_named_and_skipped(tmp_path):
    ended, entries = run(tmp_path, "--only", "grpo_4b,megatron", "--budget", "0")
    assert [entry["group"] for entry in entries] == ["grpo_4b", "grpo_4b", "megatron"]
    assert {entry["facts"]["skipped"] for entry in entries} == {"out of time: --budget 0"}
    assert json.loads(ended.stdout.splitlines()[-1])["num_failed"] == 0


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
    assert facts["mfu"] == pytest.approx(8192 * (4 * 7.5047e9 + 3.2212e9) / 989.4e12, rel=1e-4)
    card = "a card of tomorrow"
    assert "a card of tomorrow" in timing.training_facts(machine, config, found, 4, 4096)["mfu"]


def test_the_best_of_both_sides_is_compared(load):
    sft = load("gpu.trl_sft")
    rates = {("ours", 1): 10.0, ("ours", 2): 30.0, ("TRL", 1): 20.0, ("TRL", 2): 15.0}
    assert sft.beside_best(rates) == {"times_as_fast": 1.5, "our_micro_batch": 2, "trl_micro_batch": 1}
    assert sft.beside_best({("ours", 1): 10.0}) == {"skipped": "no step of one side was measured: TRL"}
