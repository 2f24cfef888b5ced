"""A run is put together: policy, engine and the record of both. The only place that picks an engine."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_rl_lora.algorithms.algorithm import Run
from nemo_rl_lora.checkpoints.record import TrainingInfo
from nemo_rl_lora.config.generation import GenerationConfig, chosen_engine
from nemo_rl_lora.config.optimizer_settings import adam_settings, constant, megatron_adam_settings
from nemo_rl_lora.generation.protocol import Generation
from nemo_rl_lora.policy.backends import build_policy
from nemo_rl_lora.policy.protocol import PolicySetup
from nemo_rl_lora.run.console import TrainingConsole
from nemo_rl_lora.run.metrics import RunLog
from nemo_rl_lora.run.preflight import Start

if TYPE_CHECKING:
    from nemo_rl_lora.distributed.policy_group import PolicyGroup
    from nemo_rl_lora.policy.dtensor.policy import DTensorPolicy
    from nemo_rl_lora.policy.megatron.policy import MegatronPolicy

    RunPolicy = DTensorPolicy | MegatronPolicy | PolicyGroup

logger = logging.getLogger(__name__)


def build_run(start: Start, log: RunLog, cleanup: ExitStack) -> Run:
    """Load the weights, and attach the algorithm to its run. What has to be closed is registered with `cleanup`."""
    config, engine, algorithm = start.config, start.config.policy.generation, start.algorithm
    cleanup.callback(algorithm.close)
    policy = _build_policy(start)
    cleanup.callback(policy.close)
    console = TrainingConsole(
        title=f"{config.algorithm.upper()} {config.policy.model_name}",
        num_steps=start.num_steps,
        metrics=algorithm.key_metrics,
        first_step=0 if start.resume is None else start.resume.step,
    )
    generation = None if engine is None else _build_generation(start, policy, engine)
    if generation is not None:
        cleanup.callback(generation.close)
    run = Run(
        config=config,
        policy=policy,
        generation=generation,
        loader=start.loader,
        tokenizer=start.tokenizer,
        num_steps=start.num_steps,
        resume=start.resume,
        origin=_origin(start),
        checkpointer=start.checkpointer,
        log=log,
        console=console,
    )
    algorithm.attach(run)
    return run


def _origin(start: Start) -> TrainingInfo:
    """What every checkpoint of the run says; a run that continues goes on saying where its adapter came from."""
    if start.resume is not None:
        initial_adapter = start.resume.info.initial_adapter
    else:
        initial_adapter = None if start.initial_adapter is None else start.initial_adapter.record
    return TrainingInfo(
        step=0,
        phase=start.config.algorithm,
        model_source=start.source.description,
        base_digest=start.base_digest,
        spec=None if start.spec is None else asdict(start.spec),
        initial_adapter=initial_adapter,
    )


def _build_policy(start: Start) -> RunPolicy:
    config = start.config.policy
    num_processes = start.config.cluster.num_nodes * start.config.cluster.gpus_per_node
    lora, is_megatron = start.spec is not None, config.active_backend == "megatron"
    adam = megatron_adam_settings(start.config, lora=lora) if is_megatron else adam_settings(config, lora=lora)
    setup = PolicySetup(
        model_path=start.source.path,
        base_model_name=config.model_name,
        spec=start.spec,
        seed=start.algorithm.loop.seed,
        temperature=start.algorithm.temperature,
        keep_reference=start.config.needs_reference,
        logprob_rows=start.algorithm.logprob_rows,
        adam=adam if config.adapter.trainable else replace(adam, lr_at=partial(constant, 0.0)),
        initial_adapter=None if start.initial_adapter is None else start.initial_adapter.directory,
        reference=config.adapter.reference or "base",
    )
    if start.initial_adapter is not None:
        logger.info(f"policy.adapter.init_from: {start.initial_adapter}")
    if num_processes > 1:
        from nemo_rl_lora.distributed.policy_group import PolicyGroup

        return PolicyGroup(config, setup, num_processes)
    return build_policy(config, setup)


def _build_generation(start: Start, policy: RunPolicy, config: GenerationConfig) -> Generation:
    """The engine for the policy that is trained."""
    backend, reason = chosen_engine(config.backend)
    logger.info(f"policy.generation.backend={config.backend!r}: {backend} ({reason})")
    if backend == "replay":
        from nemo_rl_lora.generation.replay import ReplayGeneration

        assert config.replay_path is not None, "checked by GenerationConfig"
        return ReplayGeneration(Path(config.replay_path), start.tokenizer)
    if backend == "vllm":
        return _build_vllm(start, policy.adapted, config)
    from nemo_rl_lora.generation.in_process.engine import InProcessGeneration

    return InProcessGeneration(
        policy.base_model(),
        tokenizer=start.tokenizer,
        spec=start.spec,
        adapted=policy.adapted,
        compute_dtype=policy.compute_dtype,
        max_concurrent_sequences=config.max_concurrent_sequences,
    )


def _build_vllm(start: Start, adapted: Any, config: GenerationConfig) -> Generation:
    from nemo_rl_lora.generation.vllm.generation import ServedModel, VllmGeneration, engine_settings, start_engine

    policy = start.config.policy
    model = ServedModel(
        path=start.source.path, name=policy.model_name, tokenizer=start.tokenizer, spec=start.spec, adapted=adapted
    )
    settings = engine_settings(config, model, policy.hf_config_overrides)
    if config.colocated.enabled:
        return VllmGeneration(model, settings, partial(start_engine, settings))
    from nemo_rl_lora.distributed.engine_process import EngineProcess

    process = partial(EngineProcess, settings, config.timeout_seconds)
    return VllmGeneration(model, settings, process, config.max_generation_failures)
