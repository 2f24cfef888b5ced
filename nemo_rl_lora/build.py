"""The composition root: from a configuration to the parts of a run. The only place that picks a backend.

Everything that can be refused is refused before a weight is loaded: `check_start` first, `build_grpo` after it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_rl_lora.algorithms.grpo import GrpoParts
from nemo_rl_lora.algorithms.losses import make_policy_loss
from nemo_rl_lora.algorithms.rollout import RolloutParams
from nemo_rl_lora.checkpoint import Checkpointer, ResumePoint, is_finished, probe_directory
from nemo_rl_lora.config.master import GrpoMaster
from nemo_rl_lora.config.policy import PolicyConfig
from nemo_rl_lora.console import KeyMetric, TrainingConsole
from nemo_rl_lora.data.prompts import PromptLoader, PromptSet, load_prompt_sets
from nemo_rl_lora.environments.protocol import Environment
from nemo_rl_lora.environments.registry import check_prompts, make_environments
from nemo_rl_lora.generation.protocol import Generation
from nemo_rl_lora.lora.spec import LoraSpec
from nemo_rl_lora.metrics import RunLog, check_sinks
from nemo_rl_lora.model_source import ModelSource, load_tokenizer, resolve_model
from nemo_rl_lora.plan import chosen_engine, make_plan
from nemo_rl_lora.types import SamplingParams

if TYPE_CHECKING:
    from nemo_rl_lora.policy.dtensor import DTensorPolicy

logger = logging.getLogger(__name__)

KEY_METRICS = (
    KeyMetric(name="reward", higher_is_better=True),
    KeyMetric(name="accuracy", split="validation", higher_is_better=True),
    KeyMetric(name="loss"),
    KeyMetric(name="gen_kl_error"),
    KeyMetric(name="mean_completion_length", label="length"),
    KeyMetric(name="generation_tokens_per_second", label="sampled tokens/s"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedStart:
    """A run that has been checked, before any weight is loaded."""

    config: GrpoMaster
    source: ModelSource
    tokenizer: Any
    spec: LoraSpec | None
    train: PromptSet
    validation: PromptSet | None
    environments: dict[str, Environment]
    checkpointer: Checkpointer
    resume: ResumePoint | None
    num_steps: int

    @property
    def is_finished(self) -> bool:
        """Whether the run did all its steps already."""
        return is_finished(self.resume, self.num_steps)


def check_start(config: GrpoMaster) -> CheckedStart:
    """Everything that can be known without weights. ValueError names the first thing that is wrong."""
    plan = make_plan(config)
    if plan.problems:
        raise ValueError("\n".join(plan.problems))
    check_sinks(config.logger)
    _check_rollouts(config)
    source = resolve_model(config.policy.model_name)
    tokenizer = tokenizer_of(config.policy, source)
    train, validation = load_prompt_sets(config, tokenizer)
    num_batches = prompt_loader(config, train).num_batches_per_epoch
    num_steps = min(config.grpo.max_num_steps, config.grpo.max_num_epochs * num_batches)
    checkpointer = Checkpointer(config.checkpointing, config.model_dump(mode="json", by_alias=True))
    checkpointer.prepare(required_bytes=plan.sizes.checkpoint_bytes)
    resume = checkpointer.find_resume()
    if resume is not None and not is_finished(resume, num_steps):
        checkpointer.refuse_without_optimizer(resume)
    return CheckedStart(
        config=config,
        source=source,
        tokenizer=tokenizer,
        spec=plan.spec,
        train=train,
        validation=validation,
        environments=_environments_of(config, train, validation),
        checkpointer=checkpointer,
        resume=resume,
        num_steps=num_steps,
    )


def build_grpo(start: CheckedStart, log: RunLog) -> GrpoParts:
    """Load the weights and put the run together."""
    config, generation_config = start.config, start.config.policy.generation
    assert generation_config is not None, "checked by GrpoMaster"
    loss = make_policy_loss(config.loss_fn)
    policy = _build_policy(start, keep_reference=loss.needs_reference)
    sampling = SamplingParams(
        max_new_tokens=generation_config.max_new_tokens,
        temperature=generation_config.temperature,
        top_p=generation_config.top_p,
        top_k=generation_config.top_k,
        stop_token_ids=tuple(generation_config.stop_token_ids or ()),
        stop_strings=tuple(generation_config.stop_strings or ()),
    )
    rollout_params = RolloutParams(
        num_completions=config.grpo.num_generations_per_prompt,
        sampling=sampling,
        max_sequence_length=config.policy.max_total_sequence_length,
        seed=config.grpo.seed,
        purpose="rollout",
    )
    validation_params = replace(
        rollout_params,
        num_completions=config.grpo.val_num_generations_per_prompt,
        sampling=replace(
            sampling,
            temperature=generation_config.val_temperature,
            top_p=generation_config.val_top_p,
            top_k=generation_config.val_top_k,
        ),
        purpose="validation",
    )
    return GrpoParts(
        config=config,
        policy=policy,
        generation=_build_generation(start, policy),
        environments=start.environments,
        loader=prompt_loader(config, start.train),
        validation=start.validation,
        rollout_params=rollout_params,
        validation_params=validation_params,
        loss=loss,
        num_steps=start.num_steps,
        checkpointer=start.checkpointer,
        log=log,
        console=TrainingConsole(
            title=f"GRPO {config.policy.model_name}",
            num_steps=start.num_steps,
            metrics=KEY_METRICS,
            first_step=0 if start.resume is None else start.resume.step,
        ),
        model_source=start.source.description,
        tokenizer=start.tokenizer,
    )


def plan_checks(config: GrpoMaster) -> list[tuple[str, Callable[[], str]]]:
    """What `--plan` looks at beside the model's config: tokenizer, data and environments, sinks, directories."""

    def tokenizer() -> str:
        made = tokenizer_of(config.policy, resolve_model(config.policy.model_name, weights=False))
        return f"{len(made)} tokens, end of sequence {made.eos_token!r}"

    def data() -> str:
        source = resolve_model(config.policy.model_name, weights=False)
        train, validation = load_prompt_sets(config, tokenizer_of(config.policy, source))
        _environments_of(config, train, validation)
        num_validation = 0 if validation is None else len(validation)
        loader = prompt_loader(config, train)
        return (
            f"{len(train)} training prompts ({loader.num_batches_per_epoch} steps an epoch), {num_validation} for "
            f"validation, scored by {', '.join(train.environment_names)}"
        )

    def directories() -> str:
        check_sinks(config.logger)
        _check_rollouts(config)
        checked = [config.logger.log_dir]
        probe_directory(Path(config.logger.log_dir), "logger.log_dir")
        if config.checkpointing.enabled:
            probe_directory(Path(config.checkpointing.checkpoint_dir), "checkpointing.checkpoint_dir")
            checked.append(config.checkpointing.checkpoint_dir)
        return f"{' and '.join(checked)} can be written"

    return [("tokenizer", tokenizer), ("data", data), ("directories", directories)]


