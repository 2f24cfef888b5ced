"""The three ways to configure an adapter, and the one way to read them: `lora_spec_from_policy`.

Contract: `policy.dtensor_cfg.lora_cfg` and `policy.megatron_cfg.peft` have NeMo RL's keys and the defaults
of its documentation (its base files set some to other values, and a file wins); `policy.lora` serves
whichever backend is on. The classes check shapes; what the values mean, and whether they may be, is
LoraSpec's and lora/dialects.py's. Nothing outside this module reads a block.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

from nemo_rl_lora.config.base import Section
from nemo_rl_lora.lora.dialects import spec_from_lora_cfg, spec_from_megatron_peft, spec_from_unified
from nemo_rl_lora.lora.spec import LoraSpec

LORA_CFG_KEY = "policy.dtensor_cfg.lora_cfg"
PEFT_KEY = "policy.megatron_cfg.peft"
UNIFIED_KEY = "policy.lora"


class LoraCfg(Section):
    """`policy.dtensor_cfg.lora_cfg`: an adapter on the DTensor backend."""

    enabled: bool = False
    """Train an adapter; false trains every weight."""
    target_modules: list[str] | Literal["all-linear"] = []
    """Modules to adapt; empty means every linear layer but the output head. Needs match_all_linear=false if
    not.
    """
    exclude_modules: list[str] = []
    """Modules to leave out of those."""
    match_all_linear: bool = True
    """Adapt every linear layer but the output head."""
    dim: int = 8
    """The rank."""
    alpha: float = 32
    """The update is scaled by alpha / dim."""
    dropout: float = 0.0
    """Probability of dropout on the adapter's path."""
    dropout_position: Literal["pre", "post"] = "post"
    """Dropout before A ("pre") or after B ("post")."""
    lora_A_init: str = "xavier"  # noqa: N815
    """How A is drawn: xavier, uniform, kaiming or normal(STD). B starts at zero."""
    use_triton: bool = True
    """Triton kernels, on CUDA with tensor_parallel_size 1."""
    lora_dtype: str | None = None
    """Dtype of the adapter in the forward pass; null follows the compute dtype. Masters are fp32."""
    rank_pattern: dict[str, int] = {}
    """Ranks of single modules, by the rule of target_modules; the first match wins."""
    alpha_pattern: dict[str, float] = {}
    """Alphas of single modules, by the same rule."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(dim) instead."""


class PeftCfg(Section):
    """`policy.megatron_cfg.peft`: an adapter on the Megatron backend."""

    enabled: bool = False
    """Train an adapter; false trains every weight."""
    target_modules: list[str] = []
    """Modules to adapt; empty means every linear layer but the output head. `linear_qkv` and `linear_fc1`
    have one A
    for what they fuse; Hugging Face names have an A each."""
    exclude_modules: list[str] | None = []
    """Modules to leave out of those."""
    dim: int = 32
    """The rank."""
    alpha: float = 32
    """The update is scaled by alpha / dim."""
    dropout: float = 0.0
    """Probability of dropout on the adapter's path."""
    dropout_position: Literal["pre", "post"] = "pre"
    """Dropout before A ("pre") or after B ("post")."""
    lora_A_init_method: str = "xavier"  # noqa: N815
    """How A is drawn: xavier, uniform, kaiming, normal (of standard deviation 0.2) or normal(STD)."""
    lora_B_init_method: str = "zero"  # noqa: N815
    """How B is drawn: zero."""
    a2a_experimental: bool = False
    """One all-to-all instead of a gather on row-parallel layers under sequence parallelism."""
    lora_dtype: str | None = None
    """Dtype of the adapter in the forward pass; null follows the compute dtype. Masters are fp32."""
    rank_pattern: dict[str, int] = {}
    """Ranks of single modules, by the rule of target_modules; the first match wins."""
    alpha_pattern: dict[str, float] = {}
    """Alphas of single modules, by the same rule."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(dim) instead."""


