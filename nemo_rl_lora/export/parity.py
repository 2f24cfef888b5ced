"""What merging costs an adapter: a certificate for one checkpoint.

Contract: the adapter and its base are read from disk. Layer by layer, the share of the update that is left when
W + scale B A is rounded to bf16; token by token, on greedy answers to real prompts, how far three ways of computing are
from the merged model in fp32: split (bf16 base, adapter beside it), merged in fp32 and rounded to bf16, and the base
alone. Two passes in bf16 differ by rounding anyway, so the verdict compares the merged one with the split one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nemo_rl_lora.generation.in_process.fallback import Adding
from nemo_rl_lora.lora.adapter_tensors import AdapterTensors
from nemo_rl_lora.lora.merge import LEAST_SHARE, Survival
from nemo_rl_lora.lora.targets import AdaptedModule

MOST_NOISE = 2.0  # times the split's own distance, that the merged model may have
NUM_TOKENS = 24  # of an answer

PROMPTS = (
    "What is 3 + 4? Answer with a number.",
    "What is 58 + 27? Answer with a number.",
    "The capital of France is",
    "A pen costs 2 dollars. What do 3 pens cost?",
    "Write a short sentence about the sea.",
    "Which is larger, 17 or 71?",
    "def mean(values):\n    return sum(values) /",
    "Translate to French: good morning.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShare:
    """One adapted module."""

    module: str
    surviving_share: float  # as lora/merge.py defines both
    relative_error: float
    changed_share: float  # of the weight's elements, how many are not the base's


@dataclass(frozen=True, slots=True, kw_only=True)
class Distance:
    """From the merged model in fp32, over all tokens of the answers."""

    mean_kl: float
    mean_abs_logprob_error: float
    max_abs_logprob_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    layers: tuple[LayerShare, ...]
    surviving_share: float  # of the whole update
    num_tokens: int
    distances: Mapping[str, Distance]  # base_fp32, split_bf16, merged_bf16
    logprob_errors: Mapping[str, tuple[float, ...]]  # of each token
    verdict: str  # "merge" or "adapter"
    reason: str


@torch.no_grad()
def layer_shares(
    weights: Mapping[str, Tensor], tensors: Mapping[str, Tensor], adapted: Sequence[AdaptedModule]
) -> tuple[list[LayerShare], float]:
    """What rounding to bf16 leaves of each module's update, and of all of them together."""
    shares, whole = [], Survival()
    for module in adapted:
        adapter = AdapterTensors.of(module.name, module.scale, tensors).to(torch.float32)
        base = weights[f"{module.name}.weight"].to(torch.bfloat16)
        update = adapter.scale * (adapter.b @ adapter.a)
        left = adapter.merged(base).float() - base.float()
        survival = Survival()
        survival.add(update, left)
        whole.add_all(survival)
        shares.append(
            LayerShare(
                module=module.name,
                surviving_share=survival.share,
                relative_error=survival.relative_error,
                changed_share=float((left != 0).float().mean()),
            )
        )
    return shares, whole.share


@torch.no_grad()
def certify(
    model: PreTrainedModel, tokenizer: Any, tensors: Mapping[str, Tensor], adapted: Sequence[AdaptedModule]
) -> Certificate:
    """The certificate of an adapter on this model, which holds the base in fp32 and is used up."""
    shares, whole = layer_shares(dict(model.named_parameters()), tensors, adapted)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(base | _merged(model, tensors, adapted))
    rows = [_with_answer(model, _prompt_ids(tokenizer, prompt)) for prompt in PROMPTS]
    exact = [_log_distribution(model, *row) for row in rows]
    model.load_state_dict(base)
    found = {"base_fp32": [_log_distribution(model, *row) for row in rows]}
    torch.nn.Module.to(model, dtype=torch.bfloat16)
    with _beside(model, tensors, adapted):
        found["split_bf16"] = [_log_distribution(model, *row) for row in rows]
    model.load_state_dict(model.state_dict() | _merged(model, tensors, adapted))
    found["merged_bf16"] = [_log_distribution(model, *row) for row in rows]
    distances, errors = {}, {}
    for name, other in found.items():
        distances[name], errors[name] = _distance(exact, other, rows)
    verdict, reason = _verdict(whole, distances)
    return Certificate(
        layers=tuple(shares),
        surviving_share=whole,
        num_tokens=sum(len(token_ids) - begin for token_ids, begin in rows),
        distances=distances,
        logprob_errors=errors,
        verdict=verdict,
        reason=reason,
    )


def _merged(
    model: PreTrainedModel, tensors: Mapping[str, Tensor], adapted: Sequence[AdaptedModule]
) -> dict[str, Tensor]:
    """The adapted weights, merged in the model's dtype."""
    return {
        name: AdapterTensors.of(m.name, m.scale, tensors).merged(model.get_parameter(name).detach())
        for m, name in ((m, f"{m.name}.weight") for m in adapted)
    }


def _verdict(share: float, distances: Mapping[str, Distance]) -> tuple[str, str]:
    merged, split = distances["merged_bf16"].mean_kl, distances["split_bf16"].mean_kl
    compared = f"merged bf16 is {merged:.2e} (mean KL) from the exact model, split {split:.2e}"
    if share < LEAST_SHARE:
        return "adapter", f"rounding to bf16 leaves {share:.0%} of the update, below {LEAST_SHARE:.0%}; {compared}"
    if merged > MOST_NOISE * split:
        return "adapter", f"{compared}, more than {MOST_NOISE:g} times as far"
    return "merge", f"rounding to bf16 leaves {share:.0%} of the update; {compared}"


@contextmanager
def _beside(model: PreTrainedModel, tensors: Mapping[str, Tensor], adapted: Sequence[AdaptedModule]) -> Iterator[None]:
    """The adapter computed apart, in the model's dtype."""
    hooks = [
        model.get_submodule(m.name).register_forward_hook(
            Adding(AdapterTensors.of(m.name, m.scale, tensors).to(model.dtype))
        )
        for m in adapted
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _prompt_ids(tokenizer: Any, prompt: str) -> Tensor:
    if tokenizer.chat_template is None:
        return torch.tensor([tokenizer(prompt)["input_ids"]])
    message = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])


def _with_answer(model: Any, prompt: Tensor) -> tuple[Tensor, int]:
    """Prompt and greedy answer [T], and where the answer begins."""
    ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NUM_TOKENS, do_sample=False)
    return ids[0], prompt.shape[1]


def _log_distribution(model: Any, token_ids: Tensor, begin: int) -> Tensor:
    """[answer tokens, V] fp32"""
    return model(token_ids[None]).logits[0, begin - 1 : -1].float().log_softmax(-1)


def _distance(
    exact: Sequence[Tensor], other: Sequence[Tensor], rows: Sequence[tuple[Tensor, int]]
) -> tuple[Distance, tuple[float, ...]]:
    kl = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(exact, other, strict=True)])
    chosen = [ids[begin:, None] for ids, begin in rows]
    errors = torch.cat(
        [(q.gather(1, ids) - p.gather(1, ids))[:, 0] for p, q, ids in zip(exact, other, chosen, strict=True)]
    )
    distance = Distance(
        mean_kl=float(kl.mean()),
        mean_abs_logprob_error=float(errors.abs().mean()),
        max_abs_logprob_error=float(errors.abs().max()),
    )
    return distance, tuple(errors.tolist())
