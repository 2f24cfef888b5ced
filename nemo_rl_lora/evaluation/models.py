"""An evaluation, put together: adapters fitted to a base, the prompts, and engines on the one base in memory.

Contract: `check_evaluation` refuses everything that can be refused before a weight is loaded, every adapter included.
The base's weights are never written; `LoadedBase.require_unwritten` proves it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from nemo_rl_lora.checkpoints.durable_files import probe_directory
from nemo_rl_lora.config.data import DatasetConfig
from nemo_rl_lora.config.engine_rules import graph_problems
from nemo_rl_lora.config.evaluation import EvalConfig, EvalPolicy
from nemo_rl_lora.config.master import EvalMaster
from nemo_rl_lora.evaluation.ask import validation_sampling
from nemo_rl_lora.evaluation.report import refuse_existing_results
from nemo_rl_lora.evaluation.task import Task, load_task
from nemo_rl_lora.generation.in_process.engine import InProcessGeneration
from nemo_rl_lora.generation.protocol import Generation
from nemo_rl_lora.generation.sync_mode import mode_of_finished
from nemo_rl_lora.lora.files import adapter_tensor_name, read_adapter
from nemo_rl_lora.lora.fit import adapter_directory, fit_adapter
from nemo_rl_lora.lora.spec import LoraSpec
from nemo_rl_lora.lora.targets import AdaptedModule
from nemo_rl_lora.models.load import described_model, load_model
from nemo_rl_lora.models.shapes import ModelShapes, shapes_of
from nemo_rl_lora.models.source import ModelSource, resolve_model
from nemo_rl_lora.policy.offer import offer
from nemo_rl_lora.run.model_checks import check_base, label_of, tokenizer_of
from nemo_rl_lora.tensors import tensors_digest, torch_dtype
from nemo_rl_lora.types import WeightsRef

logger = logging.getLogger(__name__)

BASE_NAME = "(base)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A model to evaluate: the base with an adapter, or the base itself, as an adapter of no module."""

    name: str  # as written in eval.adapters
    directory: Path | None  # None: the base itself
    spec: LoraSpec
    adapted: tuple[AdaptedModule, ...]
    digest: str | None  # of A and B


