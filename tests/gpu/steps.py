"""One step of SFT, DPO and GRPO on both backends, beside the same step of the DTensor backend on the CPU in fp32.

Compared are the log-probabilities before the step, the loss, the gradient of each A and B (the largest relative
distance counts), and what the masters are after the step. B is not zero. Both sides begin with the same adapter and
get the same batch. With `--cpu` both are the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from nemo_rl_lora.algorithms.losses.likelihood import SftLoss
from nemo_rl_lora.algorithms.losses.policy import make_policy_loss
from nemo_rl_lora.algorithms.losses.preference import row_logprobs
from nemo_rl_lora.config.loss_fn import LossFnConfig
from nemo_rl_lora.types import Batch, LossFn
from tests.gpu.checks import Answer, Check, Machine, relative, within, without_gpu
from tests.policy.batches import make_groups_batch
from tests.policy.dtensor.test_policy import make_policy, spec
from tests.policy.megatron.twins import BOTH, distance, gradients, masters, random_adapter, set_masters
from tests.policy.test_pairs import LAYOUTS, make_chats, make_pairs, preference_loss
from tests.tiny_models import FAMILIES, save_random_model

Backend = Literal["dtensor", "megatron"]
Precision = Literal["float32", "bfloat16"]
BACKENDS: tuple[Backend, ...] = ("dtensor", "megatron")
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")
# fp32: rounding through three layers in another order of sums is 1e-6 on a CPU; TF32 would be 1e-3.
# bf16: numbers have 8 bits, so that on a CPU log-probabilities are off by 2e-3 and the worst gradient by 0.07.
BOUNDS: dict[Precision, float] = {"float32": 1e-4, "bfloat16": 3e-2}
BF16_GRADIENT_BOUND = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """`settings` are keys of `policy` for each backend."""

    family: str
    algorithm: Literal["sft", "dpo", "grpo"]
    layout: str = "rows"
    settings: Mapping[Backend, Mapping[str, Any]] = field(default_factory=dict)


PACKED = Case(
    family="llama",
    algorithm="sft",
    layout="packed",
    settings={"dtensor": LAYOUTS["packed"], "megatron": LAYOUTS["packed"]},
)
CHECKPOINTED = Case(
    family="llama",
    algorithm="grpo",
    layout="activation checkpointing",
    settings={backend: {f"{backend}_cfg": {"activation_checkpointing": True}} for backend in BACKENDS},
)
COMPILED = Case(family="llama", algorithm="sft", layout="compiled", settings={"dtensor": {"compile": True}})
ALL_CASES = (
    *(Case(family=f, algorithm=a) for f in ("llama", "qwen2", "qwen3") for a in ("sft", "dpo", "grpo")),
    PACKED,
    CHECKPOINTED,
    COMPILED,
)
CPU_CASES = (
    Case(family="llama", algorithm="sft"),
    Case(family="qwen2", algorithm="dpo"),
    Case(family="qwen3", algorithm="grpo"),
    PACKED,
    CHECKPOINTED,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a step trains on, and from which adapter."""

    batch: Batch
    loss_fn: LossFn
    adapter: dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What a step did. The last two by canonical name, on the CPU; gradients are those before clipping."""

    logprobs: Tensor  # [B, T]
    loss: float
    gradients: dict[str, Tensor]
    masters: dict[str, Tensor]


def checks(machine: Machine) -> Iterator[Check]:
    @cache
    def model_of(family: str) -> Path:
        return save_random_model(FAMILIES[family], machine.root / family)

    for case in ALL_CASES if machine.has_gpu else CPU_CASES:
        expected = cache(partial(step_on_cpu, case, model_of(case.family)))
        for backend in case.settings or BACKENDS:
            for precision in PRECISIONS:
                name = f"{case.algorithm} on {backend} in {precision}, {case.family}, {case.layout}"
                ask = partial(beside_cpu, case, model_of(case.family), backend, precision, expected)
                yield Check(name=name, ask=ask)


def step_on_cpu(case: Case, model: Path) -> tuple[Work, Step]:
    with without_gpu():
        alone = replace(case, settings={}) if case is COMPILED else case
        work = work_of(alone, model)
        return work, step_of(alone, model, "dtensor", "float32", work)


def work_of(case: Case, model: Path) -> Work:
    """The batch of the case's algorithm with its reference, and an adapter whose B is not zero."""
    policy = policy_of(case, model, "dtensor", "float32")
    adapter = {name: tensor.detach().clone() for name, tensor in random_adapter(policy).items()}
    if case.algorithm == "sft":
        return Work(batch=make_chats(), loss_fn=SftLoss(), adapter=adapter)
    if case.algorithm == "dpo":
        pairs = make_pairs()
        reference = row_logprobs(policy.reference_logprobs(pairs), pairs.loss_mask)
        batch, loss_fn = replace(pairs, reference_logprobs=reference), preference_loss()
        return Work(batch=batch, loss_fn=loss_fn, adapter=adapter)
    groups = make_groups_batch()
    groups = replace(groups, reference_logprobs=policy.reference_logprobs(groups))
    loss_fn = make_policy_loss(LossFnConfig(reference_policy_kl_penalty=0.1))
    return Work(batch=groups, loss_fn=loss_fn, adapter=adapter)


def policy_of(case: Case, model: Path, backend: Backend, precision: Precision) -> Any:
    settings = case.settings.get(backend, {})
    return make_policy(
        model,
        backend=BOTH[backend],
        spec=spec(),
        temperature=0.8,
        precision=precision,
        max_grad_norm=None,
        **settings,
    )


def step_of(case: Case, model: Path, backend: Backend, precision: Precision, work: Work) -> Step:
    policy = policy_of(case, model, backend, precision)
    set_masters(policy, work.adapter)
    logprobs = policy.logprobs(work.batch)
    output = policy.train_step(work.batch, work.loss_fn)

    def on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.detach().float().cpu().clone() for name, tensor in tensors.items()}

    return Step(
        logprobs=logprobs.cpu(),
        loss=output.loss,
        gradients=on_cpu(gradients(policy)),
        masters=on_cpu(masters(policy)),
    )


def beside_cpu(
    case: Case, model: Path, backend: Backend, precision: Precision, expected: Callable[[], tuple[Work, Step]]
) -> Answer:
    """In bf16 gradients have a bound of their own, and the masters none: Adam's first step is as large for a gradient
    that is rounding as for any other."""
    work, wanted = expected()
    assert min(gradient.norm() for gradient in wanted.gradients.values()) > 0
    found = step_of(case, model, backend, precision, work)
    bound = BOUNDS[precision]
    errors = {
        "logprobs": relative(found.logprobs, wanted.logprobs),
        "loss": abs(found.loss - wanted.loss) / max(1.0, abs(wanted.loss)),
    }
    gradient, moved = distance(found.gradients, wanted.gradients), distance(found.masters, wanted.masters)
    if precision == "float32":
        return within(bound, {**errors, "gradients": gradient, "masters": moved})
    answer = within(bound, errors, gradients=gradient, gradients_bound=BF16_GRADIENT_BOUND, masters=moved)
    return replace(answer, ok=bool(answer.ok) and gradient <= BF16_GRADIENT_BOUND)
