"""A run in one process: it starts with the environment that was asked for, and pays nothing for Ray."""

import json
import os
import subprocess
import sys

CODE = """
import json, os, sys
from nemo_rl_lora.run import cli
code = cli.run("sft", program="sft", argv=json.loads(os.environ["ARGUMENTS"]))
print(json.dumps([code, sorted({"ray", "vllm"} & sys.modules.keys()), os.environ.get("NRL_TEST_VARIABLE")]))
"""


def test_one_process_imports_no_ray_and_has_its_variables(tiny_sft):
    arguments = tiny_sft.arguments("policy.dtensor_cfg.env_vars={NRL_TEST_VARIABLE: seen}", "sft.max_num_steps=1")
    environment = os.environ | {"ARGUMENTS": json.dumps(arguments)}
    command = [sys.executable, "-c", CODE]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout.splitlines()[-1]) == [0, [], "seen"]
    assert tiny_sft.steps() == ["step_1"]
