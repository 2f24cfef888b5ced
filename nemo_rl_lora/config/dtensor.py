"""`policy.dtensor_cfg`: the DTensor backend. Sizes load with any value; what cannot run is refused at the start."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from nemo_rl_lora.config.base import Section
from nemo_rl_lora.config.lora import LoraCfg


class DTensorConfig(Section):
    """Training on PyTorch DTensor with nemo-automodel's LoRA modules."""

    v2: bool = Field(default=True, alias="_v2")
    """NeMo RL's switch to its second DTensor worker, the only one that has LoRA; there is one worker here."""
    enabled: bool = True
    """Train on this backend, where policy.backend is null."""
    sequence_parallel: bool = False
    """Shard activations along the sequence between tensor-parallel ranks."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """Ranks that share each weight matrix."""
    context_parallel_size: int = Field(default=1, ge=1)
    """Ranks that share each sequence."""
    dp_replicate_size: int = Field(default=1, ge=1)
    """Replicas of the sharded model."""
    env_vars: dict[str, str] | None = None
    """Environment variables of the training processes, which stand before torch starts."""
    load: Literal["all_ranks", "broadcast"] | None = None
    """How several processes load the base: each reads its own part, or the first reads and sends. null: the former,
    unless transformers makes the model's tensors of several of the files'. No NeMo RL key."""
    cpu_offload: bool = False
    """Keep weights and optimizer state in the host's memory, and bring a layer to the GPU while it computes."""
    custom_parallel_plan: str | None = None
    """Dotted path of a tensor-parallel plan (a dict, or a function that gives one); null: the architecture's own."""
    lora_cfg: LoraCfg = LoraCfg()
    """The adapter, in NeMo RL's DTensor dialect."""

    @model_validator(mode="after")
    def _lora_needs_v2(self) -> DTensorConfig:
        if self.lora_cfg.enabled and not self.v2:
            raise ValueError(
                "policy.dtensor_cfg._v2=False: LoRA needs the second DTensor worker, and "
                "policy.dtensor_cfg.lora_cfg.enabled is true. Set policy.dtensor_cfg._v2=true."
            )
        return self
