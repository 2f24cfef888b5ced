"""A run that has no memory left says where, at which peak, and which keys take less there, and keeps its checkpoint."""

from __future__ import annotations

import re

import pytest
import torch

from nemo_rl_lora.config.load import load_config
from nemo_rl_lora.generation.in_process.engine import InProcessGeneration
from nemo_rl_lora.policy.dtensor.policy import DTensorPolicy
from nemo_rl_lora.policy.optimizer import MasterAdam
from nemo_rl_lora.run import memory
from tests.driver import TinyRun

NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
PEAK = r"the peak was \d+\.\d\d GiB of the machine's memory"


@pytest.fixture
def lacking(monkeypatch):
    """(class, name of a method, number of a call): from this call on the method finds no memory."""

    def lack(owner, name, number=1):
        whole, calls = getattr(owner, name), []

        def method(*arguments, **named):
            calls.append(name)
            if len(calls) >= number:
                raise NO_MEMORY
            return whole(*arguments, **named)

        monkeypatch.setattr(owner, name, method)

    yield lack
    vars(NO_MEMORY).clear()  # what the runs have noted on it


def said_of(ended, phase):
    """The lines on memory of a failed run, which name this phase; without the first."""
    assert ended.code == 1
    assert ended.err.count("What takes less") == 1
    assert "Traceback" not in ended.err
    lines = ended.err.split("The run failed: ")[1].splitlines()
    assert lines[0] == f"OutOfMemoryError: {NO_MEMORY}"
    assert re.fullmatch(rf"Out of memory in {phase}; {PEAK}\. What takes less there:", lines[1]), lines[1]
    return lines[2:]


BY_ROWS = "policy.dynamic_batching.enabled=false"


def test_training_names_its_keys_and_the_run_goes_on_from_the_step_before_with_one_of_them_changed(
    tiny_sft, lacking, monkeypatch
):
    more = ("sft.max_num_steps=3", "checkpointing.save_period=100", BY_ROWS)
    lacking(DTensorPolicy, "_loss_of", number=5)  # two passes a step: in the third step, before the optimizer moves

    ended = tiny_sft(*more, "policy.train_micro_batch_size=2")

    step = tiny_sft.checkpoints / "step_2"
    assert said_of(ended, "training") == [
        "policy.train_micro_batch_size=2: rows of a pass. Lower it.",
        "policy.dtensor_cfg.activation_checkpointing=False: each layer keeps its activations for the backward pass. "
        "Set it to true.",
        "policy.dtensor_cfg.tensor_parallel_size=1: processes that share each weight and its activations. Raise it, "
        "and cluster.gpus_per_node with it.",
        f"Step 2, the last complete one, is saved: {step}.",
        f"The traceback is in {tiny_sft.logs / 'exp_001' / 'run.log'}.",
    ]
    monkeypatch.undo()
    ended = tiny_sft(*more, "policy.train_micro_batch_size=1")
    assert ended.code == 0, ended.err
    assert tiny_sft.steps() == ["step_2", "step_3"]


def test_an_optimizer_without_memory_leaves_no_step_that_is_half_moved(tiny_sft, lacking):
    lacking(MasterAdam, "step", number=2)
    ended = tiny_sft("checkpointing.save_period=100")
    assert said_of(ended, "training")[-2] == (
        "Step 1, the last complete one, could not be saved. The newest checkpoint is none."
    )
    assert tiny_sft.steps() == []


@pytest.mark.parametrize(
    ("method", "phase", "key"),
    [
        ("base_model", "the start, where weights are loaded", "policy.dtensor_cfg.tensor_parallel_size=1: "),
        ("publish", "the sync of weights to the engine", "policy.generation.lora_sync='merged': "),
        ("reference_logprobs", "the pass for log-probabilities", "policy.logprob_batch_size="),
        ("train_step", "training", "policy.train_micro_batch_size="),
    ],
)
def test_each_phase_of_grpo_names_keys_of_its_own(tiny_run, lacking, method, phase, key):
    lacking(DTensorPolicy, method)
    rows = (BY_ROWS, "policy.logprob_batch_size=4", "policy.train_micro_batch_size=2")

    ended = tiny_run(*rows, "policy.generation.lora_sync=merged", "loss_fn.reference_policy_kl_penalty=0.1")

    assert said_of(ended, phase)[0].startswith(key)


@pytest.mark.parametrize("ahead", [False, True])
def test_sampling_names_its_keys_in_whichever_thread_it_runs(tiny_run, lacking, ahead):
    lacking(InProcessGeneration, "collect")
    more = ("grpo.async_grpo.enabled=true",) if ahead else ()
    lines = said_of(tiny_run("policy.generation.max_concurrent_sequences=16", *more), "sampling")
    assert lines[0] == (
        "policy.generation.max_concurrent_sequences=16: completions that are decoded at once, each with its keys and "
        "values. Lower it."
    )
    assert not [line for line in lines if "train_micro_batch_size" in line or "activation_checkpointing" in line]


