"""Segment layout and attention against transformers' own padded forward pass, values and gradients."""

import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_rl_lora.policy import attention, cpu_attention
from nemo_rl_lora.policy.attention import supports_segments
from nemo_rl_lora.policy.forward import ForwardPass
from nemo_rl_lora.policy.head import Head, target_logprobs
from nemo_rl_lora.policy.microbatches import MicrobatchPlan
from tests.policy.batches import microbatches_of

FAMILIES = ["llama", "qwen2", "qwen3"]
PLANS = {
    "rows": MicrobatchPlan(fill="rows", max_rows=3, max_tokens=60, share_prefix=False, max_shared_tokens=999),
    "rows, shared": MicrobatchPlan(fill="rows", max_rows=3, max_tokens=60, share_prefix=True, max_shared_tokens=999),
    # both groups in one microbatch: the shorter prompt is padded, and its padding is nobody's key
    "all rows, shared": MicrobatchPlan(
        fill="rows", max_rows=7, max_tokens=60, share_prefix=True, max_shared_tokens=999
    ),
    "sorted": MicrobatchPlan(fill="sorted", max_rows=3, max_tokens=60, share_prefix=False, max_shared_tokens=999),
    "sorted, shared": MicrobatchPlan(
        fill="sorted", max_rows=3, max_tokens=90, share_prefix=True, max_shared_tokens=999
    ),
    "packed, shared, capped": MicrobatchPlan(
        fill="packed", max_rows=3, max_tokens=90, share_prefix=True, max_shared_tokens=50, round_to=16
    ),
}


