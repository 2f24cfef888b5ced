"""The search for a token budget in each of two processes that share a model: run by test_token_budget.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from nemo_rl_lora.algorithms.batch import longest_rows
from nemo_rl_lora.algorithms.losses.likelihood import SftLoss
from nemo_rl_lora.lora.files import read_adapter
from nemo_rl_lora.policy import device_memory
from nemo_rl_lora.policy.token_budget import CPU_SHARE
from nemo_rl_lora.policy.trained import TrainedPolicy
from nemo_rl_lora.types import Batch
from tests.policy.parallel_ranks import Case, policy_of
from tests.tiny_models import VOCABULARY

NUMBER = 2
TARGET = 200  # tokens of which the poorer process has the memory


def auto(tokens: Any) -> dict[str, Any]:
    return {"dynamic_batching": {"enabled": True, "train_mb_tokens": tokens, "sequence_length_round": 8}}


def search_and_step(rank: int, cases: list[Case], model: Path, adapter: Path, batch: Batch, meeting: Path) -> None:
    """Each process writes what it found of every case."""
    for case in cases:
        torch.save(_found(rank, case, model, adapter, batch), meeting / f"{case.name} {rank}.pt")


def _found(rank: int, case: Case, model: Path, adapter: Path, batch: Batch) -> dict[str, Any]:
    longest = longest_rows(torch.arange(16), num_prompt_tokens=1, num_tokens=64, vocabulary=VOCABULARY)
    policy = _policy(case, model, adapter, "auto")
    before = torch.get_rng_state()
    policy._attempt(longest, TARGET)
    room = device_memory.peak_bytes(torch.device("cpu"), lambda: policy._attempt(longest, TARGET))
    masters = policy._trained.masters().values()
    needed = room + sum(2 * master.nbytes for master in masters)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_memory, "free_bytes", lambda _: int((3 - 2 * rank) * NUMBER * needed / CPU_SHARE))
        found = policy.find_train_tokens(longest)
    result: dict[str, Any] = {
        "found": found,
        "most": policy._sizes(longest).largest,
        "budget": policy.cutting.train.max_tokens,
        "left": [master.grad is not None for master in masters] + [bool(policy._optimizer.state)],
        "drawn": not torch.equal(torch.get_rng_state(), before),
    }
    result["steps"] = [policy.train_step(batch, SftLoss()) for _ in range(2)]
    result["weights"] = [master.detach().clone() for master in masters]
    if case.backend == "megatron":
        parallel_state.destroy_model_parallel()
    given = _policy(case, model, adapter, found.tokens)
    result["given steps"] = [given.train_step(batch, SftLoss()) for _ in range(2)]
    result["given weights"] = [master.detach().clone() for master in given._trained.masters().values()]
    if case.backend == "megatron":
        parallel_state.destroy_model_parallel()
    return result


def _policy(case: Case, model: Path, adapter: Path, tokens: Any) -> TrainedPolicy:
    policy = policy_of(replace(case, layout=auto(tokens)), model, case.sizes)
    tensors, _ = read_adapter(adapter)
    with torch.no_grad():
        for master, tensor in policy._trained.masters_from(tensors):
            master.copy_(tensor)
    policy._trained.refresh()
    return policy
