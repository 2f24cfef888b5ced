"""LoRA post-training of language models by SFT, DPO and GRPO. Importing this package imports no backend.

from nemo_rl_lora import load_config, train
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_rl_lora.config.load import load_config
    from nemo_rl_lora.run.drivers import train

__all__ = ["load_config", "train"]
__version__ = "0.1.0"
"""Here, and not asked of the package's metadata: a checkout on PYTHONPATH has none."""

_HOMES = {"load_config": "nemo_rl_lora.config.load", "train": "nemo_rl_lora.run.drivers"}
"""The module of each name, imported when it is first asked for."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
