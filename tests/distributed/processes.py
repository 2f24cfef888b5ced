"""The processes that a test started, seen from outside."""

from __future__ import annotations

import psutil


def own_processes() -> list[psutil.Process]:
    """This process and all that it started, Ray's own among them."""
    return [psutil.Process(), *psutil.Process().children(recursive=True)]


def listening_addresses() -> dict[str, set[str]]:
    """The name of a process to the addresses that it and its namesakes listen at."""
    found: dict[str, set[str]] = {}
    for process in own_processes():
        addresses = {c.laddr.ip for c in process.net_connections() if c.status == psutil.CONN_LISTEN}
        found.setdefault(process.name(), set()).update(addresses)
    return found


def assert_loopback_alone() -> None:
    """Ray runs, and nothing that this process started listens anywhere but on the loopback interface."""
    found = listening_addresses()
    assert found["gcs_server"]
    assert set().union(*found.values()) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, found
