"""The evaluation driver: check, or show the plan; then ask every model and print the table."""

from __future__ import annotations

import argparse
import contextlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_rl_lora.config.load import load_config, resolved_yaml
from nemo_rl_lora.run.control import EXIT_OK, StopRequest, running
from nemo_rl_lora.run.drivers import declare, prepare_process, set_up_logging, with_fast_precision
from nemo_rl_lora.run.memory import from_phase

if TYPE_CHECKING:
    from nemo_rl_lora.evaluation.models import CheckedEvaluation, LoadedBase
    from nemo_rl_lora.evaluation.report import EvaluationConsole, ResultFiles
    from nemo_rl_lora.evaluation.results import Outcome, Result, ScoredCompletion

logger = logging.getLogger(__name__)

__all__ = ["declare", "main"]


def main(arguments: argparse.Namespace) -> int:
    """Plan or evaluate; the exit code."""
    config = load_config(arguments.config, arguments.overrides, "eval")
    if not arguments.plan:
        prepare_process(started=arguments.started)
    set_up_logging(arguments)
    config = with_fast_precision(config, arguments)
    from nemo_rl_lora.config.errors import ConfigError
    from nemo_rl_lora.evaluation.models import LoadedBase, check_evaluation
    from nemo_rl_lora.evaluation.report import EvaluationConsole, ResultFiles, print_results
    from nemo_rl_lora.models.stored import BadWeightsError
    from nemo_rl_lora.run.console import setup_logging

    checked = check_evaluation(config, weights=not arguments.plan)
    task = checked.task
    console = EvaluationConsole(len(task.prompts), task.num_completions)
    if arguments.plan:
        print_plan(checked, console)
        return EXIT_OK
    for note in checked.notes:
        logger.warning(note)
    directory = None if config.eval.save_path is None else Path(config.eval.save_path)
    with running(directory, config) as stop, contextlib.ExitStack() as cleanup:
        cleanup.callback(task.close)
        files = ResultFiles(directory, resolved_yaml(config)) if directory is not None else None
        if files is not None:
            cleanup.callback(files.close)
        try:
            with stop.starting(), from_phase("start"):
                base = LoadedBase(checked)
        except BadWeightsError as error:
            raise ConfigError(str(error)) from error
        setup_logging(console.console)
        with console:
            results = evaluate_all(checked, base, console, files, stop)
    if results:
        print_results(console.console, results, num_prompts=len(task.prompts), num_completions=task.num_completions)
    if stop.requested:
        console.say(
            f"Stopped by {stop.signal_name}: {len(results)} of {len(checked.candidates)} models were evaluated."
        )
    if directory is not None:
        console.say(f"Results: {directory}")
    return stop.exit_code


def evaluate_all(
    checked: CheckedEvaluation,
    base: LoadedBase,
    console: EvaluationConsole,
    files: ResultFiles | None,
    stop: StopRequest,
) -> dict[str, Result]:
    """Every model's result, or those of the models before a request to stop."""
    from nemo_rl_lora.evaluation.results import ask_model, summarise

    settings = checked.config.eval
    results: dict[str, Result] = {}
    outcome_of_base: Outcome | None = None

    def tell(completions: Sequence[ScoredCompletion]) -> None:
        console.batch(completions)
        if files is not None:
            files.batch(completions)

    for candidate in checked.candidates:
        console.model(candidate.name)
        with base.serve(candidate) as generation:
            outcome = ask_model(candidate.name, generation, checked.task, tell=tell, stopped=lambda: stop.requested)
        if outcome is None:
            break
        results[candidate.name] = summarise(
            outcome,
            num_completions=settings.num_tests_per_prompt,
            k_values=settings.k_values,
            solved_at=settings.solved_at,
            base=None if candidate.directory is None else outcome_of_base,
        )
        if candidate.directory is None:
            outcome_of_base = outcome
        if files is not None:
            files.results(document(checked, base.digest, results))
    base.require_unwritten()
    return results


def document(checked: CheckedEvaluation, base_digest: str, results: Mapping[str, Result]) -> dict[str, Any]:
    """What results.json holds. `complete` is false as long as a model is missing."""
    from nemo_rl_lora.evaluation.report import result_document

    config, task = checked.config, checked.task
    models = {}
    for candidate in checked.candidates:
        if candidate.name in results:
            models[candidate.name] = {
                "directory": None if candidate.directory is None else str(candidate.directory),
                "adapter_digest": candidate.digest,
                **result_document(results[candidate.name]),
            }
    return {
        "model_name": config.policy.model_name,
        "model_source": checked.source.description,
        "base_digest": base_digest,
        "num_prompts": len(task.prompts),
        "num_tests_per_prompt": task.num_completions,
        "complete": len(models) == len(checked.candidates),
        "models": models,
    }


def print_plan(checked: CheckedEvaluation, console: EvaluationConsole) -> None:
    """What would be evaluated."""
    from nemo_rl_lora.run.console import figure_table

    policy, task = checked.config.policy, checked.task
    console.say(f"Evaluation on {policy.model_name} ({checked.architecture}), {policy.precision}")
    console.say(f"Model: {checked.source.description}")
    console.say(f"Asked: {task.describe()}")
    rows = []
    for candidate in checked.candidates:
        figures = ("-", "-", "-", "-")
        if candidate.directory is not None:
            num_params = sum(module.num_params for module in candidate.adapted)
            spec = candidate.spec
            figures = (f"{spec.dim}", f"{spec.alpha:g}", f"{len(candidate.adapted)}", f"{num_params:,}")
        rows.append((candidate.name, *figures))
    console.console.print(figure_table(["model"], ["dim", "alpha", "modules", "parameters"], rows))
    for note in checked.notes:
        console.say(f"Warning: {note}")
    console.say(f"Adapters are served {_WAYS[policy.generation.lora_sync]}.")
    console.say("Not checked: the base's weights: none was read.")


_WAYS = {
    "auto": "as A and B where merging would lose more than a tenth of the update, else merged",
    "merged": "merged into copies of the weights they change",
    "adapter": "as A and B beside the shared weights",
}
