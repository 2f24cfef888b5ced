"""The DPO driver from its command line to its files, on a tiny random model."""

import json
import math

import pytest
from safetensors.torch import load_file

from nemo_rl_lora.algorithms.dpo import REFERENCE_FILE, accuracies
from nemo_rl_lora.policy.dtensor.policy import DTensorPolicy
from nemo_rl_lora.types import PreferencePair
from tests.driver import adapter, same, without_seconds

TRAIN_METRICS = [
    "loss",
    "preference_loss",
    "accuracy",
    "rewards_chosen_mean",
    "rewards_rejected_mean",
    "rewards_margin_mean",
    "num_valid_samples",
    "grad_norm",
    "lr",
    "global_valid_toks",
    "total_num_tokens",
    "tokens_per_second_per_gpu",
    "model_tflops_per_second_per_gpu",
    "timing/policy_and_reference_logprobs",
    "timing/policy_training",
]


@pytest.fixture
def reference_passes(monkeypatch):
    """The number of rows of every reference pass."""
    rows: list[int] = []
    original = DTensorPolicy.reference_logprobs

    def counted(self, batch):
        rows.append(len(batch.token_ids))
        return original(self, batch)

    monkeypatch.setattr(DTensorPolicy, "reference_logprobs", counted)
    return rows


def test_a_run_starts_at_log_2_and_learns_to_prefer(tiny_dpo):
    ended = tiny_dpo(
        "dpo.max_num_epochs=20",
        "dpo.max_num_steps=20",
        "dpo.val_at_start=true",
        "dpo.val_at_end=true",
        "policy.optimizer.kwargs.lr=0.01",
    )

    assert ended.code == 0, ended.err
    lines = tiny_dpo.metrics()
    assert all(set(TRAIN_METRICS) <= line.keys() for line in lines)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)  # the policy is the reference
    start, end = tiny_dpo.metrics("validation")
    assert (start["loss"], start["accuracy"]) == (pytest.approx(math.log(2), abs=1e-6), 0.5)
    assert end["accuracy"] == 1
    assert end["loss"] < 0.3
    assert end["validation-default_loss"] == end["loss"]


def test_reference_logprobs_are_computed_once_per_pair(tiny_dpo, reference_passes):
    ended = tiny_dpo("dpo.max_num_epochs=3", "dpo.max_num_steps=9", "dpo.val_period=3")  # 3 steps an epoch

    assert ended.code == 0, ended.err
    assert reference_passes == [8, 8, 8]  # rows, of 4 pairs; validation has the same pairs


def test_a_resumed_run_is_the_run_that_was_interrupted_and_asks_the_reference_nothing_again(
    tiny_dpo, tmp_path, reference_passes
):
    settings = [
        "dpo.max_num_epochs=5",
        "dpo.val_period=2",
        "policy.dtensor_cfg.lora_cfg.dropout=0.3",
        "policy.optimizer.kwargs.lr=0.01",
    ]
    whole = tiny_dpo(*settings, "dpo.max_num_steps=6", f"checkpointing.checkpoint_dir={tmp_path}/whole")
    assert whole.code == 0, whole.err
    assert tiny_dpo(*settings, "dpo.max_num_steps=4").code == 0
    num_before = len(reference_passes)
    assert tiny_dpo(*settings, "dpo.max_num_steps=6").code == 0

    assert len(reference_passes) == num_before
    steps = tmp_path / "whole" / "step_6", tiny_dpo.checkpoints / "step_6"
    assert same(*(adapter(step) for step in steps))
    assert same(*(load_file(step / REFERENCE_FILE) for step in steps))
    resumed = tiny_dpo.metrics(experiment=3)
    assert [line["step"] for line in resumed] == [5, 6]
    assert without_seconds(tiny_dpo.metrics()[4:]) == without_seconds(resumed)


def test_the_reference_of_a_resumed_run_is_the_base_and_not_the_checkpoint(tiny_dpo):
    """What is kept must be the base model's: at lr 0 the loss stays at log 2 only if it is."""
    assert tiny_dpo("policy.optimizer.kwargs.lr=0.01", "dpo.max_num_steps=1", "data.shuffle=false").code == 0
    moved = tiny_dpo("policy.optimizer.kwargs.lr=0.01", "dpo.max_num_steps=2", "data.shuffle=false")

    assert moved.code == 0, moved.err
    (line,) = tiny_dpo.metrics(experiment=2)
    assert abs(line["loss"] - math.log(2)) > 1e-4  # pairs that are new to the run: policy and reference differ


def test_with_the_sft_term_alone_no_reference_is_computed(tiny_dpo, reference_passes):
    ended = tiny_dpo("dpo.preference_loss_weight=0", "dpo.sft_loss_weight=1")

    assert ended.code == 0, ended.err
    assert reference_passes == []
    assert all(line["loss"] == line["sft_loss"] for line in tiny_dpo.metrics())


def test_full_fine_tuning_keeps_its_reference(tiny_dpo):
    ended = tiny_dpo(
        "policy.dtensor_cfg.lora_cfg.enabled=false",
        "policy.optimizer.full_finetuning_lr=0.01",
        "dpo.val_at_end=true",
        "data.shuffle=false",
    )

    assert ended.code == 0, ended.err
    first, second = tiny_dpo.metrics()
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(second["loss"] - math.log(2)) > 1e-4


def test_counters_say_how_many_tokens_came_from_each_source(tiny_dpo):
    assert tiny_dpo().code == 0
    counters = json.loads((tiny_dpo.checkpoints / "step_2" / "training_info.json").read_text())["counters"]
    assert counters["num_pairs"] == 8
    assert counters["num_tokens/BinaryPreferenceDataset"] == counters["num_tokens"] > 0


def pair(cluster: str, source: str = "a") -> PreferencePair:
    return PreferencePair(index=0, prompt_ids=(1,), chosen_ids=(2,), rejected_ids=(3,), source=source, cluster=cluster)


def test_the_interval_of_accuracy_counts_a_question_once():
    """20 questions with one pair each, and the same answers given three times over: the interval stays as wide."""
    single = [(pair(str(i)), 1.0 if i % 4 else 0.0) for i in range(20)]
    found, tripled = accuracies(single), accuracies(single * 3)
    expected = 1.96 * math.sqrt(0.75 * 0.25 / 20)
    assert found["accuracy"] == 0.75
    assert found["accuracy_high"] - 0.75 == pytest.approx(expected)
    assert tripled == pytest.approx(found)


def test_accuracy_is_given_by_source_where_there_are_several():
    found = accuracies([(pair("1", "x"), 1.0), (pair("2", "y"), 0.0), (pair("3", "y"), 1.0)])
    assert (found["accuracy/x"], found["accuracy/y"]) == (1.0, 0.5)
    assert "accuracy/a" not in accuracies([(pair("1"), 1.0)])
