"""An engine on a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from nemo_rl_lora.lora.spec import LoraSpec
from tests.generation.engine_inputs import LetterTokenizer, adapted_modules, parameters_of, ref


@pytest.fixture
def make_engine() -> Callable[..., Any]:
    """An engine with weights synced: the model's own by default."""
    from nemo_rl_lora.generation.in_process.engine import InProcessGeneration

    def make(model: PreTrainedModel, *, lora: bool = False, sync: bool = True, concurrent: int = 16) -> Any:
        engine = InProcessGeneration(
            model,
            tokenizer=LetterTokenizer(),  # type: ignore[arg-type]
            spec=LoraSpec(dim=4, alpha=6) if lora else None,
            adapted=adapted_modules(model) if lora else [],
            compute_dtype=torch.float32,
            max_concurrent_sequences=concurrent,
        )
        if sync and not lora:
            engine.sync_weights(ref(parameters_of(model)))
        return engine

    return make
