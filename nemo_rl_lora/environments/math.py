"""Reward 1.0 where a completion's boxed or last mathematical expression equals the row's `answer` (math-verify).

A row: {"question": "...", "answer": "\\frac{1}{2}"}. Verification runs in processes of its own, which import no
torch, start when they are first needed and are ended when one completion takes longer than its time.
"""

from __future__ import annotations

import json
import logging
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import LifoQueue
from typing import Any

from nemo_rl_lora.environments.protocol import Environment, Scores
from nemo_rl_lora.types import Prompt

logger = logging.getLogger(__name__)

_START_SECONDS = 120.0
_GRACE_SECONDS = 0.5
_TIMED_OUT = {"reward": 0.0, "timed_out": True, "unreadable_gold": False}


class MathEnvironment(Environment):
    name = "math"

    def __init__(self, num_workers: int, timeout_seconds: float) -> None:
        self._num_workers = max(1, min(num_workers, len(os.sched_getaffinity(0))))
        self._timeout_seconds = timeout_seconds
        # last in, first out: a worker that was used is taken before one that was never started
        self._idle: LifoQueue[_Worker] = LifoQueue()
        self._workers = [_Worker() for _ in range(self._num_workers)]
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(self._num_workers, thread_name_prefix="math-verify")

    def check(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            if not _gold(prompt):
                raise ValueError(
                    f"env.math: row {prompt.index} has answer={prompt.row.get('answer')!r}. Correct the row, or set "
                    f"data.train.output_key to the key that holds the expected answer."
                )

    def score(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> Scores:
        replies = list(self._threads.map(self._verify, map(_gold, prompts), texts))
        assert len(replies) == len(prompts) == len(texts), (len(replies), len(prompts), len(texts))
        for prompt, reply in zip(prompts, replies, strict=True):
            if reply["unreadable_gold"]:
                raise ValueError(
                    f"env.math: row {prompt.index} has answer={_gold(prompt)!r}, in which math-verify finds no "
                    f"expression. Correct the row."
                )
        num_timeouts = float(sum(reply["timed_out"] for reply in replies))
        return Scores(
            rewards=tuple(reply["reward"] for reply in replies), metrics={"math_verify_timeouts": num_timeouts}
        )

    def close(self) -> None:
        self._threads.shutdown()
        for worker in self._workers:
            worker.end()

    def _verify(self, gold: str, text: str) -> dict[str, Any]:
        worker = self._idle.get()
        try:
            return worker.verify(gold, text, self._timeout_seconds)
        finally:
            self._idle.put(worker)


def _gold(prompt: Prompt) -> str:
    answer = prompt.row.get("answer")
    return "" if answer is None else str(answer).strip()


class _Worker:
    """One process, started on demand and again after it had to be ended. Used by one thread at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""

    def verify(self, gold: str, text: str, timeout_seconds: float) -> dict[str, Any]:
        if self._process is not None and self._process.poll() is not None:
            self.end()  # something ended it while it was idle
        process = self._process or self._start()
        request = {"gold": gold, "text": text, "timeout_seconds": timeout_seconds}
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            reply = self._read_line(timeout_seconds + _GRACE_SECONDS)
        except BrokenPipeError:
            reply = None
        if reply is None:
            logger.debug("a verification process did not answer in time and is replaced")
            self.end()
            return _TIMED_OUT
        return json.loads(reply)

    def end(self) -> None:
        process, self._process, self._unread = self._process, None, b""
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                logger.debug("a verification process ended before it read its request")

    def _start(self) -> subprocess.Popen[bytes]:
        root = str(Path(__file__).resolve().parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "nemo_rl_lora.environments.math_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        if self._read_line(_START_SECONDS) is None:
            self.end()
            raise RuntimeError(
                f"env.math: a verification process did not start within {_START_SECONDS:.0f} s. Run "
                f"`python -m nemo_rl_lora.environments.math_worker` to see why."
            )
        return self._process

    def _read_line(self, seconds: float) -> bytes | None:
        """The next line of the process, or None if it ends or `seconds` pass first."""
        assert self._process is not None
        assert self._process.stdout is not None
        pipe, deadline = self._process.stdout.fileno(), time.monotonic() + seconds
        while b"\n" not in self._unread:
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not select.select([pipe], [], [], remaining)[0]:
                return None
            chunk = os.read(pipe, 65536)
            if not chunk:
                return None
            self._unread += chunk
        line, _, self._unread = self._unread.partition(b"\n")
        return line
