"""Attention by two flash calls: what is gathered and merged, with the kernel written out densely in fp64; and that
the real kernel takes what it is given, on fake tensors of a GPU."""

import pytest
import torch

from nemo_rl_lora.policy import flash_segments
from nemo_rl_lora.policy.attention import AttentionPlan, segment_attention
from nemo_rl_lora.policy.flash_segments import attend_by_flash, flash_backward, gathered, plan_flash
from tests.policy.batches import segments_of

HEADS, KV_HEADS, SIZE = 6, 2, 8
# (length, parent) of each segment
LAYOUTS = {
    "rows": [(5, None), (9, None), (3, None)],
    "one group": [(7, None), (4, 0), (6, 0), (1, 0)],
    "groups among rows": [(7, None), (4, 0), (6, 0), (5, None), (3, None), (2, 4), (9, 4), (3, None)],
    "a group whose parent comes after others": [(2, None), (8, None), (3, 1), (1, 0), (4, 1)],
}


def scores_of(q, k, scale, causal):
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(HEADS // KV_HEADS, 1)) * scale
    return scores.masked_fill(torch.ones(len(q), len(k), dtype=torch.bool).triu(1), -torch.inf) if causal else scores


def runs(call):
    for i in range(len(call.query_bounds) - 1):
        yield slice(*call.query_bounds[i : i + 2].tolist()), slice(*call.key_bounds[i : i + 2].tolist())


def dense_forward(q, k, v, call, scale, *, causal):
    q, k, v = gathered(q, call.query_rows), gathered(k, call.key_rows), gathered(v, call.key_rows)
    out, total = torch.empty_like(q), torch.empty(HEADS, len(q), dtype=q.dtype)
    for a, b in runs(call):
        scores = scores_of(q[a], k[b], scale, causal)
        total[:, a] = scores.logsumexp(-1)
        out[a] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[b].repeat_interleave(HEADS // KV_HEADS, 1))
    return out, total, [torch.empty(0), torch.empty(0)]


def dense_backward(grad, q, k, v, out, total, states, call, scale, *, causal):
    """As flash computes it: probabilities from the log-sum-exp, and the softmax's correction from the output."""
    rows = call.query_rows
    grad, q, out = gathered(grad, rows), gathered(q, rows), gathered(out, rows)
    k, v = gathered(k, call.key_rows), gathered(v, call.key_rows)
    total = total if rows is None else total[:, rows]
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)

    def of_kv_heads(x):
        return x.view(len(x), KV_HEADS, -1, SIZE).sum(2)

    for a, b in runs(call):
        p = (scores_of(q[a], k[b], scale, causal) - total[:, a, None]).exp()
        wide_k, wide_v = (x[b].repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
        dp = torch.einsum("qhd,khd->hqk", grad[a], wide_v)
        ds = p * (dp - (grad[a] * out[a]).sum(-1).t()[..., None]) * scale
        dq[a] = torch.einsum("hqk,khd->qhd", ds, wide_k)
        dk[b] += of_kv_heads(torch.einsum("hqk,qhd->khd", ds, q[a]))
        dv[b] += of_kv_heads(torch.einsum("hqk,qhd->khd", p, grad[a]))
    return dq, dk, dv


def whole_softmax(q, k, v, segments, scale):
    """The reference: every token over its segment's tokens so far and all of its parent's; gradients by autograd."""
    allowed = torch.zeros(len(q), len(q), dtype=torch.bool)
    for one in segments:
        own = slice(one.start, one.start + one.length)
        allowed[own, own] = torch.ones(one.length, one.length, dtype=torch.bool).tril()
        if one.parent is not None:
            parent = segments[one.parent]
            allowed[own, parent.start : parent.start + parent.length] = True
    scores = scores_of(q, k, scale, causal=False).masked_fill(~allowed, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.repeat_interleave(HEADS // KV_HEADS, 1))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_two_calls_are_the_whole_softmax_and_its_gradient(layout, monkeypatch):
    monkeypatch.setattr(flash_segments, "flash_forward", dense_forward)
    monkeypatch.setattr(flash_segments, "flash_backward", dense_backward)
    segments, generator = segments_of(layout), torch.Generator().manual_seed(0)
    num_tokens = sum(length for length, _ in layout)
    inputs = [
        torch.randn(num_tokens, heads, SIZE, dtype=torch.float64, generator=generator, requires_grad=True)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]
    q, k, v = inputs
    out = attend_by_flash(q, k, v, plan_flash(segments), 0.3)
    expected = whole_softmax(q, k, v, segments, 0.3)
    grad = torch.randn(out.shape, dtype=torch.float64, generator=generator)

    assert torch.allclose(out, expected, atol=1e-14)
    for found, wanted in zip(
        torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        assert torch.allclose(found, wanted, atol=1e-13)  # fp64: sums of at most 37 products
        assert wanted.abs().max() > 0.1


def attend_on_gpu(dtype, size, layout=LAYOUTS["groups among rows"]):
    segments = segments_of(layout)
    num_tokens = sum(length for length, _ in layout)
    q, k, v = (torch.empty(1, h, num_tokens, size, dtype=dtype, device="cuda") for h in (HEADS, KV_HEADS, KV_HEADS))
    plan = AttentionPlan(segments, torch.device("cuda"))
    with torch.no_grad():
        out, _ = segment_attention(torch.nn.Module(), q, k, v, None, attention_plan=plan)
    return plan, out


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_kernel_takes_what_it_is_given(on_gpu, layout):
    plan, out = attend_on_gpu(torch.bfloat16, 64, layout)
    num_tokens = sum(length for length, _ in layout)
    assert (out.shape, out.dtype, out.device.type) == ((1, num_tokens, HEADS, 64), torch.bfloat16, "cuda")
    assert "padded" not in vars(plan)  # no mask, no padding
    flat = {"dtype": torch.bfloat16, "device": "cuda"}
    q, grad = (torch.empty(num_tokens, HEADS, 64, **flat) for _ in range(2))
    k, v = (torch.empty(num_tokens, KV_HEADS, 64, **flat) for _ in range(2))
    total = torch.empty(HEADS, num_tokens, device="cuda")
    states = [torch.empty(2, dtype=torch.uint64, device="cuda"), torch.empty(0, device="cuda")]
    for call in filter(None, (plan.flash.own, plan.flash.above)):
        dq, dk, dv = flash_backward(grad, q, k, v, q, total, states, call, 0.3, causal=call is plan.flash.own)
        assert dq.shape == gathered(q, call.query_rows).shape
        assert dk.shape == dv.shape == gathered(k, call.key_rows).shape
        assert call.query_bounds.dtype == call.key_bounds.dtype == torch.int32


def test_a_gpu_before_ampere_pads_too(on_gpu, monkeypatch):
    """torch's flash attention raises there."""
    monkeypatch.setattr("nemo_rl_lora.kernels.machine.is_recent", lambda: False)
    plan, _ = attend_on_gpu(torch.bfloat16, 64, LAYOUTS["rows"])
    assert "padded" in vars(plan)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 64), (torch.bfloat16, 60), (torch.float16, 264)])
def test_what_it_does_not_take_is_padded(on_gpu, dtype, size):
    plan, out = attend_on_gpu(dtype, size, LAYOUTS["rows"])
    assert (out.dtype, out.shape[-1]) == (dtype, size)
    assert "flash" not in vars(plan)
