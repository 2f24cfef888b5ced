"""`policy.deterministic`: what torch and cuBLAS are told, where attention is strict, and what the log names."""

from __future__ import annotations

import os
import warnings

import pytest
import torch
from torch.nn.attention import SDPBackend

from nemo_rl_lora.models.stored import BadWeightsError
from nemo_rl_lora.policy import flash_segments
from nemo_rl_lora.policy.determinism import WORKSPACE, deterministic_algorithms, repeatable, strictly
from nemo_rl_lora.policy.dtensor.policy import DTensorPolicy


def state() -> tuple[object, ...]:
    cuda, settings = torch.backends.cuda, vars(torch.utils)["deterministic"]
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        settings.fill_uninitialized_memory,
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
    )


@pytest.fixture(autouse=True)
def no_workspace(monkeypatch):
    monkeypatch.setenv(WORKSPACE, "of a test")  # put back afterwards
    monkeypatch.delenv(WORKSPACE)


def test_what_is_set_is_taken_back():
    before = state()
    with deterministic_algorithms(True):
        assert state() == (True, True, False, False, False, False)
        assert os.environ[WORKSPACE] == ":4096:8"
    assert state() == before
    with deterministic_algorithms(False):
        assert state() == before


def test_the_users_workspace_stays(monkeypatch):
    monkeypatch.setenv(WORKSPACE, ":16:8")
    with deterministic_algorithms(True):
        assert os.environ[WORKSPACE] == ":16:8"


def test_a_process_whose_cuda_has_started_without_a_workspace_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    before = state()
    with (
        pytest.raises(ValueError, match=r"^policy\.deterministic=True: CUDA has started.*Set it to :4096:8"),
        deterministic_algorithms(True),
    ):
        pass
    assert state() == before


@pytest.mark.parametrize("algorithm", ["sft", "grpo"])
def test_a_run_has_the_workspace_before_its_checks_look_at_the_gpu(algorithm, tiny_sft, tiny_run, monkeypatch):
    """The memory of a GPU is asked for at every start, which starts CUDA."""
    found: list[str | None] = []

    def look(_: object) -> int:
        found.append(os.environ.get(WORKSPACE))
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        return 1 << 40

    def build(start: object) -> None:
        raise BadWeightsError("the run has come as far as its weights.")

    monkeypatch.setattr("nemo_rl_lora.plan.plan._memory_bytes", look)
    monkeypatch.setattr("nemo_rl_lora.run.start._build_policy", build)
    ended = {"sft": tiny_sft, "grpo": tiny_run}[algorithm]("policy.deterministic=true")

    assert found[0] == ":4096:8"
    assert "the run has come as far as its weights." in ended.err


def test_inside_strictly_torch_stops_where_it_would_only_warn():
    with strictly():
        assert not torch.are_deterministic_algorithms_enabled()
    with deterministic_algorithms(True):
        with strictly():
            assert state()[:2] == (True, False)
        assert state()[:2] == (True, True)


def test_attention_with_gradients_is_of_plain_products():
    kernels = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    assert repeatable(kernels) == kernels
    with deterministic_algorithms(True):
        assert repeatable(kernels) == [SDPBackend.MATH]


@pytest.mark.parametrize("on", [False, True])
def test_flash_attentions_backward_pass_is_asked_for_its_deterministic_form(on, monkeypatch):
    """torch reads it where it may stop, and nowhere else (aten/native/transformers/cuda/attention_backward.cu)."""
    seen = []

    def backward(*arguments, **named):
        seen.append(state()[:2])
        return arguments[1], arguments[2], arguments[3]

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", backward)
    plan = flash_segments.Call(
        query_rows=None,
        key_rows=None,
        query_bounds=torch.tensor([0, 2]),
        key_bounds=torch.tensor([0, 2]),
        longest_query=2,
        longest_key=2,
    )
    x = torch.ones(2, 1, 8)
    with deterministic_algorithms(on):
        flash_segments.flash_backward(x, x, x, x, x, x, (x, x), plan, 1.0, causal=True)
    assert seen == [(on, False)]


def warn_of(*messages):
    for message in messages:
        warnings.warn(message, stacklevel=1)


def test_an_operation_without_a_deterministic_form_is_named_once(caplog):
    cumsum = "cumsum_cuda_kernel does not have a deterministic implementation, but you set 'torch.use_determinis..."
    attention = "Memory Efficient attention defaults to a non-deterministic algorithm. To explicitly enable"
    named, other = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_, **__: other.append(str(message))
        with deterministic_algorithms(True, named.append):
            warn_of(cumsum, cumsum, attention, "of another kind")
        with deterministic_algorithms(True):
            warn_of(cumsum)
        warn_of(cumsum)
    assert named == ["cumsum_cuda_kernel", "Memory Efficient attention"]
    assert other == ["of another kind", cumsum]
    assert caplog.text.count("policy.deterministic=True: cumsum_cuda_kernel has no deterministic form in torch") == 1


@pytest.mark.parametrize("on", [False, True])
def test_a_run_trains_so_where_it_is_asked_for_and_leaves_no_trace(tiny_sft, monkeypatch, on):
    seen, step, before = [], DTensorPolicy.train_step, state()

    def seeing(policy, *arguments):
        seen.append(state()[:2])
        return step(policy, *arguments)

    monkeypatch.setattr(DTensorPolicy, "train_step", seeing)
    ended = tiny_sft(*([] if not on else ["policy.deterministic=true"]))
    assert ended.code == 0, ended.err
    assert seen == [(on, on)] * 2
    assert state() == before


def test_kernels_that_are_chosen_by_a_clock_are_refused(tiny_sft):
    ended = tiny_sft("policy.deterministic=true", "policy.dtensor_cfg.lora_cfg.use_triton=automodel")
    assert ended.code == 2
    assert "policy.deterministic=True: policy.dtensor_cfg.lora_cfg.use_triton=automodel chooses among" in ended.err
