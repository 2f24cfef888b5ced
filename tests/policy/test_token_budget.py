"""`train_mb_tokens: auto`: the budget that is found fits, a larger one would not, and nothing is left of the search."""

from __future__ import annotations

import contextlib
import random
import weakref
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from nemo_rl_lora.algorithms.batch import longest_rows
from nemo_rl_lora.algorithms.losses.likelihood import SftLoss
from nemo_rl_lora.config.errors import ConfigError
from nemo_rl_lora.distributed.ranks import Ranks
from nemo_rl_lora.policy import device_memory, token_budget
from nemo_rl_lora.policy.token_budget import (
    CPU_SHARE,
    LongestRowTooLongError,
    Sizes,
    by_forecast,
    by_halving,
    find_tokens,
)
from tests.policy.budget_ranks import TARGET, search_and_step
from tests.policy.dtensor.test_policy import make_policy, spec
from tests.policy.megatron.twins import BOTH, gradients, masters, moments, random_adapter, set_masters
from tests.policy.parallel_ranks import Case
from tests.policy.test_pairs import make_chats
from tests.rank_processes import run_ranks
from tests.tiny_models import ALL_LINEAR, VOCABULARY

CPU = torch.device("cpu")
AUTO = {"dynamic_batching": {"enabled": True, "train_mb_tokens": "auto", "sequence_length_round": 8}}
ROWS, LENGTH = 16, 64


def longest(num_rows: int = ROWS):
    return longest_rows(torch.arange(num_rows), num_prompt_tokens=1, num_tokens=LENGTH, vocabulary=VOCABULARY)


def policy_of(path, backend: str, **settings):
    """With an adapter whose B is not zero, dropout and weight decay."""
    policy = make_policy(
        path,
        backend=BOTH[backend],
        **{
            "spec": spec(targets=ALL_LINEAR, dropout=0.1, dropout_position="pre", kernels=False),
            "optimizer": {"kwargs": {"lr": 1e-2, "weight_decay": 0.1}},
            **AUTO,
            **settings,
        },
    )
    if policy._setup.spec is not None:
        set_masters(policy, random_adapter(policy))
    return policy


@pytest.fixture(params=BOTH)
def policy(request, tiny_model):
    return policy_of(tiny_model("llama"), request.param)


class Limited:
    """An attempt that has memory for so many tokens."""

    def __init__(self, limit: int) -> None:
        self.limit, self.tried = limit, list[int]()

    def __call__(self, tokens: int) -> int:
        self.tried.append(tokens)
        if tokens > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return tokens


def test_of_the_halves_the_first_that_fits_is_taken():
    rng = random.Random(1)
    for _ in range(200):
        round_to = rng.choice([1, 8, 64])
        least = round_to * rng.randint(1, 40)
        sizes = Sizes(least=least, largest=least + round_to * rng.randint(0, 4000), round_to=round_to)
        attempt = Limited(rng.randint(least, 2 * sizes.largest))
        found = by_halving(attempt, sizes, device=CPU, reserve_bytes=0)
        assert found.tokens <= attempt.limit
        assert found.tokens == sizes.largest or 2 * (found.tokens + round_to) > attempt.limit
        assert sizes.least <= found.tokens <= sizes.largest
        assert found.tokens in (sizes.least, sizes.largest) or found.tokens % round_to == 0
        assert len(set(attempt.tried)) == len(attempt.tried) == found.num_trials


def test_a_row_that_does_not_fit_ends_the_search():
    sizes = Sizes(least=64, largest=1000, round_to=8)
    with pytest.raises(LongestRowTooLongError) as raised:
        by_halving(Limited(63), sizes, device=CPU, reserve_bytes=0)
    assert raised.value.tokens == 64


def test_another_error_is_not_taken_for_want_of_memory():
    def broken(_: int) -> int:
        raise RuntimeError("CUDA error: device-side assert triggered")

    with pytest.raises(RuntimeError, match="device-side"):
        by_halving(broken, Sizes(least=64, largest=1000, round_to=8), device=CPU, reserve_bytes=0)


