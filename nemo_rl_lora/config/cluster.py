"""How many processes train. One process per device; this module starts none."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from nemo_rl_lora.config.base import Fixed, Section


class ClusterConfig(Section):
    """The machines of a run."""

    gpus_per_node: int = Field(default=1, ge=1)
    """Training processes on each node, one per GPU; 1 is also one process on a CPU."""
    num_nodes: int = Field(default=1, ge=1)
    """Nodes."""
    segment_size: Annotated[int | None, Fixed(None, remedy="Nodes are not grouped into segments: remove the key.")] = (
        None
    )
    """NeMo RL: nodes of a network segment."""
    master_port_range_low: Annotated[
        int, Fixed(1400, remedy="The operating system picks a free port: remove the key.")
    ] = 1400
    """NeMo RL: lowest port of the rendezvous."""
    master_port_range_high: Annotated[
        int, Fixed(1999, remedy="The operating system picks a free port: remove the key.")
    ] = 1999
    """NeMo RL: highest port of the rendezvous."""
