"""torch.compile in a process of tests, some of which turn it off."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch._dynamo


@contextmanager
def torch_compiles() -> Iterator[None]:
    """As in a process of its own: not as tests of vLLM, and vLLM itself where it compiles nothing, leave it."""
    kept = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    with patch.dict(os.environ, kept, clear=True), torch._dynamo.config.patch(disable=False):
        yield
