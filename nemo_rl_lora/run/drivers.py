"""What the drivers' command lines share: arguments, the plan, the start, the run and its summary."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import re
import shlex
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_rl_lora.config.cluster import joins_ray
from nemo_rl_lora.config.cluster_rules import missing_env_vars
from nemo_rl_lora.config.load import load_config, resolved_yaml, run_of_another_tool
from nemo_rl_lora.config.master import MasterConfig
from nemo_rl_lora.config.other_runs import notes_of
from nemo_rl_lora.run.control import EXIT_CONFIG, EXIT_OK, STARTED, RunFailedError, RunLostError

if TYPE_CHECKING:
    from nemo_rl_lora.algorithms.loop import RunResult
    from nemo_rl_lora.run.crossing import Crossing
    from nemo_rl_lora.run.preflight import Start
    from nemo_rl_lora.run.restarts import Restarts

logger = logging.getLogger(__name__)

_LOAD_PATH = "checkpointing.load_path="


def declare(parser: argparse.ArgumentParser) -> None:
    """A driver's arguments; whatever is no flag is an override."""
    parser.epilog = (
        "Overrides: a.b=c sets a key, +a.b=c adds one, ++a.b=c does either, ~a.b removes one. "
        "Exit code: 0 completed, 2 configuration error, 1 failure while running, 128 + signal."
    )
    quick_start = f"examples/configs/quickstart/{parser.get_default('driver')}.yaml"
    parser.add_argument("--config", type=Path, help=f"a YAML file; without it, {quick_start}")
    parser.add_argument("--plan", action="store_true", help="check everything and show the plan; loads no weight")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides")


def main(arguments: argparse.Namespace) -> int:
    """Plan or train; the exit code."""
    config = load_config(arguments.config, arguments.overrides, arguments.driver)
    if not arguments.plan:
        variables = missing_env_vars(config.policy) if config.cluster.num_processes == 1 else {}
        prepare_process(variables, arguments.started)
    set_up_logging(arguments)
    say_what_was_translated(arguments.config)
    config = with_fast_precision(config, arguments)
    if arguments.plan:
        return show_plan(config)
    return train(config, continue_command(sys.argv, config.checkpointing.load_path), arguments.started).exit_code


def set_up_logging(arguments: argparse.Namespace) -> None:
    """Show messages from here on; beside a plan, which says everything itself, only warnings."""
    from nemo_rl_lora.run.console import setup_logging

    setup_logging(level=logging.WARNING if arguments.plan else logging.INFO)


def say_what_was_translated(file: Path | None) -> None:
    """What is otherwise in this run than where its file, another tool's, comes from."""
    run = None if file is None else run_of_another_tool(file)
    if run is not None:
        logger.warning(f"{file}: runs as a {run.tool} configuration that is translated. {' '.join(notes_of(run))}")


def with_fast_precision(config: Any, arguments: argparse.Namespace) -> Any:
    """The driver's configuration in float32 where bfloat16 was only inherited and this machine has no instructions for
    it: there PyTorch multiplies bfloat16 matrices 5 to 70 times more slowly. Where the user set it, a warning says so.
    """
    if config.policy.precision != "bfloat16" or _has_bfloat16_products():
        return config
    lacks = "this processor has no instructions for bfloat16, which is much slower here than float32"
    if config.layers.is_set("policy.precision"):
        logger.warning(f"policy.precision=bfloat16: {lacks}.")
        return config
    logger.warning(f"policy.precision: float32, because {lacks}. To have it all the same: policy.precision=bfloat16.")
    return load_config(arguments.config, arguments.overrides, arguments.driver, precision="float32")


def _has_bfloat16_products() -> bool:
    """Whether this machine multiplies bfloat16 matrices about as fast as others; of a cluster's nodes nothing is
    known."""
    import torch

    from nemo_rl_lora.tensors import cpu_multiplies_bfloat16

    return torch.cuda.is_available() or joins_ray() or cpu_multiplies_bfloat16()


