"""Where the decoder keeps keys and values: slots of one length, for prompts or for completions, kept dense.

Contract: `KeyValueStore` grows, and what is stored stays; a slot's place moves where rows are closed. Not here: which
slot is whose.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class KeyValueStore:
    """Keys [layers, slots, K, D, capacity] (transposed: the faster product) and values [.., K, capacity, D]."""

    def __init__(self, num_layers: int, num_heads: int, head_dim: int, like: Tensor) -> None:
        self.keys = like.new_empty((num_layers, 0, num_heads, head_dim, 0))
        self.values = like.new_empty((num_layers, 0, num_heads, 0, head_dim))

    @property
    def num_bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def reserve(self, num_slots: int, length: int) -> None:
        """Make room for this many slots of this length; what is stored stays."""
        layers, slots, heads, head_dim, capacity = self.keys.shape
        if num_slots <= slots and length <= capacity:
            return
        new_slots = max(slots, num_slots)
        new_capacity = capacity if length <= capacity else max(length, 2 * capacity)
        # Zeros, not garbage: a masked position still enters a product, where NaN would survive its zero weight.
        keys = self.keys.new_zeros((layers, new_slots, heads, head_dim, new_capacity))
        values = self.values.new_zeros((layers, new_slots, heads, new_capacity, head_dim))
        keys[:, :slots, :, :, :capacity] = self.keys
        values[:, :slots, :, :capacity] = self.values
        self.keys, self.values = keys, values

    def move(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        if not sources:
            return
        source, target = torch.tensor(sources), torch.tensor(targets)
        self.keys[:, target, :, :, :length] = self.keys[:, source, :, :, :length]
        self.values[:, target, :, :length] = self.values[:, source, :, :length]


def fill_holes(num_rows: int, retired: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """Close rows by moving the last ones into the gaps. Returns (order, sources, targets); order[new] = old."""
    gone = set(retired)
    num_left = num_rows - len(gone)
    targets = [row for row in sorted(gone) if row < num_left]
    sources = [row for row in range(num_left, num_rows) if row not in gone]
    order = list(range(num_left))
    for source, target in zip(sources, targets, strict=True):
        order[target] = source
    return order, sources, targets