def test_no_more_is_taken_than_whole_rows_filled():
    """Of a budget of 150 tokens rows of 100 fill 100, and shorter ones would fill more than was tried."""

    def attempt(tokens: int) -> int:
        if tokens > 299:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return tokens // 100 * 100

    sizes = Sizes(least=100, largest=600, round_to=50)
    assert by_halving(attempt, replace(sizes, largest=500), device=CPU, reserve_bytes=0).tokens == 200
    assert by_halving(attempt, sizes, device=CPU, reserve_bytes=0).tokens == 100


class Midway:
    """The last layer's part of a backward pass has no memory above a number of tokens, once gradients exist."""

    def __init__(self, policy, limit: int) -> None:
        self._limit, self.num_failures = limit, 0
        layers = [m for m in policy._model.modules() if type(m).__name__ in ("LlamaDecoderLayer", "Layer")]
        layers[0].register_forward_hook(self._watch)

    def _watch(self, _module, _inputs, output):
        hidden = output[0] if isinstance(output, tuple) else output
        num_tokens = hidden.numel() // hidden.shape[-1]
        if hidden.requires_grad:
            hidden.register_hook(partial(self._refuse, num_tokens))

    def _refuse(self, num_tokens: int, _gradient):
        if num_tokens > self._limit:
            self.num_failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory.")


def test_a_policy_is_as_if_nothing_had_been_searched(policy, tiny_model, monkeypatch):
    """Out of memory in the middle of backward passes, with dropout; beside a policy that was given the budget."""
    failing = Midway(policy, limit=300)
    monkeypatch.setattr(token_budget, "find_tokens", by_halving_here)
    monkeypatch.setattr("nemo_rl_lora.policy.trained.find_tokens", by_halving_here)
    before, drawn = {name: tensor.clone() for name, tensor in masters(policy).items()}, torch.get_rng_state()
    found = policy.find_train_tokens(longest())
    assert (found.tokens, found.num_trials, found.reason) == (256, 3, "1024 and 512 did not fit")
    assert failing.num_failures == 2
    assert all(master.grad is None for master in policy._trained.masters().values())
    assert not policy._optimizer.state
    assert policy._optimizer.num_steps == 0
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(tensor, before[name]) for name, tensor in masters(policy).items())
    backend = "dtensor" if type(policy) is BOTH["dtensor"] else "megatron"
    given = policy_of(
        tiny_model("llama"), backend, dynamic_batching={**AUTO["dynamic_batching"], "train_mb_tokens": 256}
    )
    for _ in range(2):
        output, expected = (one.train_step(make_chats(), SftLoss()) for one in (policy, given))
        assert output == expected
    for read in (masters, gradients):
        assert all(torch.equal(tensor, read(given)[name]) for name, tensor in read(policy).items())
    pairs = moments(given)
    assert all(
        torch.equal(a, b) for name, pair in moments(policy).items() for a, b in zip(pair, pairs[name], strict=True)
    )


def by_halving_here(attempt, sizes, *, device, ranks, reserve_bytes):
    """The way of a GPU, on the CPU."""
    return by_halving(attempt, sizes, device=device, reserve_bytes=reserve_bytes)


def peak_of(policy, batch, tokens: int) -> int:
    return device_memory.peak_bytes(CPU, lambda: policy._attempt(batch, tokens))


@pytest.mark.parametrize("spec_of", [spec(targets=ALL_LINEAR), None], ids=["adapter", "all weights"])
@pytest.mark.parametrize("backend", BOTH)
def test_what_is_found_on_a_cpu_takes_the_share_and_more_would_take_more(tiny_model, monkeypatch, backend, spec_of):
    policy, batch = policy_of(tiny_model("llama"), backend, spec=spec_of), longest()
    moments_bytes = sum(2 * master.nbytes for master in policy._trained.masters().values())
    policy._attempt(batch, LENGTH)  # what is taken once
    for target in (200, 456, 900):
        room = peak_of(policy, batch, target)
        free = int((room + moments_bytes) / CPU_SHARE) + 8
        monkeypatch.setattr(device_memory, "free_bytes", lambda _, free=free: free)
        found = policy.find_train_tokens(batch)
        assert found.tokens % 8 == 0
        assert peak_of(policy, batch, found.tokens) <= 1.05 * room, found
        assert peak_of(policy, batch, 2 * found.tokens) > room, found
        assert abs(found.tokens - target) <= 0.15 * target + 8, found
        assert policy.cutting.train.max_tokens == found.tokens
        assert policy.cutting.logprob.max_tokens == LENGTH * policy._setup.logprob_rows