def train(config: MasterConfig, command: str | None = None, started: float | None = None) -> RunResult:
    """Train as the configuration says, or continue its run. `command` is shown as the way to continue; `started`: when
    the process started, by time.monotonic.

    ValueError where the run cannot start, before a weight is loaded; control.RunFailedError where it fails later.
    """
    from nemo_rl_lora.distributed.shared_memory import remove_leftovers
    from nemo_rl_lora.policy.determinism import set_workspace
    from nemo_rl_lora.run.console import setup_logging
    from nemo_rl_lora.run.restarts import Restarts

    setup_logging()
    remove_leftovers()
    if config.policy.deterministic:
        set_workspace()  # the checks before a start look at the GPU
    restarts = Restarts(config, command, started)
    while True:
        start = restarts.start()
        try:
            with contextlib.closing(start.checkpointer):
                return _finished(start) or _train(start, restarts, command)
        except RunFailedError as failed:
            if not isinstance(failed.__cause__, RunLostError) or not failed.__cause__.starts_again:
                raise


def _finished(start: Start) -> RunResult | None:
    """What a run says that was finished before; None for one that is to be trained."""
    from nemo_rl_lora.algorithms.loop import RunResult

    if start.resume is None or not start.is_finished:
        return None
    step, path, loop = start.resume.step, start.resume.path, start.config.algorithm
    if start.phase is None:
        budget = "" if start.algorithm.loop.max_num_tokens is None else f" and {loop}.max_num_tokens"
        done = f"{step} steps. For more steps raise {loop}.max_num_steps{budget}; for"
    else:
        done = f"{step} steps in {start.phase.begin.index + 1} phases. For"
    sys.stdout.write(
        f"The run in {path} is finished: {done} another run set checkpointing.checkpoint_dir or "
        "checkpointing.load_path=none.\n"
    )
    return RunResult(outcome="was finished", is_complete=True, step=step, checkpoint=path, log_directory=None)


def _train(start: Start, restarts: Restarts, command: str | None) -> RunResult:
    from nemo_rl_lora.algorithms.loop import TrainingLoop
    from nemo_rl_lora.run.console import setup_logging
    from nemo_rl_lora.run.control import running
    from nemo_rl_lora.run.memory import from_phase
    from nemo_rl_lora.run.metrics import RunLog
    from nemo_rl_lora.run.restarts import LOSSES
    from nemo_rl_lora.run.start import build_run

    config = start.run_config
    draw = draw_curves_of if config.logger.plot.enabled else None
    log = RunLog(config.logger, resolved_yaml(config), draw)
    with running(log.directory, config) as stop, contextlib.ExitStack() as cleanup:
        if draw is not None:
            cleanup.callback(draw, log.directory)
        cleanup.callback(log.close)
        restarts.record(log, start)
        loop = crossing = console = None
        try:
            while True:
                with contextlib.ExitStack() as parts:
                    with stop.starting(), from_phase("start"):
                        run = build_run(start, log, parts)
                    setup_logging(run.console.console)
                    if console is not None:
                        run.console.go_on_from(console)
                    console = run.console
                    with console:
                        loop = TrainingLoop(run, start.algorithm, restarts.started)
                        if crossing is not None:
                            crossing.confirm(run)
                        result = loop.run(stop)
                        goes_on = result.is_complete and bool(start.following)
                        crossing = _crossing(start, result) if goes_on and not stop.requested else None
                if crossing is not None:
                    run = loop = None  # and with them the weights, which the next phase has its own of
                    start = crossing.make()
                if goes_on and stop.requested:
                    result = replace(result, outcome=f"stopped by {stop.signal_name}", is_complete=False)
                    break
                if crossing is None:
                    break
        except LOSSES as error:
            num_steps = loop.step if loop is not None else None if crossing is None else crossing.step
            lost = restarts.lost(error, start, num_steps, stop)
            if lost is None:
                raise
            raise lost from error
    console.summary(
        result.outcome,
        log_directory=log.directory,
        checkpoint=result.checkpoint,
        best_checkpoint=start.checkpointer.best_step(),
        continue_command=None if result.is_complete or result.checkpoint is None else _way_on(start, command),
        restarts=restarts.lines,
    )
    return replace(result, exit_code=stop.exit_code)


def _crossing(start: Start, result: RunResult) -> Crossing:
    """From a phase that is over into the next."""
    from nemo_rl_lora.run.crossing import Crossing
    from nemo_rl_lora.run.phases import PhaseStart

    assert isinstance(start, PhaseStart), start
    return Crossing(start, result)


