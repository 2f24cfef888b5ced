"""What the phases of a run come to, as text: a table, and the learning rate from the first step to the last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.text import Text

from nemo_rl_lora.plan.plan import Plan
from nemo_rl_lora.run.console import figure_table
from nemo_rl_lora.scalars import scaled_bytes

_WIDTH, _HEIGHT = 64, 5  # of the curve, in characters
_EIGHTHS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True, kw_only=True)
class PhasePlan:
    """A phase, as far as it is known before a weight is loaded."""

    name: str
    plan: Plan
    first_step: int
    num_steps: int  # expected, by the mean of the rows
    num_tokens: float  # the same
    lr_at: Callable[[float], float]  # of the phase's length, a share from 0 to 1
    at_end: str


def render_phases(phases: Sequence[PhasePlan]) -> RenderableType:
    """The table, and the curve below it."""
    rows = [
        (
            phase.name,
            "all weights" if phase.plan.spec is None else f"LoRA, dim {phase.plan.spec.dim}",
            f"{phase.plan.num_trainable_params:,}",
            scaled_bytes(_state_bytes(phase.plan)),
            f"{phase.num_steps:,}",
            f"{phase.num_tokens:,.0f}",
            phase.at_end,
        )
        for phase in phases
    ]
    figures = ("parameters", "in memory", "steps", "tokens", "at its end")
    table = figure_table(("phase", "trains"), figures, rows, "Phases (steps and tokens as the rows' mean has it)")
    return Group(table, Text(lr_curve(phases)))


def _state_bytes(plan: Plan) -> int:
    """Of weights, adapter, gradients and moments."""
    sizes = plan.sizes
    return sizes.base_bytes + (sizes.adapter_bytes or 0) + sizes.gradient_bytes + sizes.optimizer_bytes


def lr_curve(phases: Sequence[PhasePlan], width: int = _WIDTH) -> str:
    """The learning rate over all phases' steps, as lines of text, with a mark where a phase begins."""
    total = sum(phase.num_steps for phase in phases)
    widths = [max(1, round(width * phase.num_steps / total)) for phase in phases]
    values = [
        phase.lr_at((column + 0.5) / own) for phase, own in zip(phases, widths, strict=True) for column in range(own)
    ]
    peak = max(values) or 1.0
    levels = [value / peak * _HEIGHT for value in values]
    lines = []
    for row in reversed(range(_HEIGHT)):
        cells = "".join(_EIGHTHS[round(8 * min(max(level - row, 0.0), 1.0))] for level in levels)
        label = f"{peak:.1e}" if row == _HEIGHT - 1 else "0" if row == 0 else ""
        lines.append(f"{label:>8} │{cells}".rstrip())
    marks = [f"└{phase.first_step} {phase.name}"[:own].ljust(own) for phase, own in zip(phases, widths, strict=True)]
    end = phases[-1].first_step + phases[-1].num_steps
    return "\n".join(["Learning rate", *lines, f"{'step':>8} {''.join(marks)}└{end}"])
