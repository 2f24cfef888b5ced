"""From a configuration to a Plan: everything that can be known without weights.

Contract: reads the model's config.json and nothing larger; the checks that the caller hands in read what they read.
Raises ValueError where no plan can be made (no such model, targets that match nothing). What would stop the run but
not the planning is collected in `Plan.problems`; what nobody looked at is said in `Plan.unchecked`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil
import torch

from nemo_rl_lora.config.cluster import joins_ray
from nemo_rl_lora.config.cluster_rules import device_problems
from nemo_rl_lora.config.generation import chosen_engine
from nemo_rl_lora.config.lora import kernels_off_because, lora_block_key, lora_field_key, lora_spec_from_policy
from nemo_rl_lora.config.optimizer_settings import adam_settings, megatron_adam_settings
from nemo_rl_lora.config.support import check_runnable
from nemo_rl_lora.generation.sync_mode import KEY as SYNC_KEY
from nemo_rl_lora.generation.sync_mode import Chosen, choose_sync
from nemo_rl_lora.generation.vllm.generation import adapter_problems as adapter_problems_of_vllm
from nemo_rl_lora.generation.vllm.generation import vllm_problems
from nemo_rl_lora.kernels import machine
from nemo_rl_lora.lora.spec import LoraSpec, require_adapter_dtype
from nemo_rl_lora.lora.targets import AdaptedModule, resolve_trained_targets
from nemo_rl_lora.models.families import changing_positions
from nemo_rl_lora.models.own_forward import refusal
from nemo_rl_lora.models.shapes import ModelShapes, ModuleType, adapted_types, left_out_types, read_model_shapes
from nemo_rl_lora.models.source import resolve_model
from nemo_rl_lora.plan.advice import advice
from nemo_rl_lora.plan.rank_parts import RankPart, rank_parts
from nemo_rl_lora.policy.attention import layout_problems, supports_segments
from nemo_rl_lora.policy.dtensor.limits import COMPILE_KEY, compile_problems, tensor_parallel_problems
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

_WARMUP_STEPS = 100_000  # of a schedule, in which its first rate that moves anything is looked for
_PROCESSES_A_CORE = 2
_PROCESS_BYTES = 512 * 2**20  # of torch, Ray and the vendors, in each training process
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
    advice: tuple[str, ...]
    problems: tuple[str, ...]
    unchecked: tuple[str, ...]


def make_plan(config: MasterConfig, checks: Sequence[NamedCheck] = ()) -> Plan:
    """What this run would do.

    Each check is a name and a function that returns what it found (None: nothing to show), or raises ValueError, which
    becomes a problem.
    """
    policy = config.policy
    spec, backend = lora_spec_from_policy(policy), policy.active_backend
    source = resolve_model(policy.model_name, weights=False)
    shapes = read_model_shapes(
        source.path, dict(policy.hf_config_overrides), f"policy.model_name={policy.model_name!r}"
    )
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
        backend=backend,
        spec=spec,
        adapted=types,
        left_out=() if spec is None else left_out_types(shapes, adapted),
        num_params=shapes.num_params,
        num_trainable_params=num_trainable,
        sizes=sizes,
        rank_parts=rank_parts,
        effects=_effects(config, spec, shapes, adapted),
        checks=(_world_size(config), *_engines(config), *passed),
        advice=(
            *(f"{key}: is NeMo RL's, and changes nothing here" for key in config.layers.without_effect),
            *advice(config, spec, shapes, adapted),
        ),
        problems=(
            *check_runnable(config),
            *_forward_problems(policy, shapes),
            *layout_problems(policy, shapes.config),
            *(_dtensor_problems(config, shapes.config, spec and adapted) if backend == "dtensor" else ()),
            *_engine_problems(policy, spec, adapted, shapes),
            *megatron_problems,
            *device_problems(config, torch.cuda.device_count()),
            *problems,
        ),
        unchecked=_unchecked(config, sizes, [name for name, _ in checks]),
    )


def _dtensor_problems(config: MasterConfig, hf: Any, adapted: Sequence[AdaptedModule] | None) -> list[str]:
    sizes = config.policy.dtensor_cfg
    num_shards = config.cluster.num_processes // (sizes.tensor_parallel_size * sizes.dp_replicate_size)
    found = tensor_parallel_problems(sizes, hf, adapted, num_shards=max(1, num_shards))
    return [*found, *compile_problems(config.policy, hf)]


def machine_problems(config: MasterConfig, plan: Plan) -> list[str]:
    """Why this machine cannot run the plan's processes all at once. Nothing for a single one, and where a Ray cluster
    is joined, which has its own machines (distributed/placement.py)."""
    number = config.cluster.num_processes
    if number == 1 or joins_ray():
        return []
    key, rank_bytes = f"cluster.gpus_per_node={number}", _rank_bytes(config, plan)
    holds = f"a process holds {rank_bytes / 2**30:,.1f} GiB of weights, gradients and moments"
    if torch.cuda.is_available() and not _is_offloaded(config.policy):
        available = torch.cuda.get_device_properties(0).total_memory
        fits = rank_bytes <= available
        return [] if fits else [f"{key}: {holds}, and a GPU has {available / 2**30:,.1f} GiB. Share the model further."]
    cores, available = os.cpu_count() or 1, psutil.virtual_memory().available
    needed = number * (rank_bytes + _PROCESS_BYTES)
    problems = []
    if number > cores * _PROCESSES_A_CORE and not torch.cuda.is_available():
        problems.append(
            f"{key}: this machine has no GPU and {cores} CPU core(s), and at most {_PROCESSES_A_CORE} processes share "
            f"a core. Set cluster.gpus_per_node={cores} or less."
        )
    if needed > available:
        problems.append(
            f"{key}: {holds}, and {_PROCESS_BYTES / 2**30:,.1f} GiB of its own; together {needed / 2**30:,.1f} GiB, "
            f"and this machine has {available / 2**30:,.1f} GiB free. Set a lower cluster.gpus_per_node, or free some "
            f"memory."
        )
    return problems


def _rank_bytes(config: MasterConfig, plan: Plan) -> int:
    """Of the weights, gradients and moments that the process with the most of them holds."""
    sizes, compute_bytes = plan.sizes, DTYPES[config.policy.precision].num_bytes
    trained_bytes = (sizes.adapter_bytes or 0) + sizes.gradient_bytes + sizes.optimizer_bytes
    if not plan.rank_parts:
        return (
            (sizes.base_bytes + trained_bytes)
            * config.policy.dtensor_cfg.dp_replicate_size
            // config.cluster.num_processes
        )
    if plan.spec is None:
        return max(part.num_params for part in plan.rank_parts) * 4 * _MASTER_BYTES
    return max(p.num_params * compute_bytes + p.num_adapter_params * 4 * _MASTER_BYTES for p in plan.rank_parts)


def _forward_problems(policy: PolicyConfig, shapes: ModelShapes) -> list[str]:
    """Why log-probabilities would not be this model's."""
    problems = []
    if shapes.head_problem is not None:
        problems.append(str(refusal(policy.model_name, shapes.head_problem)))
    if (found := changing_positions(shapes.config, policy.max_total_sequence_length)) is not None:
        rope_type, longest = found
        problems.append(
            f"policy.max_total_sequence_length={policy.max_total_sequence_length}: rotary positions of this model "
            f"(rope_type {rope_type!r}) change in sequences longer than {longest} tokens, so that a row's "
            f"log-probabilities would depend on the rows beside it. Set at most {longest}."
        )
    return problems


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


