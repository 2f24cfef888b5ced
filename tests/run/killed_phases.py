"""A program that kills runs in phases around a boundary, and continues each: DIRECTORY MODEL NUMBER [OVERRIDE ...].

Everything heavy is imported once, and each run is a fork. The first of them counts the files and directories that are
written from the save at the first boundary to the first step after it; each of the others is killed, by SIGKILL, at one
of these writes. Prints a line of JSON for each: the number of the write, and whether the run that continued ended with
the bits of the one that was not killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path

from nemo_rl_lora.algorithms import loop
from nemo_rl_lora.checkpoints import durable_files
from nemo_rl_lora.policy.dtensor import policy  # noqa: F401 (imported before the forks)
from tests.driver import TinyRun, adapter, same
from tests.run.test_phases import Phased

PHASES = "sft.phases=[{train: full, steps: 2}, {train: lora, steps: 2, at_end: merge}, {train: lora, steps: 1}]"
BOUNDARY = 2


class Writes:
    """Counts writes within the window, and kills this process at one of them."""

    def __init__(self, kill_at: int | None) -> None:
        self.count, self._kill_at, self.is_open = 0, kill_at, False

    def see(self, of):
        def seen(*arguments, **named):
            if self.is_open:
                self.count += 1
                if self.count == self._kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
            return of(*arguments, **named)

        return seen

    def watch(self) -> None:
        save, record = loop.TrainingLoop._save, loop.TrainingLoop._record

        def saving(training, reason):
            if training.step == BOUNDARY:
                self.is_open = True
            return save(training, reason)

        def recording(training, done):
            if training.step == BOUNDARY + 1:
                self.is_open = False
            return record(training, done)

        loop.TrainingLoop._save, loop.TrainingLoop._record = saving, recording
        os.fsync = self.see(os.fsync)
        durable_files.os.fsync = os.fsync
        Path.rename, Path.mkdir, Path.unlink = self.see(Path.rename), self.see(Path.mkdir), self.see(Path.unlink)
        Path.write_text = self.see(Path.write_text)


def forked(run: Phased, overrides: list[str], kill_at: int | None, *, watched: bool = True) -> tuple[int, int]:
    """The exit code of a run in a fork (of a signal: negative), and the writes that it counted."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            writes = Writes(kill_at)
            if watched:
                writes.watch()
            ended = run(PHASES, *overrides)
            code = ended.code
            if code:
                os.write(2, ended.err.encode())
            os.write(writer, str(writes.count).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), int(said or 0)


def main() -> int:
    root, model, number, *overrides = sys.argv[1:]

    def run_in(name: str) -> Phased:
        directory = Path(root) / name
        directory.mkdir(parents=True)
        run = Phased(TinyRun(root=directory, model=Path(model), algorithm="sft"))
        run.arguments()
        run.rows = Path(root) / "whole" / "rows.jsonl"
        return run

    whole = run_in("whole")
    code, num_writes = forked(whole, overrides, None)
    assert code == 0, code
    expected = adapter(whole.tiny.checkpoints / "step_5")
    for index in range(int(number)):
        kill_at = 1 + index * (num_writes - 1) // max(1, int(number) - 1)
        run = run_in(f"killed_{index}")
        killed, _ = forked(run, overrides, kill_at)
        left = sorted(path.name for path in run.tiny.checkpoints.iterdir() if path.is_dir())
        code, _ = forked(run, overrides, None, watched=False)
        step = run.tiny.checkpoints / "step_5"
        equal = code == 0 and same(adapter(step), expected)
        found = {"write": kill_at, "of": num_writes, "killed": killed, "left": left, "code": code, "equal": equal}
        print(json.dumps(found), flush=True)  # noqa: T201 (a program)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
