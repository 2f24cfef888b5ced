"""Steps of training on our Triton kernels, in Triton's interpreter, beside the same steps on torch's products.

tests/kernels/test_kernels.py runs this file in a process of its own, which has the interpreter from its start.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_rl_lora.kernels import logprobs
from nemo_rl_lora.policy import head
from nemo_rl_lora.policy.dtensor import policy as dtensor
from tests.gpu import steps
from tests.gpu.checks import relative
from tests.policy import sharing
from tests.policy.dtensor.kernel_cases import CountedKernel, counted_own_kernels
from tests.policy.dtensor.test_policy import spec
from tests.policy.dtensor.test_sharing import MODELS
from tests.policy.parallel_ranks import Case, Inputs, run_cases
from tests.tiny_models import FAMILIES, save_random_model


def run_on_kernels(patch: pytest.MonkeyPatch) -> dict[str, CountedKernel]:
    """The DTensor backend and the head as on a GPU, from here on; counters of launches."""
    chosen = dtensor.kernels_in_force
    patch.setattr(dtensor, "kernels_in_force", lambda config, spec, *, lacks: chosen(config, spec, lacks=None))
    patch.setattr(head, "_kernel_takes", lambda *_: True)
    of_head = CountedKernel(logprobs.logprob_kernel)
    patch.setattr(logprobs, "logprob_kernel", of_head)
    return counted_own_kernels() | {"logprob_kernel": of_head}


@pytest.mark.parametrize("layout", [steps.Case(family="qwen2", algorithm="sft"), steps.CHECKPOINTED], ids=str)
def test_a_step_on_kernels_is_the_step_without(tmp_path, monkeypatch, layout):
    """Log-probabilities, loss, the gradient of each A and B, and both after the step."""
    model = save_random_model(FAMILIES[layout.family], tmp_path)
    work = steps.work_of(layout, model)
    expected = steps.step_of(layout, model, "dtensor", "float32", work)
    counted = run_on_kernels(monkeypatch)
    found = steps.step_of(layout, model, "dtensor", "float32", work)
    assert min(kernel.num_launches for kernel in counted.values()) > 0
    assert relative(found.logprobs, expected.logprobs) <= 2e-6
    assert found.loss == pytest.approx(expected.loss, rel=2e-6)
    assert steps.distance(found.gradients, expected.gradients) <= 1e-5
    assert steps.distance(found.masters, expected.masters) <= 1e-4


SHARED = Case(name="dp2", number=2, backend="dtensor", sizes={}, layout=sharing.PACKED, spec=spec(), loss="sft")


def cases_on_kernels(rank: int, cases: list[Case], inputs: dict[str, Inputs], meeting: Path) -> None:
    counted = run_on_kernels(pytest.MonkeyPatch())
    run_cases(rank, cases, inputs, meeting)
    assert min(kernel.num_launches for kernel in counted.values()) > 0


@pytest.fixture(scope="module")
def found(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharing, "run_cases", cases_on_kernels)
        return sharing.find([SHARED], MODELS, request, tmp_path_factory)


@sharing.checked([SHARED], {SHARED.name})
def test_processes_on_kernels_that_share_a_model_are_one_process_without(found, name, check):
    """By FSDP2, which frees a layer's weights between its passes."""
    check(found[name])
