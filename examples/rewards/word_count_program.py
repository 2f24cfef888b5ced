"""The reward of word_count.py by a program of its own for each completion, as a sandbox would be called."""

import asyncio
from asyncio.subprocess import PIPE


async def reward(prompt: str, completion: str, row: dict) -> float:
    program = await asyncio.create_subprocess_exec("wc", "-w", stdin=PIPE, stdout=PIPE)
    try:
        output, _ = await program.communicate(completion.encode())
    finally:
        if program.returncode is None:  # the time of this call is up
            program.kill()
    distance = abs(int(output) - row["num_words"])
    return max(0.0, 1.0 - distance / row["num_words"])
