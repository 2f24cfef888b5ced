"""Settings of supervised fine-tuning: its length, its validation and which tokens it learns."""

from __future__ import annotations

from nemo_rl_lora.config.loop import TuningConfig


class SftConfig(TuningConfig):
    """The SFT loop."""

    only_unmask_final: bool = False
    """Learn the last assistant message only; false learns all of them."""
