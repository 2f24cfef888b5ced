"""The policy's verbs in several processes that share a model, and what they give: run by test_parallel.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from nemo_rl_lora.algorithms.losses.likelihood import SftLoss
from nemo_rl_lora.algorithms.losses.policy import make_policy_loss
from nemo_rl_lora.config.loss_fn import LossFnConfig
from nemo_rl_lora.lora.files import read_adapter
from nemo_rl_lora.lora.spec import LoraSpec
from nemo_rl_lora.policy.megatron.policy import MegatronPolicy
from nemo_rl_lora.types import Batch
from tests.policy.dtensor.test_policy import make_policy
from tests.policy.test_pairs import preference_loss

NUM_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Case:
    """A way for `number` processes to share a model, and what is trained. `spec` None: all weights."""

    name: str
    number: int
    family: str = "llama"
    sizes: dict[str, Any]  # of policy.megatron_cfg
    layout: dict[str, Any] = field(default_factory=dict)  # of policy
    spec: LoraSpec | None
    loss: str = "grpo"
    rounding: float = 1e-5  # fp32's, of sums in another order
    after_steps: float = 1e-4  # AdamW divides by a root of small numbers


def loss_of(name: str):
    if name == "sft":
        return SftLoss()
    if name == "dpo":
        return preference_loss()
    return make_policy_loss(LossFnConfig(reference_policy_kl_penalty=0.1))


def run_case(case: Case, model: Path, adapter: Path | None, batch: Batch, out: Path, sizes: dict[str, Any]):
    """Log-probabilities, three optimizer steps with their gradients, and the files of a checkpoint in `out`."""
    policy = make_policy(
        model,
        backend=MegatronPolicy,
        spec=case.spec,
        keep_reference=case.loss == "grpo",
        max_grad_norm=None,
        megatron_cfg={"enabled": True, **sizes},
        dtensor_cfg={"enabled": False},
        **case.layout,
    )
    if adapter is not None:
        tensors, _ = read_adapter(adapter)
        with torch.no_grad():
            for master, tensor in policy._trained.masters_from(tensors):
                master.copy_(tensor)
    found: dict[str, Any] = {"logprobs": policy.logprobs(batch)}
    if case.loss == "grpo":
        found["reference"] = policy.reference_logprobs(batch)
    merged = policy.publish(0, "merged")
    assert merged.tensors is not None
    found["merged"] = {name: merged.tensors[name].clone() for name in merged.tensors}
    found["adapter digest"] = merged.digest
    found["steps"] = []
    for _ in range(NUM_STEPS):
        step = policy.train_step(batch, loss_of(case.loss))
        found["steps"].append((step, policy._trained.canonical(gradient_of)))
    policy.save(out)
    resumed = make_policy(
        model,
        backend=MegatronPolicy,
        spec=case.spec,
        max_grad_norm=None,
        megatron_cfg={"enabled": True, **sizes},
        dtensor_cfg={"enabled": False},
        **case.layout,
    )
    if dist.get_world_size() > 1:
        dist.barrier()  # the first process has written
    resumed.load(out)
    found["resumed"] = resumed._trained.canonical(lambda master: master.detach().clone())
    found["resumed moments"] = resumed._trained.canonical(lambda master: resumed._optimizer.moments_of(master)[1])
    return found


def gradient_of(master: torch.nn.Parameter) -> Tensor:
    assert master.grad is not None
    return master.grad.clone()


def run_cases(rank: int, cases: list[Case], inputs: dict[str, Any], meeting: Path) -> None:
    """One process's part of every case; the first writes what it found into the case's directory."""
    for case in cases:
        out = meeting / case.name
        if rank == 0:
            out.mkdir()
        model, adapter, batch = inputs[case.name]
        try:
            found = run_case(case, model, adapter, batch, out, case.sizes)
        except BaseException as error:
            error.add_note(f"in {case}")
            raise
        parallel_state.destroy_model_parallel()
        if rank == 0:
            torch.save(found, out / "found.pt")
