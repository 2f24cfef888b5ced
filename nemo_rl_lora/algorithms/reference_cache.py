"""Reference log-probabilities of preference pairs, computed once per pair and kept for later epochs and resumes.

The reference (the base, or the initial adapter) does not move, so the value of given tokens never changes: a pair that
comes again costs no pass, and a resumed run goes on with the very numbers of the run that was interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nemo_rl_lora.data.checked_rows import tokens_digest
from nemo_rl_lora.data.preferences import pair_tokens
from nemo_rl_lora.policy.protocol import Policy
from nemo_rl_lora.types import Batch, PreferencePair


class ReferenceCache:
    """The digest of a pair's tokens -> the summed logprobs of its chosen and of its rejected answer."""

    def __init__(self) -> None:
        self._values: dict[bytes, tuple[float, float]] = {}

    def __len__(self) -> int:
        return len(self._values)

    def of(self, pairs: Sequence[PreferencePair], batch: Batch, policy: Policy) -> Tensor:
        """[B] fp32 for the rows of `batch`, which holds `pairs`, two rows each. One pass if a pair is new."""
        keys = [tokens_digest(pair_tokens(pair)) for pair in pairs]
        if any(key not in self._values for key in keys):
            sums = policy.reference_logprobs(batch).double().sum(dim=1).view(-1, 2).tolist()
            for key, (chosen, rejected) in zip(keys, sums, strict=True):
                self._values.setdefault(key, (chosen, rejected))
        return torch.tensor([value for key in keys for value in self._values[key]], dtype=torch.float32)

    def save(self, path: Path) -> None:
        """One safetensors file: tokens [N, 16] uint8, the digests; logprobs [N, 2] fp64."""
        tensors = {
            "tokens": torch.tensor([list(key) for key in self._values], dtype=torch.uint8).view(-1, 16),
            "logprobs": torch.tensor(list(self._values.values()), dtype=torch.float64).view(-1, 2),
        }
        save_file(tensors, path)

    def load(self, path: Path) -> None:
        """Replace what is held by what `save` wrote; by nothing where a version that did not name tokens wrote it."""
        with safe_open(path, framework="pt") as file:
            if "tokens" not in file.keys():  # noqa: SIM118
                self._values = {}
                return
            keys = [bytes(key) for key in file.get_tensor("tokens").tolist()]
            logprobs = file.get_tensor("logprobs").tolist()
        self._values = {key: (chosen, rejected) for key, (chosen, rejected) in zip(keys, logprobs, strict=True)}
