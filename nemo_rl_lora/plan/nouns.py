"""The nouns of a plan. No logic but sums."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_rl_lora.lora.spec import LoraSpec
from nemo_rl_lora.models.shapes import ModuleType


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Bytes of tensors, without the headers of files. None where a run has no such thing."""

    base_bytes: int  # the weights in memory
    adapter_bytes: int | None  # A and B, fp32
    gradient_bytes: int
    optimizer_bytes: int
    checkpoint_bytes: int
    sync_merged_bytes: int
    sync_adapter_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPart:
    """What one process of the Megatron backend holds of the model; its tensor-parallel siblings hold as much."""

    pp_rank: int
    ep_rank: int
    num_tp_ranks: int
    layers: range
    experts: range
    num_params: int
    num_adapter_params: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """What a setting comes to on this machine with this model."""

    key: str
    requested: str
    effective: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A check that passed, and what it found."""

    name: str
    finding: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run would do. `problems` is empty when it can start."""

    model_name: str
    model_source: str
    architecture: str
    algorithm: str
    backend: str
    spec: LoraSpec | None  # None: every weight is trained
    adapted: tuple[ModuleType, ...]
    left_out: tuple[ModuleType, ...]
    num_params: int
    num_trainable_params: int
    sizes: Sizes
    rank_parts: tuple[RankPart, ...]  # empty where one process holds the whole model
    effects: tuple[Effect, ...]
    checks: tuple[Check, ...]
    problems: tuple[str, ...]
    unchecked: tuple[str, ...]
