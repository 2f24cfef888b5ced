"""What this version cannot run, though the configuration is valid. Asked by `--plan` and by every start.

It reads the configuration, and of the machine only whether there is a GPU; no model.
"""

from __future__ import annotations

from nemo_rl_lora.config.cluster_rules import cluster_problems
from nemo_rl_lora.config.engine_rules import engine_problems
from nemo_rl_lora.config.generation import chosen_engine, has_gpu
from nemo_rl_lora.config.lora import lora_field_key, lora_spec_from_policy
from nemo_rl_lora.config.master import GrpoMaster, MasterConfig, SftMaster
from nemo_rl_lora.config.optimizer_settings import (
    megatron_peak_lr,
    megatron_schedule_is_in_force,
    weight_decay_schedule_is_in_force,
)
from nemo_rl_lora.config.unused_keys import unused_key_problems

_KEY = "policy.megatron_cfg"


def check_runnable(config: MasterConfig) -> list[str]:
    """One paragraph for each setting that this version cannot run; empty where it can."""
    return [
        *(megatron_problems(config) if config.policy.active_backend == "megatron" else []),
        *_compile_problems(config),
        *cluster_problems(config),
        *_world_problems(config),
        *engine_problems(config.policy.generation),
        *_evaluation_problems(config),
        *(_ahead_problems(config) if isinstance(config, GrpoMaster) else []),
        *unused_key_problems(config),
    ]


def _compile_problems(config: MasterConfig) -> list[str]:
    """Why layers are not compiled that were to be, whatever the model."""
    policy, key = config.policy, "policy.compile"
    if policy.compile is not True:
        return []
    if policy.active_backend == "megatron":
        return [
            f"{key}=True: the layers of the DTensor backend are compiled, and Megatron-Core's are not. Set it to "
            f"false, or policy.backend=dtensor."
        ]
    if policy.dtensor_cfg.sequence_parallel and policy.dtensor_cfg.tensor_parallel_size > 1:
        return [
            f"{key}=True: torch.compile fails on sequences that tensor-parallel ranks share. Set it to false, or "
            f"policy.dtensor_cfg.sequence_parallel to false."
        ]
    if (generation := policy.generation) is None or config.cluster.num_processes > 1:
        return []  # where several processes train, none of them is vLLM's
    is_beside = chosen_engine(generation.backend)[0] == "vllm" and generation.colocated.enabled
    if not (is_beside and generation.vllm_cfg.enforce_eager):
        return []
    return [
        f"{key}=True: policy.generation.vllm_cfg.enforce_eager=true turns torch.compile off in vLLM's process, which "
        f"is this one. Set that to false, or policy.generation.colocated.enabled to false, or {key} to false."
    ]


def _evaluation_problems(config: MasterConfig) -> list[str]:
    """Why this engine cannot be asked by evaluations."""
    generation = config.policy.generation
    if not config.evaluate or generation is None or generation.backend != "replay":
        return []
    return [
        f"policy.generation.backend='replay': it has its file's completions and no model, and evaluate asks the policy "
        f"(evaluate.0.name={config.evaluate[0].name!r}). Choose another, or remove evaluate."
    ]


def phase_problems(config: MasterConfig) -> list[str]:
    """Keys that the user set, and that phases leave without a meaning; what phases need of other sections; LoRA keys
    that no phase reads."""
    if not isinstance(config, SftMaster):
        return []
    if not config.sft.phases:
        key = "sft.max_phase_loss_shift"
        unread = f"{key}={config.sft.max_phase_loss_shift}: the run has no phases. Remove it, or set sft.phases."
        return [unread] if config.is_set(key) else []
    problems = [
        f"sft.{key}={getattr(config.sft, key)!r}: the phases say how long the run is. Remove it, or give a phase's own "
        f"{unit}."
        for key, unit in (("max_num_steps", "steps"), ("max_num_epochs", "epochs"), ("max_num_tokens", "tokens"))
        if config.is_set(f"sft.{key}") and getattr(config.sft, key) is not None
    ]
    if config.policy.adapter.init_from is not None and config.sft.phases[0].train == "full":
        problems.append(
            f"policy.adapter.init_from={config.policy.adapter.init_from!r}: the first phase trains all weights, and an "
            "adapter starts from it only where the first phase has one. Remove it, or train=lora in sft.phases.0."
        )
    if not config.policy.adapter.trainable and len(config.sft.phases) > 1:
        problems.append(
            "policy.adapter.trainable=False: only the first phase would be without a learning rate. Remove it, or give "
            "that phase lr=0."
        )
    if not config.checkpointing.enabled and len(config.sft.phases) > 1:
        problems.append(
            "checkpointing.enabled=False: what a phase has trained goes to the next one through a checkpoint. Set it "
            "to true."
        )
    if not config.checkpointing.save_optimizer and len(config.sft.phases) > 1:
        problems.append(
            "checkpointing.save_optimizer=False: a phase may go on with the moments of the one before. Set it to true."
        )
    return [*problems, *unused_key_problems(config)]


