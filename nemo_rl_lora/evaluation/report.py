"""What a person sees of an evaluation, and the files that it leaves."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.text import Text

from nemo_rl_lora.evaluation.estimates import Estimate
from nemo_rl_lora.evaluation.results import Result, ScoredCompletion
from nemo_rl_lora.run.console import LiveConsole, figure_table, format_seconds

RESULTS_FILE = "results.json"
COMPLETIONS_FILE = "completions.jsonl"
CONFIG_FILE = "config.yaml"
_TEMPORARY_FILE = f"tmp_{RESULTS_FILE}"  # until it is whole


class EvaluationConsole(LiveConsole):
    """Live progress, prompt by prompt: a bar on a terminal, otherwise a line a batch."""

    def __init__(self, num_prompts: int, num_completions: int, file: IO[str] | None = None) -> None:
        super().__init__(file)
        self._num_prompts, self._num_completions = num_prompts, num_completions
        self._rewards: list[float] = []
        self._model = ""

    def model(self, name: str) -> None:
        """This model is asked from now on."""
        self._model, self._rewards, self._started = name, [], self._now()

    def batch(self, completions: Sequence[ScoredCompletion]) -> None:
        """These completions of the model have been scored."""
        self._rewards += [completion.reward for completion in completions]
        if not self.console.is_terminal:
            accuracy = f"accuracy so far {statistics.fmean(self._rewards):.3f}"
            self.say(f"{self._model}: {self._num_done} of {self._num_prompts} prompts, {accuracy}")

    @property
    def _num_done(self) -> int:
        return len(self._rewards) // self._num_completions

    def _cells(self) -> list[Text | ProgressBar]:
        cells = self._progress(self._model, self._num_done, self._num_prompts)
        cells.append(Text(f"{format_seconds(self._elapsed)} elapsed"))
        if self._num_done:
            cells.append(Text(self._left(self._num_done, self._num_prompts - self._num_done)))
            cells.append(Text(f"accuracy {statistics.fmean(self._rewards):.3f}", style="green"))
        return cells


def print_results(console: Console, results: Mapping[str, Result], *, num_prompts: int, num_completions: int) -> None:
    """The table of all models, and what it does not say."""
    has_gain = any(result.gain is not None for result in results.values())
    k_values = dict.fromkeys(k for result in results.values() for k in result.pass_at)
    figures = ["accuracy", *(["over base"] if has_gain else []), *(f"pass@{k}" for k in k_values)]
    rows = [
        (
            name,
            _interval(result.accuracy),
            *([_interval(result.gain, signed=True)] if has_gain else []),
            *(f"{result.pass_at[k].mean:.3f}" for k in result.pass_at),
            f"{result.mean_num_tokens:.1f}",
            f"{result.truncated_share:.0%}",
            format_seconds(result.generation_seconds + result.reward_seconds),
        )
        for name, result in results.items()
    ]
    console.print(figure_table(["model"], [*figures, "tokens", "cut", "time"], rows))
    lines = [
        f"{num_prompts} prompts, {num_completions} completion(s) each; ±: 95 % interval over prompts (normal "
        f"approximation), of the difference prompt by prompt where it is over the base."
    ]
    for name, result in results.items():
        if result.num_changed is not None:
            total = num_prompts * num_completions
            lines.append(f"{name}: {result.num_changed} of {total} completions are not the base's.")
        lines += [f"{name}: {metric} {count:g}" for metric, count in result.environment_metrics.items() if count]
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def _interval(value: Estimate | None, *, signed: bool = False) -> str:
    if value is None:
        return ""
    sign = "+" if signed else ""
    return f"{value.mean:{sign}.3f}" + ("" if value.half_width is None else f" ± {value.half_width:.3f}")


class ResultFiles:
    """results.json, completions.jsonl and config.yaml in one directory."""

    def __init__(self, directory: Path, resolved_yaml: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        (directory / CONFIG_FILE).write_text(resolved_yaml, encoding="utf-8")
        self._completions = (directory / COMPLETIONS_FILE).open("w", encoding="utf-8")

    def batch(self, completions: Sequence[ScoredCompletion]) -> None:
        for completion in completions:
            self._completions.write(json.dumps(asdict(completion), ensure_ascii=False) + "\n")
        self._completions.flush()

    def results(self, document: Mapping[str, Any]) -> None:
        """Write results.json anew: a reader sees all of it or what was there before."""
        temporary = self.directory / _TEMPORARY_FILE
        temporary.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, self.directory / RESULTS_FILE)

    def close(self) -> None:
        self._completions.close()


def refuse_existing_results(directory: Path, key: str) -> None:
    """ValueError where files have the names of those that an evaluation writes: an earlier one's, or a step's."""
    for name in (RESULTS_FILE, COMPLETIONS_FILE, CONFIG_FILE, _TEMPORARY_FILE):
        if os.path.lexists(directory / name):
            raise ValueError(
                f"{key}={str(directory)!r}: holds {name}, which an evaluation writes itself. Name another directory, "
                f"or move the file away."
            )


def result_document(result: Result) -> dict[str, Any]:
    """A model's figures as they stand in results.json."""
    figures = asdict(result)
    return {f"pass@{k}": value for k, value in figures.pop("pass_at").items()} | figures
