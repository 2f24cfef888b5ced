"""`policy.compile`: compiled layers train as those that are not, for any number of tokens, or are refused by name."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import LlamaConfig, MistralConfig

from nemo_rl_lora.algorithms.losses.likelihood import SftLoss
from nemo_rl_lora.config.policy import PolicyConfig
from nemo_rl_lora.policy.dtensor.limits import compile_problems
from tests.driver import adapter, same
from tests.dynamo import torch_compiles, why_nothing_compiles
from tests.policy.batches import make_groups_batch
from tests.policy.dtensor.test_policy import LAYOUTS, make_policy, spec
from tests.policy.megatron.twins import gradients, random_adapter, set_masters
from tests.policy.test_pairs import make_batch

pytestmark = pytest.mark.timeout(1200)  # a C++ compiler runs a dozen times
DROPPED = spec(dropout=0.2, dropout_position="post")
CASES = [
    pytest.param("llama", spec(), LAYOUTS["packed, shared"], id="packed"),
    pytest.param("qwen2", spec(), LAYOUTS["token budget"], id="token budget", marks=pytest.mark.slow),
    pytest.param("qwen3", DROPPED, LAYOUTS["one row"], id="dropout", marks=pytest.mark.slow),
    pytest.param("llama", spec(), LAYOUTS["checkpointed"], id="checkpointed", marks=pytest.mark.slow),
    pytest.param("llama", None, LAYOUTS["packed, shared"], id="all weights", marks=pytest.mark.slow),
]


@pytest.fixture(autouse=True)
def compiling():
    torch._dynamo.reset()  # what tests before have compiled
    with torch_compiles():
        if reason := why_nothing_compiles():
            pytest.skip(reason)
        yield


@pytest.mark.parametrize(("family", "chosen", "layout"), CASES)
def test_compiled_layers_train_as_those_that_are_not(tiny_model, family, chosen, layout):
    """Four steps of other numbers of tokens, each from the same weights, with adapters whose B is not zero: fp32 sums
    in another order. The steps after the first find all that they need compiled."""
    batches = [
        make_groups_batch(),
        make_batch([(5, 20), (5, 31), (9, 3)], groups=[0, 0, 1]),
        make_batch([(4, 7)], groups=[0]),
        make_batch([(2, 1)], groups=[0]),
    ]
    still = {"max_grad_norm": None, "optimizer": {"kwargs": {"lr": 0.0, "weight_decay": 0.0}}}
    results, num_graphs = [], []
    for compiled in (False, True):
        before = counters["stats"]["unique_graphs"]
        policy = make_policy(tiny_model(family), spec=chosen, compile=compiled, **still, **layout)
        if chosen is not None:
            set_masters(policy, random_adapter(policy))
        found = []
        for batch in batches:
            logprobs = policy.logprobs(batch)
            output = policy.train_step(batch, SftLoss())
            found.append((logprobs, output.loss, gradients(policy)))
            num_graphs.append(counters["stats"]["unique_graphs"] - before)
        if chosen is not None:
            found.append((policy.reference_logprobs(batches[0]), 0.0, {}))
        results.append(found)
    assert num_graphs[:4] == [0] * 4
    assert num_graphs[4] > 0
    assert num_graphs[4:] == [num_graphs[4]] * 4
    for (logprobs, loss, of_masters), (own_logprobs, own_loss, own_gradients) in zip(*results, strict=True):
        torch.testing.assert_close(own_logprobs, logprobs, atol=1e-5, rtol=0)
        assert own_loss == pytest.approx(loss, abs=1e-5)
        least = 1e-6 * float(sum(gradient.square().sum() for gradient in of_masters.values())) ** 0.5
        for name, gradient in of_masters.items():  # some of the keys' are all but zero, where few are looked at
            assert (own_gradients[name] - gradient).norm() <= 1e-4 * gradient.norm() + least, name


def test_what_is_not_compiled_is_refused_by_name(monkeypatch, tmp_path):
    llama, mistral = LlamaConfig(), MistralConfig(sliding_window=8)
    assert problems(llama) == []
    assert problems(mistral, compile="auto") == problems(mistral, compile=False) == []
    (said,) = problems(mistral)
    assert said.startswith("policy.compile=True: only layers with full causal attention are compiled, which mistral ")
    for name in ("CC", "CXX"):
        monkeypatch.setenv(name, str(tmp_path / "no_such_compiler"))
    (said,) = problems(llama)
    assert said == (
        f"policy.compile=True: torch.compile needs a compiler, and there is no {tmp_path / 'no_such_compiler'}. "
        "Install one, or set policy.compile=false."
    )
    monkeypatch.undo()
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    (said,) = problems(llama)
    assert said.startswith("policy.compile=True: torch.compile needs the headers of Python 3.")


REFUSED = {
    "megatron": (
        ["policy.backend=megatron", "policy.dtensor_cfg.lora_cfg.enabled=false", "policy.lora.dim=4"],
        "the layers of the DTensor backend are compiled, and Megatron-Core's are not.",
    ),
    "vLLM beside": (
        ["policy.generation.backend=vllm", "policy.generation.vllm_cfg.enforce_eager=true"],
        "policy.generation.vllm_cfg.enforce_eager=true turns torch.compile off in vLLM's process, which is this one.",
    ),
    "sequences shared": (
        [
            "cluster.gpus_per_node=2",
            "policy.dtensor_cfg.tensor_parallel_size=2",
            "++policy.dtensor_cfg.sequence_parallel=true",
        ],
        "torch.compile fails on sequences that tensor-parallel ranks share.",
    ),
    "environment": ([], "TORCH_COMPILE_DISABLE=1 in the environment turns torch.compile off."),
}


@pytest.mark.parametrize(("settings", "said"), REFUSED.values(), ids=REFUSED)
def test_where_nothing_would_be_compiled_the_key_is_refused(tiny_run, monkeypatch, settings, said):
    if not settings:
        monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    ended = tiny_run("policy.compile=true", *settings)
    assert ended.code == 2, ended.err
    assert f"policy.compile=True: {said}" in ended.err


@pytest.mark.slow  # compiles, to fail
def test_a_compiler_that_fails_is_said_by_the_keys_name(tiny_sft, tmp_path, monkeypatch):
    """One that tells its version, and compiles nothing."""
    broken = tmp_path / "g++"
    broken.write_text('#!/bin/sh\ncase "$*" in *--version*) exec g++ --version;; esac\nexit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with torch._inductor.config.patch({"cpp.cxx": (None, str(broken))}):
        ended = tiny_sft("policy.compile=true")
    assert ended.code != 0
    assert "policy.compile=True: torch.compile failed (CppCompileError: " in ended.err
    assert "). Set policy.compile=false." in ended.err


def problems(model_config, **policy) -> list[str]:
    settings = {"model_name": "tiny", "compile": True, "max_total_sequence_length": 64, **policy}
    return compile_problems(PolicyConfig.model_validate(settings), model_config)


@pytest.mark.slow  # a compiled policy: above
def test_a_compiled_run_continues_as_it_would_have_gone_on(tiny_sft):
    settings = ("policy.compile=true", "sft.max_num_epochs=9", "checkpointing.save_period=1")
    whole = tiny_sft(*settings, "sft.max_num_steps=3")
    assert whole.code == 0, whole.err
    expected = adapter(tiny_sft.checkpoints / "step_3")
    shutil.rmtree(tiny_sft.checkpoints / "step_3")
    continued = tiny_sft(*settings, "sft.max_num_steps=3")
    assert continued.code == 0, continued.err
    assert same(adapter(tiny_sft.checkpoints / "step_3"), expected)
    assert max(float(tensor.abs().max()) for name, tensor in expected.items() if "lora_B" in name) > 0
