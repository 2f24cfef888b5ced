"""Adapters split over two tensor-parallel ranks are those of one process: outputs, gradients and dropout."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tests.policy.megatron.adapted_ranks import CASES, run_case
from tests.policy.megatron.twins import distance


@pytest.fixture(scope="module")
def ranks(tiny_model, tmp_path_factory):
    """What each of two processes found."""
    meeting = tmp_path_factory.mktemp("meeting")
    module, path = "tests.policy.megatron.adapted_ranks", str(tiny_model("llama"))
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", module, str(rank), str(meeting), path],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate()[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(errors)
    return [torch.load(meeting / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_ranks_compute_what_one_does(ranks, tiny_model, case):
    expected = run_case(tiny_model("llama"), case, 1)
    assert min(tensor.norm() for tensor in expected.values()) > 0
    for found in ranks:
        assert distance(found[case.name], expected) <= 1e-5
