"""The engine of the trainer's process beside transformers: the log-probabilities of what it sampled.

The judge is transformers' own model on the CPU, with the adapter merged into its weights in fp32. With CUDA graphs and
without, every number is to be the same; on a CPU tests/recorded_steps.py captures.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nemo_rl_lora.generation.in_process.bursts import Bursts
from nemo_rl_lora.generation.in_process.engine import CudaGraphsChoice, InProcessGeneration
from nemo_rl_lora.generation.protocol import generate
from nemo_rl_lora.lora.spec import LoraSpec
from nemo_rl_lora.types import CompletionGroup, SyncMode
from tests.generation.engine_inputs import (
    LetterTokenizer,
    adapted_modules,
    adapter_tensors,
    merged_tensors,
    ref,
    request,
)
from tests.gpu.checks import Answer, Check, Machine, within
from tests.recorded_steps import recorded
from tests.tiny_models import sampling_model

ARCHITECTURES = ("llama", "qwen2", "qwen3")
MODES: tuple[SyncMode, ...] = ("merged", "adapter")
GRAPH_MODES = MODES
PROMPTS = tuple(tuple((7 * i + j) % 90 for j in range(3 + 5 * i)) for i in range(4))
TEMPERATURE = 0.9
# fp32: the largest difference; sums of logits of the order of 10 in another order, 1e-5 on a CPU.
# bf16: the mean difference; weights and logits have 8 bits, 0.05 on a CPU. Without the adapter it is above 1.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 0.15}


def checks(machine: Machine) -> Iterator[Check]:
    for dtype in BOUNDS:
        for architecture in ARCHITECTURES:
            for mode in MODES:
                name = f"{architecture}, {mode} weights, {str(dtype).removeprefix('torch.')}"
                yield Check(name=name, ask=partial(beside_transformers, machine, architecture, mode, dtype))
        for mode in GRAPH_MODES if machine.has_gpu or dtype == torch.float32 else ():
            name = f"CUDA graphs, {mode} weights, {str(dtype).removeprefix('torch.')}"
            yield Check(name=name, ask=partial(with_and_without_graphs, machine, mode, dtype))


def with_and_without_graphs(machine: Machine, mode: SyncMode, dtype: torch.dtype) -> Answer:
    """Several draws, more rows than fit at once, after each of three syncs: every number is the same."""
    (with_graphs, seconds, num_captured), (without, seconds_without, _) = (
        sampled_three_times(machine, mode, dtype, cuda_graphs=cuda_graphs) for cuda_graphs in (True, False)
    )
    pairs = [
        (one, other)
        for group, again in zip(with_graphs, without, strict=True)
        for one, other in zip(group.completions, again.completions, strict=True)
    ]
    return Answer(
        ok=with_graphs == without and num_captured > 0,
        facts={
            "same_tokens": all(one.token_ids == other.token_ids for one, other in pairs),
            "same_logprobs": all(one.logprobs == other.logprobs for one, other in pairs),
            "num_captured": num_captured,
            "rollout_seconds": seconds,
            "rollout_seconds_without": seconds_without,
        },
    )


def sampled_three_times(
    machine: Machine, mode: SyncMode, dtype: torch.dtype, *, cuda_graphs: bool
) -> tuple[list[CompletionGroup], float, int]:
    """The groups of three rollouts, the seconds of the last one, and how many steps are captured."""
    model, groups, seconds = sampling_model("qwen3"), list[CompletionGroup](), 0.0
    engine: Any = engine_on(machine, sampling_model("qwen3"), dtype, cuda_graphs=cuda_graphs and machine.has_gpu)
    if not machine.has_gpu:
        engine._bursts = Bursts(engine._decoder, (lambda: recorded) if cuda_graphs else None)
        engine._decoder.kept_bytes = 2**30
    draws: tuple[dict[str, Any], ...] = ({}, {"temperature": 0.0}, {"temperature": 0.8, "top_k": 9, "top_p": 0.9})
    requests = [
        request(prompt, 3, max_new_tokens=20, stop_token_ids=(4, 12), **how) for prompt in PROMPTS for how in draws
    ]
    for version in (1, 2, 3):
        adapter = adapter_tensors(model, version)
        synced(machine, engine, adapter if mode == "adapter" else merged_tensors(model, adapter), mode, dtype, version)
        begun = time.perf_counter()
        groups += generate(engine, requests)
        seconds = time.perf_counter() - begun
    num_captured = len(engine._bursts._steps)
    engine.close()
    return groups, seconds, num_captured


def beside_transformers(machine: Machine, architecture: str, mode: SyncMode, dtype: torch.dtype) -> Answer:
    model = sampling_model(architecture)
    adapter = adapter_tensors(model)
    merged = merged_tensors(model, adapter)
    groups = sample(machine, sampling_model(architecture), adapter if mode == "adapter" else merged, mode, dtype)
    model.load_state_dict(merged, strict=False)
    differences = torch.cat(
        [
            torch.tensor(completion.logprobs) - judged_logprobs(model, group.prompt.token_ids, completion.token_ids)
            for group in groups
            for completion in group.completions
        ]
    ).abs()
    judged = differences.max() if dtype == torch.float32 else differences.mean()
    return within(
        BOUNDS[dtype],
        {"largest_difference" if dtype == torch.float32 else "mean_difference": float(judged)},
        num_tokens=len(differences),
    )


def sample(
    machine: Machine, model: PreTrainedModel, tensors: dict[str, Tensor], mode: SyncMode, dtype: torch.dtype
) -> list[CompletionGroup]:
    """Three completions of each prompt, after a sync of these tensors."""
    engine = engine_on(machine, model, dtype)
    synced(machine, engine, tensors, mode, dtype)
    sampling: dict[str, Any] = {"max_new_tokens": 20, "temperature": TEMPERATURE}
    return generate(engine, [request(prompt, num_completions=3, **sampling) for prompt in PROMPTS])


def engine_on(
    machine: Machine, model: PreTrainedModel, dtype: torch.dtype, cuda_graphs: CudaGraphsChoice = "auto"
) -> InProcessGeneration:
    torch.nn.Module.to(model, machine.device, dtype)
    tokenizer: Any = LetterTokenizer()
    return InProcessGeneration(
        model,
        tokenizer=tokenizer,
        spec=LoraSpec(dim=4, alpha=6.0),
        adapted=adapted_modules(model),
        compute_dtype=dtype,
        max_concurrent_sequences=16,
        cuda_graphs=cuda_graphs,
    )


def synced(
    machine: Machine,
    engine: InProcessGeneration,
    tensors: dict[str, Tensor],
    mode: SyncMode,
    dtype: torch.dtype,
    version: int = 1,
) -> None:
    on_device = {
        name: tensor.to(machine.device, torch.float32 if mode == "adapter" else dtype)
        for name, tensor in tensors.items()
    }
    receipt = engine.sync_weights(ref(on_device, mode, version))
    assert receipt.verdict == "confirmed", receipt


def judged_logprobs(model: PreTrainedModel, prompt: tuple[int, ...], token_ids: tuple[int, ...]) -> Tensor:
    """Of these tokens after the prompt, by one forward pass."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + token_ids])).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
    return logits.log_softmax(-1).gather(1, torch.tensor(token_ids)[:, None])[:, 0]
