"""A run is put together: policy, engine and the record of both. The only place that picks an engine."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nemo_rl_lora.algorithms.algorithm import Run
from nemo_rl_lora.algorithms.served import ServedPolicy
from nemo_rl_lora.checkpoints.record import TrainingInfo
from nemo_rl_lora.config.cluster import joins_ray
from nemo_rl_lora.config.cluster_rules import refuse_missing_env_vars
from nemo_rl_lora.config.errors import ConfigError
from nemo_rl_lora.config.generation import GenerationConfig, chosen_engine
from nemo_rl_lora.config.lora import kernels_off_because
from nemo_rl_lora.config.master import GrpoMaster, MasterConfig
from nemo_rl_lora.generation.protocol import Generation
from nemo_rl_lora.generation.sync_mode import SyncChoice, stored_weight
from nemo_rl_lora.kernels import machine
from nemo_rl_lora.lora.files import AdapterBase
from nemo_rl_lora.models.flops import flop_rates, why_not_counted
from nemo_rl_lora.models.stored import BadWeightsError
from nemo_rl_lora.plan.plan import chosen_sync
from nemo_rl_lora.policy.backends import build_policy
from nemo_rl_lora.policy.determinism import deterministic_algorithms
from nemo_rl_lora.policy.protocol import PolicySetup
from nemo_rl_lora.run.auto_budget import settle_train_tokens
from nemo_rl_lora.run.console import TrainingConsole
from nemo_rl_lora.run.metrics import RunLog
from nemo_rl_lora.run.preflight import Start, expected_steps
from nemo_rl_lora.run.utilization import Utilization, published_peak
from nemo_rl_lora.types import SyncMode

if TYPE_CHECKING:
    from nemo_rl_lora.distributed.engine_process import EngineProcesses
    from nemo_rl_lora.distributed.policy_group import PolicyGroup
    from nemo_rl_lora.policy.dtensor.policy import DTensorPolicy
    from nemo_rl_lora.policy.megatron.policy import MegatronPolicy

    RunPolicy = DTensorPolicy | MegatronPolicy | PolicyGroup

logger = logging.getLogger(__name__)


def build_run(start: Start, log: RunLog, cleanup: ExitStack) -> Run:
    """Load the weights, and attach the algorithm to its run. What has to be closed is registered with `cleanup`."""
    config, engine, algorithm = start.config, start.config.policy.generation, start.algorithm
    cleanup.callback(algorithm.close)
    cleanup.callback(start.evaluations.close)
    cleanup.enter_context(deterministic_algorithms(config.policy.deterministic))
    processes = _engine_processes(start, engine, cleanup)
    try:
        policy = _build_policy(start)
    except BadWeightsError as error:
        raise ConfigError(str(error)) from error
    cleanup.callback(policy.close)
    phase = start.phase
    begin, part = (0, "") if phase is None else (phase.begin.step, f", {phase.begin.name}")
    console = TrainingConsole(
        title=f"{config.algorithm.upper()} {config.policy.model_name}{part}",
        num_steps=begin + (start.num_steps if phase is None else expected_steps(start)[0]),
        metrics=(*algorithm.key_metrics, *start.evaluations.key_metrics),
        first_step=begin if start.resume is None else start.resume.step,
    )
    served = generation = choice = None
    if engine is not None:
        generation, choice = _build_generation(start, policy, engine, processes)
        cleanup.callback(generation.close)
        served = ServedPolicy(policy, generation, choice)
    train_tokens = settle_train_tokens(start, policy, generation, choice)
    run = Run(
        config=config,
        policy=policy,
        served=served,
        evaluations=start.evaluations,
        loader=start.loader,
        tokenizer=start.tokenizer,
        num_steps=start.num_steps,
        phase=phase,
        lr_at=start.adam.lr_at,
        resume=start.resume,
        origin=replace(_origin(start), train_mb_tokens=train_tokens),
        checkpointer=start.checkpointer,
        log=log,
        console=console,
        utilization=_utilization(start, policy),
    )
    algorithm.attach(run)
    cleanup.callback(algorithm.detach)
    return run


def _utilization(start: Start, policy: RunPolicy) -> Utilization:
    """What the metrics of a step are measured by; why some of them are left out is logged."""
    config, spec, model = start.config, start.spec, start.model
    rates, gpu = None, policy.gpu_name
    peak = config.logger.peak_tflops or published_peak(gpu, config.policy.precision)
    if (reason := why_not_counted(model.config, config.policy.max_total_sequence_length)) is not None:
        logger.info(f"no model_tflops_per_second_per_gpu and mfu among the metrics: {reason}")
    else:
        adapted = None if spec is None else policy.adapted
        rates = flop_rates(model, adapted, shared_a=spec is not None and spec.fused == "shared")
        if peak is None and gpu is not None:
            logger.info(f"no mfu among the metrics: the peak of {gpu} is not known here. Set logger.peak_tflops.")
    return Utilization(num_processes=config.cluster.num_processes, rates=rates, peak_tflops=peak)


def _origin(start: Start) -> TrainingInfo:
    """What every checkpoint of the run says; a run that continues goes on saying where its adapter came from."""
    return TrainingInfo(
        step=0,
        phase=start.config.algorithm,
        model_source=start.source.description,
        base_digest=start.base_digest,
        spec=None if start.spec is None else asdict(start.spec),
        initial_adapter=start.initial_record,
        data_digests=start.algorithm.data_digests(),
        reward_digests=start.reward_digests,
        clock=start.clock,
        phase_begin=None if start.phase is None else start.phase.begin,
    )


def _build_policy(start: Start) -> RunPolicy:
    config, source = start.config.policy, start.source
    cluster = start.config.cluster
    setup = PolicySetup(
        model_path=source.path,
        base_model_name=config.model_name,
        base=AdapterBase(name=source.found_by, source=source.description, digest=start.base_digest),
        spec=start.spec,
        seed=start.algorithm.loop.seed,
        temperature=start.algorithm.temperature,
        keep_reference=start.config.needs_reference,
        logprob_rows=start.algorithm.logprob_rows,
        adam=start.adam,
        initial_adapter=None if start.initial_adapter is None else start.initial_adapter.directory,
        reference=config.adapter.reference or "base",
    )
    _say_why_kernels_are_off(start)
    if start.config.layers.without_effect:
        logger.info(f"keys of NeMo RL that change nothing here: {', '.join(start.config.layers.without_effect)}")
    if start.initial_adapter is not None:
        logger.info(f"policy.adapter.init_from: {start.initial_adapter}")
    if cluster.num_processes > 1:
        from nemo_rl_lora.distributed.policy_group import PolicyGroup

        return PolicyGroup(config, setup, cluster, written=_written(start.config), read=_read(start))
    refuse_missing_env_vars(config)
    return build_policy(config, setup)


def _written(config: MasterConfig) -> dict[Path, str]:
    """The directories into which the policy's processes write, by key=value."""
    directories = {}
    if config.checkpointing.enabled:
        directories["checkpointing.checkpoint_dir"] = config.checkpointing.checkpoint_dir
    if config.logger.record_digests:  # of files that are written there, and removed
        directories["logger.record_digests=True, in logger.log_dir"] = config.logger.log_dir
    return {Path(directory): f"{key}={directory!r}" for key, directory in directories.items()}


