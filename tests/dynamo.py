"""torch.compile in a process of tests, for which it is off."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch._dynamo
from transformers import LlamaConfig

from nemo_rl_lora.config.policy import PolicyConfig
from nemo_rl_lora.policy.dtensor.limits import compile_problems


def why_nothing_compiles() -> str | None:
    """Why this machine cannot compile; None where it can."""
    policy = PolicyConfig(model_name="tiny", compile=True)
    with torch_compiles():
        return next(iter(compile_problems(policy, LlamaConfig())), None)


@contextmanager
def torch_compiles() -> Iterator[None]:
    """As in a process of its own: not as tests/conftest.py, and vLLM where it compiles nothing, leave it."""
    kept = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    with patch.dict(os.environ, kept, clear=True), torch._dynamo.config.patch(disable=False):
        yield
