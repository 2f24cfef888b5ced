"""The command `nemo-rl-lora`: a name for every driver and tool, and the one way in for examples/ and tools/.

A command's own modules are imported when it runs, and `--help` imports nothing heavy.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

from nemo_rl_lora.run.control import EXIT_CONFIG, EXIT_OK, main_guard

if TYPE_CHECKING:
    from nemo_rl_lora.config.master import Algorithm

NAME = "nemo-rl-lora"


@dataclass(frozen=True, slots=True, kw_only=True)
class Invocation:
    """How a command was called: as what (`nemo-rl-lora sft`), what its help says, and its arguments."""

    program: str
    doc: str
    arguments: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command: a line about it, ways to call it (arguments alone), and what runs it to an exit code."""

    summary: str
    calls: tuple[str, ...]
    run: Callable[[Invocation], int]
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
        sys.stdout.write(f"{NAME} {version(NAME)}\n")
        return EXIT_OK
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        meant = f" Did you mean {near[0]!r}?" if near else ""
        sys.stderr.write(f"{name!r}: no command of {NAME}.{meant} There are: {', '.join(COMMANDS)}.\n")
        return EXIT_CONFIG
    return run(name, program=f"{NAME} {name}", argv=arguments[1:])


def run(name: str, *, program: str, argv: Sequence[str] | None = None) -> int:
    """A command by its name, in the program that was started; the exit code."""
    command = COMMANDS[name]
    arguments = list(sys.argv[1:] if argv is None else argv)
    return main_guard(lambda: command.run(Invocation(program=program, doc=command.doc(program), arguments=arguments)))


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


def _training(algorithm: Algorithm) -> Callable[[Invocation], int]:
    def train(call: Invocation) -> int:
        from nemo_rl_lora.run.drivers import driver_arguments, train_main

        return train_main(algorithm, driver_arguments(algorithm, call.doc, call.arguments, call.program))

    return train


def _evaluate(call: Invocation) -> int:
    from nemo_rl_lora.evaluation.command import eval_main
    from nemo_rl_lora.run.drivers import driver_arguments

    return eval_main(driver_arguments("eval", call.doc, call.arguments, call.program))


def _export(call: Invocation) -> int:
    from nemo_rl_lora.export.command import export_main, parse_arguments

    arguments = parse_arguments(call.doc, call.arguments, call.program)
    _silence_vendors()
    return export_main(arguments)


def _config(call: Invocation) -> int:
    from nemo_rl_lora.run.config_command import config_main

    return config_main(call.doc, call.arguments, call.program)


def _verify_resume(call: Invocation) -> int:
    from nemo_rl_lora.run.verify_resume import parse_arguments, verify_resume

    return verify_resume(parse_arguments(call.doc, call.arguments, call.program))


def _parity(call: Invocation) -> int:
    from nemo_rl_lora.export.parity_command import parity_main, parse_arguments

    arguments = parse_arguments(call.doc, call.arguments, call.program)
    _silence_vendors()
    return parity_main(arguments)


def _transcode(call: Invocation) -> int:
    from nemo_rl_lora.export.transcode_command import parse_arguments, transcode_main

    arguments = parse_arguments(call.doc, call.arguments, call.program)
    _silence_vendors()
    return transcode_main(arguments)


def _silence_vendors() -> None:
    from nemo_rl_lora.run.drivers import silence_vendors

    silence_vendors()


_LORA = "policy.dtensor_cfg.lora_cfg.enabled=true"
_OVERRIDES = "--config FILE [--plan] [a.b=c] [+a.b=c] [++a.b=c] [~a.b]"

COMMANDS = {
    "sft": Command(summary="Train with SFT.", calls=(_LORA, _OVERRIDES), run=_training("sft")),
    "dpo": Command(summary="Train with DPO.", calls=(_LORA, _OVERRIDES), run=_training("dpo")),
    "grpo": Command(summary="Train with GRPO.", calls=(_LORA, _OVERRIDES), run=_training("grpo")),
    "eval": Command(
        summary="Evaluate a model, or adapters on it: accuracy and pass@k.",
        calls=("", '"eval.adapters=[results/grpo/step_30]"', _OVERRIDES),
        run=_evaluate,
    ),
    "export": Command(
        summary="Export an adapter: merged into its base, or alone in PEFT's format.",
        calls=(
            "--adapter-ckpt STEP --hf-ckpt-path OUTPUT [--hf-model-name BASE]",
            "--adapter-ckpt STEP --hf-ckpt-path OUTPUT --adapter-only",
            "--adapter-ckpt RUN --hf-ckpt-path OUTPUT --all",
        ),
        run=_export,
    ),
    "config": Command(
        summary="Expand, compare or translate configuration files.",
        calls=("expand FILE [overrides]", "compare LEFT RIGHT", "translate FILE"),
        run=_config,
    ),
    "verify-resume": Command(
        summary="Compare a resumed run, step by step, with the run that was not interrupted.",
        calls=("--checkpoint STEP --steps K [--record LOG_DIRECTORY]",),
        run=_verify_resume,
    ),
    "parity": Command(
        summary="Say what merging a checkpoint's adapter costs: merge it, or send it beside the base.",
        calls=("--checkpoint DIR [--output DIR] [--model NAME]",),
        run=_parity,
        more="DIR is a step (`step_N`) or an adapter in PEFT's format. Writes certificate.json, certificate.md and\n"
        "certificate.png into the output directory, which is `parity` in the checkpoint's unless it is given, and\n"
        "prints the verdict.",
    ),
    "transcode": Command(
        summary="Convert an adapter between PEFT's form and megatron-bridge's two, exactly or not at all.",
        calls=("--adapter DIR --to peft|megatron-shared|megatron-canonical --out DIR [--plan]",),
        run=_transcode,
        more="Exit code: 0 done, 2 impossible or a wrong input (nothing was written).",
    ),
}
