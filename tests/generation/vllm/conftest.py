"""Versions of weights, for tests that share an engine."""

import pytest


@pytest.fixture
def versions():
    """Numbers that no other test of the engine had."""
    return iter(range(next(_TENS) * 10, 10**6))


_TENS = iter(range(1, 10**6))
