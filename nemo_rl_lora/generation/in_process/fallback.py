"""The slow decoder: any causal language model of transformers, through its own forward pass and cache.

Contract: the verbs of `decoder.Decoder`. It is used, and the log says so, where `decoder.CausalDecoder` cannot serve a
model (sliding windows, other architectures). Prompts are prefilled once and their cache repeated for the group.
Rows are opened only when none are open. The given model's parameters are shared and never written.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from nemo_rl_lora.lora.adapter_tensors import AdapterTensors, side_of
from nemo_rl_lora.lora.files import module_of
from nemo_rl_lora.models.own_forward import compared_attention, fastest_of


class PlainDecoder:
    late_admission = False

    def __init__(self, model: PreTrainedModel, compute_dtype: torch.dtype) -> None:
        shared_storage = {id(t): t for t in (*model.parameters(), *model.buffers())}
        self.model = copy.deepcopy(model, shared_storage).eval()  # own modules, the same tensors
        self.hooks: list[RemovableHandle] = []
        self.shared: dict[str, nn.Parameter] = {}
        self.places: dict[str, list[tuple[nn.Module, str]]] = {}  # a tied parameter stands in two modules
        first_name: dict[int, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            module, _, leaf = name.rpartition(".")
            canonical = first_name.setdefault(id(parameter), name)
            self.places.setdefault(canonical, []).append((self.model.get_submodule(module), leaf))
            self.shared[canonical] = nn.Parameter(parameter.detach().to(compute_dtype), requires_grad=False)
        self.set_weights({})
        self._choose_attention()
        self.reset()

    @torch.no_grad()
    def _choose_attention(self) -> None:
        """torch's fused attention, where it computes what the model's own does."""
        self.model.set_attn_implementation("eager")
        vocabulary = int(self.model.config.get_text_config().vocab_size)
        token_ids = torch.arange(8, device=self.model.device)[None] % vocabulary
        with compared_attention(ALL_ATTENTION_FUNCTIONS["sdpa"]) as calls:
            self.model(input_ids=token_ids, use_cache=False)
        self.model.set_attn_implementation(fastest_of(self.model, calls))

    def reset(self) -> None:
        self.cache: Any = None
        self.mask = torch.empty((0, 0), dtype=torch.int64, device=self.model.device)  # [N, positions so far]

    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        for name, places in self.places.items():
            parameter = self.shared[name]
            if name in weights:
                parameter = nn.Parameter(weights[name], requires_grad=False)
            for module, leaf in places:
                setattr(module, leaf, parameter)

    def set_adapters(self, adapters: Mapping[str, AdapterTensors]) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks = [
            self.model.get_submodule(name).register_forward_hook(Adding(adapter)) for name, adapter in adapters.items()
        ]

    def held(self, name: str) -> Tensor | None:
        if (side := side_of(name)) is not None:
            adapters = self._adapters(module_of(name))
            return adapters[-1].factor(side) if adapters else None
        module, _, leaf = name.rpartition(".")
        return getattr(self.model.get_submodule(module), leaf)

    def multiply(self, name: str, x: Tensor) -> Tensor | None:
        if (side := side_of(name)) is not None:
            products = [adapter.product(side, x) for adapter in self._adapters(module_of(name))]
            return torch.stack(products).sum(0) if products else None
        layer, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(layer)
        if not isinstance(module, nn.Linear) or leaf != "weight":
            return None
        bias, module._parameters["bias"] = module._parameters["bias"], None
        try:
            return module.forward(x)  # without the hooks
        finally:
            module._parameters["bias"] = bias

    def _adapters(self, module: str) -> list[AdapterTensors]:
        """All that a module's own hooks add."""
        hooks = self.model.get_submodule(module)._forward_hooks.values()
        return [hook.adapter for hook in hooks if isinstance(hook, Adding)]

    def admit(self, prompts: Sequence[Sequence[int]], counts: Sequence[int]) -> Tensor:
        assert self.cache is None, "rows are still open"
        longest = max(len(prompt) for prompt in prompts)
        token_ids = torch.zeros((len(prompts), longest), dtype=torch.int64)
        mask = torch.zeros_like(token_ids)
        for row, prompt in enumerate(prompts):
            token_ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        self.cache, self.mask = DynamicCache(config=self.model.config), mask.to(self.model.device)
        logits = self._forward(token_ids.to(self.model.device))
        rows = torch.arange(len(prompts)).repeat_interleave(torch.tensor(counts)).to(self.model.device)
        self.cache.reorder_cache(rows)
        self.mask = self.mask[rows]
        return logits

    def step(self, token_ids: Tensor) -> Tensor:
        self.mask = torch.cat((self.mask, self.mask.new_ones((len(self.mask), 1))), dim=1)
        return self._forward(token_ids[:, None])

    def _forward(self, token_ids: Tensor) -> Tensor:
        positions = (self.mask.cumsum(dim=-1) - 1).clamp(min=0)[:, -token_ids.shape[1] :]
        out = self.model(
            input_ids=token_ids,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1]

    def retire(self, rows: Sequence[int]) -> list[int]:
        gone = set(rows)
        order = [row for row in range(len(self.mask)) if row not in gone]
        if not order:
            self.reset()
        elif gone:
            index = torch.tensor(order, device=self.model.device)
            self.cache.reorder_cache(index)
            self.mask = self.mask[index]
        return order


@dataclass(frozen=True, slots=True)
class Adding:
    """A forward hook of a linear layer: the adapter beside it."""

    adapter: AdapterTensors

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + self.adapter.update(inputs[0]).to(output.dtype)
