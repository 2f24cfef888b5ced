"""The export's command line: flags to a request, and what came of it to the screen.

Exit code: 0 done; 1 something failed while it was made; 2 a wrong input, before anything was written.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_rl_lora.run.control import EXIT_FAILURE, EXIT_OK
from nemo_rl_lora.tensors import COMPUTE_DTYPES

if TYPE_CHECKING:
    from nemo_rl_lora.export.convert import Export, ExportRequest

_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[KMGT]i?)?B?", re.IGNORECASE)
_EXAMPLES = """examples:
  a merged model:      --adapter-ckpt results/grpo/step_30 --hf-ckpt-path exported/merged
  an adapter for PEFT: --adapter-ckpt results/grpo/step_30 --hf-ckpt-path exported/adapter --adapter-only
  every step of a run: --adapter-ckpt results/grpo --hf-ckpt-path exported/all --all

Exit code: 0 done, 1 failed while exporting, 2 a wrong input (nothing was written)."""


def declare(parser: argparse.ArgumentParser) -> None:
    """The flags, NeMo RL's and ours."""
    parser.epilog, parser.allow_abbrev = _EXAMPLES, False
    add = parser.add_argument
    add("--adapter-ckpt", type=Path, required=True, help="a step (step_N), a PEFT directory; with --all, a run")
    add("--hf-ckpt-path", type=Path, required=True, help="the directory to make; with --all, one in it for every step")
    add("--hf-model-name", help="the base: a model name or directory (default: what the adapter says it is for)")
    add("--base-ckpt", type=Path, help="a Hugging Face directory to read the base's weights from instead")
    add("--adapter-only", action="store_true", help="export the adapter in PEFT's format; reads no base")
    add("--all", action="store_true", help="every step of a run, the base read once; finished ones are skipped")
    add("--overwrite", action="store_true", help="replace an earlier export")
    add("--dtype", choices=COMPUTE_DTYPES, help="of the merged weights (default: as the base stores each)")
    add("--max-shard-size", metavar="SIZE", help="of a weights file, such as 500MB or 2GiB (default: 5GB)")
    add("--no-verify", action="store_true", help="do not read the result back")
    add("--verify-full", action="store_true", help="compare every row with fp64, in place of 16 of each weight")
    add("--verify-logits", action="store_true", help="compare logits with base + adapter in PEFT; loads both models")


def main(arguments: argparse.Namespace) -> int:
    """Export, show what was made, and return the exit code."""
    _refuse_contradictions(arguments)
    from rich.console import Console

    from nemo_rl_lora.export.convert import export
    from nemo_rl_lora.run.console import setup_logging

    setup_logging()
    console, started = Console(highlight=False), time.perf_counter()
    exports = export(_request(arguments))
    print_exports(console, exports, time.perf_counter() - started)
    return EXIT_FAILURE if any(item.status == "failed" for item in exports) else EXIT_OK


def _request(arguments: argparse.Namespace) -> ExportRequest:
    from nemo_rl_lora.export.convert import ExportRequest

    return ExportRequest(
        adapter=arguments.adapter_ckpt,
        output=arguments.hf_ckpt_path,
        model_name=arguments.hf_model_name,
        base_directory=arguments.base_ckpt,
        adapter_only=arguments.adapter_only,
        all_steps=arguments.all,
        overwrite=arguments.overwrite,
        dtype=arguments.dtype,
        max_shard_bytes=parse_size(arguments.max_shard_size or "5GB"),
        verification="none" if arguments.no_verify else "full" if arguments.verify_full else "sampled",
        verify_logits=arguments.verify_logits,
    )


def _refuse_contradictions(arguments: argparse.Namespace) -> None:
    if arguments.no_verify and arguments.verify_full:
        raise ValueError("--verify-full=True: contradicts --no-verify. Drop one of them.")
    if not arguments.adapter_only:
        return
    for name in ("dtype", "max_shard_size", "no_verify", "verify_full", "verify_logits"):
        if value := getattr(arguments, name):
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{flag}={value!r}: is about merged weights, and --adapter-only merges none. Drop one of them."
            )
    if arguments.base_ckpt is not None:
        sys.stderr.write("--base-ckpt is not needed with --adapter-only: no base is read.\n")


