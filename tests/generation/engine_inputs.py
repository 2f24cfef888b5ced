"""What a test gives an engine: a stand-in tokenizer, weights to sync, and requests."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nemo_rl_lora.lora.targets import AdaptedModule
from nemo_rl_lora.policy.offer import OfferedTensors
from nemo_rl_lora.types import GroupRequest, Prompt, SamplingParams, SyncMode, TensorInfo, WeightsRef
from tests.tiny_models import ALL_LINEAR


class LetterTokenizer:
    """Token i is the letter i of the alphabet; from 90 on tokens are special. Nothing ends a sequence by itself."""

    eos_token_id = None

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(chr(ord("!") + i) for i in token_ids if not (skip_special_tokens and i >= 90))


def adapted_modules(model: PreTrainedModel, dim: int = 4) -> list[AdaptedModule]:
    return [
        AdaptedModule(
            name=name, in_features=m.in_features, out_features=m.out_features, dim=dim, alpha=6.0, scale=6.0 / dim
        )
        for name, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and name.rpartition(".")[2] in ALL_LINEAR
    ]


def adapter_tensors(model: PreTrainedModel, seed: int = 0) -> dict[str, Tensor]:
    """Random A and B, B not zero, under PEFT's names."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module in adapted_modules(model):
        prefix = f"base_model.model.{module.name}"
        tensors[f"{prefix}.lora_A.weight"] = 0.2 * torch.randn(module.dim, module.in_features, generator=generator)
        tensors[f"{prefix}.lora_B.weight"] = 0.2 * torch.randn(module.out_features, module.dim, generator=generator)
    return tensors


def merged_tensors(model: PreTrainedModel, adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    weights = dict(model.named_parameters())
    merged = {}
    for module in adapted_modules(model):
        a = adapter[f"base_model.model.{module.name}.lora_A.weight"]
        b = adapter[f"base_model.model.{module.name}.lora_B.weight"]
        merged[f"{module.name}.weight"] = weights[f"{module.name}.weight"].detach() + module.scale * b @ a
    return merged


def ref(tensors: Mapping[str, Tensor], mode: SyncMode = "merged", version: int = 1) -> WeightsRef:
    manifest = tuple(TensorInfo(name=n, shape=tuple(t.shape), dtype=t.dtype) for n, t in tensors.items())
    offered = OfferedTensors({name: partial(tensors.__getitem__, name) for name in tensors}, mode)
    return WeightsRef(
        version=version,
        mode=mode,
        manifest=manifest,
        digest=f"digest {version}",
        num_bytes=0,
        tensors=offered,
        handed=offered.handed,
    )


def parameters_of(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def request(token_ids: tuple[int, ...], num_completions: int = 1, **sampling: Any) -> GroupRequest:
    seed = sampling.pop("seed", 1000 * len(token_ids))
    prompt = Prompt(index=len(token_ids), token_ids=token_ids, text="", row={}, environment="none")
    return GroupRequest(
        prompt=prompt,
        num_completions=num_completions,
        seeds=tuple(range(seed, seed + num_completions)),
        sampling=SamplingParams(**{"max_new_tokens": 8, **sampling}),
    )
