"""`policy.megatron_cfg`: the Megatron backend. Any sane value loads; what cannot run is refused at the start."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from nemo_rl_lora.config.base import Fixed, Section
from nemo_rl_lora.config.lora import PeftCfg

_NO_FP8 = "FP8 training is not part of this product: remove the key."
_NO_MTP = "Multi-token prediction is not part of this product: remove the key."
_NO_GRAPH = "CUDA graphs are not part of this product: remove the key."
_NO_OFFLOAD = "Activations and optimizer state stay on their device: remove the key."


class MegatronCheckpointConfig(Section):
    """How Megatron writes its sharded checkpoints."""

    async_save: bool = False
    """Write in the background."""
    ckpt_assume_constant_structure: bool = False
    """Reuse the save plan of the first checkpoint."""


class MegatronOptimizerConfig(Section):
    """Megatron's optimizer."""

    optimizer: Annotated[str, Fixed("adam", remedy="Megatron trains with Adam here.")] = "adam"
    """Name of the optimizer."""
    lr: float = Field(default=5e-6, ge=0, allow_inf_nan=False)
    """Peak learning rate."""
    min_lr: float = Field(default=5e-6, ge=0, allow_inf_nan=False)
    """Learning rate at the end of the decay."""
    weight_decay: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    """Decoupled weight decay."""
    bf16: bool = True
    """Train in bfloat16."""
    fp16: Annotated[bool, Fixed(False, remedy="Use bfloat16 or float32 (policy.precision).")] = False
    """Train in float16."""
    params_dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of the master parameters."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay rate of the first moment."""
    adam_beta2: float = Field(default=0.98, ge=0, lt=1)
    """Decay rate of the second moment."""
    adam_eps: float = Field(default=1e-5, gt=0, allow_inf_nan=False)
    """Added to the root of the second moment."""
    sgd_momentum: Annotated[float, Fixed(0.9, remedy="Megatron trains with Adam here: remove the key.")] = 0.9
    """NeMo RL: momentum, where the optimizer is sgd."""
    use_distributed_optimizer: Literal["auto"] | bool = True
    """Shard the optimizer state over data-parallel ranks; auto: where that pays and runs."""
    use_precision_aware_optimizer: bool = True
    """Keep moments in the precision that the optimizer chooses."""
    clip_grad: float | None = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Limit of the gradient's global L2 norm; 0 or null for none. The base files take it from policy.max_grad_norm."""
    optimizer_cpu_offload: Annotated[bool, Fixed(False, remedy=_NO_OFFLOAD)] = False
    """NeMo RL: keep optimizer state in host memory."""
    optimizer_offload_fraction: Annotated[float, Fixed(0.0, remedy=_NO_OFFLOAD)] = 0.0
    """NeMo RL: share of the state kept in host memory."""
    overlap_cpu_optimizer_d2h_h2d: Annotated[bool, Fixed(False, remedy=_NO_OFFLOAD)] = False
    """NeMo RL: overlap the copies of that state."""


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


class MegatronDdpConfig(Section):
    """Megatron's data-parallel wrapper."""

    grad_reduce_in_fp32: bool = False
    """Reduce gradients in fp32."""
    overlap_grad_reduce: bool = True
    """Overlap the reduction with the backward pass."""
    overlap_param_gather: bool = True
    """Overlap the gathering of parameters with the forward pass."""
    data_parallel_sharding_strategy: Literal["no_shard", "optim", "optim_grads", "optim_grads_params"] = (
        "optim_grads_params"
    )
    """What is sharded over data-parallel ranks."""
    use_custom_fsdp: Annotated[bool, Fixed(False, remedy="Use the DTensor backend for FSDP.")] = False
    """NeMo RL: Megatron's own FSDP."""


class Fp8Config(Section):
    """NeMo RL's FP8 training."""

    enabled: Annotated[bool, Fixed(False, remedy=_NO_FP8)] = False
    """Train in FP8."""
    fp8: Annotated[str, Fixed("e4m3", remedy=_NO_FP8)] = "e4m3"
    """Format."""
    fp8_recipe: Annotated[str, Fixed("blockwise", remedy=_NO_FP8)] = "blockwise"
    """Scaling recipe."""
    fp8_param: Annotated[bool, Fixed(False, remedy=_NO_FP8)] = False
    """Keep parameters in FP8."""


