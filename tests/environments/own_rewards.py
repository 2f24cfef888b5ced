"""Prompts and environments of a test's own, and what became of a process."""

import time
from pathlib import Path

from nemo_rl_lora.config.env import EnvConfig
from nemo_rl_lora.environments.registry import make_environment
from nemo_rl_lora.types import Prompt


def prompt_of(environment="mine", index=0, text="ask", **row):
    return Prompt(index=index, token_ids=(1,), text=text, row=row, environment=environment)


def environment_of(name, **block):
    return make_environment(name, EnvConfig.model_validate({name: block}))


def own(tmp_path, source, reference="reward", **block):
    """The environment of a reward file of this source, with the keys of its block."""
    (tmp_path / "mine.py").write_text(source)
    return environment_of("mine", reward_function=f"{tmp_path / 'mine.py'}:{reference}", **block)


def is_running(pid):
    """Whether the process is there and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
