"""Reference log-probabilities of preference pairs, computed once per pair and kept for later epochs and resumes.

The reference (the base, or the initial adapter) does not move, so these values never change: a pair that comes again
costs no pass, and a resumed run goes on with the very numbers of the run that was interrupted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nemo_rl_lora.policy.protocol import Policy
from nemo_rl_lora.types import Batch, PreferencePair

_Key = tuple[str, int]


class ReferenceCache:
    """(source, index) of a pair -> the summed logprobs of its chosen and of its rejected answer."""

    def __init__(self) -> None:
        self._values: dict[_Key, tuple[float, float]] = {}

    def __len__(self) -> int:
        return len(self._values)

    def of(self, pairs: Sequence[PreferencePair], batch: Batch, policy: Policy) -> Tensor:
        """[B] fp32 for the rows of `batch`, which holds `pairs`, two rows each. One pass if a pair is new."""
        keys = [(pair.source, pair.index) for pair in pairs]
        if any(key not in self._values for key in keys):
            sums = policy.reference_logprobs(batch).double().sum(dim=1).view(-1, 2).tolist()
            for key, (chosen, rejected) in zip(keys, sums, strict=True):
                self._values.setdefault(key, (chosen, rejected))
        return torch.tensor([value for key in keys for value in self._values[key]], dtype=torch.float32)

    def save(self, path: Path) -> None:
        """One safetensors file: index [N] int64, source [N] int64, logprobs [N, 2] fp64; the sources' names beside."""
        sources = sorted({source for source, _ in self._values})
        number = {source: i for i, source in enumerate(sources)}
        tensors = {
            "source": torch.tensor([number[source] for source, _ in self._values], dtype=torch.int64),
            "index": torch.tensor([index for _, index in self._values], dtype=torch.int64),
            "logprobs": torch.tensor(list(self._values.values()), dtype=torch.float64).view(-1, 2),
        }
        save_file(tensors, path, metadata={"sources": json.dumps(sources)})

    def load(self, path: Path) -> None:
        """Replace what is held by what `save` wrote."""
        with safe_open(path, framework="pt") as file:
            sources = json.loads(file.metadata()["sources"])
            source, index = file.get_tensor("source").tolist(), file.get_tensor("index").tolist()
            logprobs = file.get_tensor("logprobs").tolist()
        keys = [(sources[number], position) for number, position in zip(source, index, strict=True)]
        self._values = {key: (chosen, rejected) for key, (chosen, rejected) in zip(keys, logprobs, strict=True)}