_BARE = Candidate(name=BASE_NAME, directory=None, spec=LoraSpec(dim=1, alpha=1), adapted=(), digest=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedEvaluation:
    """An evaluation that has been checked, before any weight is loaded."""

    config: EvalMaster
    source: ModelSource
    architecture: str
    tokenizer: Any
    task: Task
    candidates: tuple[Candidate, ...]
    notes: tuple[str, ...]  # what is worth a warning


def check_evaluation(config: EvalMaster, *, weights: bool) -> CheckedEvaluation:
    """Everything that can be known without weights. ValueError names what is wrong.

    `weights`: the base's files have to be there as well.
    """
    policy, settings = config.policy, config.eval
    if settings.save_path is not None:
        refuse_existing_results(Path(settings.save_path), "eval.save_path")
        probe_directory(Path(settings.save_path), "eval.save_path")
    for problem in graph_problems(policy.generation):
        raise ValueError(problem)
    source = resolve_model(policy.model_name, weights=False)
    model = described_model(source.path, policy.hf_config_overrides, label_of(policy))
    shapes = shapes_of(model, model.config)
    _refuse_more_than_the_model_sees(policy, shapes)
    check_base(policy, source, model, partial=True)
    tokenizer = tokenizer_of(policy, source, model)
    candidates, notes = _candidates(config.eval, source, shapes, tokenizer)
    section, engine = config.data.validation, policy.generation
    assert isinstance(section, DatasetConfig), "checked by EvalMaster"
    task = load_task(
        section,
        "data.validation",
        tokenizer,
        config=config,
        asked=settings,
        engine=engine,
        sampling=validation_sampling(engine),
    )
    if weights:
        source = resolve_model(policy.model_name)
        check_base(policy, source, model, partial=False)
    return CheckedEvaluation(
        config=config,
        source=source,
        architecture=shapes.architecture,
        tokenizer=tokenizer,
        task=task,
        candidates=candidates,
        notes=notes,
    )


def _refuse_more_than_the_model_sees(policy: EvalPolicy, shapes: ModelShapes) -> None:
    positions = getattr(shapes.config.get_text_config(), "max_position_embeddings", None)  # a recurrent one has none
    if positions is not None and policy.max_total_sequence_length > positions:
        raise ValueError(
            f"policy.max_total_sequence_length={policy.max_total_sequence_length}: {policy.model_name} has {positions} "
            f"positions. Set it to {positions} or less."
        )


def _candidates(
    settings: EvalConfig, source: ModelSource, shapes: ModelShapes, tokenizer: Any
) -> tuple[tuple[Candidate, ...], tuple[str, ...]]:
    """The base where it is asked for, then the adapters; and warnings. ValueError names each adapter that is wrong."""
    candidates = [_BARE] if settings.include_base else []
    problems: list[str] = []
    notes: list[str] = []
    for name in settings.adapters:
        try:
            candidate, more = _candidate(name, source, shapes, tokenizer)
        except ValueError as error:
            problems.append(f"eval.adapters={name!r}: {error}")
        else:
            candidates.append(candidate)
            notes += [f"eval.adapters={name!r}: {note}" for note in more]
    if problems:
        raise ValueError("\n".join(problems))
    return tuple(candidates), tuple(notes)


def _candidate(name: str, source: ModelSource, shapes: ModelShapes, tokenizer: Any) -> tuple[Candidate, list[str]]:
    directory = adapter_directory(Path(name).expanduser())
    tensors, peft_config = read_adapter(directory)
    spec, adapted = fit_adapter(
        tensors, peft_config, shapes.linears, tied_head=shapes.has_tied_head, model_name=source.name
    )
    notes = []
    made_for = peft_config.get("base_model_name_or_path")
    if made_for and not source.is_named(made_for):
        notes.append(f"was made for {made_for}, and is evaluated on policy.model_name={source.name!r}.")
    if not any(bool(tensors[adapter_tensor_name(module.name, "B")].any()) for module in adapted):
        notes.append("every B is zero, so this adapter is the base.")
    template = directory.parent / "tokenizer" / "chat_template.jinja"
    if template.is_file() and template.read_text(encoding="utf-8") != tokenizer.chat_template:
        notes.append(
            "was trained with another chat template than policy.tokenizer has, so prompts look different to it. "
            f"policy.tokenizer.name={template.parent} has its own."
        )
    digest = tensors_digest(tensors, whole=True)
    return Candidate(name=name, directory=directory, spec=spec, adapted=adapted, digest=digest), notes


class LoadedBase:
    """The base model, once in memory, and an engine on it for one adapter at a time."""

    def __init__(self, checked: CheckedEvaluation) -> None:
        self._policy, self._tokenizer = checked.config.policy, checked.tokenizer
        self._dtype = torch_dtype(self._policy.precision)
        self.model: PreTrainedModel = load_model(
            checked.source.path, dtype=self._dtype, config_overrides=dict(self._policy.hf_config_overrides)
        )
        torch.nn.Module.to(self.model, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        self._num_served = 0
        self.digest = self._digest()

    @contextmanager
    def serve(self, candidate: Candidate) -> Iterator[Generation]:
        """An engine that samples from this candidate."""
        engine = InProcessGeneration(
            self.model,
            tokenizer=self._tokenizer,
            spec=candidate.spec,
            adapted=candidate.adapted,
            compute_dtype=self._dtype,
            max_concurrent_sequences=self._policy.generation.max_concurrent_sequences,
            cuda_graphs=self._policy.generation.cuda_graphs,
        )
        try:
            ref = self._weights(candidate)
            engine.sync_weights(ref)
            if candidate.digest is not None and ref.digest != candidate.digest:
                raise RuntimeError(f"{candidate.directory}: the adapter's file has changed since the start.")
            yield engine
        finally:
            engine.close()

    def require_unwritten(self) -> None:
        """RuntimeError where the base is not what was loaded."""
        if self._digest() != self.digest:
            raise RuntimeError("the base's weights have changed during the evaluation. Its results cannot be used.")

    def _digest(self) -> str:
        return tensors_digest(dict(self.model.named_parameters()))

    def _weights(self, candidate: Candidate) -> WeightsRef:
        self._num_served += 1
        tensors = {} if candidate.directory is None else read_adapter(candidate.directory)[0]
        mode = self._policy.generation.lora_sync
        if mode == "auto":
            mode = mode_of_finished(tensors, candidate.adapted, self.model.get_parameter, self._dtype)
        return offer(
            self._num_served,
            mode,
            tensors,
            adapted=candidate.adapted,
            weight_of=self.model.get_parameter,
            dtype=self._dtype,
        )
