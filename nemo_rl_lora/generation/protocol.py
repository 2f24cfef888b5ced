"""The verbs of a generation engine: it samples completions from the weights it was last given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NewType, Protocol

from nemo_rl_lora.types import CompletionGroup, GroupRequest, SyncReceipt, WeightsRef

Ticket = NewType("Ticket", int)


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