def reference(model, batch, weights):
    """Logprobs and parameter gradients of a plain padded pass with eager attention."""
    model.zero_grad()
    model.set_attn_implementation("eager")
    width = batch.token_ids.shape[1]
    mask = (torch.arange(width)[None] < batch.sequence_length[:, None]).long()
    logits = model(batch.token_ids, attention_mask=mask).logits
    values = torch.log_softmax(logits, -1)[:, :-1].gather(2, batch.token_ids[:, 1:, None])[..., 0]
    values = torch.cat([torch.zeros(len(values), 1), values], 1) * batch.loss_mask
    (values * weights).sum().backward()
    return values.detach(), [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_equals_padded_rows(tiny_model, groups_batch, family, plan):
    assert_equals_padded_rows(tiny_model, groups_batch, family, plan)


def test_prompts_of_other_lengths_share_a_microbatch(tiny_model, groups_batch):
    """Their segments are padded to lengths of their own, in buckets of their own."""
    batch = replace(groups_batch, prompt_length=torch.tensor([3, 3, 3, 14, 14, 14, 14]))
    assert_equals_padded_rows(tiny_model, batch, "llama", PLANS["all rows, shared"])


def assert_equals_padded_rows(tiny_model, groups_batch, family, plan):
    model = AutoModelForCausalLM.from_pretrained(tiny_model(family), dtype=torch.float32).eval()
    weights = torch.randn(groups_batch.token_ids.shape, generator=torch.Generator().manual_seed(2))
    expected, expected_gradients = reference(model, groups_batch, weights)
    model.zero_grad()
    forward = ForwardPass(model=model, flat=True, temperature=1.0, chunk_tokens=16, autocast_dtype=None)
    forward.prepare()
    seen = torch.zeros_like(expected)
    for micro in microbatches_of(groups_batch, plan):
        values = forward(micro, groups_batch.token_ids.shape[1])
        (values * weights[micro.rows]).sum().backward()
        seen[micro.rows] = values.detach()
    # fp32 rounding through 3 layers: values on a scale of 5, gradients relative in L2
    torch.testing.assert_close(seen, expected, atol=5e-6, rtol=0)
    for parameter, gradient in zip(model.parameters(), expected_gradients, strict=True):
        assert (parameter.grad - gradient).norm() <= 1e-5 * gradient.norm()


@pytest.mark.parametrize(("length", "num_keys"), [(150, 150), (150, 220), (64, 64), (65, 70), (3, 9)])
def test_runs_of_queries_equal_a_dense_softmax(monkeypatch, length, num_keys):
    """In fp64, gradients too; with so few scores at a time that segments are taken by twos and fewer."""
    monkeypatch.setattr(cpu_attention, "_SCORES_PER_CHUNK", 3 * 2 * 64 * 2 * 220)
    for error in errors_of_attention(length, num_keys, torch.float64):
        assert error < 1e-14


@pytest.mark.parametrize("num_keys", [150, 220])
@pytest.mark.parametrize("size", [1.0, 2.0])
@pytest.mark.parametrize(
    ("dtype", "bounds"),
    [(torch.bfloat16, (0.003, 0.008)), (torch.float16, (5e-4, 1e-3)), (torch.float32, (1e-6, 2e-6))],
)
def test_attention_rounds_differences_to_its_dtype(num_keys, size, dtype, bounds):
    """Scores up to 5 and 20. bf16 rounds the latter by 0.04: the probabilities of those that are looked at must not
    have that error. Softmax in fp32 of scores in bf16 is off by 0.008 and, in its gradients, 0.011; where scores are
    small by 0.0033 and 0.0047. Measured here: 0.0021 and 0.0071; in fp16 3e-4 and 9e-4; in fp32 7e-7 and 1e-6."""
    out, *gradients = errors_of_attention(150, num_keys, dtype, size=size)
    assert out < bounds[0]
    assert max(gradients) < bounds[1]


def errors_of_attention(length, num_keys, dtype, size=1.0):
    """Of the output and of the gradients of q, k and v: the norm of the error, by that of a dense softmax in fp64."""
    generator = torch.Generator().manual_seed(0)
    num, heads, repeats, width = 5, 3, 2, 64
    shapes = ((num, length, heads * repeats, width), *2 * ((num, num_keys, heads, width),))
    inputs = [size * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    q, k, v = (x.to(dtype).requires_grad_() for x in inputs)
    blocked = torch.ones(num, length, num_keys, dtype=torch.bool).triu(num_keys - length + 1)
    for row in range(num):  # padding of the parent's keys
        blocked[row, :, num_keys - length - row : num_keys - length] = row < num_keys - length
    q64, k64, v64 = (x.detach().double().requires_grad_() for x in (q, k, v))
    of_each = [x.repeat_interleave(repeats, dim=2) for x in (k64, v64)]  # head of q
    scores = torch.einsum("sqhd,skhd->shqk", q64, of_each[0]) / 8
    p = scores.masked_fill(blocked[:, None], -math.inf).softmax(-1)
    dense = torch.einsum("shqk,skhd->sqhd", p, of_each[1])
    found = attention.attend(q, k, v, blocked, 1 / 8)
    grad = torch.randn(dense.shape, generator=generator, dtype=torch.float64).to(dtype)
    expected = dense, *torch.autograd.grad(dense, (q64, k64, v64), grad.double())
    own = found, *torch.autograd.grad(found, (q, k, v), grad)
    with torch.no_grad():
        return [float((x.double() - y).norm() / y.norm()) for x, y in zip(own, expected, strict=True)]


def test_padded_layout_serves_a_sliding_window(tiny_model, groups_batch):
    model = AutoModelForCausalLM.from_pretrained(tiny_model("mistral-window"), dtype=torch.float32).eval()
    assert not supports_segments(model.config, max_length=40)
    assert supports_segments(model.config, max_length=8)
    weights = torch.randn(groups_batch.token_ids.shape, generator=torch.Generator().manual_seed(2))
    expected, _ = reference(model, groups_batch, weights)
    forward = ForwardPass(model=model, flat=False, temperature=1.0, chunk_tokens=16, autocast_dtype=None)
    forward.prepare()
    for micro in microbatches_of(groups_batch, PLANS["sorted"]):
        values = forward(micro, groups_batch.token_ids.shape[1])
        torch.testing.assert_close(values, expected[micro.rows], atol=5e-6, rtol=0)


@pytest.mark.parametrize("plan", [plan for plan in PLANS.values() if plan.fill != "rows"])
def test_no_microbatch_is_over_its_budget(groups_batch, plan):
    found = microbatches_of(groups_batch, plan)
    assert sorted(row for micro in found for row in micro.rows.tolist()) == list(range(7))
    assert all(micro.num_tokens - micro.num_padding_tokens <= plan.max_tokens for micro in found)


def test_sharing_computes_each_prompt_once(groups_batch):
    shared, *rest = microbatches_of(
        groups_batch,
        MicrobatchPlan(fill="sorted", max_rows=1, max_tokens=10**6, share_prefix=True, max_shared_tokens=10**6),
    )
    own = groups_batch.sequence_length - groups_batch.prompt_length
    assert not rest
    assert shared.num_tokens == int(own.sum()) + 9 + 14


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("train_head", [False, True])
def test_chunked_head_equals_dense_log_softmax(temperature, train_head):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 12, generator=generator, dtype=torch.float64).float().requires_grad_()
    weight = torch.randn(50, 12, generator=generator).requires_grad_(train_head)
    target = torch.randint(0, 50, (37,), generator=generator)
    outer = torch.randn(37, generator=generator)
    values = target_logprobs(hidden, Head(weight=weight, temperature=temperature, chunk_tokens=8), target)
    (values * outer).sum().backward()
    h64 = hidden.detach().double().requires_grad_()
    w64 = weight.detach().double().requires_grad_()
    dense = torch.log_softmax(h64 @ w64.T / temperature, -1).gather(1, target[:, None])[:, 0]
    (dense * outer).sum().backward()
    torch.testing.assert_close(values.double(), dense, atol=1e-5, rtol=0)
    torch.testing.assert_close(hidden.grad.double(), h64.grad, atol=1e-5, rtol=0)
    if train_head:
        torch.testing.assert_close(weight.grad.double(), w64.grad, atol=1e-5, rtol=0)