def test_on_a_cpu_the_longest_row_is_the_least_and_a_step_the_most(policy, monkeypatch):
    monkeypatch.setattr(device_memory, "free_bytes", lambda _: 0)
    found = policy.find_train_tokens(longest())
    assert (found.tokens, found.num_trials) == (LENGTH, 1)
    monkeypatch.setattr(device_memory, "free_bytes", lambda _: 2**40)
    found = policy.find_train_tokens(longest())
    assert found.tokens == ROWS * LENGTH
    assert found.reason.startswith("all rows of a step fit at once: ")
    assert policy.find_train_tokens(longest(1)).tokens == LENGTH


@pytest.mark.parametrize("backend", BOTH)
def test_moments_that_are_not_there_yet_have_room(tiny_model, monkeypatch, backend):
    policy, batch = policy_of(tiny_model("llama"), backend, spec=None), longest(200)
    monkeypatch.setattr(device_memory, "free_bytes", lambda _: 2**24)
    before = policy.find_train_tokens(batch).tokens
    policy.train_step(make_chats(), SftLoss())
    after = policy.find_train_tokens(batch).tokens
    moments_bytes = sum(2 * master.nbytes for master in policy._trained.masters().values())
    of_a_token = (peak_of(policy, batch, 10 * LENGTH) - peak_of(policy, batch, 5 * LENGTH)) / (5 * LENGTH)
    assert (after - before) * of_a_token == pytest.approx(moments_bytes, rel=0.25)


def test_what_the_engine_keeps_is_left_to_it(policy, monkeypatch):
    monkeypatch.setattr(device_memory, "free_bytes", lambda _: 2**24)
    with_all, with_less = (policy.find_train_tokens(longest(200), kept).tokens for kept in (0, 2**22))
    assert with_less < with_all < 200 * LENGTH


