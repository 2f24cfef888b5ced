"""Tokens a second of the engine in the trainer's process on the Llama-3.2-1B shape, beside transformers' `generate`.

Every row has a prompt of 100 tokens and a fixed number of new ones. On our side 8 rows share their prompt, as in GRPO,
and `generate` has the same rows. Prefill counts on both sides, the sync of the weights on neither (`sync_s`),
and nor does the capture of CUDA graphs, since a first rollout is not timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from gpu.shapes import LLAMA_1B, random_model
from gpu.timing import measurement, timed
from gpu.training import TOY_TOKENS, dtensor_policy
from work import LORA_ALPHA, LORA_DIM

from nemo_rl_lora.generation.in_process.engine import CudaGraphsChoice, InProcessGeneration
from nemo_rl_lora.generation.protocol import generate
from nemo_rl_lora.lora.spec import LoraSpec
from nemo_rl_lora.types import GroupRequest, Prompt, SamplingParams, SyncMode
from tests.generation.engine_inputs import LetterTokenizer
from tests.gpu.checks import Check, Fact, Machine

PROMPT_TOKENS, NEW_TOKENS, TOY_NEW_TOKENS = 100, 128, 4
NUM_ROWS, TOY_NUM_ROWS = (64, 256), (8, 16)
GROUP_SIZE = 8
MODES: tuple[SyncMode, ...] = ("merged", "adapter")


def decoding(machine: Machine) -> Iterator[Check]:
    toy = not machine.has_gpu
    config = LLAMA_1B.config(toy=toy)

    @cache
    def policy() -> Any:
        return dtensor_policy(machine, config, TOY_TOKENS, microbatch_tokens=TOY_TOKENS)

    @cache
    def model() -> Any:
        return random_model(config, machine.device, attention="sdpa")

    sizes = TOY_NUM_ROWS if toy else NUM_ROWS
    for num_rows in sizes:
        for mode in MODES:
            yield measurement(f"ours, {mode}, {num_rows} rows", partial(ours, machine, policy, mode, num_rows))
    for mode in MODES:
        name = f"ours, {mode}, {sizes[0]} rows, without CUDA graphs"
        yield measurement(name, partial(ours, machine, policy, mode, sizes[0], cuda_graphs=False))
    policy.cache_clear()  # its weights would count as memory of the other side
    for num_rows in sizes:
        yield measurement(f"transformers' generate, {num_rows} rows", partial(plain, machine, model, num_rows))


def ours(
    machine: Machine,
    make_policy: Callable[[], Any],
    mode: SyncMode,
    num_rows: int,
    cuda_graphs: CudaGraphsChoice = "auto",
) -> dict[str, Fact]:
    policy, tokenizer = make_policy(), LetterTokenizer()
    engine = InProcessGeneration(
        policy.base_model(),
        tokenizer=tokenizer,  # pyright: ignore[reportArgumentType]
        spec=LoraSpec(dim=LORA_DIM, alpha=LORA_ALPHA),
        adapted=policy.adapted,
        compute_dtype=torch.bfloat16,
        max_concurrent_sequences=num_rows,
        cuda_graphs=cuda_graphs,
    )
    receipt = engine.sync_weights(policy.publish(1, mode))
    num_new = new_tokens(machine)
    requests = [request(index, num_new) for index in range(num_rows // GROUP_SIZE)]
    facts = decoding_facts(machine, partial(generate, engine, requests), num_rows, num_new)
    engine.close()
    return {**facts, "sync_s": receipt.seconds}


def plain(machine: Machine, make_model: Callable[[], Any], num_rows: int) -> dict[str, Fact]:
    model, num_new = make_model(), new_tokens(machine)
    token_ids = torch.tensor([prompt(row // GROUP_SIZE) for row in range(num_rows)], device=machine.device)

    def call() -> None:
        out = model.generate(
            token_ids,
            attention_mask=torch.ones_like(token_ids),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=num_new,
            min_new_tokens=num_new,
            pad_token_id=0,
        )
        assert out.shape == (num_rows, PROMPT_TOKENS + num_new), out.shape

    return decoding_facts(machine, call, num_rows, num_new)


def decoding_facts(machine: Machine, call: Callable[[], object], num_rows: int, num_new: int) -> dict[str, Fact]:
    found = timed(machine, call, num_warm=1, num_timed=1)
    return {
        "tokens_per_s": num_rows * num_new / found.seconds,
        "ms_per_token": 1e3 * found.seconds / num_new,
        "peak_gib": found.peak_gib,
    }


def new_tokens(machine: Machine) -> int:
    return NEW_TOKENS if machine.has_gpu else TOY_NEW_TOKENS


def prompt(index: int) -> tuple[int, ...]:
    return tuple((7 * index + i) % 250 for i in range(PROMPT_TOKENS))


def request(index: int, num_new: int) -> GroupRequest:
    return GroupRequest(
        prompt=Prompt(index=index, token_ids=prompt(index), text="", row={}, environment=""),
        num_completions=GROUP_SIZE,
        seeds=tuple(range(index * GROUP_SIZE, (index + 1) * GROUP_SIZE)),
        sampling=SamplingParams(max_new_tokens=num_new),
    )
