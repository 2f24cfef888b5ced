"""Hosts are apart but for packets and what they share, and nothing of them stays."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from tests.hosts import hosts_up, why_no_hosts

pytestmark = pytest.mark.skipif(why_no_hosts() is not None, reason=why_no_hosts() or "")


def reaches(host, other) -> bool:
    ping = "import socket, sys; socket.create_connection((sys.argv[1], 9), 1)"
    command = host.command("python3", "-c", ping, other.address)
    return "ConnectionRefusedError" in subprocess.run(command, capture_output=True, text=True).stderr  # an answer


def wait_for(host, *commands) -> None:
    """Until these run inside the host, and no others."""
    deadline = time.monotonic() + 30
    while host.commands() != [*commands]:
        assert time.monotonic() < deadline, host.commands()


def test_hosts_share_packets_and_named_directories_alone(three_hosts, tmp_path):
    first, second, _ = three_hosts
    assert reaches(first, second)
    for place, is_shared in ((str(tmp_path), True), ("/tmp", False), ("/dev/shm", False)):
        first.run("touch", f"{place}/seen")
        assert ("seen" in second.run("ls", place).split()) == is_shared
    assert first.files() == ["/dev/shm/seen", "/tmp/seen"]
    assert not Path("/tmp/seen").exists()
    sleeping = first.start("sleep", "77")
    wait_for(first, "sleep 77")
    assert second.commands() == []
    sleeping.kill()


def test_a_host_that_is_cut_off_is_reached_by_nobody_until_it_joins(three_hosts):
    first, second, third = three_hosts
    second.cut()
    assert not reaches(first, second)
    assert not reaches(second, third)
    assert reaches(first, third)
    second.join()
    deadline = time.monotonic() + 30
    while not reaches(first, second):
        assert time.monotonic() < deadline


def fail_with_hosts() -> None:
    with hosts_up(2, bridge="nrl-gone", subnet="10.79.0") as hosts:
        hosts[0].start("sleep", "78")
        wait_for(hosts[0], "sleep 78")
        raise ZeroDivisionError


def test_nothing_is_left_after_a_failure():
    with pytest.raises(ZeroDivisionError):
        fail_with_hosts()
    assert "sleep 78" not in subprocess.run(["ps", "-eo", "args="], capture_output=True, text=True).stdout
    assert "nrl-gone" not in subprocess.run(["ip", "link"], capture_output=True, text=True).stdout
    assert not list(Path("/run").glob("nrl-gone-*"))