def _read(start: Start) -> dict[Path, str]:
    """The checkpoints that the policy's processes read, by key=value."""
    label = f"checkpointing.load_path={start.config.checkpointing.load_path!r}"
    begins = None if start.phase is None else start.phase.goes_on_from
    paths = (begins, None if start.resume is None else start.resume.path)
    return {path: label for path in paths if path is not None}


def _say_why_kernels_are_off(start: Start) -> None:
    config, spec = start.config.policy, start.spec
    if spec is None or config.active_backend != "dtensor":
        return
    lacks = None if joins_ray() else machine.kernel_problem()  # of a cluster's nodes nothing is known here
    if (reason := kernels_off_because(config, spec, lacks=lacks)) is not None:
        logger.warning(reason)


def _engine_processes(start: Start, config: GenerationConfig | None, cleanup: ExitStack) -> EngineProcesses | None:
    """The places of engines in processes of their own, before a weight is loaded; None where there are none."""
    if config is None or config.colocated.enabled:
        return None
    from nemo_rl_lora.distributed.engine_process import EngineProcesses

    processes = EngineProcesses(config, start.config.cluster)
    cleanup.callback(processes.close)
    return processes


def _build_generation(
    start: Start, policy: RunPolicy, config: GenerationConfig, processes: EngineProcesses | None
) -> tuple[Generation, SyncChoice]:
    """The engine for the policy that is trained, and the form in which it gets its weights."""
    backend, reason = chosen_engine(config.backend)
    logger.info(f"policy.generation.backend={config.backend!r}: {backend} ({reason})")
    chosen = chosen_sync(start.config, start.spec, policy.adapted, start.model.config)
    if backend == "replay":
        from nemo_rl_lora.generation.replay import ReplayGeneration

        assert config.replay_path is not None, "checked by GenerationConfig"
        return ReplayGeneration(Path(config.replay_path), start.tokenizer), SyncChoice(chosen)
    if backend == "vllm":
        weight_of = partial(stored_weight, start.source.path)
        sync = SyncChoice(chosen, policy.adapted, weight_of, config.vllm_cfg.precision)
        return _build_vllm(start, policy.adapted, config, sync.mode, processes), sync
    from nemo_rl_lora.generation.in_process.engine import InProcessGeneration

    base = policy.base_model()
    sync = SyncChoice(chosen, policy.adapted, base.get_parameter, start.config.policy.precision, takes_both=True)
    engine = InProcessGeneration(
        base,
        tokenizer=start.tokenizer,
        spec=start.spec,
        adapted=policy.adapted,
        compute_dtype=policy.compute_dtype,
        max_concurrent_sequences=config.max_concurrent_sequences,
        cuda_graphs=config.cuda_graphs,
    )
    return engine, sync


def _updates_in_flight(start: Start) -> Literal["keep", "recompute"] | None:
    """What becomes of the keys and values of a completion that goes on under new weights; None: none does."""
    ahead = start.config.grpo.async_grpo if isinstance(start.config, GrpoMaster) else None
    if ahead is None or not (ahead.num_steps_ahead and ahead.in_flight_weight_updates):
        return None
    return "recompute" if ahead.recompute_kv_cache_after_weight_updates else "keep"


def _build_vllm(
    start: Start, adapted: Any, config: GenerationConfig, mode: SyncMode, processes: EngineProcesses | None
) -> Generation:
    from nemo_rl_lora.generation.vllm.generation import ServedModel, VllmGeneration, engine_settings, start_engine

    policy = start.config.policy
    model = ServedModel(
        path=start.source.path, name=policy.model_name, tokenizer=start.tokenizer, spec=start.spec, adapted=adapted
    )
    settings = engine_settings(config, model, policy.hf_config_overrides, mode, _updates_in_flight(start))
    if processes is None:
        doing = "sleeps" if settings.sleeps else "stays awake (on a CPU vLLM puts nothing to sleep)"
        logger.info(f"generation: vLLM shares the trainer's device, and {doing} while the policy trains")
        return VllmGeneration(model, settings, partial(start_engine, settings))
    number, process = len(processes.nodes), partial(processes.start, settings)
    return VllmGeneration(model, settings, process, config.max_generation_failures, number)
