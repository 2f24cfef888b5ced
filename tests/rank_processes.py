"""A function in several processes of one gloo group. They fork from one server, which has imported what they need."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.children import SERVER


def run_ranks(number: int, meeting: Path, function: Callable[..., None], *arguments: Any) -> None:
    """`function(rank, *arguments)` in `number` processes, which meet in an empty directory.

    RuntimeError with what each process said that failed.
    """
    processes = [
        SERVER.Process(target=_one_rank, args=(rank, number, meeting, function, arguments)) for rank in range(number)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if errors := [path.read_text() for path in sorted(meeting.glob("error*"))]:
        raise RuntimeError("\n".join(errors))
    assert all(process.exitcode == 0 for process in processes), [process.exitcode for process in processes]


def _one_rank(rank: int, number: int, meeting: Path, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{meeting / 'store'}", rank=rank, world_size=number)
        function(rank, *arguments)
        dist.barrier()  # the others may still need this one
        dist.destroy_process_group()
    except BaseException:
        (meeting / f"error{rank}").write_text(f"rank {rank}\n{traceback.format_exc()}")
        raise