class UnifiedLora(Section):
    """`policy.lora`: an adapter on whichever backend is on."""

    enabled: bool = True
    """Train an adapter: writing the block asks for one. false trains every weight."""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Modules to adapt, by Hugging Face or Megatron names; "all-linear" is every linear layer but the
    output head.
    """
    exclude_modules: list[str] = []
    """Modules to leave out of those."""
    dim: int = 8
    """The rank."""
    alpha: float = 32
    """The update is scaled by alpha / dim."""
    dropout: float = 0.0
    """Probability of dropout on the adapter's path."""
    dropout_position: Literal["pre", "post"] = "post"
    """Dropout before A ("pre") or after B ("post")."""
    A_init: str = "xavier"
    """How A is drawn: xavier, uniform, kaiming or normal(STD)."""
    B_init: str = "zero"
    """How B is drawn: zero."""
    use_triton: bool | None = None
    """Triton kernels of the DTensor backend; null means wherever they can run."""
    a2a: bool = False
    """Megatron only: one all-to-all instead of a gather on row-parallel layers under sequence parallelism."""
    dtype: str | None = None
    """Dtype of the adapter in the forward pass; null follows the compute dtype. Masters are fp32."""
    rank_pattern: dict[str, int] = {}
    """Ranks of single modules, by the rule of target_modules; the first match wins."""
    alpha_pattern: dict[str, float] = {}
    """Alphas of single modules, by the same rule."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(dim) instead."""


class PolicyLike(Protocol):
    """What of the policy's section this module reads."""

    @property
    def active_backend(self) -> Literal["dtensor", "megatron"]: ...
    @property
    def dtensor_cfg(self) -> Any: ...
    @property
    def megatron_cfg(self) -> Any: ...
    @property
    def lora(self) -> UnifiedLora | None: ...


def lora_block_key(policy: PolicyLike) -> str:
    """The dotted key of the LoRA block that is in force, for messages about it."""
    if _unified_is_on(policy):
        return UNIFIED_KEY
    return LORA_CFG_KEY if policy.active_backend == "dtensor" else PEFT_KEY


def lora_spec_from_policy(policy: PolicyLike) -> LoraSpec | None:
    """The adapter that this policy trains, or None for full fine-tuning. Raises ValueError by the keys'
    names.

    Refuses more than one enabled block, and an enabled block of the backend that is off.
    """
    backend = policy.active_backend
    native = {"dtensor": policy.dtensor_cfg.lora_cfg, "megatron": policy.megatron_cfg.peft}
    keys = {"dtensor": LORA_CFG_KEY, "megatron": PEFT_KEY}
    if _unified_is_on(policy) and (taken := [keys[name] for name, block in native.items() if block.enabled]):
        raise ValueError(
            f"{UNIFIED_KEY}.enabled=True: {' and '.join(taken)} is enabled as well, and there is one "
            "adapter. "
            f"Set {taken[0]}.enabled=false, or {UNIFIED_KEY}.enabled=false."
        )
    if policy.lora is not None and policy.lora.enabled:
        return spec_from_unified(policy.lora.model_dump(), UNIFIED_KEY, backend)
    other = "megatron" if backend == "dtensor" else "dtensor"
    if native[other].enabled:
        raise ValueError(
            f"{keys[other]}.enabled=True: the backend is {backend}, which does not read this block. "
            f"Set {keys[backend]}.enabled=true instead, or policy.backend={other}."
        )
    if not native[backend].enabled:
        return None
    parse = spec_from_lora_cfg if backend == "dtensor" else spec_from_megatron_peft
    return parse(native[backend].model_dump(), keys[backend])


def _unified_is_on(policy: PolicyLike) -> bool:
    return policy.lora is not None and policy.lora.enabled


def kernels_off_because(policy: PolicyLike, spec: LoraSpec, *, cuda: bool) -> str | None:
    """Why Triton kernels that were asked for do not run: a sentence that names the keys, or None where they do.

    None too where they were not asked for.
    """
    if not spec.kernels:
        return None
    key = f"{lora_block_key(policy)}.use_triton"
    tensor_parallel = policy.dtensor_cfg.tensor_parallel_size
    if tensor_parallel > 1:
        return f"{key}: off, because policy.dtensor_cfg.tensor_parallel_size={tensor_parallel} is above 1."
    if not cuda:
        return f"{key}: off, because there is no CUDA device: plain torch products are used."
    return None
