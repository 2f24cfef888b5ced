"""Several tokens of every row without a word from the host: one step over buffers of fixed addresses, repeated.

Contract: `Bursts.extend` appends a few tokens to every open row of a decoder and draws them, with the numbers of
`CausalDecoder.step` and `sampling.sample` (but for the rounding of products that are padded). One copy goes to the
device before them, and one comes back after them. A step is a function of the buffers alone, whose sizes are rounded up
(`Shape`): a captured one is replayed for every token of its shape. A row whose draw needs the host (logits without a
distribution, a top-p that reaches far) stays where it is, and gives fewer tokens.
Not here: when a completion ends. Whoever reads the tokens drops those after its end.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from nemo_rl_lora.generation.in_process.decoder import CausalDecoder, StepPlan, attention_mask
from nemo_rl_lora.generation.in_process.sampling import Draw, draw
from nemo_rl_lora.types import SamplingParams

logger = logging.getLogger(__name__)

BURST_TOKENS = 8  # of a row, before the host looks whether one ended
LEAST_LENGTH = 64  # of prompts and of completions, rounded up
MAX_CAPTURED = 64  # each holds the arguments of a thousand kernels or more

Step = Callable[[], None]
Capture = Callable[[Step], Step]
"""Calls a function, and returns one that does the same to the same tensors without Python's part in it."""
Numbers = TypeVar("Numbers", Tensor, np.ndarray)


