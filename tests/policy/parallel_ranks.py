"""The policy's verbs in several processes that share a model, and what they give: for tests/policy/sharing.py."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch._dynamo.utils import counters

from nemo_rl_lora.algorithms.losses.likelihood import SftLoss
from nemo_rl_lora.algorithms.losses.policy import make_policy_loss
from nemo_rl_lora.config.loss_fn import LossFnConfig
from nemo_rl_lora.lora.files import read_adapter
from nemo_rl_lora.lora.spec import LoraSpec
from nemo_rl_lora.policy.dtensor.policy import DTensorPolicy
from nemo_rl_lora.policy.megatron.policy import MegatronPolicy
from nemo_rl_lora.policy.trained import TrainedPolicy
from nemo_rl_lora.types import Batch
from tests.dynamo import torch_compiles
from tests.policy.dtensor.test_policy import make_policy
from tests.policy.test_pairs import preference_loss

NUM_STEPS = 3
# Steps small enough that a model of random weights does not double a difference in each, and an epsilon above rounding:
# with 1e-8 an element whose gradient is no more than that moves as far as any other.
ADAM = {"kwargs": {"lr": 1e-3, "weight_decay": 0.1, "eps": 1e-6}}


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a case works on. `foreign`: a checkpoint that one process of the other backend wrote."""

    model: Path
    adapter: Path | None
    batch: Batch
    foreign: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Case:
    """A way for `number` processes to share a model, and what is trained. `spec` None: all weights."""

    name: str
    number: int
    backend: Literal["dtensor", "megatron"] = "megatron"
    family: str = "llama"
    sizes: dict[str, Any]  # of the backend's section of policy
    layout: dict[str, Any] = field(default_factory=dict)  # of policy
    spec: LoraSpec | None
    loss: str = "grpo"
    foreign: bool = False  # reads a checkpoint of the other backend too
    rounding: float = 1e-5  # fp32's, of sums in another order
    after_steps: float = 1e-4  # AdamW divides by a root of small numbers


def loss_of(name: str):
    if name == "sft":
        return SftLoss()
    if name == "dpo":
        return preference_loss()
    return make_policy_loss(LossFnConfig(reference_policy_kl_penalty=0.1))


def policy_of(case: Case, model: Path, sizes: dict[str, Any], *, keep_reference: bool = False):
    """This process's part of a policy that is shared as `sizes` say."""
    other = "megatron_cfg" if case.backend == "dtensor" else "dtensor_cfg"
    return make_policy(
        model,
        backend=DTensorPolicy if case.backend == "dtensor" else MegatronPolicy,
        spec=case.spec,
        keep_reference=keep_reference,
        max_grad_norm=None,
        **{f"{case.backend}_cfg": {"enabled": True, **sizes}, other: {"enabled": False}},
        **{"optimizer": ADAM, **case.layout},
    )


def run_case(case: Case, inputs: Inputs, out: Path, sizes: dict[str, Any]):
    """Log-probabilities, three optimizer steps with their gradients, and the files of a checkpoint in `out`."""
    torch._dynamo.reset()  # what cases before have compiled
    batch, graphs = inputs.batch, counters["stats"]["unique_graphs"]
    policy = policy_of(case, inputs.model, sizes, keep_reference=case.loss == "grpo")
    if inputs.adapter is not None:
        tensors, _ = read_adapter(inputs.adapter)
        with torch.no_grad():
            for master, tensor in policy._trained.masters_from(tensors):
                master.copy_(tensor)
        policy._trained.refresh()
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
        found["steps"].append((step, dict(policy._trained.canonical(gradient_of))))
    assert counters["stats"]["unique_graphs"] > graphs or not case.layout.get("compile")
    found["moments"] = moments_of(policy)
    policy.save(out)
    if dist.is_initialized():
        dist.barrier()  # the first process has written
    resumed = policy_of(case, inputs.model, sizes)
    found |= {f"resumed {name}": tensors for name, tensors in state_after(resumed, out).items()}
    if inputs.foreign is not None:
        found |= {f"foreign {name}": tensors for name, tensors in state_after(resumed, inputs.foreign).items()}
    return found


def moments_of(policy: TrainedPolicy) -> dict[str, Tensor]:
    """Both moments of every canonical tensor."""
    moments: dict[str, Tensor] = {}
    for index, kind in enumerate(("exp_avg", "exp_avg_sq")):
        of_kind = policy._trained.canonical(lambda master, index=index: policy._optimizer.moments_of(master)[index])
        moments |= {f"{name}.{kind}": tensor.clone() for name, tensor in of_kind.items()}
    return moments


def state_after(policy: TrainedPolicy, checkpoint: Path) -> dict[str, dict[str, Tensor]]:
    """What a policy has after it read a checkpoint, under canonical names."""
    policy.load(checkpoint)
    return {
        "weights": dict(policy._trained.canonical(lambda master: master.detach().clone())),
        "moments": moments_of(policy),
    }


def gradient_of(master: torch.nn.Parameter) -> Tensor:
    assert master.grad is not None
    return master.grad.clone()


def run_cases(rank: int, cases: list[Case], inputs: dict[str, Inputs], meeting: Path) -> None:
    """One process's part of every case; the first writes what it found into the case's directory."""
    for case in cases:
        out = meeting / case.name
        if rank == 0:
            out.mkdir()
        try:
            with torch_compiles() if case.layout.get("compile") else nullcontext():
                found = run_case(case, inputs[case.name], out, case.sizes)
        except BaseException as error:
            error.add_note(f"in {case}")
            raise
        if case.backend == "megatron":
            parallel_state.destroy_model_parallel()
        if rank == 0:
            torch.save(found, out / "found.pt")
