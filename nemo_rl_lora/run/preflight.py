"""What is checked before a weight is loaded, by `--plan` and by every start.

Contract: PREFLIGHT is the one list, and a start says as much as a plan: everything that is wrong, at once. A plan takes
nothing: it does not lock the checkpoints' directory, and the base's weights need not be there.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from nemo_rl_lora.algorithms.algorithm import Algorithm
from nemo_rl_lora.algorithms.dpo import Dpo
from nemo_rl_lora.algorithms.grpo import Grpo
from nemo_rl_lora.algorithms.phase import Phase
from nemo_rl_lora.algorithms.sft import Sft
from nemo_rl_lora.checkpoints.durable_files import probe_directory
from nemo_rl_lora.checkpoints.steps import Checkpointer, ResumePoint, is_finished
from nemo_rl_lora.config.errors import did_you_mean
from nemo_rl_lora.config.load import resolved_tree
from nemo_rl_lora.config.lora import lora_spec_from_policy
from nemo_rl_lora.config.master import GrpoMaster, MasterConfig, SftMaster
from nemo_rl_lora.config.optimizer_settings import AdamSettings, adam_settings, constant, megatron_adam_settings
from nemo_rl_lora.config.support import check_runnable, phase_problems
from nemo_rl_lora.data.chat import reads_clock, stop_clock
from nemo_rl_lora.data.loader import RowLoader
from nemo_rl_lora.evaluation.during_run import Evaluations, load_evaluations
from nemo_rl_lora.lora.spec import LoraSpec
from nemo_rl_lora.models.load import described_model
from nemo_rl_lora.models.source import ModelSource, base_digest, resolve_model
from nemo_rl_lora.plan.plan import Plan, engine_problems_of_cpus, machine_problems, make_plan
from nemo_rl_lora.policy.dtensor.sharded_files import refuse_sharded
from nemo_rl_lora.run.metrics import check_sinks
from nemo_rl_lora.run.model_checks import (
    check_base,
    check_megatron_base,
    check_saved_files,
    check_slices,
    label_of,
    positions_warning,
    rank_warning,
    tokenizer_of,
)
from nemo_rl_lora.run.warm_start import InitialAdapter, check_initial_adapter

logger = logging.getLogger(__name__)

ALGORITHMS: dict[str, type[Algorithm[Any]]] = {"sft": Sft, "dpo": Dpo, "grpo": Grpo}


class Start:
    """What a run starts from: facts that are found out once, when they are first asked for."""

    def __init__(self, config: MasterConfig, plan: Plan | None = None) -> None:
        """`plan` is that of a run which starts now; None: it is only planned, so that nothing is taken and the base's
        weights need not be there."""
        self.config, self.plan = config, plan
        self.algorithm = ALGORITHMS[config.algorithm](config)
        self.following: tuple[Start, ...] = ()  # phases of the same run that come after this one

    @property
    def run_config(self) -> MasterConfig:
        """The configuration as it was given: of a phase, that of the whole run."""
        return self.config

    @property
    def label(self) -> str:
        """What stands before a problem of this phase; nothing where the run has none."""
        return ""

    @property
    def phase(self) -> Phase | None:
        """What the loop has to know of the phase; None where the run has none."""
        return None

    def named(self, problem: str) -> str:
        """A problem of this phase, and of no other, as it is said."""
        return problem

    def check_end(self) -> None:
        """ValueError where what the end of this phase makes cannot be made."""

    @property
    def made_bytes(self) -> int:
        """Of what the end of this phase makes, beside the checkpoints."""
        return 0

    @property
    def initial_record(self) -> Mapping[str, str] | None:
        """What the adapter started from, for checkpoints."""
        if self.resume is not None:
            return self.resume.info.initial_adapter
        return None if self.initial_adapter is None else self.initial_adapter.record

    @property
    def adam(self) -> AdamSettings:
        """The optimizer's settings; the learning rate of an adapter that is not to move is zero."""
        policy, lora = self.config.policy, self.spec is not None
        if policy.active_backend == "megatron":
            settings = megatron_adam_settings(self.config, lora=lora)
        else:
            settings = adam_settings(policy, lora=lora)
        return settings if policy.adapter.trainable else replace(settings, lr_at=partial(constant, 0.0))

    @property
    def spec(self) -> LoraSpec | None:
        return lora_spec_from_policy(self.config.policy)

    @cached_property
    def source(self) -> ModelSource:
        return resolve_model(self.config.policy.model_name, weights=self.plan is not None)

    @cached_property
    def model(self) -> PreTrainedModel:
        """What the base's config.json describes, on the meta device."""
        policy = self.config.policy
        return described_model(self.source.path, policy.hf_config_overrides, label_of(policy))

    @cached_property
    def tokenizer(self) -> Any:
        return tokenizer_of(self.config.policy, self.source, self.model)

    @cached_property
    def clock(self) -> str | None:
        """When the clock of the chat template stands, so that a resume has the very rows; None where it reads none."""
        return self.new_clock(self.resume)

    def new_clock(self, resume: ResumePoint | None) -> str | None:
        """The same, for a run that continues there."""
        if not reads_clock(self.tokenizer):
            return None
        saved = None if resume is None else resume.info.clock
        return saved or datetime.now().astimezone().isoformat(timespec="seconds")

    @property
    def loader(self) -> RowLoader[Any]:
        if isinstance(self._loaded, ValueError):
            raise self._loaded
        return self._loaded

    @cached_property
    def _loaded(self) -> RowLoader[Any] | ValueError:
        """The rows, read and checked once; why they cannot be used, where that is so."""
        try:
            return self.algorithm.load_data(self._stopped_tokenizer)
        except ValueError as error:
            return error

    @cached_property
    def _stopped_tokenizer(self) -> Any:
        """The tokenizer, which from here on writes the time of the run's start."""
        if self.clock is not None:
            stop_clock(self.tokenizer, self.clock)
        return self.tokenizer

    @property
    def evaluations(self) -> Evaluations:
        if isinstance(self._loaded_evaluations, ValueError):
            raise self._loaded_evaluations
        return self._loaded_evaluations

    @cached_property
    def _loaded_evaluations(self) -> Evaluations | ValueError:
        """`evaluate`, its rows read and checked once; why they cannot be asked, where that is so."""
        try:
            return load_evaluations(self.config, self._stopped_tokenizer)
        except ValueError as error:
            return error

    @property
    def reward_digests(self) -> dict[str, str]:
        """Of the user's code that scores, by the key that names it."""
        return self.algorithm.reward_digests() | self.evaluations.reward_digests()

    @property
    def num_steps(self) -> int:
        loop = self.algorithm.loop
        return min(loop.max_num_steps, loop.max_num_epochs * self.loader.num_batches_per_epoch)

    @cached_property
    def checkpointer(self) -> Checkpointer:
        return self.new_checkpointer()

    def new_checkpointer(self) -> Checkpointer:
        """Of the run, in whatever phase it is."""
        config = self.run_config
        return Checkpointer(config.checkpointing, resolved_tree(config), type(config))

    @cached_property
    def resume(self) -> ResumePoint | None:
        """Where the run continues; None for a new one."""
        return self.checkpointer.find_resume()

    @cached_property
    def base_digest(self) -> str | None:
        """Of the weights in `source`; None where they are not in safetensors files, or for a plan not there or whole,
        which the check of the base says."""
        try:
            return base_digest(self.source.path)
        except ValueError:
            if self.plan is not None:
                raise
            return None

    @cached_property
    def initial_adapter(self) -> InitialAdapter | None:
        """What a new run's adapter starts from; None where A is drawn, and where the run continues."""
        return self.new_initial_adapter()

    def new_initial_adapter(self) -> InitialAdapter | None:
        """The same, found out."""
        if self.resume is not None or self.spec is None:
            return None
        return check_initial_adapter(self.config.policy, self.spec, self.source, self.base_digest)

    def warn(self, text: str | None) -> str | None:
        """A finding for the plan, which a start logs."""
        if text is not None and self.plan is not None:
            logger.warning(text)
        return text

    @property
    def is_finished(self) -> bool:
        """Whether the run did all its steps, or tokens, already."""
        return is_finished(self.resume, self.num_steps, self.algorithm.loop.max_num_tokens)