def _ahead_problems(config: GrpoMaster) -> list[str]:
    """Why this engine cannot sample while the policy trains."""
    ahead, generation = config.grpo.async_grpo, config.generation
    engine, off = chosen_engine(generation.backend)[0], "set grpo.async_grpo.enabled=false"
    if ahead is None or not ahead.num_steps_ahead:
        return []
    if engine == "replay":
        return [f"policy.generation.backend='replay': its rollouts are there already. Choose another, or {off}."]
    for name, limit in generation.parity:
        if limit is not None:
            return [
                f"policy.generation.parity.{name}={limit}: compares the engine with the policy that trains, and with "
                f"grpo.async_grpo.max_trajectory_age_steps={ahead.num_steps_ahead} an earlier one has sampled, from "
                f"which it has moved. Remove it, or {off}."
            ]
    if engine == "vllm" and generation.colocated.enabled:
        return [
            f"policy.generation.colocated.enabled=True: vLLM has to sample while this process trains. Set it to false, "
            f"which gives vLLM a process of its own, or {off}."
        ]
    if engine == "in_process" and config.policy.deterministic and has_gpu():
        return [
            f"policy.deterministic=True: the engine samples in a thread of the process that trains, and torch has one "
            f"switch for both, so neither would repeat. Set it to false, or {off}."
        ]
    if engine == "in_process" and ahead.recompute_kv_cache_after_weight_updates:
        return [
            "grpo.async_grpo.recompute_kv_cache_after_weight_updates=True: the in-process engine keeps the keys and "
            "values that it has. Set it to false, or policy.generation.backend=vllm."
        ]
    return []


def _world_problems(config: MasterConfig) -> list[str]:
    """A paragraph for each parallel size of the DTensor backend that the processes cannot have."""
    if config.policy.active_backend != "dtensor":
        return []
    sizes, key, number = config.policy.dtensor_cfg, "policy.dtensor_cfg", config.cluster.num_processes
    problems = []
    if sizes.context_parallel_size > 1:
        problems.append(
            f"{key}.context_parallel_size={sizes.context_parallel_size}: the DTensor backend does not split sequences "
            f"between ranks. Set {key}.context_parallel_size=1, or policy.backend=megatron with "
            f"policy.megatron_cfg.context_parallel_size={sizes.context_parallel_size}."
        )
    group = sizes.tensor_parallel_size * sizes.dp_replicate_size
    if number % group:
        asked = "tensor_parallel_size" if sizes.tensor_parallel_size > 1 else "dp_replicate_size"
        problems.append(
            f"{key}.{asked}={getattr(sizes, asked)}: {sizes.tensor_parallel_size} tensor-parallel ranks x "
            f"{sizes.dp_replicate_size} replicas have to divide the number of processes, and cluster.num_nodes x "
            f"cluster.gpus_per_node is {number}. Change one of them."
        )
    if sizes.sequence_parallel and sizes.tensor_parallel_size == 1:
        problems.append(
            f"{key}.sequence_parallel=True: it shards activations between tensor-parallel ranks, and there is one. "
            f"Set {key}.sequence_parallel=false."
        )
    if sizes.custom_parallel_plan is not None and sizes.tensor_parallel_size == 1:
        problems.append(
            f"{key}.custom_parallel_plan={sizes.custom_parallel_plan!r}: it splits matrices between tensor-parallel "
            f"ranks, and there is one. Set {key}.custom_parallel_plan=null, or raise {key}.tensor_parallel_size."
        )
    if sizes.load is not None and number == 1:
        problems.append(
            f"{key}.load={sizes.load!r}: says how several processes load the base, and there is one. Set "
            f"{key}.load=null, or raise cluster.gpus_per_node."
        )
    return problems