def test_validation_names_the_keys_of_a_pass_without_gradient(tiny_sft, lacking):
    lacking(DTensorPolicy, "logprobs")
    ended = tiny_sft("sft.val_at_start=true", BY_ROWS, "sft.val_micro_batch_size=3")
    assert said_of(ended, "validation")[0] == "sft.val_micro_batch_size=3: rows of a pass. Lower it."


def config_of(tiny: TinyRun, *overrides: str):
    arguments = tiny.arguments(*overrides)
    return load_config(None, arguments, tiny.algorithm)


def lines_of(tiny: TinyRun, phase: str, *overrides: str) -> list[str]:
    try:
        with memory.from_phase(phase):
            raise RuntimeError("Worker failed with error 'CUDA out of memory. Tried to allocate 9 GiB'")
    except RuntimeError as error:
        return memory.what_takes_less(error, config_of(tiny, *overrides))[1:]


def test_a_budget_of_tokens_is_named_with_its_least_value(tiny_sft):
    packed = (BY_ROWS, "policy.sequence_packing.enabled=true")
    budget = "policy.sequence_packing.train_mb_tokens=256"
    assert lines_of(tiny_sft, "policy_training", *packed, budget)[0] == (
        "policy.sequence_packing.train_mb_tokens=256: tokens of a pass. Lower it, to 64 at the least."
    )
    least = "policy.sequence_packing.train_mb_tokens=64"
    assert lines_of(tiny_sft, "policy_training", *packed, least)[0] == (
        "policy.max_total_sequence_length=64: a pass holds a sequence of this length. Lower it."
    )


def test_a_budget_that_was_found_is_named_with_where_its_number_stands(tiny_sft):
    assert lines_of(tiny_sft, "policy_training", "policy.dynamic_batching.train_mb_tokens=auto")[0] == (
        "policy.dynamic_batching.train_mb_tokens='auto': tokens of a pass, of which the log says how many were found "
        "at the start. Set it to fewer, to 64 at the least."
    )


def test_what_is_already_as_low_as_it_goes_is_not_named(tiny_run):
    checkpointing = "policy.dtensor_cfg.activation_checkpointing=true"
    assert not [line for line in lines_of(tiny_run, "policy_training", checkpointing) if "activation_check" in line]
    for setting in ("policy.generation.lora_sync=adapter", "policy.generation.lora_refit_mode=native"):
        assert not [line for line in lines_of(tiny_run, "weight_sync", setting) if "policy.generation.lora_" in line]
    (line,) = [
        line
        for line in lines_of(tiny_run, "weight_sync", "policy.generation.lora_refit_mode=merged")
        if "policy.generation.lora_" in line
    ]
    assert line.startswith("policy.generation.lora_refit_mode='merged': ")
    assert line.endswith("Set it to native.")


def test_vllm_and_megatron_are_named_by_their_own_keys(tiny_run):
    vllm = ("policy.generation.backend=vllm", "policy.generation.vllm_cfg.gpu_memory_utilization=0.7")
    (line,) = [line for line in lines_of(tiny_run, "generation", *vllm) if "gpu_memory_utilization" in line]
    assert line.startswith("policy.generation.vllm_cfg.gpu_memory_utilization=0.7: ")
    lora = ("policy.dtensor_cfg.lora_cfg.enabled=false", "policy.dtensor_cfg.lora_cfg.dim=null")
    megatron = ("policy.backend=megatron", "policy.lora={dim: 4}", lora[0])
    lines = lines_of(tiny_run, "policy_training", *megatron)
    assert any(line.startswith("policy.megatron_cfg.activation_checkpointing=False: ") for line in lines)
    assert any(line.startswith("policy.megatron_cfg.tensor_model_parallel_size=1: ") for line in lines)


def test_the_inner_phase_and_the_process_that_lacks_memory_are_named_through_what_comes_of_its_error():
    inner = MemoryError()

    def engine():
        with memory.from_process("the engine's process"):
            raise inner

    def sync():
        try:
            engine()
        except MemoryError as error:
            raise RuntimeError("the engine broke off") from error

    inside = memory.from_phase("generation")
    with pytest.raises(RuntimeError) as raised, memory.from_phase("total_validation_time"), inside:
        sync()
    assert memory.memory_error(raised.value) is inner
    assert vars(inner)["phase"] == "generation"
    assert vars(inner)["peak_memory"].endswith(", in the engine's process")


def test_an_error_of_another_kind_gets_no_advice(tiny_sft):
    error = RuntimeError("shapes do not fit")
    with pytest.raises(RuntimeError), memory.from_phase("policy_training"):
        raise error
    assert memory.what_takes_less(error, config_of(tiny_sft)) == []
    assert not vars(error)
