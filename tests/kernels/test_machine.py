"""Where Triton's kernels do not run, torch's products take their place, and a sentence says why."""

from __future__ import annotations

import sysconfig

import pytest
import torch

from nemo_rl_lora.kernels import machine
from nemo_rl_lora.policy import head
from tests.fake_gpu import fake_gpu

T4 = "Tesla T4 has compute capability 7.5, below 8.0: plain torch products are used"


def ask_anew():
    machine.triton_problem.cache_clear()
    machine.is_recent.cache_clear()


@pytest.fixture(autouse=True)
def nothing_is_kept():
    ask_anew()
    yield
    ask_anew()


def no_triton(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "find_spec", lambda name: None)
    return "Triton is not installed"


def no_headers(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    return "the headers of Python 3."


def no_compiler(monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    return "Triton needs a C compiler, and there is no gcc or clang"


def other_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    return f"Triton needs a C compiler, and there is no {tmp_path / 'cc'}"


def old_card(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")
    return T4


@pytest.mark.parametrize("without", [no_triton, no_headers, no_compiler, other_compiler, old_card])
def test_where_something_is_missing_the_head_is_torchs_and_the_sentence_says_what(monkeypatch, tmp_path, without):
    with fake_gpu():
        hidden = torch.empty(3, 8, device="cuda", dtype=torch.bfloat16)
        one = head.Head(weight=torch.empty(5, 8, device="cuda", dtype=torch.bfloat16), temperature=1.0, chunk_tokens=2)
        assert machine.kernel_problem() is None
        assert head._kernel_takes(hidden, one)
        ask_anew()
        said = without(monkeypatch, tmp_path)
        assert (machine.kernel_problem() or "").startswith(said)
        assert not head._kernel_takes(hidden, one)


def test_a_plan_and_a_start_say_what_is_missing(tiny_sft, monkeypatch):
    problem = "Triton needs a C compiler, and there is no gcc or clang"
    monkeypatch.setattr(machine, "kernel_problem", lambda: problem)
    ended = tiny_sft("sft.max_num_steps=1")
    assert ended.code == 0
    assert ended.err.count(f"policy.dtensor_cfg.lora_cfg.use_triton: off, because {problem}.") == 1
    assert problem in " ".join(tiny_sft("--plan").out.split())
