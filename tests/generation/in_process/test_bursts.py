"""Bursts beside single steps: the same tokens, from a function that can be repeated without Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nemo_rl_lora.generation.in_process import bursts, projections, sampling
from nemo_rl_lora.generation.in_process.bursts import BURST_TOKENS, Bursts, rounded, rounded_rows
from nemo_rl_lora.generation.in_process.engine import InProcessGeneration
from nemo_rl_lora.generation.protocol import generate
from nemo_rl_lora.types import CompletionGroup, GroupRequest
from tests.generation.engine_inputs import adapter_tensors, merged_tensors, parameters_of, ref, request
from tests.recorded_steps import recorded
from tests.tiny_models import sampling_model

MakeEngine = Callable[..., InProcessGeneration]
PROMPTS = ((5, 9, 40, 3), (11, 2), tuple(range(20, 33)), (8, 8, 8, 61, 30, 2, 7))
DRAWS: tuple[dict[str, Any], ...] = ({}, {"temperature": 0.7}, {"temperature": 0}, {"top_k": 5, "top_p": 0.9})


def in_bursts(engine: Any, graphs: Any = None) -> Any:
    """The engine, as it samples on a GPU."""
    engine._bursts = Bursts(engine._decoder, graphs)
    engine._decoder.kept_bytes = 2**40
    return engine


def recorder() -> Any:
    return recorded


def served(make_engine: MakeEngine, architecture: str, mode: str, **settings: Any) -> Any:
    model = sampling_model(architecture)
    engine = make_engine(model, lora=True, **settings)
    adapter = adapter_tensors(model)
    engine.sync_weights(ref(adapter if mode == "adapter" else merged_tensors(model, adapter), mode))  # type: ignore[arg-type]
    return engine


def requests() -> list[GroupRequest]:
    """More than fit at once, of several lengths, which end at different times and are drawn differently."""
    stops = {"stop_token_ids": (4, 44, 12, 60), "stop_strings": ("@", "8")}
    return [
        request(prompt, num_completions=1 + i % 3, max_new_tokens=5 + 7 * i, **stops, **how)
        for how in DRAWS
        for i, prompt in enumerate(PROMPTS)
    ]


def without_logprobs(groups: list[CompletionGroup]) -> list[Any]:
    return [[(c.token_ids, c.versions, c.text, c.finish_reason) for c in group.completions] for group in groups]


def logprobs(groups: list[CompletionGroup]) -> torch.Tensor:
    return torch.tensor([logprob for group in groups for c in group.completions for logprob in c.logprobs])


@pytest.mark.parametrize(("architecture", "mode"), [("llama", "adapter"), ("qwen2", "merged"), ("qwen3", "adapter")])
def test_bursts_give_the_tokens_of_single_steps(architecture: str, mode: str, make_engine: MakeEngine) -> None:
    expected = generate(served(make_engine, architecture, mode, concurrent=7), requests())
    found = generate(in_bursts(served(make_engine, architecture, mode, concurrent=7)), requests())
    assert without_logprobs(found) == without_logprobs(expected)
    # Padded sums are added up in another order; the logits are of the order of 10.
    torch.testing.assert_close(logprobs(found), logprobs(expected), atol=1e-5, rtol=0)
    assert {c.finish_reason for group in found for c in group.completions} == {"stop", "length"}


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_bursts_of_unpadded_shapes_give_every_bit(
    architecture: str, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bursts, "rounded", lambda number, least=1: number)
    monkeypatch.setattr(bursts, "rounded_rows", lambda number: number)
    monkeypatch.setattr("nemo_rl_lora.generation.in_process.engine.BURST_TOKENS", 1)
    expected = generate(served(make_engine, architecture, "adapter", concurrent=7), requests())
    assert generate(in_bursts(served(make_engine, architecture, "adapter", concurrent=7)), requests()) == expected


@pytest.mark.parametrize(("architecture", "mode"), [("llama", "merged"), ("qwen3", "adapter")])
def test_a_captured_step_is_repeated_without_python(architecture: str, mode: str, make_engine: MakeEngine) -> None:
    called = generate(in_bursts(served(make_engine, architecture, mode, concurrent=7)), requests())
    engine = in_bursts(served(make_engine, architecture, mode, concurrent=7), recorder)
    assert generate(engine, requests()) == called
    assert generate(engine, requests()) == called  # some again, since the cache has grown after them
    captured = dict(engine._bursts._steps)
    assert generate(engine, requests()) == called
    assert dict(engine._bursts._steps) == captured  # and none is made again


@pytest.mark.parametrize("mode", ["merged", "adapter"])
def test_new_weights_are_read_at_the_old_addresses(
    mode: Any, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projections, "can_pack", lambda *_: False)  # as on a GPU
    model = sampling_model("llama")
    engine: Any = in_bursts(make_engine(model, lora=True), recorder)
    addresses, samples, captured = [], [], []
    for version in (1, 2, 3):
        adapter = adapter_tensors(model, version)
        tensors = adapter if mode == "adapter" else merged_tensors(model, adapter)
        engine.sync_weights(ref(tensors, mode, version))
        samples.append(generate(engine, [request(p, num_completions=2, max_new_tokens=12) for p in PROMPTS]))
        expected = make_engine(model, lora=True)
        expected.sync_weights(ref(tensors, mode, version))
        again = generate(in_bursts(expected), [request(p, num_completions=2, max_new_tokens=12) for p in PROMPTS])
        assert samples[-1] == again
        own = (engine._bursts._inbox, engine._bursts._outbox)
        addresses.append([one.data_ptr() for one in (*engine._decoder.tensors_of_a_step(), *own)])
        captured.append(dict(engine._bursts._steps))
    assert captured[0] == captured[1] == captured[2]
    assert addresses[0] == addresses[1] == addresses[2]
    assert len(set(map(str, map(without_logprobs, samples)))) == 3


def test_a_captured_step_does_not_outlive_what_it_reads(make_engine: MakeEngine) -> None:
    model = sampling_model("llama", max_position_embeddings=256)
    engine: Any = in_bursts(make_engine(model, lora=True), recorder)
    for version, mode in enumerate(("merged", "adapter", "merged", "adapter"), start=1):
        adapter = adapter_tensors(model, version)
        weights: Any = ref(adapter if mode == "adapter" else merged_tensors(model, adapter), mode, version)  # type: ignore[arg-type]
        engine.sync_weights(weights)
        plain: Any = make_engine(model, lora=True)
        plain.sync_weights(weights)
        asked = [request(p, max_new_tokens=36 * version) for p in PROMPTS[:2]]  # the cache grows
        assert without_logprobs(generate(engine, asked)) == without_logprobs(generate(plain, asked))
    engine._decoder.kept_bytes = 0
    generate(engine, asked)
    assert not engine._bursts._steps
    assert engine._decoder.completion_store.num_bytes == 0


def test_a_row_whose_draw_reaches_far_waits_for_the_host(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling.draw, "__defaults__", (3,))  # tokens that are sorted first
    asked = [
        request(p, num_completions=2, max_new_tokens=20, top_p=top_p) for p in PROMPTS for top_p in (0.5, 0.9, 1.0)
    ]
    expected = generate(served(make_engine, "llama", "merged"), asked)
    engine: Any = in_bursts(served(make_engine, "llama", "merged"), recorder)
    held_up, draw = [], engine._draw
    monkeypatch.setattr(engine, "_draw", lambda rows, logits: held_up.append(len(rows)) or draw(rows, logits))
    found = generate(engine, asked)
    assert without_logprobs(found) == without_logprobs(expected)
    torch.testing.assert_close(logprobs(found), logprobs(expected), atol=1e-5, rtol=0)
    assert 2 < len(held_up) < 60


def test_logits_without_a_distribution_are_an_error_and_leave_the_engine_usable(make_engine: MakeEngine) -> None:
    model = sampling_model("llama")
    engine: Any = in_bursts(make_engine(model), recorder)
    asked = [request(p, num_completions=2) for p in PROMPTS]
    expected = generate(engine, asked)
    broken = {**parameters_of(model), "model.layers.0.self_attn.v_proj.weight": torch.full((16, 32), float("nan"))}
    engine.sync_weights(ref(broken, version=2))
    with pytest.raises(FloatingPointError, match="NaN"):
        generate(engine, asked)
    engine.sync_weights(ref(parameters_of(model), version=1))
    assert generate(engine, asked) == expected


def test_tokens_of_a_burst_have_the_version_that_drew_them(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = sampling_model("llama")
    engine: Any = in_bursts(make_engine(model))
    extend, lengths = engine._bursts.extend, list[int]()

    def update_before_the_second(token_ids: Any, sampling: Any, u: torch.Tensor) -> Any:
        lengths.append(len(u))
        if len(lengths) == 2:
            engine._sync(ref(parameters_of(model), version=2))
        return extend(token_ids, sampling, u)

    monkeypatch.setattr(engine._bursts, "extend", update_before_the_second)
    (group,) = generate(engine, [request(PROMPTS[0], max_new_tokens=20)])
    assert group.completions[0].versions == ((1 + BURST_TOKENS, 1), (19 - BURST_TOKENS, 2))
    assert lengths == [8, 8, 3]  # no further than the longest may go


def test_rows_and_lengths_are_rounded_to_few_sizes() -> None:
    assert [rounded(n) for n in (1, 2, 3, 8, 9, 100)] == [1, 2, 4, 8, 16, 128]
    assert rounded(9, 64) == 64
    assert {rounded_rows(n) for n in range(1, 257)} == {1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256}
    assert all(n <= rounded_rows(n) < 2 * n for n in range(1, 1000))


def test_a_cpu_steps_token_by_token(make_engine: MakeEngine) -> None:
    assert make_engine(sampling_model("llama"))._bursts is None  # type: ignore[attr-defined]