def _engine(start: Start) -> None:
    """Rollouts that come from a file have to be there, and whole."""
    engine = start.config.policy.generation
    if engine is not None and engine.replay_path is not None:
        from nemo_rl_lora.generation.replay import check_replay

        check_replay(Path(engine.replay_path))


def _base(start: Start) -> str | None:
    what = start.config.policy, start.source, start.model
    found = check_base(*what, partial=start.plan is None)
    if found is not None:
        by_backend = check_megatron_base if start.config.policy.active_backend == "megatron" else check_slices
        by_backend(*what, partial=start.plan is None)
    return found


def _positions(start: Start) -> str | None:
    return start.warn(positions_warning(start.config.policy, start.model))


def _rank(start: Start) -> str | None:
    return start.spec and start.warn(rank_warning(start.config.policy, start.spec, start.model))


def _saved_files(start: Start) -> None:
    if start.config.checkpointing.enabled:
        check_saved_files(start.config.policy, start.spec, start.source, start.model, start.tokenizer)


def _tokenizer(start: Start) -> str:
    return f"{len(start.tokenizer)} tokens, end of sequence {start.tokenizer.eos_token!r}"


def _data(start: Start) -> str:
    loader = start.loader
    clock = "" if start.clock is None else f"; the chat template's clock stands at {start.clock}"
    steps = f"{loader.num_batches_per_epoch} steps an epoch{_token_budget(start)}"
    return f"{start.algorithm.describe_data()} ({steps}){clock}"


