"""The three ways to configure an adapter, and the one way to read them: `lora_spec_from_policy`.

Contract: `policy.dtensor_cfg.lora_cfg` and `policy.megatron_cfg.peft` have NeMo RL's keys and the defaults of its
documentation (its base files set some to other values, and a file wins); `policy.lora` serves whichever backend is on.
A block's fields are LoraSpec's, by name; the alias is the key that the dialect has for it, in files and in messages.
What a value means, and whether it may be, is LoraSpec's. Nothing outside this module reads a block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from nemo_rl_lora.config.base import Section
from nemo_rl_lora.lora.dialects import megatron_init, plain_number, refuse_shared_a, spec_from_keys
from nemo_rl_lora.lora.spec import LoraSpec
from nemo_rl_lora.lora.targets import ALL_LINEAR

if TYPE_CHECKING:
    from nemo_rl_lora.config.policy import PolicyConfig

AUTOMODEL = "automodel"
_AUTOMODEL_ROW_BYTES = 512  # of A's and B's blocks, which hold the whole rank: above it no configuration fits sm_90


class AdapterBlock(Section):
    """An adapter, in any dialect: the fields that every block has."""

    KEY: ClassVar[str]  # where the block stands

    enabled: bool = False
    """Train an adapter; false trains every weight."""
    targets: list[str] | Literal["all-linear"] | None = Field(default=[], alias="target_modules")
    """Modules to adapt; empty or null means every linear layer but the output head."""
    excludes: list[str] | None = Field(default=[], alias="exclude_modules")
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
    dtype: str | None = Field(default=None, alias="lora_dtype")
    """Dtype of the adapter in the forward pass; null follows the compute dtype. Masters are fp32."""
    rank_pattern: dict[str, int] = {}
    """Ranks of single modules, by the rule of target_modules; the first match wins."""
    alpha_pattern: dict[str, float] = {}
    """Alphas of single modules, by the same rule."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(dim) instead."""

    @classmethod
    def spec_keys(cls) -> dict[str, str]:
        """LoraSpec's fields that this block sets, and its keys for them."""
        known = LoraSpec.__dataclass_fields__
        return {name: field.alias or name for name, field in cls.model_fields.items() if name in known}

    def spec(self, backend: str, **overrides: Any) -> LoraSpec:
        """The adapter on the backend ("dtensor" or "megatron") that is on. Raises ValueError by the keys' names.

        `overrides` are fields of LoraSpec whose value is not what the block holds.
        """
        spec = spec_from_keys(self.model_dump(by_alias=True), self.spec_keys(), self.KEY, **overrides)
        if backend == "dtensor":
            refuse_shared_a(spec, self.KEY)
        return spec


class LoraCfg(AdapterBlock):
    """`policy.dtensor_cfg.lora_cfg`: an adapter on the DTensor backend."""

    KEY = "policy.dtensor_cfg.lora_cfg"

    match_all_linear: bool = True
    """Adapt every linear layer but the output head. Lists of target_modules need false."""
    A_init: str = Field(default="xavier", alias="lora_A_init")
    """How A is drawn: xavier, uniform, kaiming or normal(STD). B starts at zero."""
    kernels: Literal["automodel"] | bool = Field(default=True, alias="use_triton")
    """Triton kernels, on CUDA with tensor_parallel_size 1; "automodel" takes nemo-automodel's instead of our own."""

    def spec(self, backend: str) -> LoraSpec:
        if self.match_all_linear and self.targets and self.targets != ALL_LINEAR:
            raise ValueError(
                f"{self.KEY}.target_modules={self.targets!r}: cannot be combined with match_all_linear=true, which "
                f"adapts every linear layer. Set {self.KEY}.match_all_linear=false to adapt only these modules, or "
                f"{self.KEY}.target_modules=[] to adapt all."
            )
        return super().spec(backend, targets=self.targets or ALL_LINEAR)


class PeftCfg(AdapterBlock):
    """`policy.megatron_cfg.peft`: an adapter on the Megatron backend."""

    KEY = "policy.megatron_cfg.peft"

    targets: list[str] | None = Field(default=[], alias="target_modules")
    """Modules to adapt; empty or null means every linear layer but the output head. `linear_qkv` and `linear_fc1` have
    one A for what they fuse; Hugging Face names have an A each."""
    dim: int = 32
    """The rank."""
    dropout_position: Literal["pre", "post"] = "pre"
    """Dropout before A ("pre") or after B ("post")."""
    A_init: str = Field(default="xavier", alias="lora_A_init_method")
    """How A is drawn: xavier, uniform, kaiming, normal (of standard deviation 0.2) or normal(STD)."""
    B_init: str = Field(default="zero", alias="lora_B_init_method")
    """How B is drawn: zero."""
    a2a: bool = Field(default=False, alias="a2a_experimental")
    """One all-to-all instead of a gather on row-parallel layers under sequence parallelism."""

    def spec(self, backend: str) -> LoraSpec:
        A_init = megatron_init(self.A_init)
        return super().spec(backend, targets=self.targets or ALL_LINEAR, A_init=A_init, kernels=False)