def parse_size(text: str) -> int:
    """Bytes of `500MB` (powers of 1000), `2GiB` (of 1024) or a plain number. ValueError names the flag."""
    match = _SIZE.fullmatch(text.strip())
    size = 0
    if match is not None:
        unit = (match["unit"] or "").upper()
        factor = (1024 if unit.endswith("I") else 1000) ** (" KMGT".index(unit[0]) if unit else 0)
        size = int(float(match["number"]) * factor)
    if size < 1:
        raise ValueError(
            f"--max-shard-size={text!r}: must be a size of at least a byte. Write, for example, 500MB or 2GiB."
        )
    return size


def print_exports(console: Any, exports: Sequence[Export], seconds: float) -> None:
    """A line for each output, its measurements, its warnings; what failed, last."""
    from rich.text import Text

    from nemo_rl_lora.run.console import figure_table

    figures = ("bytes", "changed", "largest error", "its bound", "worst")
    rows = [(item.output.name, item.status, *_figures(item.report)) for item in exports]
    console.print(figure_table(("output", ""), figures, rows))
    for item in exports:
        if logits := item.report.get("logits"):
            console.print(_logits_line(item, logits), soft_wrap=True)
        for warning in item.report.get("warnings", ()):
            console.print(Text(f"Warning: {item.output.name}: {warning}", style="yellow"), soft_wrap=True)
    num_written = sum(item.status == "written" for item in exports)
    place = exports[0].output if len(exports) == 1 else exports[0].output.parent
    end = f"{num_written} of {len(exports)} written in {seconds:.1f} s: {place}{_survival(exports)}"
    console.print(Text(end), soft_wrap=True)
    for item in exports:
        if item.problem is not None:
            sys.stderr.write(f"{item.output} failed: {item.problem}\n")


def _survival(exports: Sequence[Export]) -> str:
    """What the merged weights' dtype leaves of the update, of the output where that is least, and the remedy."""
    from nemo_rl_lora.lora.merge import LEAST_SHARE, MOST_ERROR

    reports = [item.report for item in exports if "surviving_share" in item.report]
    if not reports:
        return ""
    report = min(reports, key=lambda report: report["surviving_share"] - report["relative_rounding_error"])
    share, error, names = report["surviving_share"], report["relative_rounding_error"], report["merged_dtypes"]
    said = f". In {' and '.join(names)} {share:.1%} of the update survives, and rounding adds {error:.1%} of its size"
    if share >= LEAST_SHARE and error <= MOST_ERROR:
        return said
    return f"{said}: keep the adapter beside its base with --adapter-only, or write --dtype float32"


def _figures(report: dict[str, Any]) -> list[str]:
    if not report:
        return ["-"] * 5
    figures = [f"{sum(file['num_bytes'] for file in report['files']):,}"]
    figures.append(f"{report['changed_fraction']:.2%}" if "changed_fraction" in report else "-")
    if "accuracy" not in report:
        return [*figures, "-", "-", "-"]
    accuracy = report["accuracy"]
    return [*figures, f"{accuracy['max_abs_error']:.3g}", f"{accuracy['bound']:.3g}", f"{accuracy['worst_ratio']:.3f}"]


def _logits_line(item: Export, logits: dict[str, Any]) -> str:
    return (
        f"{item.output.name}: over {logits['num_tokens']} tokens, logits differ from those of base + adapter by "
        f"{logits['mean_abs_error']:.2g} in the mean and {logits['max_abs_error']:.2g} at most (the adapter moves them "
        f"by {logits['adapter_effect']:.2g}); the top token is the same at {logits['same_top_token']:.1%}."
    )