def expected_steps(start: Start) -> tuple[int, int]:
    """At which steps the run, or the phase, ends at the latest and at the earliest, by the mean of the rows."""
    if (tokens := start.algorithm.loop.max_num_tokens) is None:
        return start.num_steps, start.num_steps
    return _steps_to(tokens, _tokens_of_a_step(start), start.num_steps)


def _steps_to(num_tokens: int, tokens_of_a_step: tuple[float, float], num_steps: int) -> tuple[int, int]:
    least, most = tokens_of_a_step
    return min(math.ceil(num_tokens / least), num_steps), min(math.ceil(num_tokens / most), num_steps)


def _tokens_of_a_step(start: Start) -> tuple[float, float]:
    """At least and at most, by the mean of the rows."""
    least, most = (start.loader.mean_of_a_batch(partial(_tokens_of, start.algorithm, which)) for which in (0, 1))
    return least, most


def _tokens_of(algorithm: Algorithm[Any], which: int, row: Any) -> int:
    return algorithm.tokens_of(row)[which]


def _token_budget(start: Start) -> str:
    """When `max_num_tokens` ends the run."""
    if (tokens := start.algorithm.loop.max_num_tokens) is None:
        return ""
    loop, ends, of_a_step = start.config.algorithm, start.num_steps, _tokens_of_a_step(start)
    latest, earliest = _steps_to(tokens, of_a_step, ends)
    when = f"about step {latest}" if latest == earliest else f"a step from {earliest} to {latest}"
    least, most = (number * ends for number in of_a_step)
    if least < tokens:
        when = f"step {earliest} at the earliest, if at all"
    if most < tokens:
        about = " to ".join(dict.fromkeys(f"{total:.0f}" for total in (least, most)))
        return (
            f"; {loop}.max_num_tokens={tokens} is not reached: the run ends at step {ends} ({loop}.max_num_steps or "
            f"{loop}.max_num_epochs), with about {about} tokens"
        )
    if start.phase is not None:
        return f"; its {tokens} tokens are reached at {when} of the phase"
    return f"; {loop}.max_num_tokens={tokens} is reached at {when}, of {ends} at most"


