"""Randomness as a function: every draw follows from (seed, purpose, and what it is for), never from global state.

That makes a resume exact, topologies comparable and a retry harmless.
"""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, purpose: str, *items: int | str) -> int:
    """A 63-bit seed for one purpose, e.g. `derive_seed(42, "sample", step, prompt_index, completion)`."""
    text = "\x1f".join([str(seed), purpose, *(f"{type(item).__name__}:{item}" for item in items)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
