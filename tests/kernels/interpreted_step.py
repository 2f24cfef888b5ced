"""A whole step of training on our Triton kernels, in Triton's interpreter, beside the same step on torch's products.

tests/kernels/test_kernels.py runs this file in a process of its own, which has the interpreter from its start.
"""

from __future__ import annotations

import pytest

from nemo_rl_lora.kernels import logprobs
from nemo_rl_lora.policy import head
from nemo_rl_lora.policy.dtensor import policy as dtensor
from tests.gpu import steps
from tests.gpu.checks import relative
from tests.kernels import interpreter
from tests.policy.dtensor.kernel_cases import CountedKernel, counted_own_kernels
from tests.tiny_models import FAMILIES, save_random_model

interpreter.compute_bfloat16()


@pytest.mark.parametrize("layout", [steps.Case(family="qwen2", algorithm="sft"), steps.CHECKPOINTED], ids=str)
def test_a_step_of_training_on_kernels_is_the_step_without(tmp_path, monkeypatch, layout):
    """Log-probabilities, loss, the gradient of each A and B, and both after the step."""
    model = save_random_model(FAMILIES[layout.family], tmp_path)
    work = steps.work_of(layout, model)
    expected = steps.step_of(layout, model, "dtensor", "float32", work)
    counted = counted_own_kernels() | {"logprob_kernel": CountedKernel(logprobs.logprob_kernel)}
    monkeypatch.setattr(logprobs, "logprob_kernel", counted["logprob_kernel"])
    chosen = dtensor.kernels_in_force
    monkeypatch.setattr(dtensor, "kernels_in_force", lambda config, spec, *, cuda: chosen(config, spec, cuda=True))
    monkeypatch.setattr(head, "_kernel_takes", lambda *_: True)
    found = steps.step_of(layout, model, "dtensor", "float32", work)
    assert min(kernel.num_launches for kernel in counted.values()) > 0
    assert relative(found.logprobs, expected.logprobs) <= 2e-6
    assert found.loss == pytest.approx(expected.loss, rel=2e-6)
    assert steps.distance(found.gradients, expected.gradients) <= 1e-5
    assert steps.distance(found.masters, expected.masters) <= 1e-4
