"""From a configuration to a Plan: everything that can be known without weights.

Contract: reads the model's config.json and nothing larger; the checks that the caller hands in read what they read.
Raises ValueError where no plan can be made (no such model, targets that match nothing). What would stop the run but
not the planning is collected in `Plan.problems`; what nobody looked at is said in `Plan.unchecked`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from nemo_rl_lora.config.generation import chosen_engine
from nemo_rl_lora.config.lora import kernels_off_because, lora_block_key, lora_field_key, lora_spec_from_policy
from nemo_rl_lora.config.support import check_runnable
from nemo_rl_lora.generation.vllm.generation import vllm_problems
from nemo_rl_lora.lora.spec import LoraSpec, require_adapter_dtype
from nemo_rl_lora.lora.targets import AdaptedModule, resolve_trained_targets
from nemo_rl_lora.models.shapes import ModelShapes, ModuleType, adapted_types, left_out_types, read_model_shapes
from nemo_rl_lora.models.source import resolve_model
from nemo_rl_lora.plan.rank_parts import RankPart, rank_parts
from nemo_rl_lora.policy.attention import layout_problems, supports_segments
from nemo_rl_lora.policy.megatron.families import (
    adapter_problems,
    parallel_problems,
    read_family,
    refuse_expert_targets,
)
from nemo_rl_lora.tensors import DTYPES

if TYPE_CHECKING:
    from nemo_rl_lora.config.master import MasterConfig
    from nemo_rl_lora.config.megatron import MegatronConfig
    from nemo_rl_lora.config.policy import PolicyConfig

NamedCheck = tuple[str, Callable[[], str | None]]

_MASTER_BYTES = 4  # adapters, and weights that are trained, are fp32


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


def make_plan(config: MasterConfig, checks: Sequence[NamedCheck] = ()) -> Plan:
    """What this run would do.

    Each check is a name and a function that returns what it found (None: nothing to show), or raises ValueError, which
    becomes a problem.
    """
    policy = config.policy
    spec = lora_spec_from_policy(policy)
    source = resolve_model(policy.model_name, weights=False)
    shapes = read_model_shapes(source.path, dict(policy.hf_config_overrides))
    adapted = _adapted(spec, shapes, policy)
    types = adapted_types(adapted, shared_a=spec is not None and spec.fused == "shared")
    num_trainable = shapes.num_params if spec is None else sum(t.num_trainable_params for t in types)
    passed, problems = _run_checks(checks)
    sizes = _sizes(config, shapes, adapted, num_trainable)
    rank_parts, megatron_problems = _megatron(config, spec, shapes, adapted)
    return Plan(
        model_name=policy.model_name,
        model_source=source.description,
        architecture=shapes.architecture,
        algorithm=config.algorithm,
        backend=policy.active_backend,
        spec=spec,
        adapted=types,
        left_out=() if spec is None else left_out_types(shapes, adapted),
        num_params=shapes.num_params,
        num_trainable_params=num_trainable,
        sizes=sizes,
        rank_parts=rank_parts,
        effects=_effects(config, spec, shapes),
        checks=(_world_size(config), *passed),
        problems=(
            *check_runnable(config),
            *layout_problems(policy, shapes.config),
            *_engine_problems(policy, spec, adapted, shapes),
            *megatron_problems,
            *_device_problems(config),
            *problems,
        ),
        unchecked=_unchecked(config, sizes, [name for name, _ in checks]),
    )


def _adapted(spec: LoraSpec | None, shapes: ModelShapes, policy: PolicyConfig) -> tuple[AdaptedModule, ...]:
    if spec is None:
        return ()
    key = lora_block_key(policy)
    require_adapter_dtype(spec, shapes.quantization, lora_field_key(policy, "dtype"))
    return resolve_trained_targets(
        spec, shapes.linears, tied_head=shapes.has_tied_head, model_label=policy.model_name, config_key=key
    )


def _sizes(config: MasterConfig, shapes: ModelShapes, adapted: Sequence[AdaptedModule], num_trainable: int) -> Sizes:
    compute_bytes = DTYPES[config.policy.precision].num_bytes
    master_bytes = num_trainable * _MASTER_BYTES
    moments_bytes = 2 * master_bytes if config.checkpointing.save_optimizer else 0
    if not adapted:
        return Sizes(
            base_bytes=shapes.num_params * _MASTER_BYTES,
            adapter_bytes=None,
            gradient_bytes=master_bytes,
            optimizer_bytes=2 * master_bytes,
            checkpoint_bytes=master_bytes + moments_bytes,
            sync_merged_bytes=shapes.num_params * compute_bytes,
            sync_adapter_bytes=None,
        )
    # On disk and in the air every Hugging Face module has its own A, also where a fused layer shares one.
    canonical_bytes = sum(m.num_params for m in adapted) * _MASTER_BYTES
    return Sizes(
        base_bytes=shapes.num_params * compute_bytes,
        adapter_bytes=master_bytes,
        gradient_bytes=master_bytes,
        optimizer_bytes=2 * master_bytes,
        checkpoint_bytes=canonical_bytes + moments_bytes,
        sync_merged_bytes=sum(m.in_features * m.out_features for m in adapted) * compute_bytes,
        sync_adapter_bytes=canonical_bytes,
    )


def _effects(config: MasterConfig, spec: LoraSpec | None, shapes: ModelShapes) -> tuple[Effect, ...]:
    effects = [_shared_prefix(config.policy, shapes)]
    if spec is not None and config.policy.active_backend == "dtensor":
        effects.insert(0, _kernels(config.policy, spec))
    if config.policy.active_backend == "megatron":
        effects += _megatron_effects(config, has_experts=bool(shapes.stacked))
    if config.policy.generation is not None:
        effects.append(_generation(config.policy.generation.backend))
    return tuple(effects)


def _megatron_effects(config: MasterConfig, *, has_experts: bool) -> list[Effect]:
    megatron = config.policy.megatron_cfg
    effects = []
    if config.cluster.gpus_per_node > 1:
        effects.append(
            Effect(
                key="policy.megatron_cfg.optimizer.use_distributed_optimizer",
                requested=str(megatron.optimizer.use_distributed_optimizer),
                effective="off",
                reason="every data-parallel rank keeps the moments of what it trains",
            )
        )
    return [*effects, *_expert_effects(megatron)] if has_experts else effects


def _expert_effects(megatron: MegatronConfig) -> list[Effect]:
    balancing = Effect(
        key="policy.megatron_cfg.moe_router_load_balancing_type",
        requested=megatron.moe_router_load_balancing_type,
        effective="none",
        reason="the loss is the algorithm's own, as on the DTensor backend",
    )
    cuda = torch.cuda.is_available()
    dispatcher = Effect(
        key="policy.megatron_cfg.moe_token_dispatcher_type",
        requested=megatron.moe_token_dispatcher_type,
        effective=megatron.moe_token_dispatcher_type if cuda else "allgather",
        reason="as asked for" if cuda else "the other one runs on CUDA alone",
    )
    return [balancing, dispatcher]


def _kernels(policy: PolicyConfig, spec: LoraSpec) -> Effect:
    off = kernels_off_because(policy, spec, cuda=torch.cuda.is_available())
    reason = (off or "").partition(": ")[2].removeprefix("off, because ").removesuffix(".")
    return Effect(
        key=f"{lora_block_key(policy)}.use_triton",
        requested=_on_off(spec.kernels),
        effective=_on_off(spec.kernels and off is None),
        reason=reason or ("CUDA, one tensor-parallel rank" if spec.kernels else "not asked for"),
    )


def _shared_prefix(policy: PolicyConfig, shapes: ModelShapes) -> Effect:
    asked = policy.shared_prefix.enabled
    supported = supports_segments(shapes.config, policy.max_total_sequence_length)
    split = policy.active_backend == "megatron" and policy.megatron_cfg.context_parallel_size > 1
    possible = supported and not split
    cap = f"rows of up to {policy.shared_prefix.max_row_tokens} tokens, above which the prompt is repeated"
    reasons = {
        (False, True): "not asked for",
        (False, False): "not asked for",
        (True, True): cap,
        (True, False): "context-parallel ranks share each sequence"
        if split
        else f"{shapes.config.model_type} has sliding windows, dropout or an attention not known here",
    }
    return Effect(
        key="policy.shared_prefix.enabled",
        requested=asked if isinstance(asked, str) else _on_off(asked),
        effective=_on_off(asked is not False and possible),
        reason=reasons[(asked is not False, possible)],
    )


def _generation(backend: str) -> Effect:
    chosen, reason = chosen_engine(backend)
    return Effect(key="policy.generation.backend", requested=backend, effective=chosen, reason=reason)


def _engine_problems(
    policy: PolicyConfig, spec: LoraSpec | None, adapted: Sequence[AdaptedModule], shapes: ModelShapes
) -> list[str]:
    """Why vLLM, where it samples, could not serve this model or its adapter."""
    if policy.generation is None or chosen_engine(policy.generation.backend)[0] != "vllm":
        return []
    return vllm_problems(policy, spec, adapted, shapes.config)


def _megatron(
    config: MasterConfig, spec: LoraSpec | None, shapes: ModelShapes, adapted: Sequence[AdaptedModule]
) -> tuple[tuple[RankPart, ...], list[str]]:
    """What each process of the Megatron backend holds, and why it cannot hold this model, or share it as asked."""
    policy, megatron = config.policy, config.policy.megatron_cfg
    if policy.active_backend != "megatron":
        return (), []
    try:
        family = read_family(shapes.config, policy.model_name, policy.max_total_sequence_length)
        if spec is not None:
            refuse_expert_targets(spec, family, lora_block_key(policy))
    except ValueError as error:
        return (), [str(error)]
    num_processes = config.cluster.num_nodes * config.cluster.gpus_per_node
    problems = parallel_problems(family, megatron, num_processes)
    problems += adapter_problems(adapted, megatron, lora_block_key(policy))
    if family.experts is not None and spec is None and _engine(policy) == "in_process":
        problems.append(
            f"policy.model_name={policy.model_name!r}: the engine in this process takes no trained experts from the "
            f"Megatron backend. Train an adapter, set policy.generation.backend=vllm, or policy.backend=dtensor."
        )
    if problems or num_processes == 1:
        return (), problems
    return rank_parts(family, megatron, adapted, shared_a=spec is not None and spec.fused == "shared"), []


def _engine(policy: PolicyConfig) -> str | None:
    """The engine that samples; None where nothing does."""
    return None if policy.generation is None else chosen_engine(policy.generation.backend)[0]


def _device_problems(config: MasterConfig) -> list[str]:
    wanted, found = config.cluster.gpus_per_node, torch.cuda.device_count()
    own = config.policy.generation is not None and not config.policy.generation.colocated.enabled
    if not found or wanted + own <= found:  # on a CPU, processes share it
        return []
    engine = ", and the engine needs one of its own" if own else ""
    return [
        f"cluster.gpus_per_node={wanted}: this machine has {found} GPU(s){engine}. Set "
        f"cluster.gpus_per_node={found - own}."
    ]


def _world_size(config: MasterConfig) -> Check:
    processes = config.cluster.num_nodes * config.cluster.gpus_per_node
    found = f"{processes} training {'process' if processes == 1 else 'processes'}"
    return Check(name="world size", finding=f"{found} on {config.cluster.num_nodes} node(s)")


def _run_checks(checks: Sequence[NamedCheck]) -> tuple[list[Check], list[str]]:
    passed, problems = [], []
    for name, check in checks:
        try:
            finding = check()
        except ValueError as error:
            problems.append(str(error))
        else:
            passed += [] if finding is None else [Check(name=name, finding=finding)]
    return passed, list(dict.fromkeys(problems))  # a check that needs what another one lacks says the same


def _unchecked(config: MasterConfig, sizes: Sizes, names: Sequence[str]) -> tuple[str, ...]:
    unchecked = ["the weights themselves: none was read", "memory of activations, and of the generation's cache"]
    unchecked += [f"{name}: nobody looked at it" for name in ("tokenizer", "data") if name not in names]
    needed = sizes.base_bytes + (sizes.adapter_bytes or 0) + sizes.gradient_bytes + sizes.optimizer_bytes
    available = _device_bytes()
    if needed > available:
        unchecked.append(
            f"whether the run fits: weights, gradients and optimizer take {needed / 2**30:,.1f} GiB, and this "
            f"machine has {available / 2**30:,.1f} GiB"
        )
    return tuple(unchecked)


def _device_bytes() -> int:
    """Memory of the first GPU, or of the machine where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _on_off(value: bool) -> str:
    return "on" if value else "off"
