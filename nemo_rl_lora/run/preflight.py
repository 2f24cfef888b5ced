"""What is checked before a weight is loaded, by `--plan` and by every start.

Contract: PREFLIGHT is the one list. A start stops at the first ValueError; a plan collects them all. A plan takes
nothing: it does not lock the checkpoints' directory, and the base's weights need not be there.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from nemo_rl_lora.algorithms.algorithm import Algorithm
from nemo_rl_lora.algorithms.dpo import Dpo
from nemo_rl_lora.algorithms.grpo import Grpo
from nemo_rl_lora.algorithms.sft import Sft
from nemo_rl_lora.checkpoints.durable_files import probe_directory
from nemo_rl_lora.checkpoints.steps import Checkpointer, ResumePoint, is_finished
from nemo_rl_lora.config.load import resolved_tree
from nemo_rl_lora.config.lora import lora_spec_from_policy
from nemo_rl_lora.config.master import MasterConfig
from nemo_rl_lora.config.policy import ModelConfig
from nemo_rl_lora.data.loader import RowLoader
from nemo_rl_lora.lora.spec import LoraSpec
from nemo_rl_lora.models.source import ModelSource, base_digest, load_tokenizer, resolve_model
from nemo_rl_lora.plan.plan import Plan, make_plan
from nemo_rl_lora.run.metrics import check_sinks
from nemo_rl_lora.run.warm_start import InitialAdapter, check_initial_adapter

ALGORITHMS: dict[str, type[Algorithm[Any]]] = {"sft": Sft, "dpo": Dpo, "grpo": Grpo}


class Start:
    """What a run starts from: facts that are found out once, when they are first asked for."""

    def __init__(self, config: MasterConfig, plan: Plan | None = None) -> None:
        """`plan` is that of a run which starts now; None: it is only planned, so that nothing is taken and the base's
        weights need not be there."""
        self.config, self.plan = config, plan
        self.algorithm = ALGORITHMS[config.algorithm](config)

    @property
    def spec(self) -> LoraSpec | None:
        return lora_spec_from_policy(self.config.policy)

    @cached_property
    def source(self) -> ModelSource:
        return resolve_model(self.config.policy.model_name, weights=self.plan is not None)

    @cached_property
    def tokenizer(self) -> Any:
        return tokenizer_of(self.config.policy, self.source)

    @cached_property
    def loader(self) -> RowLoader[Any]:
        return self.algorithm.load_data(self.tokenizer)

    @property
    def num_steps(self) -> int:
        loop = self.algorithm.loop
        return min(loop.max_num_steps, loop.max_num_epochs * self.loader.num_batches_per_epoch)

    @cached_property
    def checkpointer(self) -> Checkpointer:
        return Checkpointer(self.config.checkpointing, resolved_tree(self.config), type(self.config))

    @cached_property
    def resume(self) -> ResumePoint | None:
        """Where the run continues; None for a new one."""
        return self.checkpointer.find_resume()

    @cached_property
    def base_digest(self) -> str | None:
        """Of the weights in `source`; None where they are not in safetensors files."""
        return base_digest(self.source.path)

    @cached_property
    def initial_adapter(self) -> InitialAdapter | None:
        """What a new run's adapter starts from; None where A is drawn, and where the run continues."""
        if self.resume is not None or self.spec is None:
            return None
        return check_initial_adapter(self.config.policy, self.spec, self.source, self.base_digest)

    @property
    def is_finished(self) -> bool:
        """Whether the run did all its steps already."""
        return is_finished(self.resume, self.num_steps)


def _engine(start: Start) -> None:
    """Rollouts that come from a file have to be there, and whole."""
    engine = start.config.policy.generation
    if engine is not None and engine.replay_path is not None:
        from nemo_rl_lora.generation.replay import check_replay

        check_replay(Path(engine.replay_path))


def _tokenizer(start: Start) -> str:
    return f"{len(start.tokenizer)} tokens, end of sequence {start.tokenizer.eos_token!r}"


def _data(start: Start) -> str:
    loader = start.loader
    return f"{start.algorithm.describe_data()} ({loader.num_batches_per_epoch} steps an epoch)"


def _directories(start: Start) -> str:
    logger, checkpointing = start.config.logger, start.config.checkpointing
    probe_directory(Path(logger.log_dir), "logger.log_dir")
    if not checkpointing.enabled:
        return f"{logger.log_dir} can be written"
    if start.plan is None:
        probe_directory(Path(checkpointing.checkpoint_dir), "checkpointing.checkpoint_dir")
    else:
        start.checkpointer.prepare(required_bytes=start.plan.sizes.checkpoint_bytes)
    return f"{logger.log_dir} and {checkpointing.checkpoint_dir} can be written"


def _resume(start: Start) -> str | None:
    resume = start.resume
    if resume is None:
        return None
    if start.is_finished:
        return f"the run in {resume.path} is finished: {resume.step} steps"
    start.checkpointer.refuse_without_optimizer(resume)
    if start.base_digest is not None or start.plan is not None:
        start.checkpointer.refuse_other_base(resume, start.base_digest)
    return f"the run continues after step {resume.step}, from {resume.path}"


# What a check returns is what it found, for the plan; it raises ValueError where the run cannot start.
PREFLIGHT: tuple[tuple[str, Callable[[Start], str | None]], ...] = (
    ("sinks", lambda start: check_sinks(start.config.logger)),
    ("engine", _engine),
    ("tokenizer", _tokenizer),
    ("data", _data),
    ("directories", _directories),
    ("checkpoint", _resume),
    ("initial adapter", lambda start: start.initial_adapter and str(start.initial_adapter)),
)


def plan_run(config: MasterConfig) -> Plan:
    """What this run would do, and everything that stops it."""
    start = Start(config)
    return make_plan(config, [(name, partial(check, start)) for name, check in PREFLIGHT])


def check_start(config: MasterConfig) -> Start:
    """Everything that can be known without weights, and the checkpoints' directory taken. ValueError names the first
    thing that is wrong."""
    plan = make_plan(config)
    if plan.problems:
        raise ValueError("\n".join(plan.problems))
    start = Start(config, plan)
    with ExitStack() as failed:
        failed.callback(start.checkpointer.close)
        for _, check in PREFLIGHT:
            check(start)
        failed.pop_all()
    return start


def tokenizer_of(config: ModelConfig, source: ModelSource) -> Any:
    """The tokenizer that the policy's config names."""
    section = config.tokenizer
    if config.tokenizer_name != config.model_name:
        source = resolve_model(config.tokenizer_name, "policy.tokenizer.name", weights=False)
    return load_tokenizer(source, section.chat_template, section.chat_template_kwargs)
