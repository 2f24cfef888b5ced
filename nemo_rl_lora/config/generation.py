"""`policy.generation`: the engine that samples completions, and how it samples."""

from __future__ import annotations

import importlib.util
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from nemo_rl_lora.config.base import Fixed, Section

_NO_PORTS = "Engines of one run find each other without fixed ports: remove the key."
_NO_NIXL = "Weights are not moved by NIXL: remove the key."
_NO_HTTP_REFIT = "Weights are not moved over HTTP or ZeroMQ: remove the key."
_NO_FP8 = "FP8 rollouts are not part of this product: remove the key."
_NO_SPLIT = "The engine has no devices of its own: remove the key."


def chosen_engine(asked: str) -> tuple[str, str]:
    """The engine that samples on this machine, and why."""
    if asked != "auto":
        return asked, "as asked for"
    import torch

    if not torch.cuda.is_available():
        return "in_process", "there is no GPU"
    if importlib.util.find_spec("vllm") is None:
        return "in_process", "vLLM is not installed: uv run --extra vllm"
    return "vllm", "there is a GPU"


class NixlConfig(Section):
    """NeMo RL: weight transfer by NIXL."""

    update_weights_bucket_memory_ratio: Annotated[float, Fixed(0.05, remedy=_NO_NIXL)] = 0.05
    """NeMo RL: share of memory for a transfer buffer."""
    device: Annotated[str, Fixed("cuda", remedy=_NO_NIXL)] = "cuda"
    """NeMo RL: where the buffer is."""
    backend_name: Annotated[str, Fixed("UCX", remedy=_NO_NIXL)] = "UCX"
    """NeMo RL: NIXL's transport."""
    backend_init_params: Annotated[dict[str, Any] | None, Fixed(None, remedy=_NO_NIXL)] = None
    """NeMo RL: arguments of the transport."""
    release_after_refit: Annotated[bool, Fixed(False, remedy=_NO_NIXL)] = False
    """NeMo RL: free the buffer after each transfer."""
    shard_expert_weights: Annotated[bool, Fixed(False, remedy=_NO_NIXL)] = False
    """NeMo RL: move only a rank's own experts."""


class RefitConfig(Section):
    """NeMo RL: how weights reach the engine."""

    nixl: NixlConfig = NixlConfig()
    """NeMo RL: its NIXL transport."""


class VllmConfig(Section):
    """The vLLM engine; nothing here touches the in-process engine."""

    async_engine: bool = False
    """Use vLLM's asynchronous engine."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """dtype of the engine's weights and computation."""
    kv_cache_dtype: Annotated[str, Fixed("auto", remedy=_NO_FP8)] = "auto"
    """dtype of the key-value cache; auto is that of the weights."""
    logprobs_mode: Annotated[
        str, Fixed("processed_logprobs", remedy="The trainer compares logprobs at the sampling temperature.")
    ] = "processed_logprobs"
    """Which logprobs the engine reports."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """Ranks that share each weight matrix of the engine."""
    pipeline_parallel_size: int = Field(default=1, ge=1)
    """Ranks that share the engine's layers."""
    expert_parallel_size: int = Field(default=1, ge=1)
    """Ranks that share the engine's experts."""
    gpu_memory_utilization: float = Field(default=0.6, gt=0, le=1)
    """Share of a GPU's memory that the engine takes."""
    max_model_len: int | None = Field(default=None, ge=2)
    """Longest sequence of the engine; null is the model's own limit."""
    enforce_eager: bool = False
    """Do without CUDA graphs and compilation."""
    use_tqdm: Annotated[bool, Fixed(True, False, remedy="Set it to true or false.")] = True
    """NeMo RL: the engine's progress bar; progress is shown by the driver here, at either value."""
    use_deep_gemm: Annotated[bool, Fixed(False, remedy=_NO_FP8)] = False
    """NeMo RL: FP8 matrix products."""
    num_last_layers_in_bf16: Annotated[int, Fixed(0, remedy=_NO_FP8)] = 0
    """NeMo RL: layers that FP8 leaves alone, at the end."""
    num_first_layers_in_bf16: Annotated[int, Fixed(0, remedy=_NO_FP8)] = 0
    """NeMo RL: layers that FP8 leaves alone, at the start."""
    enable_vllm_metrics_logger: Annotated[bool, Fixed(True, False, remedy="Set it to true or false.")] = True
    """NeMo RL: log the engine's counters; here the run's metrics say what the engine did, at either value."""
    vllm_metrics_logger_interval: Annotated[float, Fixed(0.5, remedy="The run's metrics are logged each step.")] = 0.5
    """NeMo RL: seconds between two readings of the engine's counters."""
    http_refit_api_key_env_var: Annotated[str | None, Fixed(None, remedy=_NO_HTTP_REFIT)] = None
    """NeMo RL: environment variable with the key of its HTTP transfer."""
    reset_encoder_cache_after_weight_update: Annotated[
        bool, Fixed(False, remedy="There are no multimodal encoders here: remove the key.")
    ] = False
    """NeMo RL: drop cached encoder outputs after a sync."""
    http_refit_server_port: Annotated[int | None, Fixed(None, remedy=_NO_HTTP_REFIT)] = None
    """NeMo RL: port of its HTTP transfer."""
    zmq_refit_server_port: Annotated[int | None, Fixed(None, remedy=_NO_HTTP_REFIT)] = None
    """NeMo RL: port of its ZeroMQ transfer."""


