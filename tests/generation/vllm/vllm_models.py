"""A tiny model on disk that vLLM takes, its adapters, and engines on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config

from nemo_rl_lora.generation.vllm.engine import EngineSettings
from nemo_rl_lora.generation.vllm.generation import ServedModel
from nemo_rl_lora.lora.files import adapter_tensor_name
from nemo_rl_lora.lora.spec import LoraSpec
from nemo_rl_lora.lora.targets import AdaptedModule
from nemo_rl_lora.policy.offer import offer
from nemo_rl_lora.types import SyncMode, WeightsRef
from tests.generation.engine_inputs import LetterTokenizer
from tests.tiny_models import ALL_LINEAR, random_model

DIM, ALPHA = 4, 6.0
SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "tie_word_embeddings": True,
    "eos_token_id": None,
    "bos_token_id": None,
}
DEEP = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 12, "num_attention_heads": 4}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "deep llama": LlamaConfig(**(SIZES | DEEP)),
}


@dataclass(slots=True, kw_only=True)
class TinyPolicy:
    """A base model on disk and in memory, and an adapter that tests move by hand."""

    path: Path
    model: PreTrainedModel
    dtype: torch.dtype
    targets: tuple[str, ...] = ALL_LINEAR
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def adapted(self) -> list[AdaptedModule]:
        return [
            AdaptedModule(
                name=name,
                in_features=m.in_features,
                out_features=m.out_features,
                dim=DIM,
                alpha=ALPHA,
                scale=ALPHA / DIM,
            )
            for name, m in self.model.named_modules()
            if isinstance(m, torch.nn.Linear) and name.rpartition(".")[2] in self.targets
        ]

    @property
    def served(self) -> ServedModel:
        return ServedModel(
            path=self.path,
            name="tiny",
            tokenizer=LetterTokenizer(),  # type: ignore[arg-type]
            spec=LoraSpec(dim=DIM, alpha=ALPHA),
            adapted=self.adapted,
        )

    def draw(self, seed: int, b: float = 0.1) -> None:
        """New A and B; every element of B is plus or minus `b`, as after one step of AdamW at that rate."""
        generator = torch.Generator().manual_seed(seed)
        for m in self.adapted:
            sign = torch.randint(0, 2, (m.out_features, DIM), generator=generator) * 2.0 - 1
            self.tensors[adapter_tensor_name(m.name, "A")] = torch.randn(DIM, m.in_features, generator=generator) * 0.3
            self.tensors[adapter_tensor_name(m.name, "B")] = b * sign

    def move_b(self, step: float) -> None:
        """Add plus or minus `step` to every element of B."""
        generator = torch.Generator().manual_seed(5)
        for name, tensor in self.tensors.items():
            if name.endswith("lora_B.weight"):
                sign = torch.randint(0, 2, tensor.shape, generator=generator) * 2.0 - 1
                self.tensors[name] = tensor + step * sign

    def publish(self, version: int, mode: SyncMode) -> WeightsRef:
        return offer(
            version, mode, self.tensors, adapted=self.adapted, weight_of=self.model.get_parameter, dtype=self.dtype
        )

    def publish_all(self, version: int) -> WeightsRef:
        """Every weight, as full fine-tuning does."""
        weights = {name: p.detach() for name, p in self.model.named_parameters()}
        return offer(version, "merged", weights, adapted=None, weight_of=self.model.get_parameter, dtype=self.dtype)

    def merged_model(self) -> PreTrainedModel:
        """The base with the adapter merged in fp32: an independent way to the same numbers."""
        model = AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32)
        with torch.no_grad():
            for m in self.adapted:
                a, b = (self.tensors[adapter_tensor_name(m.name, side)] for side in "AB")
                model.get_parameter(f"{m.name}.weight").add_(m.scale * b @ a)
        return model


def make_policy(directory: Path, family: str, dtype: torch.dtype, targets: tuple[str, ...] = ALL_LINEAR) -> TinyPolicy:
    model = random_model(CONFIGS[family], seed=3, moved=0.2, vectors_only=True)
    model.save_pretrained(directory)
    policy = TinyPolicy(path=directory, model=model.to(dtype), dtype=dtype, targets=targets)
    policy.draw(0)
    return policy


def settings_of(policy: TinyPolicy, mode: SyncMode, **more: Any) -> EngineSettings:
    usual: dict[str, Any] = {
        "model_path": policy.path,
        "tokenizer_path": None,
        "hf_overrides": {},
        "dtype": str(policy.dtype).removeprefix("torch."),
        "max_model_len": 96,
        "max_num_seqs": 16,
        "cache_bytes": 1 << 25,
        "gpu_memory_utilization": 0.3,
        "enforce_eager": True,
        "adapter_rank": 8 if mode == "adapter" else None,
        "more": {},
    }
    return EngineSettings(**(usual | more))
