"""The in-process engine against transformers (`generate`, forward passes) and PEFT, on tiny random models in fp32."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from nemo_rl_lora.generation.in_process.engine import InProcessGeneration
from nemo_rl_lora.generation.in_process.fallback import PlainDecoder
from nemo_rl_lora.generation.in_process.inspection import Inspection
from nemo_rl_lora.generation.protocol import generate
from nemo_rl_lora.generation.turns import Turns
from nemo_rl_lora.types import CompletionGroup, SyncMode, WeightsRef
from tests.generation.engine_inputs import (
    LetterTokenizer,
    adapted_modules,
    adapter_tensors,
    merged_tensors,
    parameters_of,
    ref,
    request,
)
from tests.tiny_models import nemotron_h, random_model, sampling_model

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
PROMPTS = ((5, 9, 40, 3), (11, 2), tuple(range(20, 33)), (8, 8, 8, 61, 30, 2, 7))
MakeEngine = Callable[..., InProcessGeneration]


def greedy_reference(model: PreTrainedModel, prompt: tuple[int, ...], num_tokens: int) -> tuple[int, ...]:
    out = model.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=num_tokens, min_new_tokens=num_tokens, pad_token_id=0
    )
    return tuple(out[0, len(prompt) :].tolist())


def reference_logprobs(
    model: Any, prompt: tuple[int, ...], token_ids: tuple[int, ...], temperature: float = 1.0
) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + token_ids])).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(token_ids)[:, None])[:, 0]


def assert_logprobs_are_the_models(model: Any, groups: list[CompletionGroup], temperature: float = 1.0) -> None:
    for group in groups:
        for completion in group.completions:
            expected = reference_logprobs(model, group.prompt.token_ids, completion.token_ids, temperature)
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-4, rtol=0)


def peft_model(base: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> Any:
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    modules = adapted_modules(base)
    config = LoraConfig(r=modules[0].dim, lora_alpha=6, target_modules=[m.name for m in modules])
    model = get_peft_model(base, config)
    set_peft_model_state_dict(model, tensors)
    return model.eval()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_tokens_are_those_of_transformers_for_prompts_of_different_lengths(
    architecture: str, make_engine: MakeEngine
) -> None:
    model = sampling_model(architecture)
    groups = generate(make_engine(model), [request(p, temperature=0, max_new_tokens=12) for p in PROMPTS])
    for prompt, group in zip(PROMPTS, groups, strict=True):
        assert group.completions[0].token_ids == greedy_reference(model, prompt, 12)
    assert_logprobs_are_the_models(model, groups)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logprobs_equal_a_full_forward_pass(architecture: str, make_engine: MakeEngine) -> None:
    model = sampling_model(architecture)
    requests = [request(p, num_completions=3, temperature=1.7, max_new_tokens=20) for p in PROMPTS]
    groups = generate(make_engine(model), requests)
    assert len({c.token_ids for c in groups[0].completions}) == 3
    assert_logprobs_are_the_models(model, groups, temperature=1.7)


@pytest.mark.parametrize("rope_type", ["llama3", "linear"])
def test_scaled_rope_is_the_models(rope_type: str, make_engine: MakeEngine) -> None:
    rope: dict[str, Any] = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 4.0}
    if rope_type == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    model = sampling_model("llama", rope_parameters=rope)
    groups = generate(make_engine(model), [request(p, num_completions=2, max_new_tokens=20) for p in PROMPTS])
    assert_logprobs_are_the_models(model, groups)


@pytest.mark.parametrize("mode", ["merged", "adapter"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_a_synced_adapter_gives_the_logprobs_of_peft(
    architecture: str, mode: SyncMode, make_engine: MakeEngine
) -> None:
    model = sampling_model(architecture)
    adapter = adapter_tensors(model)
    engine = make_engine(model, lora=True)
    receipt = engine.sync_weights(ref(adapter if mode == "adapter" else merged_tensors(model, adapter), mode, 5))
    groups = generate(engine, [request(p, num_completions=3, max_new_tokens=10) for p in PROMPTS])
    assert (receipt.version, receipt.mode, receipt.verdict) == (5, mode, "confirmed")
    assert groups[0].completions[0].versions == ((10, 5),)
    reference = peft_model(sampling_model(architecture), adapter)
    assert_logprobs_are_the_models(reference, groups)
    with pytest.raises(AssertionError):
        assert_logprobs_are_the_models(model, groups)  # the adapter matters


def test_the_last_sync_counts_whatever_its_mode(make_engine: MakeEngine) -> None:
    model = sampling_model("llama")
    engine = make_engine(model, lora=True)
    for version, (seed, mode) in enumerate([(1, "merged"), (2, "adapter"), (3, "merged"), (4, "adapter")]):
        adapter = adapter_tensors(model, seed)
        engine.sync_weights(ref(adapter if mode == "adapter" else merged_tensors(model, adapter), mode, version))
        groups = generate(engine, [request(PROMPTS[0], num_completions=2)])
        assert_logprobs_are_the_models(peft_model(sampling_model("llama"), adapter), groups)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_a_full_sync_replaces_every_parameter(architecture: str, make_engine: MakeEngine) -> None:
    model = sampling_model(architecture)
    trained = sampling_model(architecture)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    engine = make_engine(model)
    engine.sync_weights(ref(parameters_of(trained), version=2))
    groups = generate(engine, [request(p, num_completions=2) for p in PROMPTS])
    assert_logprobs_are_the_models(trained, groups)


def test_training_on_after_a_sync_does_not_reach_the_engine(make_engine: MakeEngine) -> None:
    model = sampling_model("qwen2")
    engine = make_engine(model)
    before = generate(engine, [request(p, num_completions=2) for p in PROMPTS])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1.3)
    assert generate(engine, [request(p, num_completions=2) for p in PROMPTS]) == before


def test_base_weights_keep_their_bytes_through_twenty_syncs(make_engine: MakeEngine) -> None:
    def digest() -> str:
        return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()

    model = sampling_model("llama")
    before = digest()
    engine = make_engine(model, lora=True)
    for version in range(20):
        adapter = adapter_tensors(model, version)
        if version % 2:
            engine.sync_weights(ref(adapter, "adapter", version))
        else:
            engine.sync_weights(ref(merged_tensors(model, adapter), "merged", version))
        generate(engine, [request(PROMPTS[0], max_new_tokens=2)])
    assert digest() == before


def test_a_completion_is_the_same_alone_and_in_a_batch(make_engine: MakeEngine) -> None:
    model = sampling_model("llama")
    together = generate(make_engine(model), [request(p, num_completions=3, max_new_tokens=16) for p in PROMPTS])
    for prompt, group in zip(PROMPTS, together, strict=True):
        for g, completion in enumerate(group.completions):
            alone = request(prompt, max_new_tokens=16, seed=1000 * len(prompt) + g)
            (single,) = generate(make_engine(model), [alone])
            assert single.completions[0].token_ids == completion.token_ids


def test_waiting_groups_enter_as_sequences_finish(make_engine: MakeEngine) -> None:
    model = sampling_model("qwen3")
    prompts = [(7 + i, 3, 50 - i, *range(i)) for i in range(9)]
    stops = tuple(range(0, 97, 6))  # sequences end at very different lengths
    requests = [request(p, num_completions=3, max_new_tokens=30, stop_token_ids=stops) for p in prompts]
    roomy = generate(make_engine(model, concurrent=64), requests)
    crowded = generate(make_engine(model, concurrent=7), requests)
    too_small = generate(make_engine(model, concurrent=1), requests)
    assert [[c.token_ids for c in g.completions] for g in crowded] == [
        [c.token_ids for c in g.completions] for g in roomy
    ]
    assert [g.completions[0].token_ids for g in too_small] == [g.completions[0].token_ids for g in roomy]
    lengths = {len(c.token_ids) for g in roomy for c in g.completions}
    assert len(lengths) > 4
    assert_logprobs_are_the_models(model, crowded)


def test_more_tokens_than_the_first_slots_hold(make_engine: MakeEngine) -> None:
    model = sampling_model("llama", max_position_embeddings=256)
    groups = generate(make_engine(model), [request(p, num_completions=2, max_new_tokens=150) for p in PROMPTS])
    assert_logprobs_are_the_models(model, groups)


def test_prompts_of_one_group_are_computed_once(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    model = sampling_model("llama")
    engine: Any = make_engine(model)
    rows = []
    original = engine._decoder._body
    monkeypatch.setattr(engine._decoder, "_body", lambda x, *rest: rows.append(len(x)) or original(x, *rest))
    generate(engine, [request(PROMPTS[0], num_completions=8, max_new_tokens=3)])
    assert rows == [4, 8, 8]


@pytest.mark.parametrize("architecture", ["mistral", "gpt2", "nemotron-h"])
def test_other_attention_is_served_by_transformers_own_forward_pass(
    architecture: str, make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(3)
    if architecture == "mistral":
        model: Any = sampling_model("mistral", sliding_window=6)
    elif architecture == "nemotron-h":  # whose Mamba blocks keep a state
        model = random_model(nemotron_h(97), seed=7).eval()
        model.generation_config.eos_token_id = None
    else:
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3)
        ).eval()
        model.generation_config.eos_token_id = None
    engine: Any = make_engine(model, concurrent=7)
    assert isinstance(engine._decoder, PlainDecoder)
    assert "slower" in caplog.text
    stops = (4, 44, 12, 60)
    groups = generate(engine, [request(p, num_completions=3, max_new_tokens=15, stop_token_ids=stops) for p in PROMPTS])
    assert_logprobs_are_the_models(model, groups)


@pytest.mark.parametrize("mode", ["merged", "adapter"])
def test_the_plain_decoder_serves_an_adapter(mode: SyncMode, make_engine: MakeEngine) -> None:
    model = sampling_model("mistral", sliding_window=6)
    adapter = adapter_tensors(model)
    engine = make_engine(model, lora=True)
    engine.sync_weights(ref(adapter if mode == "adapter" else merged_tensors(model, adapter), mode))
    groups = generate(engine, [request(p, num_completions=2) for p in PROMPTS])
    assert_logprobs_are_the_models(peft_model(sampling_model("mistral", sliding_window=6), adapter), groups)


def test_a_stop_token_ends_a_completion_and_is_kept(make_engine: MakeEngine) -> None:
    model = sampling_model("llama")
    free = greedy_reference(model, PROMPTS[0], 12)
    stop = next(t for i, t in enumerate(free) if i >= 3 and t not in free[:i])
    (group,) = generate(
        make_engine(model), [request(PROMPTS[0], temperature=0, max_new_tokens=12, stop_token_ids=(stop,))]
    )
    completion = group.completions[0]
    end = free.index(stop)
    assert completion.token_ids == free[: end + 1]
    assert completion.finish_reason == "stop"
    assert completion.text == LetterTokenizer().decode(list(free[:end]), True)


def test_the_models_end_of_sequence_ends_a_completion(make_engine: MakeEngine) -> None:
    model = sampling_model("llama")
    free = greedy_reference(model, PROMPTS[0], 12)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = [96, free[2]]
    (group,) = generate(make_engine(model), [request(PROMPTS[0], temperature=0, max_new_tokens=12)])
    assert group.completions[0].token_ids == free[: free.index(free[2]) + 1]


def test_a_stop_string_over_two_tokens_cuts_the_text_and_keeps_the_tokens(make_engine: MakeEngine) -> None:
    model = sampling_model("llama")
    free = greedy_reference(model, PROMPTS[1], 12)
    text = LetterTokenizer().decode(list(free), True)
    stop = text[5:7]
    end = text.index(stop)
    (group,) = generate(
        make_engine(model), [request(PROMPTS[1], temperature=0, max_new_tokens=12, stop_strings=("never", stop))]
    )
    completion = group.completions[0]
    assert (completion.text, completion.finish_reason) == (text[:end], "stop")
    assert completion.token_ids == free[: len(completion.token_ids)]
    assert LetterTokenizer().decode(list(completion.token_ids), True).endswith(stop)


def test_length_ends_a_completion_at_the_models_last_position(make_engine: MakeEngine) -> None:
    model = sampling_model("llama")
    (group,) = generate(make_engine(model), [request(tuple(range(60)), max_new_tokens=50)])
    assert len(group.completions[0].token_ids) == 4
    assert group.completions[0].finish_reason == "length"


def test_groups_may_be_collected_in_any_order(make_engine: MakeEngine) -> None:
    engine = make_engine(sampling_model("llama"))
    tickets = [engine.submit(request(p)) for p in PROMPTS]
    (last,) = engine.collect(tickets[3:])
    first = engine.collect(list(reversed(tickets[:3])))
    assert [g.prompt.token_ids for g in (last, *first)] == [PROMPTS[3], PROMPTS[2], PROMPTS[1], PROMPTS[0]]
    with pytest.raises(ValueError, match="submitted and not collected"):
        engine.collect([tickets[0]])


def test_collecting_before_the_first_sync_is_an_error(make_engine: MakeEngine) -> None:
    engine = make_engine(sampling_model("llama"), sync=False)
    ticket = engine.submit(request(PROMPTS[0]))
    with pytest.raises(RuntimeError, match="sync_weights"):
        engine.collect([ticket])


def _without(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(list(tensors.items())[1:])


def _renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {("x." + name if i == 0 else name): t for i, (name, t) in enumerate(tensors.items())}


def _misshapen(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: (t[1:] if i == len(tensors) - 1 else t) for i, (name, t) in enumerate(tensors.items())}


@pytest.mark.parametrize("mode", ["merged", "adapter"])
@pytest.mark.parametrize("damage", [_without, _renamed, _misshapen])
def test_a_refused_sync_keeps_the_old_version(damage: Any, mode: SyncMode, make_engine: MakeEngine) -> None:
    model = sampling_model("llama")
    engine = make_engine(model, lora=True)

    def tensors(seed: int) -> dict[str, torch.Tensor]:
        adapter = adapter_tensors(model, seed)
        return adapter if mode == "adapter" else merged_tensors(model, adapter)

    engine.sync_weights(ref(tensors(1), mode, version=1))
    before = generate(engine, [request(PROMPTS[0], num_completions=2)])
    with pytest.raises(ValueError, match="version 2"):
        engine.sync_weights(ref(damage(tensors(2)), mode, version=2))
    assert generate(engine, [request(PROMPTS[0], num_completions=2)]) == before


def _lying(other: dict[str, torch.Tensor], mode: SyncMode) -> WeightsRef:
    """What has another shape than it says, in the last tensor."""
    return replace(ref(other, mode, version=2), tensors=_misshapen(other))


def test_a_tensor_that_differs_from_its_manifest_keeps_the_old_adapter(make_engine: MakeEngine) -> None:
    model = sampling_model("llama")
    engine = make_engine(model, lora=True)
    engine.sync_weights(ref(adapter_tensors(model, 1), "adapter", version=1))
    before = generate(engine, [request(PROMPTS[0])])
    with pytest.raises(ValueError, match="keeps version 1"):
        engine.sync_weights(_lying(adapter_tensors(model, 2), "adapter"))
    assert generate(engine, [request(PROMPTS[0])]) == before


def test_merged_weights_that_break_off_leave_no_version_until_the_next_sync(make_engine: MakeEngine) -> None:
    model = sampling_model("llama")
    engine = make_engine(model, lora=True)
    first, second = (merged_tensors(model, adapter_tensors(model, seed)) for seed in (1, 2))
    engine.sync_weights(ref(first, version=1))
    before = generate(engine, [request(PROMPTS[0])])
    with pytest.raises(ValueError, match="serves no version"):
        engine.sync_weights(_lying(second, "merged"))
    ticket = engine.submit(request(PROMPTS[0]))
    with pytest.raises(RuntimeError, match="no weights yet"):
        engine.collect([ticket])
    engine.sync_weights(ref(first, version=3))
    (after,), (expected,) = (groups[0].completions for groups in (engine.collect([ticket]), before))
    assert (after.token_ids, after.logprobs) == (expected.token_ids, expected.logprobs)


def test_an_adapter_sync_needs_an_adapter(make_engine: MakeEngine) -> None:
    model = sampling_model("llama")
    with pytest.raises(ValueError, match="without an adapter"):
        make_engine(model).sync_weights(ref(adapter_tensors(model), "adapter"))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (request(()), "token ids"),
        (request((97,)), "token ids"),
        (request(tuple([1] * 64)), "max_position_embeddings=64"),
        (replace(request((1, 2), 2), seeds=(1,)), "1 seeds for 2 completions"),
        (request((1, 2), top_p=0.0), "top_p"),
        (request((1, 2), top_k=0), "top_k=0"),
        (request((1, 2), temperature=-1.0), "temperature"),
        (request((1, 2), max_new_tokens=0), "max_new_tokens"),
        (request((1, 2), stop_strings=("",)), "stop string"),
    ],
)
def test_a_bad_request_is_refused_when_it_is_submitted(bad: Any, message: str, make_engine: MakeEngine) -> None:
    with pytest.raises(ValueError, match=message):
        make_engine(sampling_model("llama")).submit(bad)


def test_logits_without_a_distribution_are_an_error_and_leave_the_engine_usable(make_engine: MakeEngine) -> None:
    model = sampling_model("llama")
    engine = make_engine(model)
    broken = {**parameters_of(model), "model.norm.weight": torch.full((32,), float("nan"))}
    engine.sync_weights(ref(broken, version=2))
    with pytest.raises(FloatingPointError, match="NaN"):
        generate(engine, [request(p, num_completions=2) for p in PROMPTS])
    engine.sync_weights(ref(parameters_of(model), version=3))
    groups = generate(engine, [request(p, num_completions=2) for p in PROMPTS])
    assert_logprobs_are_the_models(model, groups)


def test_bfloat16_logprobs_stay_near_the_models(make_engine: MakeEngine) -> None:
    model = sampling_model("llama").to(torch.bfloat16)
    engine = InProcessGeneration(
        model,
        tokenizer=LetterTokenizer(),  # type: ignore[arg-type]
        spec=None,
        adapted=[],
        compute_dtype=torch.bfloat16,
        max_concurrent_sequences=16,
    )
    engine.sync_weights(ref(parameters_of(model)))
    for group in generate(engine, [request(p, num_completions=3) for p in PROMPTS]):
        for completion in group.completions:
            expected = reference_logprobs(model.float(), group.prompt.token_ids, completion.token_ids)
            assert (torch.tensor(completion.logprobs) - expected).abs().mean() < 0.1


@pytest.mark.parametrize("mode", ["merged", "adapter"])
def test_collecting_beside_a_sync_waits_for_its_end(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, mode: SyncMode
) -> None:
    """Another thread collects while the sync has the engine, which serves no version then."""
    model = sampling_model("llama")
    engine = make_engine(model, lora=mode == "adapter")
    tensors = adapter_tensors(model) if mode == "adapter" else parameters_of(model)
    engine.sync_weights(ref(tensors, version=1, mode=mode))
    waits, judge, step = threading.Event(), Inspection.judge, Turns.step
    ticket, found, errors = engine.submit(request(PROMPTS[0])), [], []

    def collect() -> None:
        try:
            found.extend(engine.collect([ticket]))
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=collect)

    def collecting(inspection: Inspection) -> Any:
        thread.start()
        while thread.is_alive() and not waits.wait(0.01):
            pass
        return judge(inspection)

    def entered(turns: Turns) -> Any:
        waits.set()
        return step(turns)

    monkeypatch.setattr(Inspection, "judge", collecting)
    monkeypatch.setattr(Turns, "step", entered)
    engine.sync_weights(ref(tensors, version=2, mode=mode))
    thread.join(60)
    assert not errors
    assert {version for group in found for one in group.completions for _, version in one.versions} == {2}
