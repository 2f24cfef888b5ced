"""A Ray cluster over hosts, started as docs/cluster.md says, and drivers that train on it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.driver import Ended, TinyRun
from tests.hosts import Host

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "cluster.md"
BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.DOTALL | re.MULTILINE)
UV_RUN = 'uv() { shift; "$@"; }\n'  # this interpreter's environment, without uv


def block_of_page(word: str) -> str:
    """The one block of shell commands of the page that has this word."""
    (block,) = [block for block in BLOCK.findall(PAGE.read_text()) if word in block]
    return block


@dataclass(frozen=True, slots=True, kw_only=True)
class RayHosts:
    """Hosts of one Ray cluster, whose head is the first one. Every process has the cluster's token."""

    hosts: Sequence[Host]
    shared: Path  # a directory that the hosts share

    @property
    def environment(self) -> dict[str, str]:
        """Of every command in a host. Ray's own variables of the machine are not taken over."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return kept | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_TOKEN_PATH": str(self.shared / "ray_token"),
            "RAY_OVERRIDE_RESOURCES": '{"CPU": 1}',  # a process a host
            "RAY_DEFAULT_OBJECT_STORE_MEMORY_PROPORTION": "0.01",
            "HEAD": self.hosts[0].address,
        }

    def start(self) -> None:
        """Make the token, and start Ray on the head, then on the other hosts."""
        health = block_of_page("RAY_health_check")  # sooner than by default
        head, *others = self.hosts
        _ended([self._shell(head, block_of_page("/dev/urandom"))])
        _ended([self._shell(head, health + block_of_page("--head"))])
        _ended([self._shell(host, block_of_page('--node-ip-address="$NODE"')) for host in others])

    def driver(self, tiny: TinyRun, *overrides: str) -> subprocess.Popen[str]:
        """A driver on the first host, with these arguments in the place of the page's."""
        lines = block_of_page("RAY_ADDRESS=").splitlines()
        command = ["python", f"examples/run_{tiny.algorithm}.py", *tiny.arguments(*overrides)]
        return self._shell(self.hosts[0], f"{lines[0]}\nexec {shlex.join(command)}")

    def _shell(self, host: Host, commands: str) -> subprocess.Popen[str]:
        """Commands of the page, on a host."""
        script = f"set -e\n{UV_RUN}{commands}"
        return host.start("bash", "-c", script, env=self.environment | {"NODE": host.address})


def ended(driver: subprocess.Popen[str], seconds: float = 600) -> Ended:
    """How a driver ended, within so many seconds."""
    try:
        out, err = driver.communicate(timeout=seconds)
    finally:
        driver.kill()
    return Ended(code=driver.returncode, out=out, err=err)


def wait_until(condition: Callable[[], bool], driver: subprocess.Popen[str], seconds: float = 600) -> None:
    """Wait for a condition while a driver runs."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert driver.poll() is None, driver.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def num_steps_of(tiny: TinyRun, experiment: int = 1) -> int:
    """Steps that a start has recorded."""
    log = tiny.logs / f"exp_{experiment:03d}" / "metrics.jsonl"
    return log.read_text().count('"split": "train"') if log.exists() else 0


def assert_nothing_is_left(host: Host, seconds: float = 150) -> None:
    """Until no process of a run is in the host, and no file of one."""
    deadline = time.monotonic() + seconds
    while left := [
        *(line for line in host.commands() if re.search("RankProcess|_Host|_Holder|run_sft|run_grpo", line)),
        *(file for file in host.files() if "/nrl-" in file),  # removed as soon as their process has ended
    ]:
        assert time.monotonic() < deadline, left
        time.sleep(0.5)


def _ended(commands: Sequence[subprocess.Popen[str]], seconds: float = 400) -> None:
    for command in commands:
        said = command.communicate(timeout=seconds)
        assert command.returncode == 0, said
