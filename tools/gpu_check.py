"""Check what this product computes on one GPU, beside fp64, the CPU, transformers and PEFT. See docs/gpu.md.

uv run tools/gpu_check.py [--only kernels,steps] [--out DIRECTORY] [--budget SECONDS] [--cpu]

A line for each check as soon as it is known, and gpu_check.json with all of them. The exit code is 1 where one failed,
2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.gpu.checks import Check, Machine

ROOT = Path(__file__).resolve().parents[1]
GROUPS = ("environment", "kernels", "attention", "generation", "steps", "runs")  # modules of tests/gpu, in their order
MARKS = {True: "ok  ", False: "FAIL", None: "    "}
BUDGET_SECONDS = 200  # and the check that runs then: at most four minutes

Entry = dict[str, Any]


class Report:
    """Lines on the screen and a file, both complete after every check."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.entries: list[Entry] = []

    def add(self, entry: Entry) -> None:
        self.entries.append(entry)
        self._file.write_text(json.dumps(self.entries, indent=1) + "\n")
        print(line_of(entry), flush=True)

    @property
    def failed(self) -> list[Entry]:
        return [entry for entry in self.entries if entry["ok"] is False]


def line_of(entry: Entry) -> str:
    """`ok` or FAIL (neither for a measurement), seconds, the name and the facts of an entry of gpu_check.json."""
    facts = "  ".join(f"{name}={_shown(value)}" for name, value in entry["facts"].items())
    return f"{MARKS[entry['ok']]} {entry['seconds']:6.1f} s  {entry['group']}: {entry['name']}  {facts}"


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main(arguments: Sequence[str] | None = None) -> int:
    options = read_options(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    from tests.gpu.checks import Machine, without_gpu

    if not options.cpu and not has_gpu():
        print("tools/gpu_check.py: torch finds no GPU. --cpu runs the same code without one.", file=sys.stderr)
        return 2
    report, begun = Report(options.out / "gpu_check.json"), time.monotonic()
    with tempfile.TemporaryDirectory() as root, without_gpu() if options.cpu else nullcontext():
        machine = Machine(device="cpu" if options.cpu else "cuda", root=Path(root))
        ask_all(report, options.only, partial(checks_of, machine=machine), begun=begun, budget=options.budget)
    num_ok = sum(entry["ok"] is True for entry in report.entries)
    seconds = time.monotonic() - begun
    print(f"{num_ok} passed, {len(report.failed)} failed, of {len(report.entries)} in {seconds:.0f} s")
    return 1 if report.failed else 0


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = partial(names_among, GROUPS, "a group of checks", "Groups")
    parser.add_argument("--only", type=groups, default=GROUPS, metavar="NAMES", help=f"of {','.join(GROUPS)}")
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIRECTORY", help="where gpu_check.json goes")
    parser.add_argument(
        "--budget", type=float, default=BUDGET_SECONDS, metavar="SECONDS", help="after these no check begins"
    )
    parser.add_argument(
        "--cpu",
        action="store_true",
        help="the same code without a GPU: kernels and attention are skipped, steps and runs have fewer cases",
    )
    return parser.parse_args(arguments)


def names_among(known: Collection[str], one: str, several: str, text: str) -> tuple[str, ...]:
    """Names with commas between them. `one` and `several` say what they are, in an error."""
    chosen = tuple(text.split(","))
    if unknown := [name for name in chosen if name not in known]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not {one}. {several}: {', '.join(known)}")
    return chosen


def prepare_environment(cpu: bool) -> None:
    """What has to be set before torch is imported: no model hub, a thread for matrices as tiny as these, and on a GPU
    the workspaces of cuBLAS products that repeat exactly."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if cpu:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    else:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def checks_of(group: str, machine: Machine) -> Iterator[Check]:
    yield from import_module(f"tests.gpu.{group}").checks(machine)


def ask_all(
    report: Report,
    names: Sequence[str],
    list_of: Callable[[str], Iterator[Check]],
    *,
    begun: float,
    budget: float,
) -> None:
    """Ask the checks of each list. After `budget` seconds from `begun`, by time.monotonic, none begins."""
    for name in names:
        for check in _listed(list_of, name):
            is_late = time.monotonic() - begun > budget
            report.add(out_of_time(name, check, budget) if is_late else asked(name, check))


def _listed(list_of: Callable[[str], Iterator[Check]], name: str) -> Iterator[Check]:
    """The checks; one that fails where their module cannot be imported, or their list not be made."""
    from tests.gpu.checks import Check

    try:
        yield from list_of(name)
    except Exception as error:  # the next group may still tell something
        yield Check(name="the list of checks", ask=_raiser(error))


def _raiser(error: Exception) -> Any:
    def ask() -> Any:
        raise error

    return ask


def asked(group: str, check: Check) -> Entry:
    begun = time.monotonic()
    try:
        answer = check.ask()
        ok, facts = answer.ok, dict(answer.facts)
    except Exception as error:  # the next check may still tell something
        ok, facts = False, described(error)
    return {"group": group, "name": check.name, "ok": ok, "seconds": time.monotonic() - begun, "facts": facts}


def described(error: Exception) -> dict[str, str]:
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames))
    return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}", "where": where}


def out_of_time(group: str, check: Check, budget: float) -> Entry:
    facts = {"skipped": f"out of time: --budget {budget:g}"}
    return {"group": group, "name": check.name, "ok": None, "seconds": 0.0, "facts": facts}


if __name__ == "__main__":
    prepare_environment("--cpu" in sys.argv)
    sys.exit(main())
