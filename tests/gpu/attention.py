"""Attention over segments on a GPU beside the padded path in fp32 on the CPU: values, and gradients of q, k and v.

bf16 takes flash attention without padding (policy/flash_segments.py), fp32 the padded path with torch's kernels
(policy/attention.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from nemo_rl_lora.policy.attention import AttentionPlan, segment_attention
from nemo_rl_lora.policy.microbatches import Segment
from tests.gpu.checks import Answer, Check, Machine, relative, skipped, within
from tests.policy.batches import segments_of

NUM_HEADS, NUM_KV_HEADS = 8, 2
HEAD_SIZES = (64, 128)
# (length, parent) of each segment; lengths on both sides of a kernel's blocks of 64 and 128 tokens
LAYOUTS: dict[str, list[tuple[int, int | None]]] = {
    "rows": [(300, None), (1, None), (129, None), (57, None)],
    "shared prompts": [(200, None), (100, 0), (333, 0), (1, 0), (40, None), (63, None), (128, 5), (7, 5)],
}
# relative L2 norms: inputs, probabilities and outputs are rounded to bf16 (at most 2^-9 each), gradients twice as
# often; in fp32 sums are in another order. A forgotten parent, or gradients of one call alone, are above 0.1.
BOUNDS = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
PATHS = {torch.bfloat16: "flash", torch.float32: "padded"}


def checks(machine: Machine) -> Iterator[Check]:
    if not machine.has_gpu:
        yield Check(name="flash attention over segments", ask=partial(skipped, "no GPU"))
        return
    for layout in LAYOUTS:
        for size in HEAD_SIZES:
            for dtype, path in PATHS.items():
                name = f"{path} in {str(dtype).removeprefix('torch.')}, {layout}, heads of {size}"
                yield Check(name=name, ask=partial(beside_cpu, layout, size, dtype))


def beside_cpu(layout: str, size: int, dtype: torch.dtype) -> Answer:
    """The inputs are rounded once, so that both sides have the same."""
    segments = segments_of(LAYOUTS[layout])
    num_tokens = sum(segment.length for segment in segments)
    generator = torch.Generator().manual_seed(11)
    q, k, v = (
        torch.randn(1, heads, num_tokens, size, generator=generator).to(dtype)
        for heads in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)
    )
    grad = torch.randn(1, num_tokens, NUM_HEADS, size, generator=generator).to(dtype)
    path, found = attend(segments, (q, k, v), grad, "cuda", dtype)
    _, expected = attend(segments, (q, k, v), grad, "cpu", torch.float32)
    answer = within(BOUNDS[dtype], {name: relative(found[name], expected[name]) for name in expected}, path=path)
    return answer if path == PATHS[dtype] else Answer(ok=False, facts=answer.facts)


def attend(
    segments: tuple[Segment, ...], inputs: tuple[Tensor, ...], grad: Tensor, device: str, dtype: torch.dtype
) -> tuple[str, dict[str, Tensor]]:
    """Which path was taken, and the output with the gradients of the inputs."""
    plan = AttentionPlan(segments, torch.device(device))
    q, k, v = (tensor.to(device, dtype).requires_grad_() for tensor in inputs)
    out, _ = segment_attention(torch.nn.Module(), q, k, v, None, attention_plan=plan)
    gradients = torch.autograd.grad(out, (q, k, v), grad.to(device, dtype))
    path = "flash" if "flash" in vars(plan) else "padded"
    return path, {"out": out.detach(), **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}
