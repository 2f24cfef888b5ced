"""Runs of the evaluation driver for tests, and adapters that PEFT writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch  # the driver starts its process again where torch is not yet imported
from transformers import AutoModelForCausalLM

from tests.driver import Ended, run_command


def run_eval(*arguments: str) -> Ended:
    """The evaluation driver in this process, from its arguments to its exit code."""
    return run_command("eval", *arguments)


def save_peft_adapter(base: Path, directory: Path, seed: int, scale: float = 0.3, **config: Any) -> Path:
    """An adapter with B of this standard deviation, as PEFT writes it."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **config))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, scale) if scale else parameter.zero_()
    wrapped.save_pretrained(str(directory))
    return directory
