"""The engine that samples in a GRPO run. The only place that picks one."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_rl_lora.config.generation import GenerationConfig, chosen_engine
from nemo_rl_lora.generation.protocol import Generation

if TYPE_CHECKING:
    from nemo_rl_lora.run.preflight import Start
    from nemo_rl_lora.run.start import RunPolicy

logger = logging.getLogger(__name__)


def check_engine(config: GenerationConfig) -> None:
    """ValueError where rollouts come from a file that is missing or damaged."""
    if config.replay_path is not None:
        from nemo_rl_lora.generation.replay import check_replay

        check_replay(Path(config.replay_path))


def build_generation(start: Start, policy: RunPolicy, config: GenerationConfig) -> Generation:
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
