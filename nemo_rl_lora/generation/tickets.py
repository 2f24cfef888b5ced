"""What an engine that queues requests has beside its way of sampling: tickets, where a completion ends, its text.

Contract: `Ticketed` is the submitting and collecting half of the Generation protocol. An engine fills `_done` from
`_waiting` in `_run`, and says in `_version` which weights it serves. One thread submits and collects; weights may come
from another one meanwhile, where the engine takes them between two steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from nemo_rl_lora.generation.protocol import Ticket, check_request
from nemo_rl_lora.types import Completion, CompletionGroup, GroupRequest, SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FinishReason = Literal["stop", "length"]
NONFINITE_LOGITS = (
    "generation: the model's logits hold NaN or infinity, so no token can be drawn. "
    "Lower policy.optimizer.kwargs.lr or policy.max_grad_norm, or train in float32."
)
"""What a FloatingPointError of an engine says."""


def one_more(versions: list[tuple[int, int]], version: int) -> None:
    """Count a token of this version into a run-length list."""
    if versions and versions[-1][1] == version:
        versions[-1] = (versions[-1][0] + 1, version)
    else:
        versions.append((1, version))


class Ticketed(ABC):
    """Requests in, groups out. `eos_token_id`: what the model's generation config lists."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        eos_token_id: int | list[int] | None,
        *,
        vocabulary: int,
        max_context: int,
    ) -> None:
        self._tokenizer, self._vocabulary, self._max_context = tokenizer, vocabulary, max_context
        listed = eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
        self._eos_token_ids = frozenset(i for i in (*listed, tokenizer.eos_token_id) if isinstance(i, int))
        self._version: int | None = None  # None: no weights yet
        self._num_tickets = 0
        self._waiting: dict[Ticket, GroupRequest] = {}  # in the order of their submission
        self._done: dict[Ticket, CompletionGroup] = {}

    def submit(self, request: GroupRequest) -> Ticket:
        check_request(request, self._vocabulary, self._max_context)
        self._num_tickets += 1
        ticket = Ticket(self._num_tickets)
        self._waiting[ticket] = request
        return ticket

    def collect(self, tickets: Sequence[Ticket]) -> list[CompletionGroup]:
        """See Generation."""
        unknown = [ticket for ticket in tickets if ticket not in self._done and ticket not in self._waiting]
        if unknown or len(set(tickets)) != len(tickets):
            raise ValueError(f"tickets={list(tickets)!r}: each must be submitted and not collected before")
        if any(ticket in self._waiting for ticket in tickets):
            self._run()
        return [self._done.pop(ticket) for ticket in tickets]

    def close(self) -> None:
        self._waiting.clear()
        self._done.clear()

    @abstractmethod
    def _run(self) -> None:
        """Complete everything that waits. First asks `_require_weights`, at a time when no sync is half done."""

    def _require_weights(self) -> None:
        if self._version is None:
            raise RuntimeError("generation: no weights yet. Call sync_weights before collect.")

    def _stop_token_ids(self, sampling: SamplingParams) -> frozenset[int]:
        return self._eos_token_ids | set(sampling.stop_token_ids)

    def _completion(
        self,
        sampling: SamplingParams,
        token_ids: Sequence[int],
        logprobs: Sequence[float],
        finish_reason: FinishReason,
        versions: Sequence[tuple[int, int]] | None = None,
    ) -> Completion:
        """`versions` as in Completion; None: all of it from the version that is served now."""
        assert self._version is not None, "_run requires weights"
        return Completion(
            token_ids=tuple(token_ids),
            logprobs=tuple(logprobs),
            versions=((len(token_ids), self._version),) if versions is None else tuple(versions),
            text=self._text(sampling, token_ids),
            finish_reason=finish_reason,
        )

    def _text(self, sampling: SamplingParams, token_ids: Sequence[int]) -> str:
        """Without a stop token, or cut before the first stop string."""
        if token_ids[-1] in self._stop_token_ids(sampling):
            return self._decode(sampling, token_ids[:-1])
        text = self._decode(sampling, token_ids)
        found = [position for stop in sampling.stop_strings if (position := text.find(stop)) >= 0]
        return text[: min(found, default=None)]

    def _decode(self, sampling: SamplingParams, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=sampling.skip_special_tokens))
