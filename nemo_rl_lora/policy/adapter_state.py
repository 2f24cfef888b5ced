"""What an adapter is on both backends: its switch, how A is drawn, and how dropout is.

Draws are functions of (seed, name), so that the twins start from the same adapter, drop the same elements, and a
shard is a slice of what one process would draw. No layer is defined here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_rl_lora.lora.spec import LoraSpec, init_distribution
from nemo_rl_lora.seeds import derive_seed


@dataclass(slots=True)
class AdapterSwitch:
    """State that all adapters of a model share. `dropout_seed` None means dropout is off."""

    on: bool = True
    dropout_seed: int | None = None

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """The model without its adapters: the reference policy."""
        self.on = False
        try:
            yield
        finally:
            self.on = True

    @contextlib.contextmanager
    def dropping(self, seed: int | None) -> Iterator[None]:
        """Dropout on, drawn from this seed; off where it is None."""
        before, self.dropout_seed = self.dropout_seed, seed
        try:
            yield
        finally:
            self.dropout_seed = before


def dropout_of(switch: AdapterSwitch | None, seed: int, step: int, microbatch: int) -> AbstractContextManager[None]:
    """Dropout of a microbatch, a function of the run's seed and its place; nothing where there is no adapter."""
    if switch is None:
        return contextlib.nullcontext()
    return switch.dropping(derive_seed(seed, "dropout", step, microbatch))


def draw_a(spec: LoraSpec, *, name: str, in_features: int, dim: int, seed: int) -> Tensor:
    """A [dim, in_features] in fp32 from the spec's distribution, as a function of (seed, name)."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "lora_A", name))
    kind, width = init_distribution(spec.A_init, in_features, dim)
    drawn = torch.empty(dim, in_features, dtype=torch.float32)
    if kind == "normal":
        return drawn.normal_(0.0, width, generator=generator)
    return drawn.uniform_(-width, width, generator=generator)


def keep_mask(shape: torch.Size, *, probability: float, seed: int, name: str, like: Tensor) -> Tensor:
    """Inverted dropout of a shape: 0 with this probability, else 1 / (1 - probability); a function of (seed, name).

    It lies on `like`'s device, in its dtype.
    """
    generator = torch.Generator(device=like.device)
    generator.manual_seed(derive_seed(seed, "dropout", name))
    keep = 1.0 - probability
    mask = torch.rand(shape, generator=generator, device=like.device) < keep
    return mask.to(like.dtype) / keep
