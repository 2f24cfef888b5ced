"""GRPO, put together: prompts, environments, the engine and the loss. The only place that picks an engine."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from nemo_rl_lora.algorithms.grpo import GrpoParts, GrpoWork
from nemo_rl_lora.algorithms.losses import make_policy_loss
from nemo_rl_lora.algorithms.rollout import RolloutParams, validation_sampling
from nemo_rl_lora.build.start import RunContext
from nemo_rl_lora.config.generation import GenerationConfig, chosen_engine
from nemo_rl_lora.config.grpo import GrpoConfig
from nemo_rl_lora.config.master import GrpoMaster
from nemo_rl_lora.console import KeyMetric
from nemo_rl_lora.data.loader import RowLoader
from nemo_rl_lora.data.prompts import PromptSet, load_prompt_sets
from nemo_rl_lora.environments.protocol import Environment
from nemo_rl_lora.environments.registry import check_prompts, make_environments
from nemo_rl_lora.generation.protocol import Generation
from nemo_rl_lora.types import Prompt

logger = logging.getLogger(__name__)


class GrpoRecipe:
    """A build.start.Recipe."""

    key_metrics = (
        KeyMetric(name="reward", higher_is_better=True),
        KeyMetric(name="accuracy", split="validation", higher_is_better=True),
        KeyMetric(name="loss"),
        KeyMetric(name="gen_kl_error"),
        KeyMetric(name="mean_completion_length", label="length"),
        KeyMetric(name="generation_tokens_per_second", label="sampled tokens/s"),
    )

    def __init__(self, config: GrpoMaster) -> None:
        self.config = config
        assert config.policy.generation is not None, "checked by GrpoMaster"
        self._generation: GenerationConfig = config.policy.generation
        self._loss = make_policy_loss(config.loss_fn)
        self._train: PromptSet | None = None
        self._validation: PromptSet | None = None
        self._environments: dict[str, Environment] = {}

    @property
    def settings(self) -> GrpoConfig:
        return self.config.grpo

    @property
    def temperature(self) -> float:
        return self._generation.temperature

    @property
    def logprob_rows(self) -> int:
        return self.config.policy.logprob_rows

    @property
    def needs_reference(self) -> bool:
        return self._loss.needs_reference

    def check(self) -> None:
        """Where rollouts come from a file, it is there and whole."""
        if self._generation.replay_path is not None:
            from nemo_rl_lora.generation.replay import check_replay

            check_replay(Path(self._generation.replay_path))

    def load_data(self, tokenizer: Any) -> RowLoader[Prompt]:
        """Prompts, and the environments that they name, which have found every row complete.

        With dynamic sampling a draw takes `batch_multiplier` times the prompts of a step.
        """
        config = self.config
        self._train, self._validation = load_prompt_sets(config, tokenizer)
        num_prompts = math.ceil(config.grpo.num_prompts_per_step * config.grpo.batch_multiplier)
        loader = RowLoader(
            [self._train],
            num_prompts,
            key="grpo.num_prompts_per_step",
            seed=config.grpo.seed,
            shuffle=config.data.shuffle,
            num_epochs=config.grpo.max_num_epochs,
        )
        sets = [prompts for prompts in (self._train, self._validation) if prompts is not None]
        self._environments = make_environments(
            [name for prompts in sets for name in prompts.environment_names], config.env
        )
        for prompts in sets:
            check_prompts(self._environments, prompts.unencoded())
        return loader

    def describe_data(self) -> str:
        assert self._train is not None, "load_data comes first"
        num_validation = 0 if self._validation is None else len(self._validation)
        return (
            f"{len(self._train)} training prompts, {num_validation} for validation, scored by "
            f"{', '.join(self._train.environment_names)}"
        )

    def work(self, context: RunContext) -> GrpoWork:
        assert self._train is not None, "load_data comes first"
        generation = self._build_generation(context)
        context.cleanup.callback(generation.close)
        for environment in self._environments.values():
            context.cleanup.callback(environment.close)
        sampling = validation_sampling(self._generation)
        validation_params = RolloutParams(
            num_completions=self.config.grpo.val_num_generations_per_prompt,
            sampling=sampling,
            max_sequence_length=self.config.policy.max_total_sequence_length,
            seed=self.config.grpo.seed,
            purpose="validation",
        )
        rollout_params = replace(
            validation_params,
            num_completions=self.config.grpo.num_generations_per_prompt,
            sampling=replace(
                sampling,
                temperature=self._generation.temperature,
                top_p=self._generation.top_p,
                top_k=self._generation.top_k,
            ),
            purpose="rollout",
        )
        return GrpoWork(
            GrpoParts(
                config=self.config,
                policy=context.policy,
                generation=generation,
                environments=self._environments,
                loader=context.loader,
                prompts=self._train,
                validation=self._validation,
                rollout_params=rollout_params,
                validation_params=validation_params,
                loss=self._loss,
                log=context.log,
                console=context.console,
            )
        )

    def _build_generation(self, context: RunContext) -> Generation:
        config, policy = self._generation, context.policy
        backend, reason = chosen_engine(config.backend)
        logger.info(f"policy.generation.backend={config.backend!r}: {backend} ({reason})")
        if backend == "replay":
            from nemo_rl_lora.generation.replay import ReplayGeneration

            assert config.replay_path is not None, "checked by GenerationConfig"
            return ReplayGeneration(Path(config.replay_path), context.start.tokenizer)
        if backend == "vllm":
            from nemo_rl_lora.generation.vllm import ServedModel, VllmGeneration, engine_settings, start_engine

            model = ServedModel(
                path=context.start.source.path,
                name=self.config.policy.model_name,
                tokenizer=context.start.tokenizer,
                spec=context.start.spec,
                adapted=policy.adapted,
            )
            settings = engine_settings(config, model, self.config.policy.hf_config_overrides)
            if config.colocated.enabled:
                return VllmGeneration(model, settings, partial(start_engine, settings))
            from nemo_rl_lora.distributed.engine_process import EngineProcess

            start = partial(EngineProcess, settings, config.timeout_seconds)
            return VllmGeneration(model, settings, start, config.max_generation_failures)
        from nemo_rl_lora.generation.in_process import InProcessGeneration

        return InProcessGeneration(
            policy.base_model(),
            tokenizer=context.start.tokenizer,
            spec=context.start.spec,
            adapted=policy.adapted,
            compute_dtype=policy.compute_dtype,
            max_concurrent_sequences=config.max_concurrent_sequences,
        )
