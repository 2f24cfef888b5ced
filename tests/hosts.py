"""Several hosts made of this machine, for what has to run across nodes. Needs root, iproute2 and util-linux.

Each host has an address on a bridge without an uplink, and its own loopback, processes, /dev/shm and /tmp. Nothing
crosses between hosts but packets and the directories given as `shared`. A host is held by its first process; the kernel
ends all the others with it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HOLD = "while :; do sleep 3600 & wait $!; done"  # a shell, which reaps what loses its parent


def why_no_hosts() -> str | None:
    """Why this machine cannot have hosts; None where it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "unshare", "nsenter") if shutil.which(tool) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """A host that is up: its number from 1, its address, and the process that holds it."""

    number: int
    address: str
    holder: int
    link: str  # the end of its cable that the bridge has
    shared: tuple[Path, ...]

    @property
    def interface(self) -> str:
        """The name of its network interface, other than the loopback."""
        return f"eth{self.number}"

    def command(self, *words: str) -> list[str]:
        """The command that runs these words inside the host, in the working directory of whoever calls it."""
        namespaces = ("--net", "--mount", "--uts", "--pid")
        return ["nsenter", "--target", str(self.holder), *namespaces, f"--wd={Path.cwd()}", *words]

    def start(self, *words: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """Start a command inside the host."""
        pipe = subprocess.PIPE
        return subprocess.Popen(self.command(*words), stdout=pipe, stderr=pipe, text=True, env=env)

    def run(self, *words: str, env: Mapping[str, str] | None = None, seconds: float = 60) -> str:
        """What a command says that ends well, within so many seconds."""
        ended = subprocess.run(
            self.command(*words), capture_output=True, text=True, env=env, timeout=seconds, check=False
        )
        assert ended.returncode == 0, f"{words}: {ended.stdout}{ended.stderr}"
        return ended.stdout

    def cut(self) -> None:
        """Take the host off the network: its packets are lost, and nobody is told."""
        _sh("ip", "link", "set", self.link, "down")

    def join(self) -> None:
        """Put the host back on the network."""
        _sh("ip", "link", "set", self.link, "up")

    def commands(self) -> list[str]:
        """The command lines of what runs inside, but for what holds the host and this question."""
        lines = self.run("ps", "-eo", "args=").splitlines()
        own = ("ps -eo args=", "sleep 3600")
        return [line for line in lines if line not in own and HOLD not in line and not line.startswith("nsenter ")]

    def files(self) -> list[str]:
        """The files in its own /dev/shm and /tmp."""
        pruned = [word for path in self.shared for word in ("-path", str(path), "-prune", "-o")]
        return self.run("find", "/dev/shm", "/tmp", *pruned, "-not", "-type", "d", "-print").splitlines()


@contextmanager
def hosts_up(
    number: int, shared: Sequence[Path] = (), *, bridge: str = "nrl-hosts", subnet: str = "10.78.0"
) -> Iterator[list[Host]]:
    """So many hosts, until the end of the context; then nothing of them is left. `shared` directories lie at the same
    path in each. Two sets at once need names of their own: `bridge` (12 characters at most) and `subnet`."""
    _sh("ip", "link", "add", bridge, "type", "bridge")  # fails where another set has the name
    state = Path(tempfile.mkdtemp(prefix=f"{bridge}-", dir="/run"))
    holders: list[subprocess.Popen[bytes]] = []
    paths = tuple(path.resolve() for path in shared)
    try:
        _sh("ip", "link", "set", bridge, "up")
        hosts = []
        for index in range(1, number + 1):
            private = state / f"h{index}"
            holders.append(_hold(private, f"h{index}", paths))
            host = Host(
                number=index,
                address=f"{subnet}.{index}",
                holder=_first_process(holders[-1], private),
                link=f"{bridge}.{index}",
                shared=paths,
            )
            _connect(host, bridge)
            hosts.append(host)
        yield hosts
    finally:
        for holder in holders:
            holder.kill()  # and with it, by --kill-child, the host's first process
            holder.wait()
        # the kernel keeps a host's network as long as one of its connections waits for an answer
        for link in (*(f"{bridge}.{index}" for index in range(1, number + 1)), bridge):
            subprocess.run(["ip", "link", "del", link], capture_output=True, check=False)
        _remove(state)


def _hold(private: Path, name: str, shared: Sequence[Path]) -> subprocess.Popen[bytes]:
    """Start a host that has no network yet."""
    (private / "tmp").mkdir(parents=True)
    lines = ["set -e", "mount --make-rprivate /", "mount -t proc proc /proc"]
    for number, path in enumerate(shared):
        (private / f"shared{number}").mkdir()
        lines.append(f"mount --bind {path} {private}/shared{number}")
    lines += ["mount -t tmpfs -o size=4g none /dev/shm", f"mount --bind {private}/tmp /tmp"]
    for number, path in enumerate(shared):
        lines += [f"mkdir -p {path}", f"mount --bind {private}/shared{number} {path}"]
    lines += ["ip link set lo up", f"hostname {name}", f"touch {private}/ready", f"exec bash -c '{HOLD}'"]
    with (private / "said").open("w") as said:
        return subprocess.Popen(
            ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "bash", "-c", "\n".join(lines)],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )


def _first_process(holder: subprocess.Popen[bytes], private: Path) -> int:
    """The number of a host's first process, once the host is ready."""
    deadline = time.monotonic() + 60
    while not (private / "ready").exists():
        if holder.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{private.name} did not start: {(private / 'said').read_text()}")
        time.sleep(0.02)
    return int(Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()[0])


def _connect(host: Host, bridge: str) -> None:
    holder = str(host.holder)
    _sh("ip", "link", "add", host.link, "type", "veth", "peer", "name", host.interface, "netns", holder)
    _sh("ip", "link", "set", host.link, "master", bridge, "up")
    enter = ("nsenter", "--target", holder, "--net", "ip")
    _sh(*enter, "addr", "add", f"{host.address}/24", "dev", host.interface)
    _sh(*enter, "link", "set", host.interface, "up")


def _remove(state: Path) -> None:
    """Remove a directory that a dying host may still write into; a busy machine may take long to end one."""
    deadline = time.monotonic() + 60
    while state.exists():
        shutil.rmtree(state, ignore_errors=time.monotonic() < deadline)
        time.sleep(0.05)


def _sh(*words: str) -> None:
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        raise RuntimeError(f"{' '.join(words)}: {ended.stderr.strip()}")