def _way_on(start: Start, command: str | None) -> str | None:
    """The command that continues: from where this one began, where the run has saved nothing since."""
    load_path = start.config.checkpointing.load_path
    if command is None or start.checkpointer.saved is not None or load_path == "auto":
        return command
    written = load_path if re.fullmatch(r"[\w./~-]+", load_path) else json.dumps(load_path, ensure_ascii=False)
    return command.replace(f"{_LOAD_PATH}auto", shlex.quote(f"{_LOAD_PATH}{written}"))


def continue_command(argv: Sequence[str], load_path: str = "auto") -> str:
    """The same command, continuing from the newest checkpoint wherever the first one started from: `load_path`."""
    kept = [argument for argument in argv if not argument.lstrip("+").startswith(_LOAD_PATH)]
    is_script = kept[0].endswith(".py")
    program = ["uv", "run", kept[0]] if is_script else [Path(kept[0]).name]
    return shlex.join(
        [*program, *kept[1:], *([f"{_LOAD_PATH}auto"] if len(kept) < len(argv) or load_path != "auto" else [])]
    )


def draw_curves_of(log_directory: Path) -> None:
    """Draw curves.png; a plot that cannot be drawn ends no run."""
    from nemo_rl_lora.run.plots import draw_curves

    try:
        draw_curves(log_directory)
    except OSError as error:
        logger.warning(f"{log_directory / 'curves.png'} could not be drawn: {error}")


def show_plan(config: MasterConfig) -> int:
    """Print what the run would do, without loading a weight; 2 where something stops it."""
    from rich.console import Console
    from rich.text import Text

    from nemo_rl_lora.config.support import phase_problems
    from nemo_rl_lora.plan.phases import render_phases
    from nemo_rl_lora.plan.show import render_plan
    from nemo_rl_lora.run.phases import PhaseStart, phase_plans
    from nemo_rl_lora.run.preflight import plan_of, starts_of

    starts, console = starts_of(config), Console()
    plans = [plan_of(start) for start in starts]
    phases = [start for start in starts if isinstance(start, PhaseStart)]
    own = phase_problems(config)
    problems = [*own, *(problem for plan in plans for problem in plan.problems)]
    if phases and not problems:
        console.print(render_phases(phase_plans(phases, plans)))
    for start, plan in zip(starts, plans, strict=True):
        console.print(*([Text(f"\n{start.label}")] if start.label else []), render_plan(plan), sep="\n")
    for problem in own:
        console.print(Text(f"Stops this run: {problem}"), soft_wrap=True)
    return EXIT_CONFIG if problems else EXIT_OK


def prepare_process(variables: Mapping[str, str] | None = None, started: float | None = None) -> None:
    """Settings of the C libraries that have to stand before torch is imported, where a value of the user's own stays,
    and further variables that the configuration asks for. `started`: when this process started.

    glibc hands freed memory back to the kernel at once, which costs a training loop on a CPU dear: keep it. OpenMP's
    waiting threads spin, which on a machine that does something else too costs several times the work: let them
    sleep. Both are read when a process starts, so the process starts itself again, once.
    """
    missing = {name: value for name, value in _C_SETTINGS.items() if name not in os.environ}
    missing |= variables or {}
    if "torch" in sys.modules or not missing:
        return
    os.environ.update(missing)
    if started is not None:
        os.environ[STARTED] = f"{os.getpid()}:{started}"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def silence_vendors() -> None:
    """Keep off the screen what the vendors say of packages that a CPU does not need, and of their own deprecations."""
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex", category=UserWarning)
    for name in ("torch.utils._pytree", "torch.utils.cpp_extension"):
        logging.getLogger(name).addFilter(lambda record: record.levelno >= logging.ERROR)  # torch resets the level
    for name in ("transformers.configuration_utils", "transformers.modeling_utils"):
        logging.getLogger(name).addFilter(lambda record: "is deprecated" not in record.getMessage())
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category)


_C_SETTINGS = {
    "MALLOC_TRIM_THRESHOLD_": str(10**11),
    "MALLOC_MMAP_THRESHOLD_": str(10**11),
    "MALLOC_TOP_PAD_": str(2**28),
    "GOMP_SPINCOUNT": "10000",
    "TOKENIZERS_PARALLELISM": "false",
}
