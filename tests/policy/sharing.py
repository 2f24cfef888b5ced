"""Processes that share a model train what one process trains: what both backends' tests of it have in common.

The expected values are those of world size 1, which other tests hold against transformers, PEFT and the other backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from nemo_rl_lora.algorithms.losses.preference import row_logprobs
from nemo_rl_lora.lora.files import read_adapter, read_moments
from nemo_rl_lora.types import Batch, StepOutput
from tests.policy.batches import make_groups_batch
from tests.policy.dtensor.test_policy import make_policy, plain_logprobs, relative
from tests.policy.megatron.twins import BOTH, distance, random_adapter, set_masters
from tests.policy.parallel_ranks import Case, Inputs, loss_of, run_case, run_cases
from tests.policy.test_pairs import make_chats, make_pairs
from tests.rank_processes import run_ranks
from tests.tiny_models import save_random_model

PACKED = {"sequence_packing": {"enabled": True, "train_mb_tokens": 64, "logprob_mb_tokens": 64}}
# Steps at which the gradients of later ones still differ by rounding alone.
BF16 = {"precision": "bfloat16", "optimizer": {"kwargs": {"lr": 1e-4, "weight_decay": 0.0}}}
# bf16 has 8 bits: log-probabilities differ by 1.5e-3, and gradients by a tenth.
ROUNDED: dict[str, Any] = {"rounding": 0.1, "after_steps": 0.2}


def named(cases: Sequence[Case], default: set[str]) -> pytest.MarkDecorator:
    """A test of these cases by their names, of which those that are not `default` are slow."""
    slow = {case.name: () if case.name in default else pytest.mark.slow for case in cases}
    return pytest.mark.parametrize("name", [pytest.param(name, marks=marks) for name, marks in slow.items()])


def checked(cases: Sequence[Case], default: set[str]) -> pytest.MarkDecorator:
    """A test of every check that holds for each case, as `named`."""
    return pytest.mark.parametrize(
        ("name", "check"),
        [
            pytest.param(
                case.name,
                check,
                id=f"{case.name}-{check.__name__.removeprefix('check_')}",
                marks=() if case.name in default else pytest.mark.slow,
            )
            for case in cases
            for check in (
                check_logprobs,
                check_gradients,
                check_published,
                check_resumed,
                *([check_peft] if case.spec is not None and case.family != "experts" else []),
                *([check_foreign] if case.foreign else []),
            )
        ],
    )


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the processes of a case found, and what one process finds."""

    case: Case
    inputs: Inputs
    shared: dict[str, Any]
    alone: dict[str, Any]
    checkpoint: Path  # of the processes


