"""`policy.dtensor_cfg`: the DTensor backend. Sizes load with any value; what cannot run is refused at the start."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from nemo_rl_lora.config.base import Fixed, Section
from nemo_rl_lora.config.lora import LoraCfg


class DTensorConfig(Section):
    """Training on PyTorch DTensor with nemo-automodel's LoRA modules."""

    v2: bool = Field(default=True, alias="_v2")
    """NeMo RL's switch to its second DTensor worker, the only one that has LoRA; there is one worker here."""
    enabled: bool = True
    """Train on this backend, where policy.backend is null."""
    env_vars: Annotated[
        dict[str, str],
        Fixed(
            {},
            {"PYTORCH_CUDA_ALLOC_CONF": ""},
            remedy="Set environment variables in the shell that starts the driver.",
        ),
    ] = {}
    """NeMo RL: environment of the workers."""
    cpu_offload: Annotated[bool, Fixed(False, remedy="Weights stay on their device: remove the key.")] = False
    """NeMo RL: keep weights in host memory between passes."""
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
    custom_parallel_plan: Annotated[
        str | None, Fixed(None, remedy="The plan follows from the architecture: remove the key.")
    ] = None
    """NeMo RL: dotted path of a tensor-parallel plan."""
    automodel_kwargs: Annotated[
        dict[str, Any],
        Fixed({}, {"force_hf": True}, remedy="Models are always built from transformers' own class (force_hf)."),
    ] = {}
    """NeMo RL: arguments of its model factory."""
    clear_cache_every_n_steps: Annotated[
        int | None, Fixed(None, remedy="The allocator's cache is not cleared during a run: remove the key.")
    ] = None
    """NeMo RL: steps between clearings of the CUDA cache."""
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