def _evaluations(start: Start) -> str | None:
    """Every prompt has to leave room for a completion among the model's positions."""
    positions = getattr(start.model.config.get_text_config(), "max_position_embeddings", None)
    problems = [
        f"evaluate.{number}.data.dataset_name={evaluation.settings.data.dataset_name!r}: a prompt has {longest} "
        f"tokens, and the model {positions} positions (max_position_embeddings). Set data.on_long_prompt=drop and "
        f"policy.max_total_sequence_length={positions} or less, or give other data."
        for number, evaluation in enumerate(start.evaluations)
        if positions is not None and (longest := evaluation.task.longest_prompt) >= positions
    ]
    if problems:
        raise together(problems)
    return "; ".join(evaluation.describe() for evaluation in start.evaluations) or None


def _validation(start: Start) -> None:
    """What steps are ranked by, and what ends a run early, has to be measured."""
    config, loop = start.config, start.algorithm.loop
    _ = start.loader  # reads the validation rows
    measured = start.algorithm.validation_metrics if loop.val_period > 0 or loop.val_at_start or loop.val_at_end else ()
    wanted = {}
    ranked_by = config.checkpointing.metric_name
    if config.is_set("checkpointing.metric_name") and ranked_by is not None and ranked_by.startswith("val:"):
        wanted["checkpointing.metric_name"] = ranked_by
    if isinstance(config, GrpoMaster) and config.grpo.stop_at_validation_metric is not None:
        wanted["grpo.stop_at_validation_metric"] = config.grpo.stop_at_validation_metric
    problems = []
    for key, value in wanted.items():
        name = value.removeprefix("val:")
        if not {name, name.partition("/")[0]} & set(measured):  # after the slash stands one of several datasets
            known = f"{did_you_mean(name, measured)}Validation measures {', '.join(measured)}."
            remedy = known if measured else f"Set data.validation and {config.algorithm}.val_period, or leave it out."
            problems.append(f"{key}={value!r}: no validation of this run measures it. {remedy}")
    problems += _ranked_by_evaluation(start)
    if problems:
        raise together(problems)


def _ranked_by_evaluation(start: Start) -> list[str]:
    """Why steps cannot be ranked by the evaluation that is named."""
    checkpointing, key = start.config.checkpointing, "checkpointing.metric_name"
    ranked_by, direction = checkpointing.metric_name or "", "checkpointing.higher_is_better"
    if not ranked_by.startswith("eval:"):
        return []
    name, measured = ranked_by.removeprefix("eval:"), start.evaluations.metric_names
    if name in measured:
        is_inherited = not checkpointing.higher_is_better and not start.config.is_set(direction)
        return [f"{direction}=False: is inherited, for another metric. Say it for {ranked_by}."] * is_inherited
    known = f"{did_you_mean(name, measured)}Evaluations measure {', '.join(measured)}."
    remedy = known if measured else "Add one to `evaluate`, or name another metric."
    return [f"{key}={ranked_by!r}: no evaluation of this run measures it. {remedy}"]


def _directories(start: Start) -> str:
    logger, checkpointing = start.config.logger, start.config.checkpointing
    probe_directory(Path(logger.log_dir), "logger.log_dir")
    if not checkpointing.enabled:
        return f"{logger.log_dir} can be written"
    if start.plan is None:
        start.checkpointer.check(required_bytes=make_plan(start.config).sizes.checkpoint_bytes)
    else:
        start.checkpointer.prepare(required_bytes=start.plan.sizes.checkpoint_bytes + start.made_bytes)
    start.check_end()
    return f"{logger.log_dir} and {checkpointing.checkpoint_dir} can be written"