class ColocatedResources(Section):
    """NeMo RL: devices of an engine of its own."""

    gpus_per_node: Annotated[int | None, Fixed(None, remedy=_NO_SPLIT)] = None
    """NeMo RL: GPUs of each node that the engine has for itself."""
    num_nodes: Annotated[int | None, Fixed(None, remedy=_NO_SPLIT)] = None
    """NeMo RL: nodes that the engine has for itself."""


class ColocatedConfig(Section):
    """Whether the engine shares the trainer's devices."""

    enabled: bool = True
    """true: the engine runs in the trainer's process. false: vLLM runs in a process of its own, which is started again
    if it dies; weights reach it through a file in shared memory."""
    resources: ColocatedResources = ColocatedResources()
    """NeMo RL: the devices of an engine that does not share."""


class ParityConfig(Section):
    """How far the engine's probabilities of what it sampled may be from the trainer's before the run stops. Measured in
    the training pass, so at no cost; the optimizer has then moved once. No NeMo RL keys."""

    max_gen_kl_error: float | None = Field(default=None, gt=0)
    """Stop where a step's gen_kl_error is above it; null: do not look."""
    max_token_mult_prob_error: float | None = Field(default=None, gt=1)
    """Stop where a step's token_mult_prob_error, the mean of exp(|difference of logprobs|), is above it; null: do not
    look."""


class EngineConfig(Section):
    """An engine, and how it samples where nothing is trained on its completions: in validation and evaluation."""

    lora_sync: Literal["merged", "adapter"] = "merged"
    """What a sync moves: weights with the adapter merged in, or A and B alone. No NeMo RL key."""
    max_concurrent_sequences: int = Field(default=128, ge=1)
    """Completions that are decoded at once; the in-process engine never splits a group, so a larger one runs alone.
    Each holds 2 x layers x key-value heads x head size values of cache per token. No NeMo RL key."""
    max_new_tokens: int = Field(default=512, ge=1)
    """Longest completion."""
    val_temperature: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Temperature in validation and evaluation; 0 takes the likeliest token."""
    val_top_p: float = Field(default=1.0, gt=0, le=1)
    """Likewise, draw from the likeliest tokens that together hold this probability."""
    val_top_k: int | None = Field(default=None, ge=1)
    """Likewise, draw from this many likeliest tokens; null for all."""
    stop_token_ids: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Tokens that end a completion, besides the tokenizer's and the model's end of sequence."""
    stop_strings: tuple[Annotated[str, Field(min_length=1)], ...] | None = None
    """Texts that end a completion. The reward sees the text before them; the tokens are trained as sampled."""


class GenerationConfig(EngineConfig):
    """How completions are sampled. The `val_` keys hold for validation, the others for training rollouts."""

    backend: Literal["auto", "in_process", "vllm", "replay"] = "auto"
    """auto: vllm on CUDA where it is installed, else in_process; replay serves the rollouts of replay_path. NeMo RL
    has only vllm."""
    replay_path: str | None = None
    """JSONL file of rollouts for backend=replay. No NeMo RL key."""
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Logits are divided by it, in the engine and in the trainer alike."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Must be 1.0: the trainer's logprobs are those of the full distribution. Truncate in validation (val_top_p)."""
    top_k: int | None = Field(default=None, ge=1)
    """Must be null, for the same reason (val_top_k)."""
    port_range_low: Annotated[int, Fixed(3000, remedy=_NO_PORTS)] = 3000
    """NeMo RL: first port of its engines."""
    port_range_high: Annotated[int, Fixed(4999, remedy=_NO_PORTS)] = 4999
    """NeMo RL: last port of its engines."""
    refit_transport: Annotated[
        str | None, Fixed(None, remedy="The way of the weights follows from the engine: remove the key.")
    ] = None
    """NeMo RL: how weights reach the engine."""
    real_quant_export_cpu_offload: Annotated[
        bool, Fixed(True, remedy="There are no quantized rollouts here: remove the key.")
    ] = True
    """NeMo RL: quantize weights for the engine on the CPU."""
    refit_cfg: RefitConfig = RefitConfig()
    """NeMo RL: details of its weight transfer."""
    vllm_cfg: VllmConfig = VllmConfig()
    """The vLLM engine."""
    vllm_kwargs: dict[str, Any] = {}
    """Further arguments of vLLM's engine."""
    parity: ParityConfig = ParityConfig()
    """Limits on the difference between engine and trainer."""
    colocated: ColocatedConfig = ColocatedConfig()
    """Whether the engine shares the trainer's devices."""
    max_generation_failures: int = Field(default=2, ge=0)
    """How often in a row an engine in its own process is started again before the run stops. No NeMo RL key."""
    timeout_seconds: float = Field(default=1800, gt=0, allow_inf_nan=False)
    """Longest wait for an engine in its own process: for its start, a sync, or a rollout. No NeMo RL key."""

    @model_validator(mode="after")
    def _training_draws_from_the_full_distribution(self) -> GenerationConfig:
        truncated = [("top_p", self.top_p, "1.0")] if self.top_p < 1 else []
        truncated += [("top_k", self.top_k, "null")] if self.top_k is not None else []
        for key, value, full in truncated:
            raise ValueError(
                f"policy.generation.{key}={value!r}: training rollouts must come from the full distribution, "
                f"whose logprobs the trainer computes. Set policy.generation.{key}={full}; to truncate in "
                f"validation, set policy.generation.val_{key}={value!r}."
            )
        return self

    @model_validator(mode="after")
    def _replay_has_its_file(self) -> GenerationConfig:
        if (self.backend == "replay") != (self.replay_path is not None):
            raise ValueError(
                f"policy.generation.replay_path={self.replay_path!r}: backend='replay' needs the file and no other "
                f"backend reads it, and policy.generation.backend={self.backend!r}. Set both or neither."
            )
        return self
