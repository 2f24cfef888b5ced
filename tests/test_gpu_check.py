"""tools/gpu_check.py on a machine without a GPU: what it prints and writes, and what a wrong number does."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_rl_lora.policy import low_rank
from tests.gpu import attention, generation, kernels, runs, steps
from tests.gpu.checks import Machine

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "tools" / "gpu_check.py"
LINE = re.compile(r"^(ok  |FAIL|    ) +([\d.]+) s  (\w+): (.+?)  (\w+=.*)$")
MARKS = {"ok  ": True, "FAIL": False, "    ": None}


def printed(text: str) -> list[dict[str, Any]]:
    """What the lines say, but for the last one, in the form of the file; facts are texts."""
    entries = []
    for line in text.splitlines()[:-1]:
        found = LINE.match(line)
        assert found is not None, line
        mark, seconds, group, name, facts = found.groups()
        shown = dict(fact.split("=", 1) for fact in facts.split("  "))
        entries.append({"group": group, "name": name, "ok": MARKS[mark], "seconds": seconds, "facts": shown})
    return entries


def written(directory: Path) -> list[dict[str, Any]]:
    """The file, its numbers rounded as on the screen."""
    entries = json.loads((directory / "gpu_check.json").read_text())
    return [
        entry
        | {"seconds": f"{entry['seconds']:.1f}"}
        | {"facts": {k: f"{v:.3g}" if isinstance(v, float) else str(v) for k, v in entry["facts"].items()}}
        for entry in entries
    ]


@pytest.mark.slow  # two minutes, where nothing else runs
@pytest.mark.timeout(900)
def test_every_group_says_something_and_nothing_fails_on_a_cpu(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(TOOL), "--cpu", "--out", str(tmp_path), "--budget", "1000"]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-3000:]
    entries = written(tmp_path)
    assert printed(ended.stdout) == entries
    assert ended.stdout.splitlines()[-1].startswith(f"{sum(e['ok'] is True for e in entries)} passed, 0 failed, ")
    for group in ("generation", "steps", "runs"):
        assert all(entry["ok"] for entry in entries if entry["group"] == group)
    for group in ("kernels", "attention"):
        assert [entry["facts"] for entry in entries if entry["group"] == group] == [{"skipped": "no GPU"}]
    assert {entry["group"] for entry in entries if entry["ok"]} == {"generation", "steps", "runs"}
    assert any("torch" in entry["facts"] for entry in entries if entry["group"] == "environment")
    resumed = [entry["facts"] for entry in entries if entry["name"].endswith("repeated and resumed")]
    assert {(facts["repeats_exactly"], facts["resumes_exactly"]) for facts in resumed} == {("True", "True")}


@pytest.fixture
def check(tmp_path, capsys):
    """The tool in this process; call it with arguments. Its exit code, and what it printed."""
    main = runpy.run_path(str(TOOL))["main"]

    def run(*arguments: str) -> tuple[int, list[dict[str, Any]]]:
        code = main(["--cpu", "--out", str(tmp_path), *arguments])
        entries = printed(capsys.readouterr().out)
        assert entries == written(tmp_path)
        return code, entries

    return run


def wrong_weights(sample):
    def of_qwen2(machine, model, tensors, *rest):
        wrong = 1.01 if model.config.model_type == "qwen2" else 1.0
        return sample(machine, model, {name: wrong * tensor for name, tensor in tensors.items()}, *rest)

    return of_qwen2


def no_weights(sample):
    def of_qwen2(machine, model, *rest):
        if model.config.model_type == "qwen2":
            raise RuntimeError("no\n  weights")
        return sample(machine, model, *rest)

    return of_qwen2


@pytest.mark.parametrize(("fault", "fact"), [(wrong_weights, "largest_difference"), (no_weights, "error")])
def test_a_check_that_fails_gives_exit_code_1_and_the_others_are_made(check, monkeypatch, fault, fact):
    monkeypatch.setattr(generation, "BOUNDS", dict.fromkeys(list(generation.BOUNDS)[:1], 1e-4))
    monkeypatch.setattr(generation, "GRAPH_MODES", ("merged",))
    monkeypatch.setattr(generation, "sample", fault(generation.sample))
    code, entries = check("--only", "generation,kernels")
    assert code == 1
    assert [(entry["group"], entry["name"].split(",")[0], entry["ok"]) for entry in entries] == [
        ("generation", "llama", True),
        ("generation", "llama", True),
        ("generation", "qwen2", False),
        ("generation", "qwen2", False),
        ("generation", "qwen3", True),
        ("generation", "qwen3", True),
        ("generation", "CUDA graphs", True),
        ("kernels", "Triton kernels", None),
    ]
    wrong = entries[2]["facts"]
    assert wrong["error"] == "RuntimeError: no weights" if fact == "error" else float(wrong[fact]) > 1e-3


def test_a_group_whose_checks_cannot_be_listed_fails_alone(check, monkeypatch):
    monkeypatch.setattr(generation, "ARCHITECTURES", None)
    code, entries = check("--only", "generation,attention")
    assert (code, [entry["ok"] for entry in entries]) == (1, [False, None])


def test_after_the_budget_no_check_begins(check):
    code, entries = check("--only", "environment,generation", "--budget", "0")
    assert code == 0
    assert {entry["facts"]["skipped"] for entry in entries} == {"out of time: --budget 0"}
    assert len(entries) == 16


def test_an_unknown_group_is_named(check, capsys):
    with pytest.raises(SystemExit) as ended:
        check("--only", "steps,kernel")
    assert ended.value.code == 2
    assert "'kernel' is not a group of checks. Groups: environment, kernels" in capsys.readouterr().err


def test_without_a_gpu_it_says_how_to_run_without_one(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert runpy.run_path(str(TOOL))["main"](["--out", str(tmp_path)]) == 2
    assert "--cpu" in capsys.readouterr().err


def test_on_a_gpu_every_case_is_a_check_of_its_own_name(tmp_path):
    """Of the lists alone; nothing is computed."""
    machine = Machine(device="cuda", root=tmp_path)
    names = {
        group.__name__: [check.name for check in group.checks(machine)]
        for group in (kernels, attention, generation, steps, runs)
    }
    assert all(len(set(of_group)) == len(of_group) for of_group in names.values())
    for whose in ("ours, bfloat16", "ours, float16", "ours, float32", "ours, log-probabilities", "nemo-automodel's"):
        assert any(name.startswith(whose) for name in names["tests.gpu.kernels"])
    stepped = " ".join(names["tests.gpu.steps"])
    assert all(word in stepped for word in ("llama", "qwen2", "qwen3", "packed", "activation checkpointing"))
    ran = names["tests.gpu.runs"]
    for algorithm in ("sft", "dpo", "grpo"):
        for backend in ("dtensor", "megatron"):
            assert sum(name.startswith(f"{algorithm} on {backend} in float32") for name in ran) >= 2
            assert sum(name.startswith(f"{algorithm} on {backend}") for name in names["tests.gpu.steps"]) >= 6


@pytest.mark.parametrize("dtype", list(kernels.BOUNDS))
def test_layers_at_once_are_judged_by_the_formula(dtype):
    """On torch's products; and where one of them forgets the scale."""

    def forgetful(x, w, scale, *, dtype):
        return low_rank.project(x, w, 1.0, dtype=dtype)

    wrong = SimpleNamespace(project=forgetful, expand=low_rank.expand, reduce=low_rank.reduce)
    assert kernels.joined_beside_formula(dtype, low_rank, "cpu").ok
    assert not kernels.joined_beside_formula(dtype, wrong, "cpu").ok
