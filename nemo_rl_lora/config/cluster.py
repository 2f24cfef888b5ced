"""How many processes train. One process per device; this module starts none."""

from __future__ import annotations

from pydantic import Field

from nemo_rl_lora.config.base import Section


class ClusterConfig(Section):
    """The machines of a run."""

    gpus_per_node: int = Field(default=1, ge=1)
    """Training processes on each node, one per GPU; 1 is also one process on a CPU."""
    num_nodes: int = Field(default=1, ge=1)
    """Nodes."""
