"""What a merged model says beside base + adapter, both loaded by stock transformers and PEFT.

Contract: forward passes in fp32 over a few prompts, so that what differs is the rounding of merged weights. The models
are loaded whole, one at a time: this check needs the memory that merging does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PROMPTS = (
    "The capital of France is",
    "What is 17 + 25? Reply with the number only.",
    "Weng earns $12 an hour for babysitting. Yesterday, she just did 50 minutes of babysitting. How much did she earn?",
    "def mean(values):\n    return sum(values) /",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitComparison:
    """Over every position of the prompts."""

    num_tokens: int
    adapter_effect: float  # mean |logits of base + adapter - logits of the base|
    mean_abs_error: float  # mean |logits of the merged model - logits of base + adapter|
    max_abs_error: float
    same_top_token: float  # fraction of positions

    @property
    def is_closer_than_base(self) -> bool:
        return self.mean_abs_error < self.adapter_effect or self.mean_abs_error == 0


@torch.no_grad()
def compare_logits(base: Path, adapter: Path, merged: Path, config_overrides: Mapping[str, Any]) -> LogitComparison:
    """Load both sides and compare. `merged` holds the tokenizer."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    rows = _token_ids(merged)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **config_overrides)
    adapted = PeftModel.from_pretrained(model, adapter).eval()
    expected = [_logits(adapted, row) for row in rows]
    with adapted.disable_adapter():
        bare = [_logits(adapted, row) for row in rows]
    del model, adapted
    found_model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    found = [_logits(found_model, row) for row in rows]
    want, have, without = torch.cat(expected), torch.cat(found), torch.cat(bare)
    return LogitComparison(
        num_tokens=len(want),
        adapter_effect=float((want - without).abs().mean()),
        mean_abs_error=float((have - want).abs().mean()),
        max_abs_error=float((have - want).abs().max()),
        same_top_token=float((have.argmax(-1) == want.argmax(-1)).float().mean()),
    )


def _token_ids(directory: Path) -> list[Tensor]:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    return [torch.tensor([tokenizer(prompt)["input_ids"]]) for prompt in PROMPTS]


def _logits(model: Any, token_ids: Tensor) -> Tensor:
    return model(input_ids=token_ids).logits[0].float()
