"""What the drivers' command lines share: arguments, the plan, the start, the run and its summary."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_rl_lora.config.load import load_config, resolved_yaml
from nemo_rl_lora.config.master import MasterConfig
from nemo_rl_lora.run.control import EXIT_CONFIG, EXIT_OK

if TYPE_CHECKING:
    from nemo_rl_lora.algorithms.loop import RunResult
    from nemo_rl_lora.run.preflight import Start

logger = logging.getLogger(__name__)


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
    if arguments.plan:
        return show_plan(config)
    prepare_process()
    return train(config, continue_command(sys.argv)).exit_code


def train(config: MasterConfig, command: str | None = None) -> RunResult:
    """Train as the configuration says, or continue its run. `command` is shown as the way to continue.

    ValueError where the run cannot start, before a weight is loaded; control.RunFailedError where it fails later.
    """
    from nemo_rl_lora.algorithms.loop import RunResult
    from nemo_rl_lora.run.console import setup_logging
    from nemo_rl_lora.run.preflight import check_start

    setup_logging()
    start = check_start(config)
    with contextlib.closing(start.checkpointer):
        if start.resume is None or not start.is_finished:
            return _train(start, command)
    step, path = start.resume.step, start.resume.path
    sys.stdout.write(
        f"The run in {path} is finished: {step} steps. For more steps raise {config.algorithm}.max_num_steps; for "
        "another run set checkpointing.checkpoint_dir or checkpointing.load_path=none.\n"
    )
    return RunResult(outcome="was finished", is_complete=True, step=step, checkpoint=path, log_directory=None)


def _train(start: Start, command: str | None) -> RunResult:
    from nemo_rl_lora.algorithms.loop import TrainingLoop
    from nemo_rl_lora.run.console import setup_logging
    from nemo_rl_lora.run.control import running
    from nemo_rl_lora.run.metrics import RunLog
    from nemo_rl_lora.run.start import build_run

    config = start.config
    draw = draw_curves_of if config.logger.plot.enabled else None
    log = RunLog(config.logger, resolved_yaml(config), draw)
    with running(log.directory) as stop, contextlib.ExitStack() as cleanup:
        if draw is not None:
            cleanup.callback(draw, log.directory)
        cleanup.callback(log.close)
        run = build_run(start, log, cleanup)
        setup_logging(run.console.console)
        with run.console:
            result = TrainingLoop(run, start.algorithm).run(stop)
    run.console.summary(
        result.outcome,
        log_directory=log.directory,
        checkpoint=result.checkpoint,
        best_checkpoint=start.checkpointer.best_step(),
        continue_command=None if result.is_complete or result.checkpoint is None else command,
    )
    return replace(result, exit_code=stop.exit_code)


def continue_command(argv: Sequence[str]) -> str:
    """The same command, continuing from the newest checkpoint wherever the first one started from."""
    key = "checkpointing.load_path="
    kept = [argument for argument in argv if not argument.lstrip("+").startswith(key)]
    is_script = kept[0].endswith(".py")
    program = ["uv", "run", kept[0]] if is_script else [Path(kept[0]).name]
    return shlex.join([*program, *kept[1:], *([f"{key}auto"] if len(kept) < len(argv) else [])])


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

    from nemo_rl_lora.plan.show import render_plan
    from nemo_rl_lora.run.preflight import plan_run

    plan = plan_run(config)
    Console().print(render_plan(plan))
    return EXIT_CONFIG if plan.problems else EXIT_OK


def prepare_process() -> None:
    """Settings of the C libraries that have to stand before torch is imported; a value of the user's own stays.

    glibc hands freed memory back to the kernel at once, which costs a training loop on a CPU dear: keep it. OpenMP's
    waiting threads spin, which on a machine that does something else too costs several times the work: let them
    sleep. Both are read when a process starts, so the process starts itself again, once.
    """
    missing = {name: value for name, value in _C_SETTINGS.items() if name not in os.environ}
    if "torch" in sys.modules or not missing:
        return
    os.environ.update(missing)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def silence_vendors() -> None:
    """Keep what importing the vendors says about packages that a CPU does not need off the screen."""
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex", category=UserWarning)
    for name in ("torch.utils._pytree", "torch.utils.cpp_extension"):
        logging.getLogger(name).addFilter(lambda record: record.levelno >= logging.ERROR)  # torch resets the level


_C_SETTINGS = {
    "MALLOC_TRIM_THRESHOLD_": str(10**11),
    "MALLOC_MMAP_THRESHOLD_": str(10**11),
    "MALLOC_TOP_PAD_": str(2**28),
    "GOMP_SPINCOUNT": "10000",
    "TOKENIZERS_PARALLELISM": "false",
}
