"""The benchmark scripts start, and what they compute without a model is right. None of them is run here."""

from __future__ import annotations

import argparse
import json
import mmap
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = ("compare.py", "grpo_learning.py", "grpo_profile.py", "grpo_step_ours.py", "grpo_step_trl.py")
OTHERS = (
    "gpu_speed.py",
    "memory_growth.py",
    "merge.py",
    "phases.py",
    "processes.py",
    "tuning_ours.py",
    "tuning_trl.py",
)


@pytest.fixture
def load(monkeypatch):
    """Import a module of benchmarks/ under its own name, and forget it afterwards."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load_module(name: str) -> ModuleType:
        monkeypatch.delitem(sys.modules, name, raising=False)
        module = __import__(name)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return load_module


@pytest.mark.parametrize("path", sorted(BENCHMARKS.rglob("*.py")), ids=lambda path: path.name)
def test_every_file_compiles(path):
    compile(path.read_text(encoding="utf-8"), str(path), "exec")


@pytest.mark.parametrize("script", [*SCRIPTS, *OTHERS])
def test_a_script_shows_its_help_without_importing_torch(script):
    code = (
        "import runpy, sys\n"
        f"sys.path.insert(0, {str(BENCHMARKS)!r})\n"
        f"sys.argv = [{script!r}, '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(BENCHMARKS / script)!r}, run_name='__main__')\n"
        "except SystemExit as done:\n"
        "    assert done.code == 0, done.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


def test_arms_of_phases_have_equal_tokens(load):
    phases = load("phases")
    assert phases.length_of("phases", 100) == ["sft.phases.0.tokens=50", "sft.phases.1.tokens=50"]
    assert "train: full, tokens: 100, lr: 5e-05" in phases.length_of("full", 100)[0]
    lines = [
        {"split": "validation", "val_loss": 2.0},
        {"split": "train", "total_num_tokens": 30.0},
        {"split": "train", "total_num_tokens": 20.0},
        {"split": "validation", "val_loss": 1.0},
    ]
    curve = phases.curve_of(lines)
    assert curve == {0: 2.0, 50: 1.0}
    found = phases.summary({arm: [curve, {0: 2.0, 50: 3.0}] for arm in phases.COLORS})
    assert (found["start"], found["lora"]["mean"], found["lora"]["runs"]) == (2.0, 2.0, [1.0, 3.0])


def test_questions_are_those_of_every_run(load):
    work = load("work")
    asked = work.questions(work.WORKS["short"], len)
    assert len(asked) == 40
    assert (asked[0].text, asked[0].answer) == ("What is 7 + 7? Reply with the number only.", 14)
    assert (asked[1].text, asked[1].answer) == ("What is 1 + 5? Reply with the number only.", 6)


def test_a_lead_in_brings_a_prompt_to_its_length(load):
    work = load("work")
    asked = work.questions(work.WORKS["long"], lambda text: 30 + len(text.split()))
    assert {30 + len(question.text.split()) for question in asked} == {64}
    assert asked[0].text.endswith("What is 7 + 7? Reply with the number only.")


def test_a_lead_in_that_is_too_short_is_refused(load):
    work = load("work")
    with pytest.raises(ValueError, match="prompt_tokens=64"):
        work.questions(work.WORKS["long"], lambda text: 1)


@pytest.mark.parametrize(
    ("text", "expected"), [("It is 14.", 1.0), ("7 + 7 = 14", 1.0), ("14 or 15", 0.0), ("none", 0.0), ("", 0.0)]
)
def test_the_reward_reads_the_last_integer(load, text, expected):
    assert load("work").reward(text, 14) == expected


def test_an_endless_model_names_no_end_of_sequence(load, tmp_path):
    model, target = tmp_path / "model", tmp_path / "endless"
    model.mkdir()
    target.mkdir()
    (model / "config.json").write_text('{"eos_token_id": 2, "hidden_size": 8}')
    (model / "tokenizer_config.json").write_text('{"eos_token": "</s>", "pad_token": "</s>"}')
    (model / "model.safetensors").write_bytes(b"weights")
    load("work").link_endless_model(model, target)
    assert json.loads((target / "config.json").read_text()) == {"eos_token_id": None, "hidden_size": 8}
    assert json.loads((target / "tokenizer_config.json").read_text()) == {"eos_token": None, "pad_token": "</s>"}
    assert (target / "model.safetensors").read_bytes() == b"weights"
    assert json.loads((model / "config.json").read_text())["eos_token_id"] == 2


def test_the_first_step_is_not_counted(load):
    measure = load("measure")
    records = [
        measure.StepRecord(
            step_seconds=total, generation_seconds=1.0, num_sampled_tokens=10, num_trained_tokens=8, reward=0.5
        )
        for total in (100.0, 4.0, 6.0)
    ]
    summary = measure.step_summary(records)
    assert (summary["step_s_median"], summary["gen_s_median"], summary["train_s_median"]) == (5.0, 1.0, 4.0)
    assert (summary["num_timed_steps"], summary["trained_tokens_per_step"]) == (2, 8.0)
    assert summary["step_s"] == [100.0, 4.0, 6.0]


def test_peak_memory_counts_from_its_reset(load):
    measure = load("measure")

    def touched(num_bytes):  # pages of its own, whatever the allocator keeps
        pages = mmap.mmap(-1, num_bytes)
        for start in range(0, num_bytes, 4096):
            pages[start] = 1
        return pages

    touched(200 * 2**20).close()
    measure.reset_peak()
    before = measure.rss_mib(peak=True)
    with touched(100 * 2**20):
        assert 90 < measure.rss_mib(peak=True) - before < 150


def test_parts_are_timed_without_what_runs_inside_them(load):
    profile = load("grpo_profile")
    now = iter([0.0, 1.0, 4.0, 10.0])
    profile.time = argparse.Namespace(perf_counter=lambda: next(now))
    timer = profile.SelfTimer()
    inner = timer.wrap("inner", lambda: None)
    timer.wrap("outer", inner)()
    assert timer.seconds == {"inner": 3.0, "outer": 7.0}
    assert timer.calls == {"inner": 1, "outer": 1}


def test_sides_run_in_turn_and_are_compared(load, tmp_path):
    log = tmp_path / "runs.jsonl"
    sides = []
    for name, seconds, tokens in (("a", 2.0, 100), ("b", 6.0, 104), ("c", 3.0, 120)):
        script = tmp_path / f"{name}.py"
        fields = {"step_s_median": seconds, "sampled_tokens_per_step": tokens, "peak_rss_mib": 10 * seconds}
        script.write_text(
            f"import sys\nprint('{{')\nprint({json.dumps(json.dumps(fields))})\nassert len(sys.argv) == 2\n"
        )
        sides.append(f"{name}={sys.executable} {script} {{repeat}}")
    command = [sys.executable, str(BENCHMARKS / "compare.py"), *sides, "--repeats", "2", "--log", str(log)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    ran = [json.loads(line) for line in log.read_text().splitlines()]
    assert "".join(run["name"] for run in ran) == "abccba"
    assert [run["repeat"] for run in ran] == [0, 0, 0, 1, 1, 1]
    result = json.loads(done.stdout.splitlines()[-1])
    against = result["against_first"]
    assert against["b/a"]["step_s_median"]["each"] == [3.0, 3.0]
    assert against["b/a"]["peak_rss_mib"]["median"] == 3.0
    assert against["b/a"]["tokens"]["sampled_tokens_per_step"] == {"ratio": 1.04, "agrees": True}
    assert against["c/a"]["tokens"]["sampled_tokens_per_step"] == {"ratio": 1.2, "agrees": False}


def test_a_side_that_fails_ends_the_comparison_with_its_name(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text("print('{\"step_s_median\": 1}')\nraise SystemExit(3)\n")
    command = [sys.executable, str(BENCHMARKS / "compare.py"), f"broken={sys.executable} {script}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "broken: exit code 3" in done.stderr


def test_foreign_time_is_that_of_other_processes(load):
    compare = load("compare")
    spin = "import time; end = time.perf_counter() + 1.0\nwhile time.perf_counter() < end: pass"
    done = compare.run_process([sys.executable, "-c", spin], timeout=30)
    assert 0.2 < done.cpu_seconds < 2.0
    assert 0.0 <= done.foreign_cpu < 1.0
    assert compare.run_process([sys.executable, "-c", "import time; time.sleep(30)"], timeout=0.3).exit_code == -9
