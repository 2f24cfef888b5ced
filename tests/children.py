"""Processes of a test's own that begin without this one's threads, which a fork of it would wait for or crash in."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.process import BaseProcess

SERVER = multiprocessing.get_context("forkserver")
"""There is one server in a test session: it imports, once, what any child of it needs."""
SERVER.set_forkserver_preload(
    ["tests.policy.parallel_ranks", "tests.policy.megatron.adapted_ranks", "tests.driver", "nemo_rl_lora.run.start"]
)


def started(function: Callable[..., object], *arguments: object) -> BaseProcess:
    """A process that calls `function`, which a module must have by name. It is forked from one that has only imported,
    and holds its stdout and stderr."""
    process = SERVER.Process(target=function, args=arguments)
    process.start()
    return process


def exit_code(process: BaseProcess, seconds: float = 240) -> int:
    """How a process ended, minus the number of the signal where one ended it. Raises TimeoutError; it is ended then."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"process {process.pid} still ran after {seconds} s")
    return process.exitcode
