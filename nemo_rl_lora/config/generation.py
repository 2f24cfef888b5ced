"""`policy.generation`: the engine that samples completions, and how it samples."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from nemo_rl_lora.config.base import Section


def chosen_engine(asked: str) -> tuple[str, str]:
    """The engine that samples on this machine, and why."""
    if asked != "auto":
        return asked, "as asked for"
    if has_gpu():
        return "in_process", "vLLM was not run on a GPU yet: policy.generation.backend=vllm asks for it"
    return "in_process", "there is no GPU"


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


_SYNC_OF_REFIT: dict[str, Literal["merged", "adapter"]] = {"native": "adapter", "merged": "merged"}


class VllmConfig(Section):
    """The vLLM engine; nothing here touches the in-process engine."""

    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """dtype of the engine's weights and computation."""
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
    env_vars: dict[str, str] | None = None
    """Environment variables of the engine's process, set before vLLM is imported."""


class ResourcesConfig(Section):
    """Devices that engines have to themselves: GPUs, or on a CPU processes."""

    num_nodes: int | None = Field(default=None, ge=1)
    """Nodes with engines; null is 1 where gpus_per_node is given."""
    gpus_per_node: int | None = Field(default=None, ge=1)
    """Devices of the engines on each of these nodes. An engine takes tensor_parallel_size x pipeline_parallel_size of
    one node, so that both keys together say how many engines there are; null: num_engines says it."""


class ColocatedConfig(Section):
    """Whether the engine shares the trainer's devices."""

    enabled: bool = True
    """true: the engine runs in the trainer's process. false: vLLM runs in a process of its own, which is started again
    if it dies; weights reach it through a file in shared memory."""
    resources: ResourcesConfig = ResourcesConfig()
    """With enabled=false: what the engines have to themselves."""


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

    lora_sync: Literal["auto", "merged", "adapter"] = "auto"
    """What a sync moves: weights with the adapter merged in, or A and B alone. auto: adapter where merging in the
    engine's dtype would lose more than a tenth of the update, as bf16 does at first, and merged elsewhere; `--plan` and
    the log say which, and why. NeMo RL's key is lora_refit_mode."""
    max_concurrent_sequences: int = Field(default=128, ge=1)
    """Completions that are decoded at once; the in-process engine never splits a group, so a larger one runs alone.
    Each holds 2 x layers x key-value heads x head size values of cache per token. No NeMo RL key."""
    cuda_graphs: Literal["auto"] | bool = "auto"
    """Whether the in-process engine replays a step that was captured once, on a GPU. auto: where it can be captured;
    true: stop where it cannot; false: launch every kernel of every token, which gives the same numbers. vLLM's key is
    vllm_cfg.enforce_eager. No NeMo RL key."""
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
    skip_special_tokens: bool = True
    """Leave special tokens out of a completion's text, which stop strings, rewards and the log see. False writes them;
    the token that ended the completion is left out either way. No NeMo RL key."""


class GenerationConfig(EngineConfig):
    """How completions are sampled. The `val_` keys hold for validation, the others for training rollouts."""

    lora_refit_mode: Literal["native", "merged"] | None = None
    """NeMo RL's name of lora_sync, whose adapter it calls native; null: lora_sync decides."""
    backend: Literal["auto", "in_process", "vllm", "replay"] = "auto"
    """auto: in_process, until vllm was run on a GPU; replay serves the rollouts of replay_path. NeMo RL
    has only vllm."""
    replay_path: str | None = None
    """JSONL file of rollouts for backend=replay. No NeMo RL key."""
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Logits are divided by it, in the engine and in the trainer alike."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Must be 1.0: the trainer's logprobs are those of the full distribution. Truncate in validation (val_top_p)."""
    top_k: int | None = Field(default=None, ge=1)
    """Must be null, for the same reason (val_top_k)."""
    vllm_cfg: VllmConfig = VllmConfig()
    """The vLLM engine."""
    vllm_kwargs: dict[str, Any] = {}
    """Further arguments of vLLM's engine."""
    parity: ParityConfig = ParityConfig()
    """Limits on the difference between engine and trainer."""
    colocated: ColocatedConfig = ColocatedConfig()
    """Whether the engine shares the trainer's devices."""
    num_engines: int | None = Field(default=None, ge=1)
    """Engines that sample at the same time, each with all weights; more than one need vLLM and
    colocated.enabled=false. null: as many as colocated.resources or, without it, the GPUs that do not train give; 1 on
    a CPU. No NeMo RL key."""
    max_generation_failures: int = Field(default=2, ge=0)
    """How often in a row an engine in its own process is started again before the run stops. No NeMo RL key."""
    timeout_seconds: float = Field(default=1800, gt=0, allow_inf_nan=False)
    """Longest wait for an engine in its own process: for its start, a sync, or a rollout. No NeMo RL key."""

    @property
    def asked_sync(self) -> Literal["auto", "merged", "adapter"]:
        """lora_sync, under either name."""
        return self.lora_sync if self.lora_refit_mode is None else _SYNC_OF_REFIT[self.lora_refit_mode]

    @model_validator(mode="after")
    def _both_names_say_the_same(self) -> GenerationConfig:
        is_set = "lora_sync" in self.model_fields_set
        if is_set and self.lora_refit_mode is not None and self.lora_sync not in ("auto", self.asked_sync):
            raise ValueError(
                f"policy.generation.lora_refit_mode={self.lora_refit_mode!r}: is NeMo RL's name of "
                f"policy.generation.lora_sync={self.asked_sync}, and policy.generation.lora_sync={self.lora_sync!r}. "
                f"Set one of them."
            )
        return self

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

    @property
    def devices_per_engine(self) -> int:
        """Devices of one node that an engine takes."""
        return self.vllm_cfg.tensor_parallel_size * self.vllm_cfg.pipeline_parallel_size

    @property
    def known_engines(self) -> int | None:
        """How many engines the keys ask for; None where it follows from the devices that are free."""
        per_node, nodes = self.colocated.resources.gpus_per_node, self.colocated.resources.num_nodes or 1
        if per_node is not None:
            return nodes * (per_node // self.devices_per_engine)
        return 1 if self.colocated.enabled and self.num_engines is None else self.num_engines
