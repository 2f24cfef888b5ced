"""`policy`: the model, its optimizer, how it is fed, its backend and its adapter.

Cross-field rules of the policy stand here, once. What a machine, a version or an architecture cannot run is not
judged here: see config/support.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from nemo_rl_lora.config.adapter_start import AdapterStartConfig
from nemo_rl_lora.config.base import Section
from nemo_rl_lora.config.dtensor import DTensorConfig
from nemo_rl_lora.config.generation import GenerationConfig
from nemo_rl_lora.config.lora import AUTOMODEL, UnifiedLora, lora_field_key, lora_spec_from_policy
from nemo_rl_lora.config.megatron import MegatronConfig
from nemo_rl_lora.config.optimizer import AnyScheduler, OptimizerConfig, SchedulerConfig, split_sequence

BackendName = Literal["dtensor", "megatron"]


class TokenizerConfig(Section):
    """The tokenizer and its chat template."""

    name: str | None = None
    """Model whose tokenizer is used; null is policy.model_name."""
    chat_template: str | None = "default"
    """"default": the tokenizer's own; null: messages are joined as they are; else Jinja text, a .jinja file or, where
    the tokenizer has several templates, the name of one."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Further variables of the chat template."""


class TokenBudgetConfig(Section):
    """A way to fill microbatches by tokens."""

    enabled: bool = False
    """Fill microbatches by tokens in place of `train_micro_batch_size` and `logprob_batch_size`."""
    train_mb_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    """Tokens of a training microbatch, with padding; null is max_total_sequence_length x train_micro_batch_size; auto:
    as many as fit into the memory of the device, found at the start of a run. auto is no value of NeMo RL's."""
    logprob_mb_tokens: int | None = Field(default=None, ge=1)
    """Tokens of a logprob microbatch, with padding; null is max_total_sequence_length x logprob_batch_size."""
    sequence_length_round: int = Field(default=64, ge=1)
    """Lengths of rows, packed or not, are rounded up to a multiple of this."""


class DynamicBatchingConfig(TokenBudgetConfig):
    """Microbatches of rows of like length, filled by a token budget."""


class SequencePackingConfig(TokenBudgetConfig):
    """Microbatches of several sequences in one row, without padding between them."""


class SharedPrefixConfig(Section):
    """Compute a prompt once for all completions of its group. No NeMo RL key."""

    enabled: Literal["auto"] | bool = "auto"
    """auto: where the model's attention allows it; true: refuse a model that does not; false: a row a completion."""
    max_row_tokens: int = Field(default=16384, ge=1)
    """Tokens of a prompt and the completions that share it, above which the prompt is repeated. It bounds memory."""


class ModelConfig(Section):
    """The model: what training and evaluation have in common."""

    model_name: str = Field(min_length=1)
    """A local directory or a Hugging Face name."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """The tokenizer."""
    max_total_sequence_length: int = Field(default=1024, ge=2)
    """Longest sequence: prompt and completion."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """dtype of the base weights and of computation; adapters are fp32 masters."""
    hf_config_overrides: dict[str, Any] = {}
    """Fields of the model's config.json to replace."""

    @property
    def tokenizer_name(self) -> str:
        """The model whose tokenizer is used."""
        return self.tokenizer.name or self.model_name