class CudaGraphs:
    """A capture by CUDA graphs. They share their memory, since one runs at a time and hands nothing on in it."""

    def __init__(self) -> None:
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def __call__(self, step: Step) -> Step:
        outer = torch.cuda.current_stream()
        self._stream.wait_stream(outer)
        with torch.cuda.stream(self._stream):
            step()  # what only a first call makes, such as cuBLAS's workspace, is no part of a graph
        outer.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Another thread may train meanwhile, and what it does is its own matter.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            step()
        return graph.replay


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a captured step has for good: sizes, rounded up, and the draws that are made in it."""

    num_rows: int
    num_prompts: int
    width: int
    is_rectangle: bool  # rows stand as in the decoder's rectangle
    prompt_length: int
    completion_length: int
    kinds: tuple[Draw, ...]

    @property
    def inbox(self) -> dict[str, int]:
        """The fields that the host fills, and how many numbers of 8 bytes each has."""
        of_rows = ("token_ids", "written", "prompt_lengths", "row_places", "kinds", "is_open")
        return {
            **dict.fromkeys(of_rows, self.num_rows),
            "rectangle_rows": self.num_prompts * self.width,
            "uniforms": BURST_TOKENS * self.num_rows,
            "num_done": 1,
        }

    @property
    def outbox(self) -> tuple[int, int, int]:
        """For each token of each row: its id, or -1 where there is none, and the 8 bytes of its logprob."""
        return BURST_TOKENS, 2, self.num_rows


def rounded(number: int, least: int = 1) -> int:
    """Up to a power of two, so that few shapes serve all rollouts."""
    return max(least, 1 << (number - 1).bit_length())


def rounded_rows(number: int) -> int:
    """Up to a power of two or, from 24 on, one and a half: padded rows cost as much as open ones."""
    power = rounded(number)
    return power * 3 // 4 if power >= 32 and number <= power * 3 // 4 else power


class Bursts:
    """Of one decoder. `graphs` makes what captures a step; None: the step is called for every token."""

    def __init__(self, decoder: CausalDecoder, graphs: Callable[[], Capture] | None, *, may_fail: bool = False) -> None:
        self._decoder, self._graphs, self._may_fail = decoder, graphs, may_fail
        self._capture: Capture | None = None
        self._steps: dict[Shape, Step] = {}  # the last one used is the last
        self._used: list[weakref.ref[Tensor]] = []  # what they read and write
        device = decoder.embedding.device
        self._inbox = self._outbox = torch.empty(0, dtype=torch.int64, device=device)
        self._staging = torch.empty(0, dtype=torch.int64)

    def extend(
        self, token_ids: Sequence[int], sampling: Sequence[SamplingParams], u: Tensor
    ) -> list[list[tuple[int, float]]]:
        """New tokens of every row, and their logprobs: one for each of `u` [tokens, N], or fewer.

        `token_ids` [N] are the rows' last, which the decoder has not seen yet.
        """
        kinds = tuple(dict.fromkeys(map(Draw.of, sampling)))
        shape = self._shape(len(u), kinds)
        self._reserve(shape)
        self._tell(shape, token_ids, sampling, u)
        if shape not in self._steps:
            self._steps[shape] = self._new_step(shape)
            self._tell(shape, token_ids, sampling, u)  # a capture has moved them on
        step = self._steps[shape] = self._steps.pop(shape)
        for _ in range(len(u)):
            step()
        drawn = self._outbox[: np.prod(shape.outbox)].cpu().view(shape.outbox)[: len(u), :, : len(token_ids)]
        tokens, logprobs = drawn[:, 0], drawn[:, 1].view(torch.float64)
        found = [
            [(token, logprob) for token, logprob in zip(*row, strict=True) if token >= 0]
            for row in zip(tokens.T.tolist(), logprobs.T.tolist(), strict=True)
        ]
        lengths = zip(self._decoder.row_length, found, strict=True)
        self._decoder.row_length = [length + len(new) for length, new in lengths]
        return found

    def forget(self) -> None:
        """Let go of steps that read or write what is no longer there, and of their memory."""
        now = [*self._decoder.tensors_of_a_step(), self._inbox, self._outbox]
        is_there = len(now) == len(self._used) and all(ref() is one for ref, one in zip(self._used, now, strict=True))
        if not is_there:
            self._steps.clear()
            self._capture, self._used = None, [weakref.ref(one) for one in now]

    def _shape(self, num_tokens: int, kinds: tuple[Draw, ...]) -> Shape:
        prompt_lengths, written = self._decoder.lengths_of_rows()
        num_rows, num_prompts = rounded_rows(len(written)), rounded(len(self._decoder.prompt_lengths))
        width, rectangle, _ = self._decoder.rectangle_of_rows()
        width = rounded(width)
        is_full = len(written) == num_rows == num_prompts * width
        return Shape(
            num_rows=num_rows,
            num_prompts=num_prompts,
            width=width,
            is_rectangle=is_full and rectangle == list(range(num_rows)),
            prompt_length=rounded(max(prompt_lengths), LEAST_LENGTH),
            completion_length=rounded(max(written) + num_tokens, LEAST_LENGTH),
            kinds=kinds,
        )

    def _reserve(self, shape: Shape) -> None:
        self._decoder.reserve(
            num_rows=shape.num_rows,
            num_prompts=shape.num_prompts,
            prompt_length=shape.prompt_length,
            completion_length=shape.completion_length,
        )
        size = sum(shape.inbox.values())
        if size > len(self._inbox):
            device = self._inbox.device
            self._inbox = torch.zeros(2 * size, dtype=torch.int64, device=device)
            self._outbox = torch.zeros(2 * size, dtype=torch.int64, device=device)  # which needs less
            self._staging = torch.zeros(2 * size, dtype=torch.int64, pin_memory=device.type == "cuda")
        self.forget()

    def _new_step(self, shape: Shape) -> Step:
        step = partial(self._step, shape, _fields(shape, self._inbox), _outbox(shape, self._outbox))
        if len(self._steps) >= MAX_CAPTURED:
            del self._steps[next(iter(self._steps))]
        if self._graphs is None:
            return step
        try:
            self._capture = self._capture or self._graphs()
            return self._capture(step)
        except RuntimeError as error:
            if not self._may_fail:
                raise
            logger.warning("generation: without CUDA graphs, since a step could not be captured: %s", error)
            self._graphs = None
            return step

    def _tell(self, shape: Shape, token_ids: Sequence[int], sampling: Sequence[SamplingParams], u: Tensor) -> None:
        """Fill the inbox. Rows that pad the others are closed, and read the first prompt's first token."""
        N, decoder = len(token_ids), self._decoder
        prompt_lengths, written = decoder.lengths_of_rows()
        _, rectangle_rows, row_places = decoder.rectangle_of_rows(shape.width)
        numbers = self._staging.numpy()[: sum(shape.inbox.values())]
        numbers[:] = 0
        to = _fields(shape, numbers)
        to["token_ids"][:N], to["written"][:N], to["row_places"][:N] = token_ids, written, row_places
        to["prompt_lengths"][:] = 1
        to["prompt_lengths"][:N] = prompt_lengths
        to["kinds"][:N] = [shape.kinds.index(Draw.of(params)) for params in sampling]
        to["is_open"][:N] = 1
        to["rectangle_rows"][: len(rectangle_rows)] = rectangle_rows
        to["uniforms"].view(np.float64).reshape(BURST_TOKENS, -1)[: len(u), :N] = u.numpy()
        self._inbox[: len(numbers)].copy_(self._staging[: len(numbers)], non_blocking=True)

    def _step(self, shape: Shape, fields: dict[str, Tensor], outbox: Tensor) -> None:
        """A token of every row. Nothing but `fields` and `outbox` goes from one to the next."""
        written, prompt_lengths, num_done = fields["written"], fields["prompt_lengths"], fields["num_done"]
        plan = StepPlan(
            num_rows=shape.num_rows,
            num_prompts=shape.num_prompts,
            prompt_length=shape.prompt_length,
            completion_length=shape.completion_length,
            slots=torch.arange(shape.num_rows, device=written.device),
            written=written,
            positions=prompt_lengths + written,
            mask=attention_mask(prompt_lengths, written, shape.prompt_length, shape.completion_length),
            width=shape.width,
            rectangle_rows=None if shape.is_rectangle else fields["rectangle_rows"],
            row_places=None if shape.is_rectangle else fields["row_places"],
        )
        logits = self._decoder.compute(plan, fields["token_ids"])
        u = fields["uniforms"].view(torch.float64).view(BURST_TOKENS, -1).index_select(0, num_done)[0]
        token_ids, logprobs, is_drawn = draw(logits, shape.kinds, fields["kinds"], u)
        is_drawn = fields["is_open"].logical_and_(is_drawn).bool()
        new = torch.stack((token_ids.where(is_drawn, -1), logprobs.view(torch.int64)))
        outbox.index_copy_(0, num_done, new[None])
        torch.where(is_drawn, token_ids, fields["token_ids"], out=fields["token_ids"])
        written += is_drawn
        num_done += 1


def _fields(shape: Shape, numbers: Numbers) -> dict[str, Numbers]:
    """The parts of an inbox."""
    ends = accumulate(shape.inbox.values())
    return {name: numbers[end - shape.inbox[name] : end] for name, end in zip(shape.inbox, ends, strict=True)}


def _outbox(shape: Shape, numbers: Tensor) -> Tensor:
    return numbers[: np.prod(shape.outbox)].view(shape.outbox)
