"""Causal attention of padded segments on a CPU, with a backward pass that reads and writes few scores.

The forward pass is PyTorch's flash kernel, which keeps no scores, only each query's log-sum-exp of them. With it the
backward pass has the probabilities as exp(scale * q k^T - lse), and the gradient of the scores as p * (g v^T - g o),
g o being the sum that a softmax's gradient subtracts (Dao et al., arXiv:2205.14135, appendix B). Both subtractions are
columns of the products: q and g get the number that is subtracted, k and v get ones. So a product gives the difference,
rounded once, where it is small, and what elementwise work is left is exp, the mask and one multiplication.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_SCORES_PER_CHUNK = 16 * 2**20  # 64 MiB of fp32 scores at a time
_QUERIES_PER_RUN = 64  # of a segment: so much of what causal attention masks is computed


def attend_on_cpu(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor, scale: float) -> Tensor:
    """softmax(scale * q k^T) v [S, L, H, d] with grouped heads, whose gradients are not differentiable again.

    q: [S, L, H, d]; k and v: [S, K, KV, d], a head of which serves H / KV heads of q; blocked: [S or 1, L, K], true
    where a query must not look. Query i looks at no key after K - L + i, and where K is L at all keys up to that.
    """
    return _Attend.apply(q, k, v, blocked, scale)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocked: Tensor, scale: float) -> Tensor:
        out, lse = _flash(q, k, v, blocked, scale)
        ctx.save_for_backward(q, k, v, out, lse, blocked)
        ctx.scale = scale
        return out.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, out, lse, blocked = ctx.saved_tensors
        q, k, v, grad = (x.transpose(1, 2) for x in (*inputs, grad))
        size, scale = q.shape[-1], ctx.scale
        grad_sum = torch.linalg.vecdot(grad.to(lse.dtype), out.to(lse.dtype))
        q, grad = _with_columns(q, lse / scale), _with_columns(grad, grad_sum)
        k, v = (torch.cat([x, x.new_ones(*x.shape[:-1], q.shape[-1] - size)], dim=-1) for x in (k, v))
        grad_q = q.new_zeros(*q.shape[:-1], size)
        grad_k, grad_v = (lse.new_zeros(*k.shape[:-1], size) for _ in range(2))  # sums over the runs, in fp32
        for run in _runs(q, k, blocked):
            own_q, own_grad, own_k, own_v = run.queries(q), run.queries(grad), run.keys(k), run.keys(v)
            p = _scaled_product(own_q, own_k.transpose(1, 2), scale).exp_()
            run.mask(p, blocked)
            _add_product(run.keys(grad_v), p.transpose(1, 2), own_grad[..., :size])
            grad_s = torch.bmm(own_grad, own_v.transpose(1, 2)).mul_(p)
            run.put(grad_q, _scaled_product(grad_s, own_k[..., :size], scale))
            _add_product(run.keys(grad_k), grad_s.transpose(1, 2), own_q[..., :size], scale)
        return *(x.to(q.dtype).transpose(1, 2) for x in (grad_q, grad_k, grad_v)), None, None


def _flash(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The output [S, H, L, d], and the log-sum-exp of each query's scores [S, H, L], in fp32 or fp64."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    if k.shape[2] == q.shape[2]:
        return attend(q, k, v, 0.0, True, scale=scale)
    outs, sums = [], []
    for rows, part in _row_parts(blocked):
        mask = torch.zeros(part.shape, dtype=q.dtype).masked_fill_(part, float("-inf"))[:, None]
        out, lse = attend(q[rows], k[rows], v[rows], 0.0, False, attn_mask=mask, scale=scale)
        outs.append(out)
        sums.append(lse)
    return (outs[0], sums[0]) if len(outs) == 1 else (torch.cat(outs), torch.cat(sums))


def _row_parts(blocked: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Segments by as many as have _SCORES_PER_CHUNK places in `blocked` [S or 1, L, K], and these places."""
    if blocked.shape[0] == 1:
        yield slice(None), blocked
        return
    step = max(1, _SCORES_PER_CHUNK // blocked[0].numel())
    for first in range(0, blocked.shape[0], step):
        rows = slice(first, first + step)
        yield rows, blocked[rows]


def _with_columns(x: Tensor, subtracted: Tensor) -> Tensor:
    """x [.., d] and after it columns whose sum is -subtracted [..], which 16 bits hold as two numbers."""
    columns = [-subtracted.to(x.dtype)]
    if x.element_size() == 2:
        columns.append(-(subtracted + columns[0]).to(x.dtype))
    return torch.cat([x, *(column[..., None] for column in columns)], dim=-1)


def _scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    return torch.baddbmm(left.new_empty(()), left, right, beta=0.0, alpha=scale)  # of the first nothing is read


def _add_product(total: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    if total.dtype == left.dtype:
        total.baddbmm_(left, right, alpha=scale)
    else:
        total.add_(torch.bmm(left, right), alpha=scale)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """Queries whose scores are computed at once: some positions of some segments, with the keys that they may see.

    A product's first dimension is that of segments and their KV heads, and the query heads of one are rows of it.
    """

    rows: slice  # of the S segments
    positions: slice  # of the L queries of a segment
    num_above: int  # keys before the segment's own, those of its parent
    num_kv: int

    def queries(self, x: Tensor) -> Tensor:
        """[rows*KV, heads*positions, d] of x [S, H, L, d]."""
        return self._of(x).flatten(2, 3).flatten(0, 1)

    def put(self, x: Tensor, values: Tensor) -> None:
        """The inverse: write `values` into x."""
        own = self._of(x)
        own.copy_(values.view(own.shape))

    def keys(self, x: Tensor) -> Tensor:
        """[rows*KV, keys, d] of x [S, KV, K, d]."""
        return x[self.rows].flatten(0, 1)[:, : self.num_above + self.positions.stop]

    def mask(self, p: Tensor, blocked: Tensor) -> None:
        """Write zeros where `blocked` [S or 1, L, K] is true: among the parent's keys, and those of the positions."""
        own = blocked if blocked.shape[0] == 1 else blocked[self.rows]
        begin, end = self.positions.start, self.positions.stop
        shaped = p.view(self.rows.stop - self.rows.start, -1, end - begin, p.shape[-1])
        for keys in (slice(self.num_above), slice(self.num_above + begin, self.num_above + end)):
            shaped[..., keys].masked_fill_(own[:, None, self.positions, keys], 0.0)

    def _of(self, x: Tensor) -> Tensor:
        """[rows, KV, heads, positions, d]"""
        return x[self.rows, :, self.positions].unflatten(1, (self.num_kv, -1))


def _runs(q: Tensor, k: Tensor, blocked: Tensor) -> Iterator[_Run]:
    """All of the queries, in runs of up to _QUERIES_PER_RUN positions and _SCORES_PER_CHUNK scores."""
    length, num_keys = blocked.shape[-2:]
    for begin in range(0, length, _QUERIES_PER_RUN):
        positions = slice(begin, min(begin + _QUERIES_PER_RUN, length))
        num_scores = q.shape[1] * (positions.stop - begin) * (num_keys - length + positions.stop)
        step = max(1, _SCORES_PER_CHUNK // num_scores)
        for first in range(0, q.shape[0], step):
            rows = slice(first, min(first + step, q.shape[0]))
            yield _Run(rows=rows, positions=positions, num_above=num_keys - length, num_kv=k.shape[1])