class PolicyConfig(ModelConfig):
    """The model that is trained."""

    backend: BackendName | None = None
    """Where to train. null: the one of dtensor_cfg.enabled and megatron_cfg.enabled that is true. No NeMo RL key."""
    lora: UnifiedLora | None = None
    """The adapter, for whichever backend is on; null where a native block has it. No NeMo RL key."""
    adapter: AdapterStartConfig = AdapterStartConfig()
    """Where the adapter starts from. No NeMo RL key."""
    train_global_batch_size: int = Field(default=32, ge=1)
    """Rows of an optimizer step."""
    train_micro_batch_size: int = Field(default=1, ge=1)
    """Rows of a forward and backward pass, where neither dynamic batching nor packing is on."""
    logprob_batch_size: int | None = Field(default=None, ge=1)
    """Rows of a pass without gradient; null is train_micro_batch_size."""
    logprob_chunk_size: int | None = Field(default=None, ge=1)
    """Tokens whose logits exist at a time; null is 1,024 on a GPU and 256 on a CPU, and on Megatron what
    megatron_cfg.fused_linear_logprobs_chunk_size says."""
    make_sequence_length_divisible_by: int = Field(default=1, ge=1)
    """Padded lengths are a multiple of this."""
    max_grad_norm: float | None = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Limit of the gradient's global L2 norm; null for none."""
    deterministic: bool = False
    """On a GPU, take the algorithms that give the same bits each time, where torch has them, so that a continued run is
    the run that was not interrupted; what has none is named in the log. It costs time. On a CPU a run repeats without.
    No NeMo RL key."""
    compile: Literal["auto"] | bool = "auto"
    """true: torch.compile the decoder layers of the DTensor backend, which takes up to a minute at the start; auto:
    false, until it is measured on a GPU. No NeMo RL key."""
    dtensor_cfg: DTensorConfig = DTensorConfig()
    """The DTensor backend."""
    megatron_cfg: MegatronConfig = MegatronConfig()
    """The Megatron backend."""
    dynamic_batching: DynamicBatchingConfig = DynamicBatchingConfig()
    """Token-budget microbatches."""
    sequence_packing: SequencePackingConfig = SequencePackingConfig()
    """Packed rows."""
    shared_prefix: SharedPrefixConfig = SharedPrefixConfig()
    """Prompts computed once."""
    optimizer: OptimizerConfig | None = OptimizerConfig()
    """The optimizer. null, on Megatron: policy.megatron_cfg alone has it, and with scheduler: null the schedule."""
    scheduler: SchedulerConfig | None = None
    """The learning-rate schedule; null is constant."""
    generation: GenerationConfig | None = None
    """The engine that samples completions; GRPO needs it, SFT and DPO have none."""

    @property
    def active_backend(self) -> BackendName:
        """The backend that trains."""
        return self.backend or ("megatron" if self.megatron_cfg.enabled else "dtensor")

    def microbatch_tokens(self, kind: Literal["train", "logprob"], num_rows: int) -> int:
        """The token budget of a microbatch, where dynamic batching or packing is on; `num_rows` longest rows if none
        was given, and one where it is yet to be found."""
        section = self.dynamic_batching if self.dynamic_batching.enabled else self.sequence_packing
        tokens = section.train_mb_tokens if kind == "train" else section.logprob_mb_tokens
        if tokens == "auto":
            return self.max_total_sequence_length
        return num_rows * self.max_total_sequence_length if tokens is None else tokens

    @property
    def searched_key(self) -> str | None:
        """The key of the training budget that is found at the start of a run; None where none is."""
        for name in ("dynamic_batching", "sequence_packing"):
            section: TokenBudgetConfig = getattr(self, name)
            if section.enabled and section.train_mb_tokens == "auto":
                return f"policy.{name}.train_mb_tokens"
        return None

    @property
    def logprob_rows(self) -> int:
        """Rows of a pass without gradient."""
        return self.logprob_batch_size or self.train_micro_batch_size

    @field_validator("scheduler")
    @classmethod
    def _schedulers_fit(cls, scheduler: AnyScheduler | None) -> AnyScheduler | None:
        if isinstance(scheduler, tuple):
            split_sequence(scheduler)
        return scheduler

    @model_validator(mode="after")
    def _one_backend(self) -> PolicyConfig:
        flags = (self.dtensor_cfg.enabled, self.megatron_cfg.enabled)
        if self.backend is None and flags == (True, True):
            raise ValueError(
                "policy.megatron_cfg.enabled=True: one backend trains, and policy.dtensor_cfg.enabled is true as well. "
                "Set policy.backend=dtensor or policy.backend=megatron, or one of the two flags to false."
            )
        if self.backend is None and flags == (False, False):
            raise ValueError(
                "policy.backend=None: one backend has to train, and policy.dtensor_cfg.enabled and "
                "policy.megatron_cfg.enabled are both false. Set policy.backend=dtensor or policy.backend=megatron."
            )
        return self

    @model_validator(mode="after")
    def _an_optimizer(self) -> PolicyConfig:
        if self.optimizer is None and self.active_backend == "dtensor":
            raise ValueError(
                "policy.optimizer=None: the DTensor backend has no other description of its optimizer. Remove the "
                "line, or set policy.backend=megatron."
            )
        return self

    @model_validator(mode="after")
    def _one_adapter(self) -> PolicyConfig:
        lora_spec_from_policy(self)
        return self

    @model_validator(mode="after")
    def _kernels_that_are_not_chosen_by_a_clock(self) -> PolicyConfig:
        spec = lora_spec_from_policy(self)
        if self.deterministic and spec is not None and spec.kernels == AUTOMODEL:
            raise ValueError(
                f"policy.deterministic=True: {lora_field_key(self, 'kernels')}={AUTOMODEL} chooses among settings "
                f"of its kernels by timing them, anew in every process. Set that to true, for kernels with one each."
            )
        return self

    @model_validator(mode="after")
    def _one_way_to_fill_microbatches(self) -> PolicyConfig:
        if self.dynamic_batching.enabled and self.sequence_packing.enabled:
            raise ValueError(
                "policy.sequence_packing.enabled=True: microbatches are either packed or filled by length, and "
                "policy.dynamic_batching.enabled is true as well. Set one of the two to false."
            )
        name = "dynamic_batching" if self.dynamic_batching.enabled else "sequence_packing"
        section: TokenBudgetConfig = getattr(self, name)
        for key in ("train_mb_tokens", "logprob_mb_tokens"):
            tokens = getattr(section, key)
            if section.enabled and isinstance(tokens, int) and tokens < self.max_total_sequence_length:
                raise ValueError(
                    f"policy.{name}.{key}={tokens}: the longest sequence has to fit into a microbatch, and "
                    f"policy.max_total_sequence_length is {self.max_total_sequence_length}. "
                    f"Raise it to {self.max_total_sequence_length} or more."
                )
        return self
