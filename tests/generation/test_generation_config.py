"""The rules of `policy.generation`."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from nemo_rl_lora.config.generation import GenerationConfig

# What NeMo RL's base file has of what works here, written by hand; interpolations by what they give there.
BASE: dict[str, Any] = {
    "backend": "vllm",
    "max_new_tokens": 512,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": None,
    "val_temperature": 1.0,
    "val_top_p": 1.0,
    "val_top_k": None,
    "stop_token_ids": None,
    "stop_strings": None,
    "vllm_cfg": {
        "precision": "bfloat16",
        "tensor_parallel_size": 4,
        "gpu_memory_utilization": 0.7,
        "max_model_len": 2048,
        "enforce_eager": True,
    },
    "vllm_kwargs": {},
    "colocated": {"enabled": True},
}


def test_the_base_file_and_a_recipe_with_more_ranks_load() -> None:
    config = GenerationConfig.model_validate(BASE)
    assert (config.backend, config.lora_sync, config.vllm_cfg.tensor_parallel_size) == ("vllm", "auto", 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_p": 0.9}, r"policy\.generation\.top_p=0\.9: .*policy\.generation\.val_top_p=0\.9"),
        ({"top_k": 50}, r"policy\.generation\.top_k=50: .*policy\.generation\.val_top_k=50"),
        ({"top_p": 0.0}, "greater than 0"),
        ({"temperature": 0.0}, "greater than 0"),
        ({"max_new_tokens": 0}, "greater than or equal to 1"),
        ({"stop_strings": [""]}, "at least 1 character"),
        ({"backend": "replay"}, r"policy\.generation\.replay_path=None"),
        ({"replay_path": "a.jsonl"}, r"policy\.generation\.replay_path='a\.jsonl'"),
        ({"top_P": 1.0}, "Extra inputs"),
    ],
)
def test_what_would_be_ignored_or_wrong_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        GenerationConfig.model_validate({**BASE, **change})


def test_validation_may_truncate_and_be_greedy() -> None:
    config = GenerationConfig.model_validate({**BASE, "val_temperature": 0, "val_top_p": 0.9, "val_top_k": 20})
    assert (config.val_temperature, config.val_top_p, config.val_top_k) == (0.0, 0.9, 20)
