"""All weights and then an adapter, beside an adapter alone and all weights alone, on GSM8K at equal tokens.

Each arm is the driver's own command (examples/configs/quickstart/sft_phases.yaml) with one seed; the arms that have one
phase have the tokens of both. Runs that DIRECTORY has already are not made again. Writes curves.png there; ends with
one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "examples" / "configs" / "quickstart" / "sft_phases.yaml"
COLORS = {"phases": "#2563eb", "lora": "#d97706", "full": "#059669"}
LABELS = {
    "phases": "all weights on text, then LoRA on answers",
    "lora": "LoRA on answers",
    "full": "all weights on answers",
}
RATES = {"lora": 5.0e-4, "full": 5.0e-5}

Curve = Mapping[int, float]  # tokens seen -> validation loss


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where runs are, or are made")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm, of seeds 1, 2, ...")
    parser.add_argument("--tokens", type=int, default=24000, help="of each run; those of phases are halved")
    parser.add_argument("--set", action="append", default=[], metavar="key=value", help="an override for every run")
    arguments = parser.parse_args()
    runs = {arm: [run_of(arm, seed + 1, arguments) for seed in range(arguments.seeds)] for arm in COLORS}
    draw(runs, arguments.directory / "curves.png")
    print(json.dumps(summary(runs)))
    return 0


def run_of(arm: str, seed: int, arguments: argparse.Namespace) -> Curve:
    """The validation losses of a run, which is made where it is not there yet."""
    place = arguments.directory / f"{arm}_{seed}"
    metrics = place / "logs" / "exp_001" / "metrics.jsonl"
    if not metrics.exists():
        command = [sys.executable, str(ROOT / "examples" / "run_sft.py"), "--config", str(CONFIG), f"sft.seed={seed}"]
        command += [f"checkpointing.checkpoint_dir={place / 'steps'}", f"logger.log_dir={place / 'logs'}"]
        command += ["checkpointing.keep_top_k=1", "checkpointing.save_period=0", *length_of(arm, arguments.tokens)]
        subprocess.run([*command, *arguments.set], check=True, cwd=ROOT)
    return curve_of([json.loads(line) for line in metrics.read_text().splitlines()])


def length_of(arm: str, tokens: int) -> list[str]:
    """Overrides that give an arm its phases and its tokens."""
    if arm == "phases":
        return [f"sft.phases.{index}.tokens={tokens // 2}" for index in (0, 1)]
    shape = f"tokens: {tokens}, lr: {RATES[arm]}, warmup_pct: 0.1, decay_pct: 0.2"
    return [f"sft.phases=[{{name: answers, train: {arm}, {shape}}}]"]


def curve_of(lines: list[Mapping[str, Any]]) -> Curve:
    """Tokens seen before each validation, and its loss."""
    tokens, found = 0, {}
    for line in lines:
        if line["split"] == "train":
            tokens += int(line["total_num_tokens"])
        if line["split"] == "validation":
            found[tokens] = line["val_loss"]
    return found


def summary(runs: Mapping[str, list[Curve]]) -> dict[str, Any]:
    """The last validation loss of each arm: its mean and its deviation over the seeds, and each run's."""
    last = {arm: [list(curve.values())[-1] for curve in curves] for arm, curves in runs.items()}
    return {
        "start": list(runs["lora"][0].values())[0],
        **{
            arm: {"mean": mean(values), "sd": stdev(values) if len(values) > 1 else 0.0, "runs": values}
            for arm, values in last.items()
        },
    }


def draw(runs: Mapping[str, list[Curve]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for arm, curves in runs.items():
        for number, curve in enumerate(curves):
            label = LABELS[arm] if number == 0 else None
            axes.plot(
                list(curve), list(curve.values()), "o-", color=COLORS[arm], linewidth=1.2, markersize=3, label=label
            )
    axes.set_xlabel("tokens trained on")
    axes.set_ylabel("loss of a token of held-out answers")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    raise SystemExit(main())
