"""curves.png: the curves of a run, drawn from its metrics.jsonl.

Contract: a panel for each group of metrics that the run has; none of a driver's metric names is required. The
file is replaced whole. It computes no metric.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_rl_lora.run.metrics import TIMING, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVES_FILE = "curves.png"

_COLORS = ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626", "#475569")
_NUM_COLUMNS = 2
_SMOOTHED_FROM = 20  # points; shorter curves are drawn as they are
_NUM_TIMINGS = 6
_TOTAL_TIME = "total_step_time"

Curve = tuple[list[int], list[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """A plot of the metrics named `train/<name>`, `validation/<name>` or `evaluation/<name>` that the run has."""

    title: str
    names: tuple[str, ...]
    log_scale: bool = False


PANELS = (
    Panel(title="Reward and accuracy", names=("train/reward", "train/accuracy", "validation/accuracy")),
    Panel(title="Loss", names=("train/loss", "validation/val_loss", "validation/loss")),
    Panel(
        title="Generation against training, and drift",
        names=("train/gen_kl_error", "train/policy_kl_error", "train/js_divergence_error", "train/kl_penalty"),
        log_scale=True,
    ),
    Panel(title="Tokens of a completion", names=("train/mean_completion_length", "validation/avg_length")),
    Panel(title="Margin of rewards", names=("train/rewards_chosen_mean", "train/rewards_rejected_mean")),
    Panel(title="Gradient norm", names=("train/grad_norm",)),
)


def draw_curves(log_directory: Path) -> Path | None:
    """Draw curves.png into the log directory; None where there is nothing to draw yet."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = read_metrics(log_directory)
    curves = curves_of(lines)
    panels = [panel for panel in (*PANELS, _evaluations(curves)) if any(name in curves for name in panel.names)]
    timings = _timings(curves)
    num_panels = len(panels) + bool(timings)
    if num_panels == 0:
        return None
    num_rows = math.ceil(num_panels / _NUM_COLUMNS)
    figure = Figure(figsize=(12, 3.2 * num_rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(num_rows, _NUM_COLUMNS, squeeze=False).flat)
    for ax, panel in zip(axes, panels, strict=False):  # an odd number leaves a place free
        _draw_panel(ax, panel, curves)
    if timings:
        _draw_timings(axes[len(panels)], timings)
    for ax in axes[:num_panels]:
        _mark_phases(ax, lines)
    for ax in axes[num_panels:]:
        ax.remove()
    path = log_directory / CURVES_FILE
    unfinished = path.with_name(f".{CURVES_FILE}")
    figure.savefig(unfinished, dpi=120, format="png")
    return unfinished.replace(path)


def _evaluations(curves: Mapping[str, Curve]) -> Panel:
    """Of as many evaluations as there are colors."""
    names = [name for name in curves if name.startswith("evaluation/") and name.endswith("/accuracy")]
    return Panel(title="Accuracy of evaluations", names=tuple(names[: len(_COLORS)]))


def curves_of(lines: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    """`<split>/<name>` -> (steps, values) in the order of the lines; null values are left out."""
    curves: dict[str, Curve] = {}
    for line in lines:
        for name, value in line.items():
            if name in ("step", "split") or value is None:
                continue
            steps, values = curves.setdefault(f"{line['split']}/{name}", ([], []))
            steps.append(line["step"])
            values.append(float(value))
    return curves


def smoothed(values: Sequence[float]) -> list[float]:
    """Running mean over a tenth of the curve, centred, shorter at the ends."""
    half = max(1, len(values) // 20)
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _mark_phases(ax: Axes, lines: Sequence[Mapping[str, Any]]) -> None:
    """A line where a phase begins, with its number."""
    for line in lines:
        if line["split"] == "phase":
            place = line["step"] + 0.5  # between the last step before it and its first
            ax.axvline(place, color="#475569", linewidth=1, linestyle="--", zorder=0)
            at = ax.get_xaxis_transform()
            ax.text(place, 0.99, f" phase {line['phase']:g}", transform=at, fontsize=8, color="#475569", va="top")


def _draw_panel(ax: Axes, panel: Panel, curves: Mapping[str, Curve]) -> None:
    colors = zip(panel.names, _COLORS, strict=False)  # there are more colors than curves of a panel
    shown = [(name, color) for name, color in colors if name in curves]
    for name, color in shown:
        steps, values = curves[name]
        split, metric = name.split("/", 1)
        if panel.log_scale:
            values = [value if value > 0 else math.nan for value in values]
        if split != "train":
            label = metric if split == "evaluation" else f"{metric} ({split})"
            ax.plot(steps, values, "o-", color=color, markersize=5, linewidth=1.5, label=label)
        elif len(values) >= _SMOOTHED_FROM and not panel.log_scale:
            ax.plot(steps, values, color=color, alpha=0.25, linewidth=1)
            ax.plot(steps, smoothed(values), color=color, linewidth=2, label=metric)
        else:
            ax.plot(steps, values, color=color, linewidth=1.5, label=metric)
    positive = any(value > 0 for name, _ in shown for value in curves[name][1])
    if panel.log_scale and positive:
        ax.set_yscale("log")
    _finish(ax, panel.title)


def _timings(curves: Mapping[str, Curve]) -> dict[str, Curve]:
    """The parts of a step's time, longest first; the shortest are left out."""
    prefix = f"train/{TIMING}"
    parts = {name.removeprefix(prefix): curve for name, curve in curves.items() if name.startswith(prefix)}
    total = parts.pop(_TOTAL_TIME, None)
    if not parts:
        return {_TOTAL_TIME: total} if total else {}
    ranked = sorted(parts, key=lambda name: sum(parts[name][1]), reverse=True)
    return {name: parts[name] for name in ranked[:_NUM_TIMINGS]}


def _draw_timings(ax: Axes, timings: Mapping[str, Curve]) -> None:
    steps = sorted({step for curve in timings.values() for step in curve[0]})
    by_step = [dict(zip(*curve, strict=True)) for curve in timings.values()]
    heights = [[values.get(step, 0.0) for step in steps] for values in by_step]
    if len(steps) == 1:
        bottom = 0.0
        for name, (value,), color in zip(timings, heights, _COLORS, strict=False):  # more colors than timings
            ax.bar(steps, [value], width=0.5, bottom=bottom, color=color, label=name)
            bottom += value
    else:
        ax.stackplot(steps, heights, labels=list(timings), colors=_COLORS, alpha=0.85)
    _finish(ax, "Seconds of a step")
    ax.set_ylim(0, ax.get_ylim()[1] * 1.3)
    ax.legend(fontsize=8, frameon=False, loc="upper left", ncols=3)


def _finish(ax: Axes, title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.set_title(title, loc="left", fontsize=11, fontweight="bold")
    ax.set_xlabel("step", fontsize=9)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.tick_params(which="both", labelsize=9)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=8, frameon=False, loc="best")