def megatron_problems(config: MasterConfig) -> list[str]:
    """A paragraph for each value of `policy.megatron_cfg` that this backend does not run."""
    return [
        *_balancing_problems(config),
        *_sequence_problems(config),
        *_context_problems(config),
        *_schedule_problems(config),
        *_a2a_problems(config),
    ]


def _balancing_problems(config: MasterConfig) -> list[str]:
    key, kind = f"{_KEY}.moe_router_load_balancing_type", config.policy.megatron_cfg.moe_router_load_balancing_type
    if kind == "none" or not config.is_set(key):
        return []
    return [f"{key}={kind!r}: the Megatron backend of this version has no such setting. Remove the change."]


def _sequence_problems(config: MasterConfig) -> list[str]:
    sizes = config.policy.megatron_cfg
    if not sizes.sequence_parallel or sizes.tensor_model_parallel_size > 1:
        return []
    return [
        f"{_KEY}.sequence_parallel=True: it shards activations between tensor-parallel ranks, and there is one. Set "
        f"{_KEY}.sequence_parallel=false."
    ]


def _context_problems(config: MasterConfig) -> list[str]:
    size = config.policy.megatron_cfg.context_parallel_size
    if size == 1 or config.policy.shared_prefix.enabled is not True:
        return []
    return [
        f"policy.shared_prefix.enabled=True: {size} context-parallel ranks share each sequence, and a prompt does not "
        f"split with it. Set policy.shared_prefix.enabled=auto, or {_KEY}.context_parallel_size=1."
    ]


def _schedule_problems(config: MasterConfig) -> list[str]:
    megatron = config.policy.megatron_cfg
    scheduler, key = megatron.scheduler, f"{_KEY}.scheduler"
    varies = (
        scheduler.start_weight_decay != scheduler.end_weight_decay or scheduler.weight_decay_incr_style != "constant"
    )
    problems = []
    if weight_decay_schedule_is_in_force(config.layers) and varies:
        problems.append(
            f"{key}.end_weight_decay={scheduler.end_weight_decay}: weight decay is constant here, and it starts at "
            f"{scheduler.start_weight_decay} ({scheduler.weight_decay_incr_style}). Set both to one value and "
            f"{key}.weight_decay_incr_style=constant."
        )
    if not megatron_schedule_is_in_force(config):
        return problems
    style, warmup, end = scheduler.lr_decay_style, scheduler.lr_warmup_iters, scheduler.lr_decay_iters
    peak = megatron_peak_lr(config, lora=lora_spec_from_policy(config.policy) is not None)
    if style == "WSD":
        problems.append(
            f"{key}.lr_decay_style='WSD': no key says how long its decay is. Use "
            "policy.scheduler={name: wsd, ...} and leave the Megatron schedule as it is."
        )
    elif style != "constant" and (end is None or end <= warmup):
        problems.append(
            f"{key}.lr_decay_iters={end}: the {style} schedule has to end after its warm-up of {warmup} steps. "
            f"Set it to the number of the run's steps."
        )
    if style != "constant" and megatron.optimizer.min_lr > peak:
        problems.append(
            f"{_KEY}.optimizer.min_lr={megatron.optimizer.min_lr}: is where the learning rate of {peak} decays to. "
            f"Lower it to {peak} or less."
        )
    if warmup and scheduler.lr_warmup_init > peak and config.is_set(f"{key}.lr_warmup_init"):
        problems.append(
            f"{key}.lr_warmup_init={scheduler.lr_warmup_init}: is where the warm-up to the learning rate of {peak} "
            f"starts. Lower it to {peak} or less."
        )
    return problems


def _a2a_problems(config: MasterConfig) -> list[str]:
    policy, spec = config.policy, lora_spec_from_policy(config.policy)
    if spec is None or not spec.a2a:
        return []
    key = lora_field_key(policy, "a2a")
    sizes = policy.megatron_cfg
    if sizes.sequence_parallel and sizes.tensor_model_parallel_size > 1:
        return []
    return [
        f"{key}=True: one all-to-all replaces a gather between tensor-parallel ranks that share the sequence, and "
        f"there are {sizes.tensor_model_parallel_size} with {_KEY}.sequence_parallel={sizes.sequence_parallel}. "
        f"Set it to false."
    ]
