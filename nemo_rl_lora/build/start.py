"""What every driver checks before a weight is loaded, and how a run is then put together.

An algorithm is a `Recipe`: its data, its work, its headline metrics. The only place that picks a training backend.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from nemo_rl_lora.algorithms.loop import LoopSettings, RunParts, TrainingLoop, Work
from nemo_rl_lora.base_identity import base_digest
from nemo_rl_lora.build.warm_start import InitialAdapter, check_initial_adapter
from nemo_rl_lora.checkpoint import Checkpointer, ResumePoint, is_finished, probe_directory
from nemo_rl_lora.config.adam import adam_settings, constant
from nemo_rl_lora.config.lora import lora_spec_from_policy
from nemo_rl_lora.config.master import DpoMaster, GrpoMaster, MasterConfig, SftMaster
from nemo_rl_lora.config.megatron_rules import megatron_adam_settings
from nemo_rl_lora.config.policy import ModelConfig
from nemo_rl_lora.console import KeyMetric, TrainingConsole
from nemo_rl_lora.data.loader import RowLoader
from nemo_rl_lora.data.row_sets import RowSet
from nemo_rl_lora.lora.spec import LoraSpec
from nemo_rl_lora.metrics import RunLog, check_sinks
from nemo_rl_lora.model_source import ModelSource, load_tokenizer, resolve_model
from nemo_rl_lora.plan import make_plan
from nemo_rl_lora.policy.protocol import PolicySetup

if TYPE_CHECKING:
    from nemo_rl_lora.distributed.policy_group import PolicyGroup
    from nemo_rl_lora.policy.dtensor import DTensorPolicy
    from nemo_rl_lora.policy.megatron.policy import MegatronPolicy

    RunPolicy = DTensorPolicy | MegatronPolicy | PolicyGroup

logger = logging.getLogger(__name__)
T = TypeVar("T")


class DriverSettings(LoopSettings, Protocol):
    """What is read here of the `sft`, `dpo` or `grpo` section."""

    @property
    def max_num_epochs(self) -> int: ...

    @property
    def max_num_steps(self) -> int: ...

    @property
    def seed(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext:
    """What an algorithm's work is built from, once the weights are there."""

    policy: RunPolicy
    loader: RowLoader[Any]
    log: RunLog
    console: TrainingConsole
    start: CheckedStart
    cleanup: ExitStack


class Recipe(Protocol):
    """One algorithm: how its data is read and its work is put together. Holds what it has read."""

    @property
    def config(self) -> MasterConfig: ...

    @property
    def settings(self) -> DriverSettings: ...

    @property
    def key_metrics(self) -> Sequence[KeyMetric]: ...

    @property
    def temperature(self) -> float:
        """At which log-probabilities are taken."""
        ...

    @property
    def logprob_rows(self) -> int:
        """Rows (or pairs) of a pass without gradient, where microbatches are filled by rows."""
        ...

    @property
    def needs_reference(self) -> bool: ...

    def load_data(self, tokenizer: Any) -> RowLoader[Any]:
        """Read and check every row. ValueError names the first thing that is wrong."""
        ...

    def describe_data(self) -> str:
        """What was read, for `--plan`."""
        ...

    def check(self) -> None:
        """Files that the algorithm needs beside its data."""
        ...

    def work(self, context: RunContext) -> Work: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedStart:
    """A run that has been checked, before any weight is loaded."""

    recipe: Recipe
    source: ModelSource
    tokenizer: Any
    spec: LoraSpec | None
    loader: RowLoader[Any]
    checkpointer: Checkpointer
    resume: ResumePoint | None
    num_steps: int
    base_digest: str | None  # of the weights in `source`; None where they are not in safetensors files
    initial_adapter: InitialAdapter | None  # what a new run starts from; None where it continues

    @property
    def config(self) -> MasterConfig:
        return self.recipe.config

    @property
    def is_finished(self) -> bool:
        """Whether the run did all its steps already."""
        return is_finished(self.resume, self.num_steps)


