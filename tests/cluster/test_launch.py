"""The files of tools/launch: the Slurm script on hosts of this machine, the others as far as they can be read here."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.cluster.ray_hosts import ROOT, ended, num_steps_of, wait_until
from tests.driver import TinyRun, run_driver
from tests.tiny_models import make_tiny_llama

LAUNCH = ROOT / "tools" / "launch"
# Slurm's srun, as far as the script uses it: a command on one node, ended by the signal that ends srun.
SRUN = """#!{python}
import json, pathlib, signal, subprocess, sys

node, *command = sys.argv[sys.argv.index("--nodelist") + 1 :]
started = subprocess.Popen([*json.loads({nodes!r})[node], *command])


def forward(number, frame):
    for child in pathlib.Path(f"/proc/{{started.pid}}/task/{{started.pid}}/children").read_text().split():
        subprocess.run(["kill", f"-{{number}}", child])


signal.signal(signal.SIGTERM, forward)
sys.exit(started.wait())
"""
SCONTROL = "#!/bin/bash\nprintf 'h1\\nh2\\n'\n"
MEGATRON = ["policy.backend=megatron", "policy.dtensor_cfg.lora_cfg.enabled=false", "policy.lora.dim=4"]


@pytest.fixture
def job(three_hosts, tmp_path):
    """The script as a job of two nodes; call it with the driver's run and overrides."""
    nodes = json.dumps({f"h{host.number}": host.command() for host in three_hosts})
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN.format(python=sys.executable, nodes=nodes)), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = kept | {
        "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "SLURM_JOB_NODELIST": "h[1-2]",
        "NRL_RUN": "",
        "NRL_TOKEN_DIR": str(tmp_path),
    }

    def start(tiny: TinyRun, *overrides: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        arguments = [f"examples/run_{tiny.algorithm}.py", *tiny.arguments(*MEGATRON, "cluster.num_nodes=2", *overrides)]
        script = [str(LAUNCH / "slurm.sh"), *arguments]
        return subprocess.Popen(script, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, env=environment)

    return start


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_slurm_script_trains_on_two_nodes_and_saves_when_its_time_is_over(job, three_hosts, tmp_path):
    tiny = TinyRun(root=tmp_path, model=make_tiny_llama(tmp_path / "model"), algorithm="sft")
    script = job(tiny, "sft.max_num_steps=1000", "sft.max_num_epochs=1000", "checkpointing.metric_name=null")
    try:
        wait_until(lambda: num_steps_of(tiny) >= 2, script)
        (token,) = tmp_path.glob(".nrl-ray-token-*")
        assert token.stat().st_mode & 0o777 == 0o600
        assert re.fullmatch("[0-9a-f]{64}", token.read_text())
        script.send_signal(signal.SIGTERM)
    finally:
        found = ended(script)

    assert found.code == 128 + signal.SIGTERM, found.err
    assert "stopped by SIGTERM" in found.out
    assert tiny.steps() == [f"step_{num_steps_of(tiny)}"]
    assert not list(tmp_path.glob(".nrl-ray-token-*"))
    for host in three_hosts:
        assert [line for line in host.commands() if "ray" in line] == []


def test_the_slurm_script_is_sound():
    script = str(LAUNCH / "slurm.sh")
    assert subprocess.run(["bash", "-n", script], capture_output=True, text=True).stderr == ""
    if shutil.which("shellcheck"):
        assert subprocess.run(["shellcheck", script], capture_output=True, text=True).stdout == ""


def test_ray_takes_the_file_of_ray_up():
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(yaml.safe_load((LAUNCH / "ray_cluster.yaml").read_text()))
    validate_config(prepared)
    starts = [line for place in ("head", "worker") for line in prepared[f"{place}_start_ray_commands"]]
    assert all("RAY_AUTH_MODE=token" in line for line in starts if "ray start" in line)
    assert len(starts) == 4


def test_the_driver_of_the_rayjob_is_one_that_starts(tiny_llama, tmp_path, monkeypatch):
    job = yaml.safe_load((LAUNCH / "kuberay.yaml").read_text())["spec"]
    cluster = job["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    words = shlex.split(job["entrypoint"])
    assert words[:5] == ["cd", "/workspace", "&&", "python", "examples/run_sft.py"]
    pods = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    sizes = [pod["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] for pod in pods]
    assert f"cluster.num_nodes={len(pods)}" in words
    assert {f"cluster.gpus_per_node={size}" for size in sizes} <= set(words)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # as Ray sets it for a job
    arguments = [word.replace("/shared/model", str(tiny_llama)).replace("/shared", str(tmp_path)) for word in words[5:]]

    planned = run_driver(*arguments, "--plan", algorithm="sft")

    assert planned.code == 0, planned.out + planned.err