def chosen_sync(config: MasterConfig, spec: LoraSpec | None, adapted: Sequence[AdaptedModule], hf: Any) -> Chosen:
    """What a sync of this run moves at its start, and why. `hf`: the model's transformers config."""
    policy = config.policy
    assert policy.generation is not None, "asked only where completions are generated"
    settings = (
        megatron_adam_settings(config, lora=spec is not None)
        if policy.active_backend == "megatron"
        else adam_settings(policy, lora=spec is not None)
    )
    rates = (settings.lr_at(step) for step in range(_WARMUP_STEPS))
    return choose_sync(
        policy,
        chosen_engine(policy.generation.backend)[0],
        spec,
        adapted,
        adapter_problems_of_vllm(policy.generation, spec, adapted),
        lr=next((lr for lr in rates if lr > 0), 0.0),
        typical_weight=getattr(hf, "initializer_range", None),
    )


def _effects(
    config: MasterConfig, spec: LoraSpec | None, shapes: ModelShapes, adapted: Sequence[AdaptedModule]
) -> tuple[Effect, ...]:
    effects = [_shared_prefix(config.policy, shapes)]
    if (key := config.policy.searched_key) is not None:
        effects.append(_searched(key))
    if spec is not None and config.policy.active_backend == "dtensor":
        effects.insert(0, _kernels(config.policy, spec))
    if config.policy.compile != "auto" and config.policy.active_backend == "dtensor":
        effects.append(_compiled(config.policy.compile))
    if config.policy.active_backend == "megatron":
        effects += _megatron_effects(config, has_experts=bool(shapes.stacked))
    if config.policy.generation is not None:
        effects.append(_generation(config.policy.generation.backend))
        chosen, asked = chosen_sync(config, spec, adapted, shapes.config), config.policy.generation.asked_sync
        reason = chosen.reason + ("; the first update decides again" if chosen.is_open else "")
        effects.append(Effect(key=SYNC_KEY, requested=asked, effective=chosen.mode, reason=reason))
    return tuple(effects)


