"""What a person sees of a run: a line for each step, a live bar below it, and a summary at the end.

Contract: on a terminal the bar is one line, as long as there is room: the step, what is being done, the key metric,
remaining and elapsed time, and the metric's trend; without a terminal there are only plain lines. Nothing here is a
record: run/metrics.py keeps those.
"""

from __future__ import annotations

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

from rich.box import SIMPLE
from rich.console import Console
from rich.live import Live
from rich.logging import RichHandler
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from nemo_rl_lora.run.metrics import RolloutSample

_TREND = "▁▂▃▄▅▆▇█"
_TREND_WIDTH = 24
_BAR_WIDTHS = range(24, 3, -4)
_TITLE_WIDTH = 24
_SHOWN_TEXT = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyMetric:
    """A metric worth watching. `split` is "train", "validation" or "evaluation"; without a direction there is no
    best value."""

    name: str
    split: str = "train"
    higher_is_better: bool | None = None
    label: str | None = None

    @property
    def title(self) -> str:
        return self.label or self.name


def setup_logging(console: Console | None = None, level: int = logging.INFO) -> None:
    """Show the package's messages, above the live bar where there is one; of other packages only warnings."""
    handler: logging.Handler
    if console is not None and console.is_terminal:
        handler = RichHandler(console=console, show_path=False, show_time=False, markup=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("nemo_rl_lora").setLevel(level)


class LiveConsole(ABC):
    """Lines, and on a terminal a live bar below them. A context manager: the bar is there within it."""

    def __init__(self, file: IO[str] | None = None, now: Callable[[], float] = time.monotonic) -> None:
        self.console = Console(file=file, highlight=False, soft_wrap=file is not None)
        self._now = now
        self._started = now()
        self._live: Live | None = None

    def __enter__(self) -> Self:
        self._started = self._now()
        if self.console.is_terminal:
            self._live = Live(get_renderable=self._bar, console=self.console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, text: str) -> None:
        """A line of its own, above the bar, never broken: paths and commands are there to be copied."""
        self.console.print(Text(text), soft_wrap=True)

    @abstractmethod
    def _cells(self) -> Iterable[Text | ProgressBar]:
        """What the bar shows, from left to right."""

    def _bar(self) -> Table:
        """One line: where there is little room the bar is short, and then the last cells are left out."""
        cells = [cell for cell in self._cells() if isinstance(cell, ProgressBar) or cell.plain]
        for cell in cells:
            if isinstance(cell, Text):
                cell.no_wrap, cell.overflow = True, "ellipsis"
        bar = next(cell for cell in cells if isinstance(cell, ProgressBar))
        room = self.console.width - sum(cell.cell_len + 2 for cell in cells if isinstance(cell, Text))
        bar.width = next((width for width in _BAR_WIDTHS if width <= room), _BAR_WIDTHS[-1])
        while len(cells) > 3 and room < bar.width:
            left_out = cells.pop()
            room += left_out.cell_len + 2 if isinstance(left_out, Text) else 0
        row = Table.grid(padding=(0, 2))
        row.add_row(*cells)
        return row

    def _progress(self, title: str, done: int, total: int) -> list[Text | ProgressBar]:
        short = Text(title, style="bold")
        short.truncate(_TITLE_WIDTH, overflow="ellipsis")
        return [short, ProgressBar(total=total, completed=done), Text(f"{done}/{total}")]

    @property
    def _elapsed(self) -> float:
        """Seconds since the bar is there."""
        return self._now() - self._started

    def _left(self, num_done: int, num_to_do: int) -> str:
        """How long the rest takes at the pace so far; empty where there is none, or no pace yet."""
        if num_done <= 0 or num_to_do <= 0:
            return ""
        return f"{format_seconds(self._elapsed / num_done * num_to_do)} left"


class TrainingConsole(LiveConsole):
    """Live progress of one run. Use it as a context manager around the training loop."""

    def __init__(
        self,
        *,
        title: str,
        num_steps: int,
        metrics: Sequence[KeyMetric],
        first_step: int = 0,
        file: IO[str] | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`first_step` steps were done before (a continued run). `metrics` are shown in their order."""
        super().__init__(file, now)
        self._title = title
        self._num_steps = num_steps
        self._metrics = tuple(metrics)
        self._first_step = self._step = first_step
        self._stage = "starting"
        self._history: dict[tuple[str, str], list[tuple[int, float]]] = {}
        self._seconds_before = 0.0  # of earlier phases

    def go_on_from(self, before: TrainingConsole) -> None:
        """What an earlier phase showed belongs to the same run: its summary is of all of them."""
        self._history, self._seconds_before = before._history, before._seconds_before + before._elapsed

    def stage(self, name: str) -> None:
        """What the run is doing now, such as "generating"."""
        self._stage = name

    def step(self, step: int, metrics: Mapping[str, float], *, seconds: float | None = None) -> None:
        """Show a finished step."""
        self._step = step
        took = f"{seconds:.1f} s" if seconds is not None else ""
        left = "" if self.console.is_terminal else self._remaining_text()  # which the bar says
        self._line(f"step {step}/{self._num_steps}", "train", step, metrics, (took, left))

    def validation(self, step: int, metrics: Mapping[str, float], *, seconds: float | None = None) -> None:
        """Show a validation."""
        took = f"{seconds:.1f} s" if seconds is not None else ""
        self._line(f"validation at step {step}", "validation", step, metrics, (took,))

    def evaluation(self, name: str, step: int, metrics: Mapping[str, float], *, seconds: float) -> None:
        """Show an evaluation."""
        self._line(f"evaluation {name} at step {step}", "evaluation", step, metrics, (f"{seconds:.1f} s",))

    def samples(self, samples: Sequence[RolloutSample]) -> None:
        """Show completions to read, cut to a screenful."""
        for sample in samples:
            text = sample.completion.strip()
            cut = text if len(text) <= _SHOWN_TEXT else text[:_SHOWN_TEXT] + " ..."
            self.say(f"reward {sample.reward:g} ({sample.finish_reason})  {sample.prompt.strip()[-200:]}")
            self.console.print(Padding(Text(cut), (0, 0, 0, 4)))

    def summary(
        self,
        outcome: str,
        *,
        log_directory: Path,
        checkpoint: Path | None = None,
        best_checkpoint: Path | None = None,
        continue_command: str | None = None,
        restarts: Sequence[str] = (),
    ) -> None:
        """The table of the key metrics, where the results are, how to continue, and a line for each restart.

        `outcome` is "completed", "stopped by SIGINT", ...; `checkpoint` the newest; `continue_command` None for a run
        with nothing left to do.
        """
        done = f"step {self._step} of {self._num_steps}"
        self.say(f"\n{self._title} {outcome}: {done}, {format_seconds(self._seconds_before + self._elapsed)}.")
        rows = [self._row(metric) for metric in self._metrics if (metric.split, metric.name) in self._history]
        if rows:
            self.console.print(figure_table(["metric"], ["first", "last", "best", "at step"], rows))
        for label, value in (
            ("Logs", log_directory),
            ("Checkpoint", checkpoint),
            ("Best checkpoint", best_checkpoint),
            ("Continue with", continue_command),
            *(("Restart", restart) for restart in restarts),
        ):
            if value is not None:
                self.say(f"{label + ':':<17}{value}")

    def _line(self, head: str, split: str, step: int, metrics: Mapping[str, float], tail: Sequence[str]) -> None:
        parts = [f"{head:<12}"]
        for metric in self._metrics:
            if metric.split != split or metric.name not in metrics:
                continue
            value = float(metrics[metric.name])
            self._history.setdefault((split, metric.name), []).append((step, value))
            parts.append(f"{metric.title} {format_value(value)}")
        parts += [text for text in tail if text]
        text = Text("  ".join(parts), style="" if split == "train" else "bold")
        self.console.print(text, soft_wrap=not self.console.is_terminal)

    def _remaining_text(self) -> str:
        return self._left(self._step - self._first_step, self._num_steps - self._step)

    def _cells(self) -> list[Text | ProgressBar]:
        cells = [
            *self._progress(self._title, self._step, self._num_steps),
            Text(self._stage, style="cyan"),
            Text(self._remaining_text()),
            Text(f"{format_seconds(self._elapsed)} elapsed"),
        ]
        first = self._metrics[0] if self._metrics else None
        values = [value for _, value in self._history.get((first.split, first.name), [])] if first else []
        if first and values:
            cells.insert(4, Text(f"{first.title} {format_value(values[-1])}", style="green"))
            cells.append(Text(trend(values), style="green"))
        return cells

    def _row(self, metric: KeyMetric) -> Sequence[str]:
        history = self._history[(metric.split, metric.name)]
        name = metric.title if metric.split == "train" else f"{metric.split} {metric.title}"
        first, last = format_value(history[0][1]), format_value(history[-1][1])
        return name, first, last, *_best(history, metric.higher_is_better)


def figure_table(
    texts: Sequence[str], figures: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None
) -> Table:
    """Columns of texts, folded where they are too wide, then columns of figures. With a title, a line below the head;
    nothing in a row is markup."""
    box, padding = (None, (0, 2, 0, 0)) if title is None else (SIMPLE, (0, 0, 0, 1))
    table = Table(title=title, title_justify="left", box=box, padding=padding, pad_edge=False)
    for name in texts:
        table.add_column(name, overflow="fold")
    for name in figures:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def trend(values: Sequence[float]) -> str:
    """The last values as a row of bars, from the lowest to the highest of them."""
    shown = [value for value in values if math.isfinite(value)][-_TREND_WIDTH:]
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    span = (high - low) or 1.0
    return "".join(_TREND[round((value - low) / span * (len(_TREND) - 1))] for value in shown)


def format_value(value: float) -> str:
    """Four significant digits at most; small values in powers of ten."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) < 1e-3 or abs(value) >= 1e6:
        return f"{value:.1e}"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"


def format_seconds(seconds: float) -> str:
    """`42 s`, `3 min 05 s`, `2 h 07 min`."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    return f"{total // 3600} h {total % 3600 // 60:02d} min"


def _best(history: Sequence[tuple[int, float]], higher_is_better: bool | None) -> tuple[str, str]:
    finite = [(value, step) for step, value in history if math.isfinite(value)]
    if higher_is_better is None or not finite:
        return "", ""
    choose = max if higher_is_better else min
    value, step = choose(finite, key=lambda entry: entry[0])
    return format_value(value), str(step)
