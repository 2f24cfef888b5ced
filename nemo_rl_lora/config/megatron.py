"""`policy.megatron_cfg`: the Megatron backend. Sizes load with any value; what cannot run is refused at the start."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from nemo_rl_lora.config.base import Section
from nemo_rl_lora.config.lora import PeftCfg


class MegatronOptimizerConfig(Section):
    """Megatron's optimizer."""

    lr: float = Field(default=5e-6, ge=0, allow_inf_nan=False)
    """Peak learning rate."""
    min_lr: float = Field(default=5e-6, ge=0, allow_inf_nan=False)
    """Learning rate at the end of the decay."""
    weight_decay: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    """Decoupled weight decay."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay rate of the first moment."""
    adam_beta2: float = Field(default=0.98, ge=0, lt=1)
    """Decay rate of the second moment."""
    adam_eps: float = Field(default=1e-5, gt=0, allow_inf_nan=False)
    """Added to the root of the second moment."""
    use_distributed_optimizer: Literal["auto"] | bool = True
    """Shard the optimizer state over data-parallel ranks; auto: where that pays and runs."""
    clip_grad: float | None = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Limit of the gradient's global L2 norm; 0 or null for none. The base files take it from policy.max_grad_norm."""


class MegatronSchedulerConfig(Section):
    """Megatron's learning-rate and weight-decay schedule."""

    start_weight_decay: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    """Weight decay at step 0."""
    end_weight_decay: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    """Weight decay at the end."""
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = "constant"
    """How it goes from one to the other."""
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "constant"
    """Shape of the decay."""
    lr_decay_iters: int | None = Field(default=None, ge=1)
    """Steps of the decay."""
    lr_warmup_iters: int = Field(default=50, ge=0)
    """Steps of the warm-up."""
    lr_warmup_init: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Learning rate at step 0 of the warm-up."""


class MegatronConfig(Section):
    """Training on megatron-core."""

    enabled: bool = False
    """Train on this backend, where policy.backend is null."""
    fused_linear_logprobs_chunk_size: int = Field(default=256, ge=1)
    """Tokens whose logits exist at a time, where policy.logprob_chunk_size is null."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    tensor_model_parallel_size: int = Field(default=1, ge=1)
    """Ranks that share each weight matrix."""
    expert_tensor_parallel_size: int = Field(default=1, ge=1)
    """Ranks that share each expert's weight matrix."""
    expert_model_parallel_size: int = Field(default=1, ge=1)
    """Ranks that share the experts."""
    pipeline_model_parallel_size: int = Field(default=1, ge=1)
    """Pipeline stages."""
    context_parallel_size: int = Field(default=1, ge=1)
    """Ranks that share each sequence."""
    num_layers_in_first_pipeline_stage: int | None = Field(default=None, ge=1)
    """Layers of the first stage; null divides evenly."""
    num_layers_in_last_pipeline_stage: int | None = Field(default=None, ge=1)
    """Layers of the last stage; null divides evenly."""
    sequence_parallel: bool = False
    """Shard activations along the sequence between tensor-parallel ranks."""
    freeze_moe_router: bool = False
    """Do not train the router of a mixture of experts."""
    moe_router_dtype: Literal["fp32", "fp64"] | None = None
    """dtype of the router's scores; null is that of the model."""
    moe_router_load_balancing_type: Literal["aux_loss", "seq_aux_loss", "sinkhorn", "none"] = "aux_loss"
    """How the router balances its load."""
    moe_token_dispatcher_type: Literal["alltoall", "allgather"] = "alltoall"
    """How tokens travel to the ranks of their experts."""
    env_vars: dict[str, str] | None = None
    """Environment variables of the training processes, which stand before torch starts."""
    peft: PeftCfg = PeftCfg()
    """The adapter, in NeMo RL's Megatron dialect."""
    optimizer: MegatronOptimizerConfig = MegatronOptimizerConfig()
    """The optimizer."""
    scheduler: MegatronSchedulerConfig = MegatronSchedulerConfig()
    """The schedule."""
