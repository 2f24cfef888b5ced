"""Runs that end without warning: killed, in the middle of a save too, or by a full disk."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.driver import adapter, same

ROOT = Path(__file__).parents[2]
OWN = ("checkpointing.checkpoint_dir", "logger.log_dir", "sft.max_num_steps")


@pytest.mark.slow
def test_a_run_that_is_killed_three_times_is_the_run_that_was_not(tiny_sft, tmp_path):
    """benchmarks/kill_runs.py checks every kill, and compares with a run that nobody killed."""
    settings = ["sft.max_num_epochs=1000", "policy.dtensor_cfg.lora_cfg.dropout=0.3", "checkpointing.keep_top_k=2"]
    overrides = [override for override in tiny_sft.arguments(*settings) if not override.startswith(OWN)]
    flags = ["--kills", "3", "--in-save", "1", "--save-seconds", "0.05", "--directory", str(tmp_path / "kills")]

    ended = subprocess.run(
        [sys.executable, "benchmarks/kill_runs.py", *flags, "sft", *overrides],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert ended.returncode == 0, ended.stdout + ended.stderr
    *kills, total = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    assert len(kills) == total["kills"] == 3
    assert total["inside_save"] == sum(kill["inside_save"] for kill in kills) >= 1
    assert total["tensors_compared"] == 84
    assert total["last_step"] == kills[-1]["newest_step"] + 2


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a tmpfs needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_fills_up_in_a_save_costs_no_earlier_step_and_the_run_goes_on_once_there_is_room(
    tiny_sft, small_disk, tmp_path
):
    settings = ["checkpointing.save_period=1", "checkpointing.keep_top_k=null", "sft.max_num_epochs=10"]
    steps = 20  # of about 0.1 MiB each
    there = f"checkpointing.checkpoint_dir={small_disk}/run"

    ended = tiny_sft(*settings, f"sft.max_num_steps={steps}", there)

    assert ended.code == 1
    assert "no space left to save step" in ended.err
    saved = sorted(path.name for path in (small_disk / "run").glob("*step_*"))
    assert saved == [f"step_{number}" for number in range(1, len(saved) + 1)]
    assert 0 < len(saved) < steps
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    ended = tiny_sft(*settings, f"sft.max_num_steps={steps}", there)
    assert ended.code == 0, ended.err
    assert tiny_sft.metrics(experiment=2)[0]["step"] == len(saved) + 1
    assert tiny_sft(*settings, f"sft.max_num_steps={steps}", f"checkpointing.checkpoint_dir={tmp_path}/whole").code == 0
    assert same(*(adapter(place / f"step_{steps}") for place in (small_disk / "run", tmp_path / "whole")))


def test_every_save_tells_its_size_and_its_seconds(tiny_sft):
    assert tiny_sft("checkpointing.save_period=1").code == 0

    first, second = tiny_sft.metrics("checkpoint")
    assert (first["step"], second["step"]) == (1, 2)
    for line in (first, second):
        files = [path for path in (tiny_sft.checkpoints / f"step_{line['step']}").rglob("*") if path.is_file()]
        assert line["num_bytes"] == sum(path.stat().st_size for path in files)
        assert line["timing/save"] > 0


def test_a_damaged_step_stops_the_run_or_is_passed_by(tiny_sft):
    assert tiny_sft("checkpointing.save_period=1", "checkpointing.keep_top_k=null").code == 0
    path = tiny_sft.checkpoints / "step_2" / "policy" / "optimizer" / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    more = ["checkpointing.save_period=1", "checkpointing.keep_top_k=null", "sft.max_num_steps=3"]

    ended = tiny_sft(*more)
    assert ended.code == 2
    assert f"{path}: has" in ended.err
    ended = tiny_sft(*more, "checkpointing.on_damage=previous")

    assert ended.code == 0, ended.err
    assert f"{path} has" in ended.err
    assert [line["step"] for line in tiny_sft.metrics(experiment=2)] == [2, 3]
    assert (tiny_sft.checkpoints / "set_aside_001" / "step_2").is_dir()