def test_processes_of_a_machine_share_its_memory_and_take_the_smallest_budget(monkeypatch):
    """Two processes, of which the other one found less, and which needs twice as much for a token."""

    class Two(Ranks):
        def everybodys(self, found):
            if isinstance(found, tuple):
                return [found, (found[0] // 2, "the other's")]
            return [found, found]

    def attempt(tokens: int) -> int:
        torch.empty(1000 * tokens, dtype=torch.uint8)
        return tokens

    monkeypatch.setattr(device_memory, "free_bytes", lambda _: 4_000_000)
    sizes = Sizes(least=100, largest=10_000, round_to=1)
    alone = by_forecast(attempt, sizes, device=CPU, ranks=Ranks(), reserve_bytes=0)
    assert alone.tokens == pytest.approx(2000, abs=2)
    both = by_forecast(attempt, sizes, device=CPU, ranks=Two(), reserve_bytes=0)
    assert both.tokens == pytest.approx(500, abs=2)
    assert both.reason == "the other's"


def test_a_cpu_is_never_asked_for_more_than_two_rows_before_it_is_known_what_they_take(policy):
    tried = []

    def attempt(tokens: int) -> int:
        tried.append(tokens)
        return policy._attempt(longest(), tokens)

    sizes = policy._sizes(longest())
    assert sizes == Sizes(least=LENGTH, largest=ROWS * LENGTH, round_to=8)
    find_tokens(attempt, sizes, device=CPU, ranks=Ranks(), reserve_bytes=0)
    assert max(tried) == 2 * LENGTH


def test_an_attempt_goes_through_the_microbatches_that_are_in_memory_at_a_time(policy, monkeypatch):
    ran = []
    original = type(policy)._gradients_of

    def watched(self, portion, loss_fn):
        ran.append([micro.num_tokens for micro in portion.microbatches()])
        return original(self, portion, loss_fn)

    monkeypatch.setattr(type(policy), "_gradients_of", watched)
    assert policy._attempt(longest(), 200) == 192
    assert ran == [[192, 192]]  # of six: the second finds gradients there
    batch = longest_rows(torch.arange(16) // 4, num_prompt_tokens=40, num_tokens=64, vocabulary=VOCABULARY)
    assert policy._attempt(batch, 200) == 136  # 40 tokens of a prompt and 24 of each of its four completions
    pairs = replace(longest(), group_index=torch.arange(16) // 2, whole_groups=True)
    assert policy._sizes(pairs).least == 128  # 127, rounded up: a pair stays together


def test_an_attempt_that_breaks_off_between_layers_of_one_input_leaves_nothing(tiny_model):
    """gate_proj and up_proj are computed by the first call, and out of memory comes before the second."""
    policy = policy_of(tiny_model("llama"), "dtensor", spec=spec(targets=ALL_LINEAR, kernels=False))
    mlp: Any = policy._model.get_submodule("model.layers.1.mlp")
    kept: list[Any] = []

    def break_off(_module, _inputs):
        kept.extend(weakref.ref(out) for out in mlp.up_proj.together._outs.values())
        raise torch.OutOfMemoryError("CUDA out of memory.")

    handle = mlp.act_fn.register_forward_pre_hook(break_off)
    with contextlib.suppress(torch.OutOfMemoryError):
        policy._attempt(longest(), 200)
    assert [out() for out in kept] == [None]
    with contextlib.suppress(torch.OutOfMemoryError):
        policy.logprobs(longest())  # what is left of it is let go when the next pass begins
    handle.remove()
    policy._attempt(longest(), 200)
    assert not mlp.up_proj.together._is_split


@pytest.mark.parametrize("backend", BOTH)
def test_a_row_that_does_not_fit_names_the_key_and_what_to_do(tiny_model, monkeypatch, backend):
    monkeypatch.setattr("nemo_rl_lora.policy.trained.find_tokens", by_halving_here)
    blocks = {f"{name}_cfg": {"enabled": name == backend} for name in BOTH}
    for is_on in (False, True):
        blocks[f"{backend}_cfg"] = {"enabled": True, "activation_checkpointing": is_on}
        policy = policy_of(tiny_model("llama"), backend, **blocks)
        Midway(policy, limit=32)
        with pytest.raises(ConfigError) as raised:
            policy.find_train_tokens(longest())
        recompute = "" if is_on else f", set policy.{backend}_cfg.activation_checkpointing=true"
        assert str(raised.value) == (
            "policy.dynamic_batching.train_mb_tokens='auto': a microbatch of the longest row, 64 tokens, does not fit "
            f"into the memory of {policy.device}. Lower policy.max_total_sequence_length{recompute}, or share the "
            "model among more processes."
        )


DROPPED = spec(targets=ALL_LINEAR, dropout=0.1, dropout_position="post")
STAGES = {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 1}
SHARED = [
    Case(name="sharded", number=2, backend="dtensor", sizes={}, spec=DROPPED),
    Case(name="two stages", number=2, backend="megatron", sizes=STAGES, spec=DROPPED),
]


@pytest.fixture(scope="module")
def shared(tiny_model, tmp_path_factory):
    """Case name -> what its two processes found."""
    model, saved, meeting = tiny_model("llama"), tmp_path_factory.mktemp("saved"), tmp_path_factory.mktemp("meeting")
    policy_of(model, "dtensor").save(saved)
    run_ranks(2, meeting, search_and_step, SHARED, model, saved / "adapter", make_chats(), meeting)
    return {
        case.name: [torch.load(meeting / f"{case.name} {rank}.pt", weights_only=False) for rank in range(2)]
        for case in SHARED
    }


@pytest.mark.parametrize("name", [case.name for case in SHARED])
def test_processes_that_share_a_model_agree_on_what_the_poorest_has_memory_for(shared, name):
    one, other = shared[name]
    assert one["found"] == other["found"]
    tokens = one["found"].tokens
    assert abs(tokens - TARGET) <= 0.2 * TARGET
    assert tokens < one["most"]
    for found in (one, other):
        assert found["budget"] == tokens
        assert not any(found["left"])
        assert not found["drawn"]
        assert found["steps"] == found["given steps"]
        assert all(map(torch.equal, found["weights"], found["given weights"]))