def find(
    cases: Sequence[Case],
    configs: dict[str, PretrainedConfig],
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Found]:
    """Case name -> what was found, for the cases that this session asks about."""
    asked = {item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")}
    batches = {"grpo": make_groups_batch(), "sft": make_chats(), "dpo": make_pairs()}
    models: dict[str, Path] = {}
    results = {}
    for number in (2, 4):
        inputs: dict[str, Inputs] = {}
        started = [case for case in cases if case.number == number and case.name in asked]
        for case in started:
            if case.family not in models:
                models[case.family] = save_random_model(configs[case.family], tmp_path_factory.mktemp(case.family))
            inputs[case.name] = _inputs(case, models[case.family], batches[case.loss], tmp_path_factory)
        if not started:
            continue
        meeting = tmp_path_factory.mktemp("meeting")
        run_ranks(number, meeting, run_cases, started, inputs, meeting)
        for case in started:
            results[case.name] = Found(
                case=case,
                inputs=inputs[case.name],
                shared=torch.load(meeting / case.name / "found.pt", weights_only=False),
                alone=run_case(
                    replace(case, layout=case.layout | {"compile": False}),
                    inputs[case.name],
                    tmp_path_factory.mktemp("alone"),
                    {},
                ),
                checkpoint=meeting / case.name,
            )
    return results


def _inputs(case: Case, model: Path, batch: Batch, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    batch = _with_reference(batch, model, BOTH[case.backend])
    if case.spec is None:
        return Inputs(model=model, adapter=None, batch=batch)
    adapter = _saved(case, model, tmp_path_factory.mktemp("adapter"), case.backend)
    foreign = None
    if case.foreign:
        other = "megatron" if case.backend == "dtensor" else "dtensor"
        foreign = _saved(case, model, tmp_path_factory.mktemp("foreign"), other, batch)
    return Inputs(model=model, adapter=adapter / "adapter", batch=batch, foreign=foreign)


def _saved(case: Case, model: Path, directory: Path, backend: str, batch: Batch | None = None) -> Path:
    """A checkpoint of one process with an adapter whose B is not zero, after a step where there is a batch."""
    policy = make_policy(model, backend=BOTH[backend], spec=case.spec)
    set_masters(policy, random_adapter(policy))
    if batch is not None:
        policy.train_step(batch, loss_of(case.loss))
    policy.save(directory)
    return directory


def _with_reference(batch: Batch, model: Path, backend: Any) -> Batch:
    base = make_policy(model, backend=backend).logprobs(batch)
    return replace(batch, reference_logprobs=row_logprobs(base, batch.loss_mask) if batch.whole_groups else base)


def check_logprobs(found: Found) -> None:
    shared, alone, case = found.shared, found.alone, found.case
    assert relative(shared["logprobs"], alone["logprobs"]) <= case.rounding
    if "reference" in alone:
        assert relative(shared["reference"], alone["reference"]) <= case.rounding
        assert case.spec is None or relative(shared["reference"], shared["logprobs"]) > 1e-3


def check_gradients(found: Found) -> None:
    case = found.case
    for number, (step, expected) in enumerate(zip(found.shared["steps"], found.alone["steps"], strict=True)):
        bound = case.after_steps if number else case.rounding
        (output, gradients), (other, others) = step, expected
        assert output.loss == pytest.approx(other.loss, rel=bound, abs=bound)
        assert output.grad_norm == pytest.approx(other.grad_norm, rel=bound)
        assert output.metrics == pytest.approx(other.metrics, rel=10 * bound, abs=1e-5)
        if case.sizes.get("context_parallel_size", 1) == 1:  # there, prompts are not shared
            assert arithmetic(output) == arithmetic(other)
        used = {key: gradient for key, gradient in others.items() if gradient.norm() > 0}
        assert len(used) == len(others) or (
            "all weights" in case.name and ".experts." in (others.keys() - used.keys()).pop()
        )
        assert distance({key: gradients[key] for key in used}, used) <= bound, f"step {number}"


def arithmetic(output: StepOutput) -> tuple[int, int, int]:
    """What a step's FLOP are counted from."""
    num_tokens = output.num_forward_tokens - output.num_padding_tokens
    return num_tokens, output.num_loss_tokens, output.num_attention_scores


def check_published(found: Found) -> None:
    shared, alone = found.shared, found.alone
    assert distance(shared["merged"], alone["merged"]) <= 1e-6
    assert {tensor.dtype for tensor in shared["merged"].values()} == {
        tensor.dtype for tensor in alone["merged"].values()
    }
    assert shared["adapter digest"] == alone["adapter digest"]


def check_resumed(found: Found) -> None:
    shared, alone, after = found.shared, found.alone, found.case.after_steps
    assert distance(shared["resumed weights"], alone["resumed weights"]) <= after
    expected = {key: moment for key, moment in alone["moments"].items() if moment.norm() > 0}
    # Without any moments the distance would be 1.
    assert distance({key: shared["moments"][key] for key in expected}, expected) <= min(10 * after, 0.5)
    for one in (shared, alone):
        assert one["moments"].keys() == one["resumed moments"].keys()
        for name, moment in one["moments"].items():
            assert torch.equal(one["resumed moments"][name], moment), name


def check_foreign(found: Found) -> None:
    """What the other backend wrote is read to the bit."""
    foreign = found.inputs.foreign
    assert foreign is not None
    weights, _ = read_adapter(foreign / "adapter")
    moments, _ = read_moments(foreign / "optimizer", expected=weights.keys(), aliases={})
    assert weights.keys() == found.shared["foreign weights"].keys()
    for name, tensor in weights.items():
        assert torch.equal(found.shared["foreign weights"][name], tensor), name
        for kind, moment in zip(("exp_avg", "exp_avg_sq"), moments[name], strict=True):
            assert torch.equal(found.shared["foreign moments"][f"{name}.{kind}"], moment), name


def check_peft(found: Found) -> None:
    """Stock PEFT, and one process of either backend, read what the processes wrote."""
    model, batch, spec = found.inputs.model, found.inputs.batch, found.case.spec
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    judge = peft.PeftModel.from_pretrained(base, found.checkpoint / "adapter").eval()
    expected = plain_logprobs(judge, batch).detach()
    assert spec is not None
    own = spec.fused == "shared" or "padded" in found.case.name  # what the other backend does not have
    for backend in [BOTH[found.case.backend]] if own else BOTH.values():
        one = make_policy(model, backend=backend, spec=spec)
        one.load(found.checkpoint)
        assert relative(one.logprobs(batch), expected) <= 1e-5
