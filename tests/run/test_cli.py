"""`nemo-rl-lora`: its overview, its commands' help without anything heavy, and names that are no command."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_rl_lora.run import cli
from nemo_rl_lora.run.drivers import continue_command

ROOT = Path(__file__).parents[2]
HELP = """
import sys
from nemo_rl_lora.run.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as ended:
    code = ended.code
heavy = {"torch", "transformers", "ray", "vllm", "nemo_automodel", "megatron", "matplotlib"} & set(sys.modules)
print(f"code {code}, heavy {sorted(heavy)}")
"""


def test_overview_has_a_line_for_every_command(capsys):
    assert cli.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, command in cli.COMMANDS.items():
        assert any(re.fullmatch(rf"  {name} +{re.escape(command.summary)}", line) for line in lines), name
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_a_command_shows_how_to_call_it_and_loads_nothing_heavy(name):
    command = [sys.executable, "-c", HELP, name, "--help"]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert f"usage: nemo-rl-lora {name} " in out
    for call in cli.COMMANDS[name].calls:
        assert f"\nnemo-rl-lora {name} {call}".rstrip() + "\n" in out
    assert out.splitlines()[-1] == "code 0, heavy []"


def test_a_name_that_is_no_command_is_refused_with_the_nearest(capsys):
    assert cli.main(["grop"]) == 2
    assert "'grop': no command of nemo-rl-lora. Did you mean 'grpo'? There are: sft, dpo," in capsys.readouterr().err


def test_a_wrong_input_of_a_command_exits_2_with_one_paragraph(tmp_path, capsys):
    assert cli.main(["sft", f"--config={tmp_path}/none.yaml"]) == 2
    said = capsys.readouterr().err.splitlines()  # before it, that torch is imported, where it was not yet
    assert said[-1].startswith(f"Error: --config='{tmp_path}/none.yaml': there is no file")


def test_scripts_of_the_checkout_are_the_commands():
    scripts = {*ROOT.glob("examples/run_*.py"), *ROOT.glob("tools/*.py")} - {ROOT / "tools" / "gpu_check.py"}
    for path in scripts:
        name, program = re.findall(r'sys\.exit\(run\("(\S+)", program="(.*)"\)\)', path.read_text())[0]
        assert name in cli.COMMANDS
        assert program == f"uv run {path.relative_to(ROOT)}"
    assert len(scripts) == len(cli.COMMANDS)


def test_a_run_goes_on_by_the_command_that_started_it():
    assert continue_command(["/anywhere/bin/nemo-rl-lora", "sft", "a.b=1"]) == "nemo-rl-lora sft a.b=1"
    assert continue_command(["examples/run_sft.py", "a.b=1"]) == "uv run examples/run_sft.py a.b=1"
