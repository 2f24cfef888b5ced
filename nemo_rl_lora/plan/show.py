"""A Plan as text for a terminal: which modules, how many parameters, how many bytes, and what was not looked at."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from nemo_rl_lora.lora.names import last_component
from nemo_rl_lora.models.shapes import ModuleType
from nemo_rl_lora.plan.plan import Plan
from nemo_rl_lora.plan.rank_parts import RankPart
from nemo_rl_lora.run.console import figure_table
from nemo_rl_lora.scalars import scaled_bytes


def render_plan(plan: Plan) -> RenderableType:
    """Everything the plan holds, top to bottom, for a rich console."""
    parts: list[RenderableType] = [_heading(plan)]
    if plan.adapted:
        parts.append(_module_table("Modules with an adapter", plan.adapted, with_adapter=True))
    if plan.left_out:
        parts.append(_module_table("Without an adapter", plan.left_out, with_adapter=False))
    parts += [_parameters(plan), _size_table(plan)]
    if plan.rank_parts:
        parts.append(_rank_table(plan.rank_parts))
    parts += _effect_lines(plan)
    parts += _lines("Checked", [f"{check.name}: {check.finding}" for check in plan.checks])
    parts += _lines("Not checked", plan.unchecked)
    parts += _lines("Advice", plan.advice)
    parts += _lines("Stops this run", plan.problems)
    return Group(*parts)


def human_bytes(num_bytes: int | None) -> str:
    """`1,234,567 (1.2 MiB)`, or a dash for None."""
    if num_bytes is None:
        return "-"
    scaled = scaled_bytes(num_bytes)
    return scaled if num_bytes < 1024 else f"{num_bytes:,} ({scaled})"


def _heading(plan: Plan) -> Text:
    how = "every weight is trained" if plan.spec is None else f"LoRA, dim {plan.spec.dim}, alpha {plan.spec.alpha:g}"
    return Text(
        f"{plan.algorithm.upper()} of {plan.model_name} ({plan.architecture}) on {plan.backend}: {how}\n"
        f"Model: {plan.model_source}"
    )


def _module_table(title: str, types: Iterable[ModuleType], *, with_adapter: bool) -> Table:
    figures = ("count", "weight", *(("dim", "scale", "trainable") if with_adapter else ()))
    rows = []
    for kind in types:
        cells = [
            _as_glob(kind.name),
            "-" if kind.megatron_name is None else last_component(kind.megatron_name),
            f"{kind.num_modules:,}",
            "[" + ", ".join(f"{size}" for size in kind.weight_shape) + "]",
        ]
        if with_adapter:
            cells += [f"{kind.dim}", f"{kind.scale:g}", f"{kind.num_trainable_params:,}"]
        rows.append(cells)
    return figure_table(("Hugging Face", "Megatron"), figures, rows, title)


def _as_glob(name: str) -> str:
    """The shortest glob of the type, as one would write it as a target: a terminal has 80 columns."""
    return "*." + name.removeprefix("model.layers.*.") if name.startswith("model.layers.*.") else name


def _parameters(plan: Plan) -> Text:
    total = plan.num_params + (plan.num_trainable_params if plan.spec is not None else 0)
    share = plan.num_trainable_params / total
    base = "" if plan.spec is None else f" (base {plan.num_params:,} + adapter {plan.num_trainable_params:,})"
    return Text(f"Parameters: {plan.num_trainable_params:,} trainable ({share:.4%}) of {total:,}{base}")


def _size_table(plan: Plan) -> Table:
    sizes = plan.sizes
    rows = (
        ("weights of the model", sizes.base_bytes),
        ("adapter (fp32 masters)", sizes.adapter_bytes),
        ("gradients", sizes.gradient_bytes),
        ("optimizer (two moments)", sizes.optimizer_bytes),
        ("a checkpoint", sizes.checkpoint_bytes),
        ("a sync, merged", sizes.sync_merged_bytes),
        ("a sync, as adapter", sizes.sync_adapter_bytes),
    )
    shown = [(name, human_bytes(num_bytes)) for name, num_bytes in rows]
    return figure_table(["what"], ["bytes"], shown, "Bytes of tensors")


def _rank_table(rank_parts: Iterable[RankPart]) -> Table:
    rows = [
        (
            f"{part.pp_rank}",
            _span(range(part.num_tp_ranks)),
            f"{part.ep_rank}",
            _span(part.layers),
            _span(part.experts),
            f"{part.num_params:,}",
            f"{part.num_adapter_params:,}",
        )
        for part in rank_parts
    ]
    figures = ("pp", "tp", "ep", "layers", "experts", "weights", "adapter")
    return figure_table((), figures, rows, "What a process holds")


def _span(numbers: range) -> str:
    """`0-15`, `3`, or a dash for none."""
    if not numbers:
        return "-"
    return f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"


def _effect_lines(plan: Plan) -> list[RenderableType]:
    title = "What settings come to here"
    return _lines(title, [f"{e.key}={e.requested}: {e.effective} ({e.reason})" for e in plan.effects])


def _lines(title: str, sentences: Iterable[str]) -> list[RenderableType]:
    listed = list(sentences)
    return [Text("\n".join([f"{title}:", *(f"  - {sentence}" for sentence in listed)]))] if listed else []
