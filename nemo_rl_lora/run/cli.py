"""The command `nemo-rl-lora`: a name for every driver and tool, and the one way in for examples/ and tools/.

A command is a module with two functions: `declare(parser)` adds its flags, and `main(arguments)` does it and returns
the exit code. It is imported when the command is called; declaring its flags imports nothing heavy.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from nemo_rl_lora import __version__
from nemo_rl_lora.run.control import EXIT_CONFIG, EXIT_OK, STARTED, main_guard

if TYPE_CHECKING:
    from nemo_rl_lora.config.master import Algorithm, Driver

NAME = "nemo-rl-lora"


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command: a line about it, ways to call it (arguments alone), and its module."""

    summary: str
    calls: tuple[str, ...]
    module: str
    driver: Driver | None = None  # whose configuration it reads, where its arguments are a driver's
    more: str = ""

    def doc(self, program: str) -> str:
        """The text above the flags of `--help`."""
        calls = "\n".join(f"{program} {call}".rstrip() for call in self.calls)
        return "\n\n".join(part for part in (self.summary, calls, self.more) if part)


def main(argv: Sequence[str] | None = None) -> int:
    """`nemo-rl-lora COMMAND ...`; the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        sys.stdout.write(overview())
        return EXIT_OK
    if name == "--version":
        sys.stdout.write(f"{NAME} {__version__}\n")
        return EXIT_OK
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        meant = f" Did you mean {near[0]!r}?" if near else ""
        sys.stderr.write(f"{name!r}: no command of {NAME}.{meant} There are: {', '.join(COMMANDS)}.\n")
        return EXIT_CONFIG
    return run(name, program=f"{NAME} {name}", argv=arguments[1:])


def run(name: str, *, program: str, argv: Sequence[str] | None = None) -> int:
    """A command by its name, in the program that was started; the exit code."""

    def call() -> int:
        given = sys.argv[1:] if argv is None else argv
        started = _started(name, given)
        from nemo_rl_lora.config.cluster_rules import refuse_launcher
        from nemo_rl_lora.run.drivers import silence_vendors

        arguments = parse(name, given, program)
        arguments.started = started
        if COMMANDS[name].driver is not None:
            refuse_launcher()
        silence_vendors()
        return import_module(COMMANDS[name].module).main(arguments)

    return main_guard(call)


def _started(name: str, argv: Sequence[str]) -> float:
    """When this process started, by time.monotonic. A driver says a word, since its imports take some seconds."""
    process, _, seconds = os.environ.pop(STARTED, "").partition(":")
    if process == str(os.getpid()):  # it started itself again
        return float(seconds)
    if COMMANDS[name].driver is not None and "torch" not in sys.modules and not {"-h", "--help"} & {*argv}:
        sys.stderr.write(f"{name} is starting: torch is imported, then all that the run needs is checked\n")
    return time.monotonic()


def parse(name: str, argv: Sequence[str], program: str) -> argparse.Namespace:
    """A command's arguments. SystemExit for wrong ones, and after `--help`."""
    command = COMMANDS[name]
    parser = argparse.ArgumentParser(
        prog=program, description=command.doc(program), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(driver=command.driver)
    import_module(command.module).declare(parser)
    if command.driver is None:
        return parser.parse_args(argv)
    return parser.parse_intermixed_args(argv)  # overrides may stand between flags


def overview() -> str:
    """What `nemo-rl-lora --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {NAME} COMMAND ...",
            "",
            "Post-train language models with LoRA, and see proof that it happened.",
            "",
            *lines,
            "",
            f"`{NAME} COMMAND --help` says more of each. Paths that begin with examples/ are found in the package too.",
            "",
        ]
    )


_OVERRIDES = "--config FILE [--plan] [a.b=c] [+a.b=c] [++a.b=c] [~a.b]"


def _training(algorithm: Algorithm) -> Command:
    return Command(
        summary=f"Train with {algorithm.upper()}.",
        calls=("policy.dtensor_cfg.lora_cfg.enabled=true", _OVERRIDES),
        module="nemo_rl_lora.run.drivers",
        driver=algorithm,
    )


COMMANDS = {
    "sft": _training("sft"),
    "dpo": _training("dpo"),
    "grpo": _training("grpo"),
    "eval": Command(
        summary="Evaluate a model, or adapters on it: accuracy and pass@k.",
        calls=("", '"eval.adapters=[results/grpo/step_30]"', _OVERRIDES),
        module="nemo_rl_lora.evaluation.command",
        driver="eval",
    ),
    "export": Command(
        summary="Export an adapter: merged into its base, or alone in PEFT's format.",
        calls=(
            "--adapter-ckpt STEP --hf-ckpt-path OUTPUT [--hf-model-name BASE]",
            "--adapter-ckpt STEP --hf-ckpt-path OUTPUT --adapter-only",
            "--adapter-ckpt RUN --hf-ckpt-path OUTPUT --all",
        ),
        module="nemo_rl_lora.export.command",
    ),
    "config": Command(
        summary="Expand, compare or translate configuration files.",
        calls=("expand FILE [overrides]", "compare LEFT RIGHT", "translate FILE [--output FILE]"),
        module="nemo_rl_lora.run.config_command",
    ),
    "verify-resume": Command(
        summary="Compare a resumed run, step by step, with the run that was not interrupted.",
        calls=("--checkpoint STEP --steps K [--record LOG_DIRECTORY]",),
        module="nemo_rl_lora.run.verify_resume",
    ),
    "parity": Command(
        summary="Say what merging a checkpoint's adapter costs: merge it, or send it beside the base.",
        calls=("--checkpoint DIR [--output DIR] [--model NAME]",),
        module="nemo_rl_lora.export.parity_command",
        more="DIR is a step (`step_N`) or an adapter in PEFT's format. Writes certificate.json, certificate.md and\n"
        "certificate.png into the output directory, which is `parity` in the checkpoint's unless it is given, and\n"
        "prints the verdict.",
    ),
    "transcode": Command(
        summary="Convert an adapter between PEFT's form and megatron-bridge's two, exactly or not at all.",
        calls=("--adapter DIR --to peft|megatron-shared|megatron-canonical --out DIR [--plan]",),
        module="nemo_rl_lora.export.transcode_command",
        more="Exit code: 0 done, 2 impossible or a wrong input (nothing was written).",
    ),
}
