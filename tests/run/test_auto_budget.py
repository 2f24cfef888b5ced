"""`train_mb_tokens: auto` in runs of the drivers: found at the start, recorded, taken again by a run that goes on."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from nemo_rl_lora.policy import device_memory, trained
from nemo_rl_lora.policy.token_budget import LongestRowTooLongError
from tests.driver import TinyRun, adapter, run_driver, same, without_seconds

AUTO = "policy.dynamic_batching.train_mb_tokens=auto"
LEARNING = ("policy.optimizer.kwargs.lr=0.02", "policy.dtensor_cfg.lora_cfg.dropout=0.1")
EVERY_STEP = ("checkpointing.save_period=1", "checkpointing.metric_name=null", "checkpointing.keep_top_k=null")
# Memory with which the budget is between the longest row (or pair) and all rows of a step, and those two.
MEMORY = {"sft": (4 * 2**20, 64, 256), "dpo": (8 * 2**20, 128, 512), "grpo": (7 * 2**20, 128, 640)}


@pytest.fixture(params=MEMORY)
def tiny(request, tiny_llama, tmp_path):
    return TinyRun(root=tmp_path, model=tiny_llama, algorithm=request.param)


@pytest.fixture
def little_memory(monkeypatch):
    """Only a machine with as much as this call says, in bytes."""

    def limit(num_bytes: int) -> None:
        monkeypatch.setattr(device_memory, "free_bytes", lambda _: num_bytes)

    limit(MEMORY["sft"][0])
    return limit


def record(tiny: TinyRun, step: int) -> Any:
    return json.loads((tiny.checkpoints / f"step_{step}" / "training_info.json").read_text())["train_mb_tokens"]


def said(ended) -> str:
    """What the log says of the budget."""
    assert ended.code == 0, ended.err
    return " ".join(line for line in (ended.out + ended.err).splitlines() if "train_mb_tokens=auto" in line)


def test_what_is_found_is_said_recorded_and_trained_with(tiny, little_memory, tmp_path):
    """The run is the one that was given the budget, bit for bit, with dropout and a rate that moves A and B."""
    num_bytes, longest, most = MEMORY[tiny.algorithm]
    little_memory(num_bytes)
    ended = tiny(AUTO, *LEARNING)
    found = record(tiny, 2)
    assert longest < found["tokens"] < most
    assert (found["processes"], found["backend"], found["activation_checkpointing"]) == (1, "dtensor", False)
    text = rf"{AUTO}: {found['tokens']} tokens, by 3 trial\(s\) of the longest rows on CPU with \d+ GiB: \d+ tokens"
    assert re.search(text, said(ended)), said(ended)
    given = TinyRun(root=tmp_path / "given", model=tiny.model, algorithm=tiny.algorithm)
    given.root.mkdir()
    assert given(f"policy.dynamic_batching.train_mb_tokens={found['tokens']}", *LEARNING).code == 0
    assert same(*(adapter(run.checkpoints / "step_2") for run in (tiny, given)))
    assert without_seconds(tiny.metrics()) == without_seconds(given.metrics())
    assert record(given, 2) is None


def test_a_run_that_goes_on_takes_what_was_found_and_is_the_uninterrupted_run(tiny, little_memory, tmp_path):
    whole = TinyRun(root=tmp_path / "whole", model=tiny.model, algorithm=tiny.algorithm)
    whole.root.mkdir()
    loop = tiny.algorithm
    little_memory(MEMORY[loop][0])
    settings = (AUTO, *LEARNING, *EVERY_STEP, f"{loop}.max_num_epochs=9")
    assert whole(*settings, f"{loop}.max_num_steps=3").code == 0
    assert tiny(*settings, f"{loop}.max_num_steps=1").code == 0
    found = record(tiny, 1)
    assert found == record(whole, 3)
    little_memory(2**34)  # a search would find more
    ended = tiny(*settings, f"{loop}.max_num_steps=3")
    assert said(ended).endswith(f"{AUTO}: {found['tokens']} tokens, as found when the run began")
    assert record(tiny, 3) == found
    assert same(*(adapter(run.checkpoints / "step_3") for run in (tiny, whole)))
    assert without_seconds(tiny.metrics(experiment=2)) == without_seconds(whole.metrics())[1:]


def test_on_another_device_it_is_searched_for_again(tiny_sft, little_memory, monkeypatch):
    settings = (AUTO, *EVERY_STEP, "sft.max_num_epochs=9")
    assert tiny_sft(*settings, "sft.max_num_steps=1").code == 0
    before = record(tiny_sft, 1)
    little_memory(2**34)
    monkeypatch.setattr(device_memory, "describe", lambda _: "CPU with 7 GiB")
    ended = tiny_sft(*settings, "sft.max_num_steps=2")
    assert f"{AUTO}: searched for again, since device was '{before['device']}' and is 'CPU with 7 GiB'" in said(ended)
    assert f"{AUTO}: 256 tokens, by 3 trial(s) of the longest rows on CPU with 7 GiB: all rows of a" in said(ended)
    assert record(tiny_sft, 2) == {**before, "tokens": 256, "device": "CPU with 7 GiB"}
    ended = tiny_sft(*settings, "sft.max_num_steps=3", "policy.dtensor_cfg.activation_checkpointing=true")
    assert "since activation_checkpointing was False and is True" in said(ended)
    ended = tiny_sft(*settings, "sft.max_num_steps=4", "policy.dynamic_batching.train_mb_tokens=64")
    assert said(ended) == ""
    assert record(tiny_sft, 4) is None


SUMS = "{dataset_name: generated_sums, num_rows: 2, env_name: last_number}"
EVALUATED = f"evaluate=[{{name: sums, every: 9, at_end: false, data: {SUMS}}}]"


def test_where_an_engine_comes_to_keep_more_it_is_searched_for_again(tiny_sft, little_memory):
    settings = (AUTO, *EVERY_STEP, "sft.max_num_epochs=9")
    assert tiny_sft(*settings, "sft.max_num_steps=1").code == 0
    alone = record(tiny_sft, 1)
    assert (alone["engine"], alone["kept_bytes"]) == (None, 0)

    ended = tiny_sft(*settings, "sft.max_num_steps=2", EVALUATED)

    found = record(tiny_sft, 2)
    assert found["engine"] == "in_process"
    assert found["kept_bytes"] > 0
    assert f"since engine was None and is 'in_process', kept_bytes was 0 and is {found['kept_bytes']}" in said(ended)
    assert f"{AUTO}: {found['tokens']} tokens, by 3 trial(s)" in said(ended)
    assert found["tokens"] <= alone["tokens"]
    little_memory(2**34)  # a search would find more
    for steps, more in ((3, (EVALUATED, "policy.generation.lora_sync=adapter")), (4, ())):  # keeps less, and is gone
        ended = tiny_sft(*settings, f"sft.max_num_steps={steps}", *more)
        assert said(ended).endswith(f"{AUTO}: {found['tokens']} tokens, as found when the run began")
        assert record(tiny_sft, steps) == found


def test_packed_rows_and_the_other_backend_have_it_too(tiny_sft, little_memory):
    packed = ("policy.dynamic_batching.enabled=false", "policy.sequence_packing.enabled=true")
    adapted = ("policy.backend=megatron", "policy.megatron_cfg.peft.enabled=true", "policy.megatron_cfg.peft.dim=4")
    arguments = [a for a in tiny_sft.arguments() if "lora_cfg" not in a]
    key = "policy.sequence_packing.train_mb_tokens=auto"
    ended = run_driver(*arguments, *packed, *adapted, key, algorithm="sft")
    assert ended.code == 0, ended.err
    found = record(tiny_sft, 2)
    assert found["backend"] == "megatron"
    assert f"{key}: {found['tokens']} tokens, by 3 trial(s) of the longest rows on CPU with" in ended.out + ended.err


def test_the_plan_says_that_it_is_searched_for(tiny_sft):
    ended = tiny_sft(AUTO, "--plan")
    assert ended.code == 0, ended.err
    text = " ".join(ended.out.split())
    assert (
        f"{AUTO}: searched for at the start, once the weights are there, or as the checkpoint has it (what two small "
        "attempts on the longest rows take of the free memory)"
    ) in text
    assert "searched for" not in tiny_sft("--plan").out


def test_a_row_that_does_not_fit_ends_the_start(tiny_sft, monkeypatch):
    def nothing_fits(*_, **__):
        raise LongestRowTooLongError(64)

    monkeypatch.setattr(trained, "find_tokens", nothing_fits)
    ended = tiny_sft(AUTO)
    assert ended.code == 2
    assert "policy.dynamic_batching.train_mb_tokens='auto': a microbatch of the longest row, 64 tokens, does not" in (
        ended.err
    )
    assert "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("override", "text"),
    [
        (
            "policy.dynamic_batching.train_mb_tokens=most",
            "policy.dynamic_batching.train_mb_tokens='most': must be a whole number or one of 'auto'. Correct",
        ),
        (
            "policy.dynamic_batching.train_mb_tokens=0",
            "policy.dynamic_batching.train_mb_tokens=0: must be at least 1 or one of 'auto'. Correct the value",
        ),
        (
            "policy.dynamic_batching.logprob_mb_tokens=auto",
            "policy.dynamic_batching.logprob_mb_tokens='auto': must be a whole number. Correct the value",
        ),
        (
            "policy.sequence_packing.train_mb_tokens=true",
            "policy.sequence_packing.train_mb_tokens=True: must be a whole number or one of 'auto'. Correct the value",
        ),
    ],
)
def test_other_values_are_refused_by_name(tiny_sft, override, text):
    ended = tiny_sft(override)
    assert ended.code == 2
    assert text in " ".join(ended.err.split())
