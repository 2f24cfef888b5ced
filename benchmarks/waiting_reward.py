"""A reward that takes its time in a process of its own, as a judge or a test does: half a second a completion."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from work import reward as reward_of_sum

SECONDS = 0.5


async def reward(prompt: str, completion: str, row: dict[str, Any]) -> float:
    """1.0 where the last integer is the answer, said by a process that waits first."""
    process = await asyncio.create_subprocess_exec("sleep", str(SECONDS))
    if await process.wait():
        sys.exit("sleep failed")
    return reward_of_sum(completion, int(row["answer"]))
