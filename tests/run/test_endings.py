"""What ends a run from outside, in a process of its own: signals, a terminal, closed pipes, full disks."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NoReturn

import pytest

from nemo_rl_lora.config.master import Algorithm
from nemo_rl_lora.policy.dtensor.policy import DTensorPolicy
from nemo_rl_lora.run import cli, control
from tests.children import exit_code, started
from tests.driver import TinyRun, adapter, same, without_seconds

ROOT = Path(__file__).parents[2]
LONG = ("sft.max_num_steps=100000", "sft.max_num_epochs=100000", "checkpointing.save_period=100000")


def _drive(algorithm: Algorithm, arguments: list[str], before: Callable[[], object]) -> NoReturn:
    """The driver, in a process of its own: `before` is called first."""
    code = 99
    try:
        before()
        if sys.stdout is not None:
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        code = cli.run(algorithm, program="run", argv=arguments)
    finally:
        os._exit(code)


def _nothing() -> None:
    pass


def driven(tiny: TinyRun, *overrides: str, before: Callable[[], object] = _nothing) -> BaseProcess:
    return started(_drive, tiny.algorithm, tiny.arguments(*overrides), before)


def signalled(process: BaseProcess, number: int) -> int:
    """The exit code of a process that got this signal."""
    assert process.pid is not None
    os.kill(process.pid, number)
    return exit_code(process)


def wait_for_steps(tiny: TinyRun, number: int) -> None:
    deadline = time.monotonic() + 120
    log = tiny.logs / "exp_001" / "metrics.jsonl"
    while not log.exists() or log.read_text().count('"split": "train"') < number:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def run_log(tiny: TinyRun) -> str:
    return (tiny.logs / "exp_001" / "run.log").read_text()


def screen(raw: str, width: int = 80) -> list[str]:
    """The lines of a terminal after it has got this; a line that is too long goes on in the next one."""
    lines, row, column = [""], 0, 0
    for piece in re.findall(r"\x1b\[[\d;?]*[A-Za-z]|[^\x1b]", raw):
        if piece == "\n":
            row += 1
        elif piece == "\r":
            column = 0
        elif piece.endswith("A") and len(piece) > 1:
            row -= int(piece[2:-1] or 1)
        elif piece == "\x1b[2K":
            lines[row] = ""
        elif len(piece) == 1:
            if column == width:
                row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
            lines[row] = lines[row].ljust(column)[:column] + piece + lines[row][column + 1 :]
            column += 1
        lines += [""] * (row + 1 - len(lines))
    return lines


def _terminal(name: str, ignored: int | None = None) -> None:
    """A session of this process's own on a terminal of 80 columns, as a login has it; deaf to one signal."""
    os.setsid()
    terminal = os.open(name, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(terminal, number)
    fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    os.environ["TERM"] = "xterm-256color"
    os.environ.pop("COLUMNS", None)  # else it is not the terminal that is asked
    if ignored is not None:
        signal.signal(ignored, signal.SIG_IGN)


@pytest.fixture
def on_terminal(tiny_run):
    """A GRPO run on a terminal of 80 columns, interrupted there after three steps: what it wrote, and its exit code."""
    overrides = ("grpo.max_num_steps=1000", "grpo.max_num_epochs=1000", "checkpointing.save_period=1000")
    terminal, its_end = pty.openpty()
    process = driven(tiny_run, *overrides, before=partial(_terminal, os.ttyname(its_end)))
    raw, deadline, interrupted = b"", time.monotonic() + 120, False
    while time.monotonic() < deadline and (process.is_alive() or select.select([terminal], [], [], 0)[0]):
        if not interrupted and b"step 3/" in raw:
            os.write(terminal, b"\x03")
            interrupted = True
        if select.select([terminal], [], [], 0.1)[0]:
            raw += os.read(terminal, 65536)
    os.close(its_end)
    os.close(terminal)
    return raw.decode().replace("^C", ""), exit_code(process)  # which the terminal echoes


def test_ctrl_c_is_answered_above_a_display_of_one_line(tiny_run, on_terminal):
    raw, code = on_terminal
    lines = screen(raw)
    text = "\n".join(lines)

    assert code == 130
    assert "SIGINT: finishing this step, then saving and stopping" in text
    assert "SIGINT: finishing this step" in run_log(tiny_run)
    displays = re.findall(r"\x1b\[1mGRPO .*?(?=\r|$)", raw)
    shown = [re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", display) for display in displays]
    assert any("left" in display and "reward" in display for display in shown)
    assert not [display for display in shown if len(display) > 80]
    assert "\x1b[1A\x1b[2K" not in raw[: raw.index("SIGINT: finishing")]  # never more than the line itself is erased
    assert " left" not in text  # only the display says how long it takes, and it is gone
    assert "deprecated" not in raw


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_signal_saves_the_step(tiny_sft, number):
    process = driven(tiny_sft, *LONG)
    wait_for_steps(tiny_sft, 3)

    assert signalled(process, number) == 128 + number
    (step,) = tiny_sft.steps()
    assert len(tiny_sft.metrics()) == int(step.removeprefix("step_"))
    assert f"{number.name}: finishing this step" in run_log(tiny_sft)


def test_a_run_under_nohup_goes_on(tiny_sft):
    ignored = partial(signal.signal, signal.SIGHUP, signal.SIG_IGN)
    process = driven(tiny_sft, *LONG, "sft.max_num_steps=60", before=ignored)
    wait_for_steps(tiny_sft, 3)
    assert signalled(process, signal.SIGHUP) == 0
    assert tiny_sft.steps() == ["step_60"]


def test_a_terminal_that_is_gone_costs_no_step(tiny_sft):
    terminal, its_end = pty.openpty()
    before = partial(_terminal, os.ttyname(its_end), signal.SIGHUP)
    process = driven(tiny_sft, *LONG, "sft.max_num_steps=60", before=before)
    wait_for_steps(tiny_sft, 3)
    os.close(its_end)
    os.close(terminal)
    assert exit_code(process) == 0
    assert tiny_sft.steps() == ["step_60"]
    assert "stdout can no longer be written (Input/output error): the run goes on" in run_log(tiny_sft)


def _closed() -> None:
    os.close(1)
    sys.stdout = None  # as Python has it then


def _full() -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def _no_reader() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 1)


@pytest.mark.parametrize(
    ("before", "said"),
    [
        (_closed, "stdout is closed"),
        (_full, "stdout can no longer be written (No space left on device)"),
        (_no_reader, "stdout can no longer be written (Broken pipe)"),
    ],
)
def test_a_run_whose_stdout_takes_nothing_goes_on_and_says_so_once(tiny_sft, before, said):
    assert exit_code(driven(tiny_sft, before=before)) == 0

    assert tiny_sft.steps() == ["step_2"]
    assert run_log(tiny_sft).count(f"{said}: the run goes on, and its messages are in this log alone\n") == 1
    assert run_log(tiny_sft).count("the run goes on") == 1


@pytest.mark.parametrize("surplus", [False, True])
def test_a_reward_that_raises_leaves_the_last_complete_step_and_the_run_goes_on_from_there(tiny_run, tmp_path, surplus):
    bad = tmp_path / "bad"
    (tmp_path / "rewards.py").write_text(
        "from pathlib import Path\ncalls = []\ndef reward(prompt, completion, row):\n"
        f"    calls.append(row)\n    if Path({str(bad)!r}).exists() and len(calls) > 40:\n"
        "        raise KeyError('judge')\n"
        "    return (sum(map(ord, completion)) % 5) / 4\n"
    )
    more = ("grpo.max_num_steps=4", "checkpointing.save_period=100")
    if surplus:
        more += ("grpo.use_dynamic_sampling=true", "grpo.keep_surplus_groups=true", "grpo.batch_multiplier=1.5")
    bad.touch()

    failed = tiny_run(*more)

    assert failed.code == 1
    (step,) = tiny_run.steps()
    number = int(step.removeprefix("step_"))
    saved = tiny_run.checkpoints / step
    assert f"Step {number}, the last complete one, is saved: {saved}.\nThe traceback is in" in failed.err
    bad.unlink()
    assert tiny_run(*more).code == 0
    whole = TinyRun(root=tmp_path / "whole", model=tiny_run.model)
    shutil.copytree(tmp_path, tmp_path / "whole", ignore=shutil.ignore_patterns("whole", "results", "logs"))
    assert whole(*more).code == 0
    assert same(*(adapter(run.checkpoints / "step_4") for run in (tiny_run, whole)))
    parts = [*tiny_run.metrics(experiment=1), *tiny_run.metrics(experiment=2)]
    assert without_seconds(parts) == without_seconds(whole.metrics())


@pytest.mark.parametrize(("error", "is_saved"), [(FloatingPointError, True), (RuntimeError, False)])
def test_a_step_that_fails_in_training_leaves_the_one_before_where_no_weight_has_moved(
    tiny_sft, monkeypatch, error, is_saved
):
    train_step, calls = DTensorPolicy.train_step, []

    def fails(self, batch, loss_fn):
        calls.append(1)
        if len(calls) == 3:
            raise error("of the third step")
        return train_step(self, batch, loss_fn)

    monkeypatch.setattr(DTensorPolicy, "train_step", fails)
    failed = tiny_sft("sft.max_num_steps=4", "sft.max_num_epochs=9", "checkpointing.save_period=100")

    assert failed.code == 1
    assert tiny_sft.steps() == (["step_2"] if is_saved else [])
    said = "is saved: " if is_saved else "could not be saved. The newest checkpoint is none."
    assert f"Step 2, the last complete one, {said}" in failed.err


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of so many KiB."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(*options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(place)]
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip("mounting a tmpfs needs root")
        return place

    yield mount
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_log_disk_that_fills_up_leaves_the_last_complete_step(tiny_sft, small_disk):
    failed = tiny_sft(*LONG, f"logger.log_dir={small_disk('size=112k')}")

    assert failed.code == 1
    (step,) = tiny_sft.steps()
    number = int(step.removeprefix("step_"))
    assert "The run failed: No space left on device" in failed.err
    assert f"Step {number}, the last complete one, is saved: {tiny_sft.checkpoints / step}." in failed.err
    assert failed.err.count("can no longer be written") <= 1
    assert "--- Logging error ---" not in failed.err


def test_a_checkpoint_dir_that_is_read_only_is_refused(tiny_sft, small_disk):
    place = small_disk("size=1m", "ro")
    for directory in (place, place / "run"):
        refused = tiny_sft(f"checkpointing.checkpoint_dir={directory}")
        assert refused.code == 2
        assert f"checkpointing.checkpoint_dir='{directory}': cannot be written (Read-only file system)" in refused.err


@pytest.mark.parametrize(
    "variables", [{"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}, {"LOCAL_RANK": "0"}, {"WORLD_SIZE": "16"}]
)
def test_one_of_several_processes_of_a_launcher_is_refused(tiny_sft, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    refused = tiny_sft()
    assert refused.code == 2
    assert "has started this process as one of several, and here one driver starts the others" in refused.err
    assert not tiny_sft.logs.exists()


def test_one_process_of_a_launcher_is_a_run(tiny_sft, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert tiny_sft().code == 0


def test_the_deadline_counts_the_start_up_too(tiny_sft, monkeypatch):
    monkeypatch.setenv(control.STARTED, f"{os.getpid()}:{time.monotonic() - 3000}")
    ended = tiny_sft("checkpointing.checkpoint_must_save_by=00:00:50:00", "sft.max_num_epochs=100")
    assert ended.code == 0, ended.err
    assert "stopped to be in time for checkpointing.checkpoint_must_save_by" in ended.out
    assert tiny_sft.steps() == ["step_1"]


def test_a_driver_says_a_word_before_it_imports_torch(tiny_sft):
    driver = subprocess.Popen(
        [sys.executable, "examples/run_sft.py", *tiny_sft.arguments()],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert driver.stderr is not None
        assert (
            driver.stderr.readline() == "sft is starting: torch is imported, then all that the run needs is checked\n"
        )
        assert "libtorch" not in Path(f"/proc/{driver.pid}/maps").read_text()
    finally:
        driver.send_signal(signal.SIGTERM)
        rest = driver.communicate()[1]
    assert driver.returncode == 143
    assert rest == "SIGTERM: ended at once: nothing had to be saved.\n"