def _check_rollouts(config: GrpoMaster) -> None:
    """Where rollouts come from a file, it is there and whole."""
    assert config.policy.generation is not None, "checked by GrpoMaster"
    if config.policy.generation.replay_path is not None:
        from nemo_rl_lora.generation.replay import check_replay

        check_replay(Path(config.policy.generation.replay_path))


def _environments_of(config: GrpoMaster, train: PromptSet, validation: PromptSet | None) -> dict[str, Environment]:
    """The environments that the prompts name, which have found every row complete."""
    sets = [prompts for prompts in (train, validation) if prompts is not None]
    environments = make_environments([name for prompts in sets for name in prompts.environment_names], config.env)
    for prompts in sets:
        check_prompts(environments, prompts.unencoded())
    return environments


def tokenizer_of(config: PolicyConfig, source: ModelSource) -> Any:
    """The tokenizer that the policy's config names."""
    section = config.tokenizer
    if config.tokenizer_name != config.model_name:
        source = resolve_model(config.tokenizer_name, "policy.tokenizer.name", weights=False)
    return load_tokenizer(source, section.chat_template, section.chat_template_kwargs)


def prompt_loader(config: GrpoMaster, prompts: PromptSet) -> PromptLoader:
    """The order of prompts. With dynamic sampling a draw takes `batch_multiplier` times the prompts of a step."""
    num_prompts = math.ceil(config.grpo.num_prompts_per_step * config.grpo.batch_multiplier)
    return PromptLoader(
        prompts,
        num_prompts,
        seed=config.grpo.seed,
        shuffle=config.data.shuffle,
        num_epochs=config.grpo.max_num_epochs,
    )


def _build_policy(start: CheckedStart, *, keep_reference: bool) -> DTensorPolicy:
    from nemo_rl_lora.policy.dtensor import DTensorPolicy, PolicySetup

    config = start.config.policy
    assert config.active_backend == "dtensor", config.active_backend
    assert config.generation is not None, "checked by GrpoMaster"
    setup = PolicySetup(
        model_path=start.source.path,
        base_model_name=config.model_name,
        spec=start.spec,
        seed=start.config.grpo.seed,
        temperature=config.generation.temperature,
        keep_reference=keep_reference,
    )
    return DTensorPolicy(config, setup)


def _build_generation(start: CheckedStart, policy: DTensorPolicy) -> Generation:
    config = start.config.policy.generation
    assert config is not None, "checked by GrpoMaster"
    backend, reason = chosen_engine(config.backend)
    logger.info(f"policy.generation.backend={config.backend!r}: {backend} ({reason})")
    if backend == "replay":
        from nemo_rl_lora.generation.replay import ReplayGeneration

        assert config.replay_path is not None, "checked by GenerationConfig"
        return ReplayGeneration(Path(config.replay_path), start.tokenizer)
    from nemo_rl_lora.generation.in_process import InProcessGeneration

    return InProcessGeneration(
        policy.base_model(),
        tokenizer=start.tokenizer,
        spec=start.spec,
        adapted=policy.adapted,
        compute_dtype=policy.compute_dtype,
        max_concurrent_sequences=config.max_concurrent_sequences,
    )
