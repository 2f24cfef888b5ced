"""Hosts for the tests of this folder, where the machine can have them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts import Host, hosts_up, why_no_hosts

ROOT = Path(__file__).parents[2]


@pytest.fixture
def three_hosts(tmp_path: Path) -> Iterator[list[Host]]:
    """Three hosts that share `tmp_path` and this checkout."""
    if reason := why_no_hosts():
        pytest.skip(reason)
    with hosts_up(3, [tmp_path, ROOT]) as hosts:
        yield hosts