def _megatron_effects(config: MasterConfig, *, has_experts: bool) -> list[Effect]:
    megatron = config.policy.megatron_cfg
    effects = []
    if config.cluster.num_processes > 1:
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


def _compiled(asked: bool) -> Effect:
    reason = "in the first passes, which takes up to a minute" if asked else "not asked for"
    return Effect(key=COMPILE_KEY, requested=_on_off(asked), effective=_on_off(asked), reason=reason)


def _kernels(policy: PolicyConfig, spec: LoraSpec) -> Effect:
    asked = spec.kernels if isinstance(spec.kernels, str) else _on_off(spec.kernels)
    off = kernels_off_because(policy, spec, lacks=machine.kernel_problem())
    reason = (off or "").partition(": ")[2].removeprefix("off, because ").removesuffix(".")
    return Effect(
        key=f"{lora_block_key(policy)}.use_triton",
        requested=asked,
        effective=asked if off is None else "off",
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


def _searched(key: str) -> Effect:
    how = "what two small attempts on the longest rows take of the free memory"
    if torch.cuda.is_available():
        how = "halved until a forward and backward pass of the longest rows fits; of several processes, by " + how
    return Effect(
        key=key,
        requested="auto",
        effective="searched for at the start, once the weights are there, or as the checkpoint has it",
        reason=how,
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
    num_processes = config.cluster.num_processes
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


def _world_size(config: MasterConfig) -> Check:
    processes, sizes = config.cluster.num_processes, config.policy.dtensor_cfg
    found = f"{processes} training {'process' if processes == 1 else 'processes'} on {config.cluster.num_nodes} node(s)"
    if processes > 1 and config.policy.active_backend == "dtensor":
        shards = processes // (sizes.dp_replicate_size * sizes.tensor_parallel_size)
        found += f": {sizes.dp_replicate_size} x {shards} x {sizes.tensor_parallel_size} replicas, shards, tensor ranks"
    return Check(name="world size", finding=found)


def _engines(config: MasterConfig) -> list[Check]:
    """How many engines sample, on what, and how each is shared."""
    generation, engine = config.policy.generation, _engine(config.policy)
    if generation is None or engine == "replay":
        return []
    if engine == "in_process" or generation.colocated.enabled:
        return [Check(name="engines", finding=f"1 {engine}, in the trainer's process")]
    gpus, size, ranks = torch.cuda.device_count(), generation.devices_per_engine, generation.vllm_cfg
    device = "device" if joins_ray() else "GPU" if gpus else "CPU"
    number = generation.known_engines
    if number is None and not joins_ray():
        number = max(1, (gpus - config.cluster.gpus_per_node) // size)  # 1 on a CPU
    counted = "as many vllm as the cluster has devices for" if number is None else f"{number} vllm"
    finding = f"{counted}, each in a process of its own on {size} {device}(s) of one node: "
    finding += (
        f"{ranks.tensor_parallel_size} tensor-parallel x {ranks.pipeline_parallel_size} pipeline-parallel rank(s)"
    )
    resources = generation.colocated.resources
    if resources.gpus_per_node is not None:
        finding += f", on {resources.num_nodes or 1} node(s) with {resources.gpus_per_node} of them"
    return [Check(name="engines", finding=finding)]


def engine_problems_of_cpus(config: MasterConfig, plan: Plan) -> list[str]:
    """Why the engines that have processes of their own do not fit this machine's cores and memory. Nothing where a GPU
    is (cluster_rules.device_problems), or a Ray cluster is joined (distributed/placement.py)."""
    generation = config.policy.generation
    is_apart = generation is not None and _engine(config.policy) == "vllm" and not generation.colocated.enabled
    if generation is None or not is_apart or torch.cuda.is_available() or joins_ray():
        return []
    number, size = generation.known_engines or 1, generation.devices_per_engine
    cores, available = os.cpu_count() or 1, psutil.virtual_memory().available
    engine_bytes = plan.num_params * DTYPES[generation.vllm_cfg.precision].num_bytes + size * _PROCESS_BYTES
    engines = f"policy.generation.colocated.enabled=False: {number} engine(s) of {size} process(es) each"
    remedy = "Lower policy.generation.num_engines, colocated.resources or vllm_cfg.tensor_parallel_size"
    if number * size > cores * _PROCESSES_A_CORE:
        return [
            f"{engines}, and this machine has no GPU and {cores} CPU core(s), of which at most {_PROCESSES_A_CORE} "
            f"processes share one. {remedy}."
        ]
    if number * engine_bytes > available:
        return [
            f"{engines} need {number * engine_bytes / 2**30:,.1f} GiB for weights and themselves, and this machine "
            f"has {available / 2**30:,.1f} GiB free. {remedy}, or free some memory."
        ]
    return []


def _run_checks(checks: Sequence[NamedCheck]) -> tuple[list[Check], list[str]]:
    passed, problems = [], []
    for name, check in checks:
        try:
            finding = check()
        except ValueError as error:
            problems += str(error).splitlines()
        else:
            passed += [] if finding is None else [Check(name=name, finding=finding)]
    return passed, list(dict.fromkeys(problems))  # a check that needs what another one lacks says the same


def _unchecked(config: MasterConfig, sizes: Sizes, names: Sequence[str]) -> tuple[str, ...]:
    unchecked = ["the weights themselves: none was read", "memory of activations, and of the generation's cache"]
    unchecked += [f"{name}: nobody looked at it" for name in ("tokenizer", "data") if name not in names]
    needed = sizes.base_bytes + (sizes.adapter_bytes or 0) + sizes.gradient_bytes + sizes.optimizer_bytes
    available = _memory_bytes(config.policy)
    if needed > available:
        unchecked.append(
            f"whether the run fits: weights, gradients and optimizer take {needed / 2**30:,.1f} GiB, and this "
            f"machine has {available / 2**30:,.1f} GiB"
        )
    return tuple(unchecked)


def _is_offloaded(policy: PolicyConfig) -> bool:
    """Whether weights, gradients and moments lie in the host's memory also where there is a GPU."""
    return policy.active_backend == "dtensor" and policy.dtensor_cfg.cpu_offload


def _memory_bytes(policy: PolicyConfig) -> int:
    """Of the first GPU, or of the machine where there is none, or where the weights lie there."""
    if torch.cuda.is_available() and not _is_offloaded(policy):
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _on_off(value: bool) -> str:
    return "on" if value else "off"