class MegatronConfig(Section):
    """Training on megatron-core."""

    enabled: bool = False
    """Train on this backend, where policy.backend is null."""
    checkpoint: MegatronCheckpointConfig = MegatronCheckpointConfig()
    """How checkpoints are written."""
    use_fused_linear_logprobs: bool = False
    """Compute the LM head and the logprobs in one chunked operation."""
    fused_linear_logprobs_chunk_size: int = Field(default=256, ge=1)
    """Tokens of a chunk of that operation."""
    force_reconvert_from_hf: bool = False
    """Convert the Hugging Face weights anew, though a conversion is cached."""
    env_vars: Annotated[
        dict[str, str] | None,
        Fixed({}, None, remedy="Set environment variables in the shell that starts the driver."),
    ] = None
    """NeMo RL: environment of the workers."""
    empty_unused_memory_level: Literal[0, 1, 2] = 1
    """How often the CUDA cache is emptied: never, after, or around a step."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    cuda_graph_impl: Annotated[str, Fixed("none", remedy=_NO_GRAPH)] = "none"
    """NeMo RL: CUDA graph implementation."""
    cuda_graph_modules: Annotated[list[str], Fixed([], remedy=_NO_GRAPH)] = []
    """NeMo RL: what is captured."""
    cuda_graph_warmup_steps: Annotated[int, Fixed(3, remedy=_NO_GRAPH)] = 3
    """NeMo RL: steps before the capture."""
    fine_grained_activation_offloading: Annotated[bool, Fixed(False, remedy=_NO_OFFLOAD)] = False
    """NeMo RL: move activations to host memory."""
    offload_modules: Annotated[list[str] | None, Fixed(None, remedy=_NO_OFFLOAD)] = None
    """NeMo RL: whose activations."""
    recompute_granularity: Literal["full", "selective"] = "full"
    """What activation checkpointing recomputes."""
    recompute_modules: list[str] | None = None
    """Modules that selective recomputation covers."""
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
    pipeline_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """dtype of what stages send to each other."""
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
    moe_router_bias_update_rate: float = Field(default=1e-3, ge=0, allow_inf_nan=False)
    """Rate at which the router's expert bias moves."""
    moe_permute_fusion: bool = True
    """Fuse the permutation of tokens to experts."""
    apply_rope_fusion: bool = True
    """Fuse the rotary embedding."""
    bias_activation_fusion: bool = True
    """Fuse bias and activation."""
    defer_fp32_logits: bool = False
    """Cast logits to fp32 only where the loss reads them."""
    moe_per_layer_logging: bool = False
    """Log the router's load per layer."""
    moe_enable_deepep: Annotated[bool, Fixed(False, remedy="Use policy.megatron_cfg.moe_token_dispatcher_type.")] = (
        False
    )
    """NeMo RL: DeepEP's token dispatcher."""
    moe_token_dispatcher_type: Literal["alltoall", "allgather"] = "alltoall"
    """How tokens travel to the ranks of their experts."""
    moe_shared_expert_overlap: bool = False
    """Overlap shared experts with the dispatch."""
    use_gloo_process_groups: bool = False
    """Make gloo groups beside those of NCCL."""
    gradient_accumulation_fusion: bool = False
    """Accumulate weight gradients inside the matrix product."""
    use_fused_weighted_squared_relu: bool = False
    """Fuse the weighted squared ReLU."""
    model_overrides: dict[str, Any] = {}
    """Fields of the Megatron model configuration to replace."""
    mtp_num_layers: Annotated[int, Fixed(0, remedy=_NO_MTP)] = 0
    """NeMo RL: layers of multi-token prediction."""
    mtp_loss_scaling_factor: Annotated[float, Fixed(0.0, remedy=_NO_MTP)] = 0.0
    """NeMo RL: weight of its loss."""
    mtp_use_repeated_layer: Annotated[bool, Fixed(False, remedy=_NO_MTP)] = False
    """NeMo RL: repeat its layer."""
    mtp_detach_heads: Annotated[bool, Fixed(False, remedy=_NO_MTP)] = False
    """NeMo RL: detach its heads."""
    peft: PeftCfg = PeftCfg()
    """The adapter, in NeMo RL's Megatron dialect."""
    optimizer: MegatronOptimizerConfig = MegatronOptimizerConfig()
    """The optimizer."""
    scheduler: MegatronSchedulerConfig = MegatronSchedulerConfig()
    """The schedule."""
    distributed_data_parallel_config: MegatronDdpConfig = MegatronDdpConfig()
    """The data-parallel wrapper."""
    fp8_cfg: Fp8Config = Fp8Config()
    """FP8 training."""
