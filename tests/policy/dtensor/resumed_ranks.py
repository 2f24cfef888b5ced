"""VeOmni's test of LoRA checkpoints, in each of four processes: run by test_resume.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_rl_lora.algorithms.losses.likelihood import SftLoss
from nemo_rl_lora.policy.dtensor.policy import DTensorPolicy
from nemo_rl_lora.types import Batch
from tests.policy.dtensor.test_policy import make_policy, spec

NUM_STEPS = 4


def _policy(model: Path) -> DTensorPolicy:
    adam = {"kwargs": {"lr": 1e-2, "weight_decay": 0.1}}
    return make_policy(model, spec=spec(dropout=0.1), optimizer=adam, megatron_cfg={"enabled": False})


def _weights(policy: DTensorPolicy) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in policy._trained.canonical(lambda master: master).items()}


def reload_and_resume(rank: int, model: Path, batches: list[Batch], meeting: Path) -> None:
    """Four steps, each saved; step 1 read again; step 2 continued to 4. The first process writes what it found."""
    policy, found = _policy(model), dict[str, Any]()
    for step in range(1, NUM_STEPS + 1):
        policy.train_step(batches[step - 1], SftLoss())
        found[f"step {step}"] = _weights(policy)
        policy.save(meeting / f"step_{step}")
        dist.barrier()  # the first process has written
    again = _policy(model)
    again.load(meeting / "step_1")
    found["reloaded 1"] = _weights(again)
    again.load(meeting / "step_2")
    for step in range(3, NUM_STEPS + 1):
        again.train_step(batches[step - 1], SftLoss())
        found[f"resumed {step}"] = _weights(again)
    if rank == 0:
        torch.save(found, meeting / "found.pt")