def _resume(start: Start) -> str | None:
    resume, go_on = start.resume, start.config.data.on_change == "continue"
    if resume is None:
        return None
    if start.is_finished:
        return f"the run in {resume.path} is finished: {resume.step} steps"
    start.checkpointer.refuse_without_optimizer(resume)
    if start.config.policy.active_backend == "megatron":
        refuse_sharded(resume.path / "policy", "megatron")
    if start.base_digest is not None or start.plan is not None:
        start.checkpointer.refuse_other_base(resume, start.base_digest)
    num_rows = start.loader.state()["num_rows"]
    start.checkpointer.refuse_other_data(resume, start.algorithm.data_digests(), num_rows, go_on=go_on)
    start.checkpointer.say_other_rewards(resume, start.reward_digests)
    return f"the run continues after step {resume.step}, from {resume.path}"


# What a check returns is what it found, for the plan; it raises ValueError where the run cannot start.
PREFLIGHT: tuple[tuple[str, Callable[[Start], str | None]], ...] = (
    ("sinks", lambda start: check_sinks(start.config.logger)),
    ("engine", _engine),
    ("base", _base),
    ("tokenizer", _tokenizer),
    ("positions", _positions),
    ("rank", _rank),
    ("data", _data),
    ("evaluations", _evaluations),
    ("validation", _validation),
    ("directories", _directories),
    ("saved files", _saved_files),
    ("checkpoint", _resume),
    ("initial adapter", lambda start: start.initial_adapter and str(start.initial_adapter)),
)


def starts_of(config: MasterConfig) -> list[Start]:
    """What the run starts from: of one in phases, the phase in which it continues, or its first, and those after it.
    ValueError where a phase's configuration is none."""
    if isinstance(config, SftMaster) and config.sft.phases:
        from nemo_rl_lora.run.phases import phase_starts

        return list(phase_starts(config))
    return [Start(config)]


def plan_of(start: Start) -> Plan:
    """What a run, or a phase of one, would do, and everything that stops it. ValueError where there is no model to plan
    with; it says everything else that is wrong, too."""
    try:
        return make_plan(start.config, [(name, partial(check, start)) for name, check in PREFLIGHT])
    except ValueError as error:
        raise together([str(error), *check_runnable(start.config), *_failures(start)]) from error


def check_start(config: MasterConfig) -> Start:
    """Everything that can be known without weights, and the checkpoints' directory taken. ValueError says everything
    that is wrong, in every phase; then nothing is taken."""
    starts = starts_of(config)
    own, problems = phase_problems(config), [_plan_start(start) for start in starts]
    with ExitStack() as failed:
        failed.callback(starts[0].checkpointer.close)
        if own or any(problems):
            for start in starts:
                start.plan = None
        for start, found in zip(starts, problems, strict=True):
            found += _failures(start)
        if own or any(problems):
            raise together([*own, *of_phases(starts, problems)])
        failed.pop_all()
    return starts[0]


def _plan_start(start: Start) -> list[str]:
    """Plan a start that is to be made; what is wrong with it so far."""
    problems = check_runnable(start.config)
    try:
        plan = make_plan(start.config)
    except ValueError as error:
        return [str(error), *problems]
    start.plan = plan
    return [*plan.problems, *machine_problems(start.config, plan), *engine_problems_of_cpus(start.config, plan)]


def of_phases(starts: Sequence[Start], problems: Sequence[Sequence[str]]) -> list[str]:
    """What is wrong with each start, with its phase before it, but for what is wrong with all of them."""
    shared = [text for text in problems[0] if all(text in found for found in problems)]
    each = [
        start.named(text) for start, found in zip(starts, problems, strict=True) for text in found if text not in shared
    ]
    return [*shared, *each]


def _failures(start: Start) -> list[str]:
    """What the checks say against this start. From the first failure on nothing is taken."""
    problems = []
    for _, check in PREFLIGHT:
        try:
            check(start)
        except ValueError as error:
            problems.append(str(error))
            start.plan = None
    return problems


def together(problems: Sequence[str]) -> ValueError:
    return ValueError("\n".join(dict.fromkeys(problems)))  # a check that needs what another one lacks says the same