def make_recipe(config: MasterConfig) -> Recipe:
    """The recipe of the configuration's algorithm."""
    from nemo_rl_lora.build.dpo import DpoRecipe
    from nemo_rl_lora.build.grpo import GrpoRecipe
    from nemo_rl_lora.build.sft import SftRecipe

    if isinstance(config, GrpoMaster):
        return GrpoRecipe(config)
    if isinstance(config, DpoMaster):
        return DpoRecipe(config)
    assert isinstance(config, SftMaster), type(config)
    return SftRecipe(config)


def check_start(config: MasterConfig) -> CheckedStart:
    """Everything that can be known without weights. ValueError names the first thing that is wrong."""
    plan = make_plan(config)
    if plan.problems:
        raise ValueError("\n".join(plan.problems))
    check_sinks(config.logger)
    recipe = make_recipe(config)
    recipe.check()
    source = resolve_model(config.policy.model_name)
    tokenizer = tokenizer_of(config.policy, source)
    loader = recipe.load_data(tokenizer)
    settings = recipe.settings
    num_steps = min(settings.max_num_steps, settings.max_num_epochs * loader.num_batches_per_epoch)
    checkpointer = Checkpointer(config.checkpointing, config.model_dump(mode="json", by_alias=True))
    checkpointer.prepare(required_bytes=plan.sizes.checkpoint_bytes)
    resume = checkpointer.find_resume()
    digest = base_digest(source.path)
    if resume is not None and not is_finished(resume, num_steps):
        checkpointer.refuse_without_optimizer(resume)
        checkpointer.refuse_other_base(resume, digest)
    initial = None
    if resume is None and plan.spec is not None:
        initial = check_initial_adapter(config.policy, plan.spec, source, digest)
    return CheckedStart(
        recipe=recipe,
        source=source,
        tokenizer=tokenizer,
        spec=plan.spec,
        loader=loader,
        checkpointer=checkpointer,
        resume=resume,
        num_steps=num_steps,
        base_digest=digest,
        initial_adapter=initial,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run with its weights loaded, ready to go."""

    loop: TrainingLoop
    work: Work
    policy: RunPolicy
    console: TrainingConsole


def build_run(start: CheckedStart, log: RunLog, cleanup: ExitStack) -> Run:
    """Load the weights and put the run together. What has to be closed is registered with `cleanup`."""
    config, recipe = start.config, start.recipe
    policy = _build_policy(start)
    cleanup.callback(policy.close)
    console = TrainingConsole(
        title=f"{config.algorithm.upper()} {config.policy.model_name}",
        num_steps=start.num_steps,
        metrics=recipe.key_metrics,
        first_step=0 if start.resume is None else start.resume.step,
    )
    context = RunContext(policy=policy, loader=start.loader, log=log, console=console, start=start, cleanup=cleanup)
    parts = RunParts(
        config=config,
        settings=recipe.settings,
        policy=policy,
        loader=start.loader,
        num_steps=start.num_steps,
        checkpointer=start.checkpointer,
        log=log,
        console=console,
        model_source=start.source.description,
        base_digest=start.base_digest,
        spec=start.spec,
        initial_adapter=None if start.initial_adapter is None else start.initial_adapter.record,
        tokenizer=start.tokenizer,
    )
    work = recipe.work(context)
    return Run(loop=TrainingLoop(parts, work, start.resume), work=work, policy=policy, console=console)


def mixture_loader(config: MasterConfig, settings: DriverSettings, sets: Sequence[RowSet[T]]) -> RowLoader[T]:
    """Batches of `train_global_batch_size` rows out of all sets, by their rates."""
    return RowLoader(
        sets,
        config.policy.train_global_batch_size,
        key="policy.train_global_batch_size",
        seed=settings.seed,
        shuffle=config.data.shuffle,
        num_epochs=settings.max_num_epochs,
        rates=[rows.rate for rows in sets],
    )


def describe_sets(train: Sequence[RowSet[Any]], validation: Sequence[RowSet[Any]], noun: str) -> str:
    """How many rows each set has, for `--plan`."""
    named = ", ".join(f"{len(rows)} of {rows.name}" for rows in train)
    return f"{named} to train on, {sum(map(len, validation))} {noun} for validation"


def plan_checks(config: MasterConfig) -> list[tuple[str, Callable[[], str]]]:
    """What `--plan` looks at beside the model's config: tokenizer, data, sinks, directories."""
    recipe = make_recipe(config)

    @cache
    def make_tokenizer() -> Any:
        return tokenizer_of(config.policy, resolve_model(config.policy.model_name, weights=False))

    def tokenizer() -> str:
        made = make_tokenizer()
        return f"{len(made)} tokens, end of sequence {made.eos_token!r}"

    def data() -> str:
        loader = recipe.load_data(make_tokenizer())
        return f"{recipe.describe_data()} ({loader.num_batches_per_epoch} steps an epoch)"

    def directories() -> str:
        check_sinks(config.logger)
        recipe.check()
        checked = [config.logger.log_dir]
        probe_directory(Path(config.logger.log_dir), "logger.log_dir")
        if config.checkpointing.enabled:
            probe_directory(Path(config.checkpointing.checkpoint_dir), "checkpointing.checkpoint_dir")
            checked.append(config.checkpointing.checkpoint_dir)
        return f"{' and '.join(checked)} can be written"

    def initial_adapter() -> str:
        spec = lora_spec_from_policy(config.policy)
        assert spec is not None, "checked by MasterConfig"
        source = resolve_model(config.policy.model_name, weights=False)
        found = check_initial_adapter(config.policy, spec, source, base_digest(source.path))
        return str(found)

    warm = [("initial adapter", initial_adapter)] if config.policy.adapter.init_from else []
    return [("tokenizer", tokenizer), ("data", data), *warm, ("directories", directories)]


def tokenizer_of(config: ModelConfig, source: ModelSource) -> Any:
    """The tokenizer that the policy's config names."""
    section = config.tokenizer
    if config.tokenizer_name != config.model_name:
        source = resolve_model(config.tokenizer_name, "policy.tokenizer.name", weights=False)
    return load_tokenizer(source, section.chat_template, section.chat_template_kwargs)


def _build_policy(start: CheckedStart) -> RunPolicy:
    config, recipe = start.config.policy, start.recipe
    num_processes = start.config.cluster.num_nodes * start.config.cluster.gpus_per_node
    lora, is_megatron = start.spec is not None, config.active_backend == "megatron"
    adam = megatron_adam_settings(start.config, lora=lora) if is_megatron else adam_settings(config, lora=lora)
    setup = PolicySetup(
        model_path=start.source.path,
        base_model_name=config.model_name,
        spec=start.spec,
        seed=recipe.settings.seed,
        temperature=recipe.temperature,
        keep_reference=recipe.needs_reference,
        logprob_rows=recipe.logprob_rows,
        adam=adam if config.adapter.trainable else replace(adam, lr_at=partial(constant, 0.0)),
        initial_adapter=None if start.initial_adapter is None else start.initial_adapter.directory,
        reference=config.adapter.reference or "base",
    )
    if start.initial_adapter is not None:
        logger.info(f"policy.adapter.init_from: {start.initial_adapter}")
    if not is_megatron:
        from nemo_rl_lora.policy.dtensor import DTensorPolicy

        return DTensorPolicy(config, setup)
    with warnings.catch_warnings():  # megatron-core says of each optional package that it is not there
        warnings.simplefilter("ignore")
        from nemo_rl_lora.policy.megatron.policy import MegatronPolicy
    if num_processes > 1:
        from nemo_rl_lora.distributed.policy_group import PolicyGroup

        return PolicyGroup(config, setup, num_processes)
    return MegatronPolicy(config, setup)
