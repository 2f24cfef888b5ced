"""The wheel, unpacked away from the checkout: its command works in another directory, with the files it carries."""

import json
import os
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]

# Runs the wheel's console script by its entry point, with the checkout off sys.path (an editable install adds it).
CONSOLE = f"""
import sys
sys.path[:] = [path for path in sys.path if path != {str(ROOT)!r}]
import nemo_rl_lora
assert not nemo_rl_lora.__file__.startswith({str(ROOT)!r}), nemo_rl_lora.__file__
from importlib.metadata import distribution
(script,) = distribution("nemo-rl-lora").entry_points.select(group="console_scripts", name="nemo-rl-lora")
sys.exit(script.load()())
"""

Called = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    """The wheel's files, as an installation of a pure wheel lays them out."""
    directory = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(directory)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = directory.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory / "site")
    return directory / "site"


@pytest.fixture
def call(unpacked, tmp_path) -> Callable[..., Called]:
    """The console script in an empty directory, which is `tmp_path`."""

    def run(*arguments: str) -> Called:
        return subprocess.run(
            [sys.executable, "-c", CONSOLE, *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(unpacked)},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_the_version_is_that_of_the_wheel(call):
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert call("--version").stdout.split() == ["nemo-rl-lora", stated]


def test_help_names_every_command(call):
    ended = call("--help")
    assert ended.returncode == 0, ended.stderr
    for name in ("sft", "dpo", "grpo", "eval", "export", "config", "verify-resume", "parity", "transcode"):
        assert f"\n  {name} " in ended.stdout


def test_a_shipped_recipe_is_found_by_its_path_in_the_checkout(call):
    ended = call("config", "expand", "examples/configs/recipes/cpu/sft-smollm2-135m-megatron-lora.yaml")
    assert ended.returncode == 0, ended.stderr
    assert yaml.safe_load(ended.stdout)["policy"]["megatron_cfg"]["enabled"] is True


def test_a_file_of_ones_own_inherits_a_shipped_one(call, tmp_path):
    (tmp_path / "mine.yaml").write_text("defaults: examples/configs/grpo_math_1B.yaml\ngrpo: {max_num_steps: 7}\n")
    ended = call("config", "expand", "mine.yaml")
    assert ended.returncode == 0, ended.stderr
    assert yaml.safe_load(ended.stdout)["grpo"]["max_num_steps"] == 7


def test_a_step_of_the_quick_start_trains(call, tiny_llama, tmp_path):
    ended = call(
        "sft",
        f"policy.model_name={tiny_llama}",
        "policy.precision=float32",
        "policy.dtensor_cfg.lora_cfg.enabled=true",
        "policy.train_global_batch_size=4",
        "policy.max_total_sequence_length=256",
        "sft.max_num_steps=1",
        *(f"sft.{key}" for key in ("val_period=0", "val_at_start=false", "val_at_end=false")),
        *(f"logger.{sink}=false" for sink in ("plot.enabled", "tensorboard_enabled")),
    )
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "results/sft/step_1/policy/adapter/adapter_model.safetensors").is_file()
    lines = map(json.loads, (tmp_path / "logs/exp_001/metrics.jsonl").read_text().splitlines())
    assert [line["loss"] > 0 for line in lines if line["split"] == "train"] == [True]


@pytest.mark.slow  # a file found by its path, and a quick start: above
def test_the_quick_start_of_an_own_reward_finds_its_rows_and_its_function(call, tiny_llama):
    ended = call(
        "grpo",
        "--plan",
        "--config=examples/configs/quickstart/grpo_own_reward.yaml",
        f"policy.model_name={tiny_llama}",
        "policy.dtensor_cfg.lora_cfg.enabled=true",
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "training prompts" in ended.stdout
