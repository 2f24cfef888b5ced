"""Each spot of the shim fails without it: a test that no longer does says that megatron-core outgrew the spot."""

import json
import subprocess
import sys

import pytest
import torch

from nemo_rl_lora.patches import megatron_core

ROUTER = "megatron.core.transformer.moe.moe_utils"

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the shim is for machines without CUDA")


@pytest.fixture(scope="module")
def spots():
    command = [sys.executable, "-W", "ignore", "-m", "tests.patches.shim_spots"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("module", [*megatron_core.MODULES, ROUTER])
def test_a_spot_fails_without_the_shim_and_runs_with_it(spots, module):
    spot = spots[module]
    assert spot["changed"] == ["te_general_gemm" if module == ROUTER else "torch"]
    assert any(word in spot["without"] for word in ("NVIDIA", "CUDA", "te_general_gemm")), spot["without"]
    assert spot["with"] == "ran"


def test_nothing_is_changed_where_cuda_is(monkeypatch):
    from megatron.core.tensor_parallel import mappings

    before = mappings.torch
    monkeypatch.setattr(mappings, "torch", torch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    megatron_core.install()
    assert mappings.torch is torch
    monkeypatch.undo()
    assert mappings.torch is before
