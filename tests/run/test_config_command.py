"""`nemo-rl-lora config`: what it prints, and how it fails."""

from pathlib import Path

import pytest

from nemo_rl_lora.config.load import CONFIG_DIR, load_config
from nemo_rl_lora.run import cli

QWEN = CONFIG_DIR / "recipes" / "llm" / "grpo-qwen3-8B-base-1n8g-fsdp2-lora.yaml"


def test_expand_prints_a_file_that_loads_to_the_same_configuration(tmp_path: Path, capsys) -> None:
    assert cli.main(["config", "expand", str(QWEN), "policy.optimizer.kwargs.lr=1e-4"]) == 0
    expanded = tmp_path / "expanded.yaml"
    expanded.write_text(capsys.readouterr().out)
    config = load_config(expanded, [], "grpo")
    assert config == load_config(QWEN, ["policy.optimizer.kwargs.lr=1e-4"], "grpo")


def test_compare_prints_each_difference_on_a_line(tmp_path: Path, capsys) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(f"defaults: {QWEN}\npolicy: {{hf_config_overrides: {{a: 1}}}}\ngrpo: {{seed: 43}}\n")
    assert cli.main(["config", "compare", str(QWEN), str(other)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "~ data.train.seed: 42 -> 43",
        "~ grpo.seed: 42 -> 43",
        "+ policy.hf_config_overrides.a: 1",
    ]


@pytest.mark.parametrize("text", ["grpo: {sed: 1}", "a: 1"])
def test_wrong_file_exits_2_with_the_message_alone(text: str, tmp_path: Path, capsys) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    assert cli.main(["config", "expand", str(file)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert captured.err.strip()