class UnifiedLora(AdapterBlock):
    """`policy.lora`: an adapter on whichever backend is on."""

    KEY = "policy.lora"

    enabled: bool = True
    """Train an adapter: writing the block asks for one. false trains every weight."""
    targets: list[str] | Literal["all-linear"] = Field(default="all-linear", alias="target_modules")
    """Modules to adapt, by Hugging Face or Megatron names; "all-linear" is every linear layer but the output head."""
    dtype: str | None = None
    """Dtype of the adapter in the forward pass; null follows the compute dtype. Masters are fp32."""
    B_init: str = "zero"
    """How B is drawn: zero."""
    kernels: Literal["automodel"] | bool | None = Field(default=None, alias="use_triton")
    """Triton kernels of the DTensor backend; null means wherever they can run, and "automodel" takes nemo-automodel's
    instead of our own."""
    a2a: bool = False
    """Megatron only: one all-to-all instead of a gather on row-parallel layers under sequence parallelism."""

    def spec(self, backend: str) -> LoraSpec:
        if backend == "dtensor" and self.a2a:
            raise ValueError(
                f"{self.KEY}.a2a=True: the all-to-all is a way of the Megatron backend, and the backend is dtensor. "
                f"Set it to false, or policy.backend=megatron."
            )
        if backend == "megatron" and self.kernels:
            raise ValueError(
                f"{self.KEY}.use_triton={self.kernels!r}: the Triton kernels belong to the DTensor backend, and the "
                f"backend is megatron. Set it to null or false, or policy.backend=dtensor."
            )
        return super().spec(backend, kernels=backend == "dtensor" if self.kernels is None else self.kernels)


def unified_from_spec(spec: LoraSpec) -> dict[str, Any]:
    """The `policy.lora` block that parses into this spec; null for our own kernels, which serves both backends."""
    block: dict[str, Any] = {"enabled": True}
    for name, key in UnifiedLora.spec_keys().items():
        value = getattr(spec, name)
        block[key] = list(value) if isinstance(value, tuple) else value
    return block | {"use_triton": None if spec.kernels is True else spec.kernels, "alpha": plain_number(spec.alpha)}


def _block_in_force(policy: PolicyConfig) -> AdapterBlock:
    """`policy.lora` where it is enabled, else the block of the backend that is on."""
    if policy.lora is not None and policy.lora.enabled:
        return policy.lora
    return policy.dtensor_cfg.lora_cfg if policy.active_backend == "dtensor" else policy.megatron_cfg.peft


def spec_of_block(policy: PolicyConfig) -> LoraSpec:
    """The adapter that a run's LoRA block describes, enabled or not. Raises ValueError by the keys' names."""
    backend = policy.active_backend
    native = policy.dtensor_cfg.lora_cfg if backend == "dtensor" else policy.megatron_cfg.peft
    return (policy.lora or native).spec(backend)


def lora_block_key(policy: PolicyConfig) -> str:
    """The dotted key of the LoRA block that is in force, for messages about it."""
    return _block_in_force(policy).KEY


def lora_field_key(policy: PolicyConfig, field: str) -> str:
    """The dotted key that sets this field of LoraSpec in the block in force, for messages about it."""
    block = _block_in_force(policy)
    return f"{block.KEY}.{block.spec_keys()[field]}"


def lora_spec_from_policy(policy: PolicyConfig) -> LoraSpec | None:
    """The adapter that this policy trains, or None for full fine-tuning. Raises ValueError by the keys' names.

    Refuses more than one enabled block, and an enabled block of the backend that is off.
    """
    backend, block = policy.active_backend, _block_in_force(policy)
    enabled = [native.KEY for native in (policy.dtensor_cfg.lora_cfg, policy.megatron_cfg.peft) if native.enabled]
    if isinstance(block, UnifiedLora) and enabled:
        raise ValueError(
            f"{block.KEY}.enabled=True: {' and '.join(enabled)} is enabled as well, and there is one adapter. "
            f"Set {enabled[0]}.enabled=false, or {block.KEY}.enabled=false."
        )
    other = "megatron" if backend == "dtensor" else "dtensor"
    if unread := [key for key in enabled if key != block.KEY]:
        raise ValueError(
            f"{unread[0]}.enabled=True: the backend is {backend}, which does not read this block. "
            f"Set {block.KEY}.enabled=true instead, or policy.backend={other}."
        )
    return block.spec(backend) if block.enabled else None


def kernels_off_because(policy: PolicyConfig, spec: LoraSpec, *, lacks: str | None) -> str | None:
    """Why Triton kernels that were asked for do not run: a sentence that names the keys, or None where they do.

    None too where they were not asked for. `lacks`: why this machine runs none (kernels/machine.py).
    """
    if not spec.kernels:
        return None
    key, tensor_parallel = lora_field_key(policy, "kernels"), policy.dtensor_cfg.tensor_parallel_size
    if tensor_parallel > 1:
        return f"{key}: off, because policy.dtensor_cfg.tensor_parallel_size={tensor_parallel} is above 1."
    if lacks is not None:
        return f"{key}: off, because {lacks}."
    dtype, dim = spec.dtype or policy.precision, max(spec.dim, *spec.rank_pattern.values(), 0)
    if spec.kernels == AUTOMODEL and dim * (4 if dtype == "float32" else 2) > _AUTOMODEL_ROW_BYTES:
        return (
            f"{key}: off, because blocks of rank {dim} in {dtype} of nemo-automodel's kernels do not fit in a GPU's "
            f"shared memory. Set it to true, for kernels of any rank."
        )
    return None


def kernels_in_force(policy: PolicyConfig, spec: LoraSpec, *, lacks: str | None) -> Literal["own", "automodel"] | None:
    """Which Triton kernels compute the adapter; None where plain torch products do."""
    if not spec.kernels or kernels_off_because(policy, spec, lacks=lacks) is not None:
        return None
    return "automodel" if spec.kernels == AUTOMODEL else "own"
