"""The verbs of a generation engine: it samples completions from the weights it was last given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NewType, Protocol

from nemo_rl_lora.types import CompletionGroup, GroupRequest, SyncReceipt, WeightsRef

Ticket = NewType("Ticket", int)


class GenerationFailed(RuntimeError):  # noqa: N818
    """No engine could be kept running. The policy is as it was before the rollout."""


class Generation(Protocol):
    def submit(self, request: GroupRequest) -> Ticket:
        """Queue a group; errors in the request are raised here."""
        ...

    def collect(self, tickets: Sequence[Ticket]) -> list[CompletionGroup]:
        """The groups of these tickets, in their order. Blocks until all are done."""
        ...

    def sync_weights(self, ref: WeightsRef) -> SyncReceipt:
        """Serve these weights from now on. A refused ref leaves the engine on its old version."""
        ...

    def close(self) -> None: ...


def generate(generation: Generation, requests: Sequence[GroupRequest]) -> list[CompletionGroup]:
    """Submit all and collect all."""
    return generation.collect([generation.submit(request) for request in requests])


def check_request(request: GroupRequest, vocabulary: int, max_context: int) -> None:
    """ValueError for a request that no engine could answer: tokens outside the vocabulary, no room, wrong sampling."""
    prompt, sampling = request.prompt, request.sampling
    label = f"prompt {prompt.index}"
    if not prompt.token_ids or not 0 <= min(prompt.token_ids) <= max(prompt.token_ids) < vocabulary:
        raise ValueError(f"{label}: needs token ids from 0 to {vocabulary - 1}, at least one")
    if len(prompt.token_ids) >= max_context:
        raise ValueError(
            f"{label}: {len(prompt.token_ids)} tokens leave no room below the model's "
            f"max_position_embeddings={max_context}. Lower data.max_input_seq_length."
        )
    if request.num_completions < 1 or len(request.seeds) != request.num_completions:
        raise ValueError(f"{label}: {len(request.seeds)} seeds for {request.num_completions} completions")
    if sampling.max_new_tokens < 1 or sampling.temperature < 0 or not 0 < sampling.top_p <= 1:
        raise ValueError(f"{label}: {sampling!r} needs max_new_tokens >= 1, temperature >= 0, 0 < top_p <= 1")
    if sampling.top_k is not None and sampling.top_k < 1:
        raise ValueError(f"{label}: top_k={sampling.top_k} must be at least 1, or None")
    if "" in sampling.stop_strings:
        raise ValueError(f"{label}: an empty stop string would end every completion")
