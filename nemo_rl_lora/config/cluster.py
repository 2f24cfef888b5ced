"""How many processes train, on how many machines, and how long they are waited for. This module starts none."""

from __future__ import annotations

import os

from pydantic import Field, model_validator

from nemo_rl_lora.config.base import Section

RAY_ADDRESS = "RAY_ADDRESS"


class ClusterConfig(Section):
    """The machines of a run."""

    gpus_per_node: int = Field(default=1, ge=1)
    """Training processes on each node, one per GPU; 1 is also one process on a CPU."""
    num_nodes: int = Field(default=1, ge=1)
    """Nodes that train. More than one need a Ray cluster, which RAY_ADDRESS names."""
    max_restarts: int = Field(default=0, ge=0)
    """How often a run that lost a training process, a node or an engine is started again, from its newest complete
    checkpoint or, without one, from its beginning. No NeMo RL key."""
    segment_size: int | None = Field(default=None, ge=1)
    """Nodes are taken in groups of so many whose addresses follow each other among Ray's nodes; null: any nodes. One
    node is a group of its own, whatever this says."""
    start_timeout_seconds: float = Field(default=600.0, gt=0)
    """Limit of each wait until the training processes run and have their weights. No NeMo RL key."""
    step_timeout_seconds: float = Field(default=3600.0, gt=0)
    """Limit of a step, a pass, a checkpoint or a published version in several processes. No NeMo RL key."""

    @model_validator(mode="after")
    def _whole_segments(self) -> ClusterConfig:
        if self.segment_size is not None and self.num_nodes > 1 and self.num_nodes % self.segment_size:
            raise ValueError(
                f"segment_size={self.segment_size}: must divide the number of nodes, and cluster.num_nodes="
                f"{self.num_nodes}. Change one of them, or set cluster.segment_size=null."
            )
        return self

    @property
    def num_processes(self) -> int:
        return self.num_nodes * self.gpus_per_node


def joins_ray() -> bool:
    """Whether the environment names a Ray cluster to join, so that none is started here."""
    return os.environ.get(RAY_ADDRESS, "local") not in ("", "local")
