"""Policies and engines on a fake GPU (tests/fake_gpu.py), by the product's own code; what their steps ask of it."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen3Config

from nemo_rl_lora.distributed.ranks import join_alone
from nemo_rl_lora.generation.in_process import engine
from nemo_rl_lora.models import load
from nemo_rl_lora.patches.megatron_core import MODULES
from nemo_rl_lora.policy.forward import ForwardPass
from tests.fake_gpu import FakeGpu, fake_gpu
from tests.tiny_models import VOCABULARY, save_random_model

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # flash attention takes multiples of 8
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}


def model_of(kind: str, num_layers: int, directory: Path) -> Path:
    """A directory in this one; a mistral has a window, and so padded rows."""
    configs: dict[str, Callable[..., PretrainedConfig]] = {
        "llama": LlamaConfig,
        "qwen3": Qwen3Config,
        "mistral": lambda **sizes: MistralConfig(**sizes, sliding_window=8),
    }
    path = directory / f"{kind}_{num_layers}"
    if not path.exists():
        save_random_model(configs[kind](**SIZES, num_hidden_layers=num_layers), path)
    return path


@contextmanager
def gpu_for_policies() -> Iterator[FakeGpu]:
    """A fake GPU on which policies and engines can be made: models are read on the CPU, and no number is compared."""
    join_alone()  # as CUDA it would be by NCCL, which asks for a GPU
    with pytest.MonkeyPatch.context() as patch, fake_gpu() as gpu:
        without_cuda = load.loads_without_cuda

        @contextmanager
        def loads() -> Iterator[None]:
            gpu.is_available = False
            try:
                with without_cuda():
                    yield
            finally:
                gpu.is_available = True

        def verify(self: ForwardPass, *_: object) -> frozenset[str]:
            self.prepare()
            return frozenset(name for name, module in self.model.named_modules() if isinstance(module, nn.Linear))

        patch.setattr(load, "loads_without_cuda", loads)
        patch.setattr(ForwardPass, "verify", verify)
        patch.setattr(engine, "_refuse_other_logits", lambda *_: None)
        for name in MODULES:  # which a test without a GPU has told that there is none
            patch.setattr(importlib.import_module(name), "torch", torch)
        yield gpu


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What was asked of the GPU, by line or by operation."""

    operations: Counter[str]
    lines: Counter[str]
    copies: Counter[str]
    waits: Counter[str]

    @staticmethod
    def of(gpu: FakeGpu) -> Asked:
        return Asked(
            operations=Counter(gpu.launches),
            lines=Counter(gpu.places),
            copies=Counter(gpu.copies),
            waits=Counter(gpu.waits),
        )

    def __sub__(self, other: Asked) -> Asked:
        return Asked(**{name: _difference(value, vars(other)[name]) for name, value in vars(self).items()})

    @property
    def launches(self) -> int:
        return sum(self.operations.values())


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a unit of work asks of the GPU: a token or a microbatch, a decoder layer's part of it, and what is once."""

    layer: Asked
    unit: Asked  # but for its layers
    once: Asked


def costs_of(run: Callable[[int, int], Asked]) -> Costs:
    """By differences: `run(layers, units)` is what a run of so many layers asks for so many units."""
    (one_one, one_two), (two_one, two_two) = ([run(layers, units) for units in (1, 2)] for layers in (1, 2))
    layer = (two_two - one_two) - (two_one - one_one)
    unit = (one_two - one_one) - layer
    return Costs(layer=layer, unit=unit, once=one_one - unit - layer)


def _difference(these: Counter[str], others: Counter[str]) -> Counter[str]:
    difference: Counter[str] = Counter(these)
    difference.subtract(others)
    return Counter({name: number for name, number in difference.items() if number})


def table(asked: Any) -> str:
    """For the message of a failed bound."""
    return "\n".join(f"{number:5d}  {name}" for name, number in asked.most_common())
