"""On the same pairs, loss and adapter gradients equal those of TRL 1.16's own DPO trainer, with adapters away from 0.

TRL tokenizes and collates the pairs, pads its rows and repeats the prompt; our side packs the pairs and computes a
prompt once. Each has its own reference: the model with the adapter switched off.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_rl_lora.algorithms.losses.policy import count_denominators
from nemo_rl_lora.algorithms.losses.preference import PreferenceLoss, row_logprobs
from nemo_rl_lora.config.dpo import DpoConfig
from nemo_rl_lora.lora.files import adapter_tensor_name
from nemo_rl_lora.policy.dtensor.policy import DTensorPolicy
from nemo_rl_lora.types import Batch, StepOutput
from tests.policy.dtensor.test_policy import adapters_of, make_policy, spec

BETA = 0.5
PAIRS = [
    {"prompt": "two and five", "chosen": " are seven", "rejected": " are six, no"},
    {"prompt": "a", "chosen": " longer answer than that", "rejected": " b"},
    {"prompt": "one and one", "chosen": " make two!", "rejected": " eleven"},
]
ALL_PAIRS = ((0, 1, 2),)
PAIR_BY_PAIR = ((0,), (1,), (2,))
EQUALLY_LONG = ((0, 2),)  # the pairs whose chosen answers have as many tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """TRL's loss types with their weights, and our settings. TRL's loss is the mean of those of its `batches`."""

    trl: dict[str, float]
    ours: dict[str, Any]
    label_smoothing: float = 0.0
    batches: tuple[tuple[int, ...], ...] = ALL_PAIRS


AVERAGE = {"preference_average_log_probs": True}
CASES = {
    "sigmoid": Case(trl={"sigmoid": 1.0}, ours={}),
    "sigmoid, averaged": Case(trl={"sigmoid_norm": 1.0}, ours=AVERAGE),
    # TRL's sigmoid ignores its label_smoothing; its aot does not, and for a single pair it is the same loss
    "smoothed sigmoid": Case(trl={"aot": 1.0}, ours={}, label_smoothing=0.2, batches=PAIR_BY_PAIR),
    "ipo": Case(trl={"ipo": 1.0}, ours={"loss_type": "ipo"} | AVERAGE),
    "hinge": Case(trl={"hinge": 1.0}, ours={"loss_type": "hinge"}),
    "robust": Case(trl={"robust": 1.0}, ours={"loss_type": "robust"}, label_smoothing=0.2),
    # TRL's sft is a mean over the tokens of a batch, ours over its pairs: the same for answers of one length
    "sigmoid and sft": Case(
        trl={"sigmoid": 0.7, "sft": 0.3},
        ours={"preference_loss_weight": 0.7, "sft_loss_weight": 0.3, "sft_average_log_probs": True},
        batches=EQUALLY_LONG,
    ),
    "sft": Case(
        trl={"sft": 1.0},
        ours={"preference_loss_weight": 0.0, "sft_loss_weight": 1.0, "sft_average_log_probs": True},
        batches=PAIR_BY_PAIR,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rig:
    """TRL's trainer and our policy, with the same adapter."""

    trainer: Any
    policy: DTensorPolicy

    def trl_gradients(self) -> dict[str, Tensor]:
        """By canonical name; cleared afterwards."""
        found = {
            name.replace(".default", ""): parameter.grad.clone()
            for name, parameter in self.trainer.model.named_parameters()
            if parameter.grad is not None
        }
        self.trainer.model.zero_grad(set_to_none=True)
        return found

    def our_adapter(self) -> dict[str, Tensor]:
        """By canonical name."""
        return {
            adapter_tensor_name(name, side): factor.weight
            for name, linear in adapters_of(self.policy)
            for side, factor in (("A", linear.lora_A), ("B", linear.lora_B))
        }


@pytest.fixture(scope="module")
def rig(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Rig:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32),
        args=DPOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")),
            beta=BETA,
            bf16=False,
            use_cpu=True,
            report_to="none",
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=AutoTokenizer.from_pretrained(tiny_llama),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
    )
    policy = make_policy(
        tiny_llama,
        spec=spec(dim=4, alpha=8),
        max_total_sequence_length=128,
        max_grad_norm=None,
        optimizer={"kwargs": {"lr": 0.0, "weight_decay": 0.0}},
        sequence_packing={"enabled": True},
    )
    rig = Rig(trainer=trainer, policy=policy)
    ours, generator = rig.our_adapter(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in rig.trainer.model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
                ours[name.replace(".default", "")].copy_(parameter)
    policy._trained.refresh()
    return rig


def trl_loss(rig: Rig, monkeypatch: pytest.MonkeyPatch, case: Case) -> float:
    """The trainer's loss; its gradient is left in its model."""
    monkeypatch.setattr(rig.trainer, "loss_types", list(case.trl))
    monkeypatch.setattr(rig.trainer, "loss_weights", list(case.trl.values()))
    monkeypatch.setattr(rig.trainer, "label_smoothing", case.label_smoothing)
    total = 0.0
    for pairs in case.batches:
        collated = rig.trainer.data_collator([rig.trainer.train_dataset[i] for i in pairs])
        loss = rig.trainer.compute_loss(rig.trainer.model, rig.trainer._prepare_inputs(collated)) / len(case.batches)
        loss.backward()
        total += loss.item()
    return total


def our_batch(rig: Rig, pairs: list[int]) -> Batch:
    """What TRL tokenized, as rows of ours, with the policy's own reference."""
    rows = [
        (pair["prompt_ids"], pair[f"{side}_ids"])
        for pair in map(rig.trainer.train_dataset.__getitem__, pairs)
        for side in ("chosen", "rejected")
    ]
    sequence_length = torch.tensor([len(prompt) + len(answer) for prompt, answer in rows])
    prompt_length = torch.tensor([len(prompt) for prompt, _ in rows])
    token_ids = torch.zeros(len(rows), int(sequence_length.max()), dtype=torch.int64)
    for i, (prompt, answer) in enumerate(rows):
        token_ids[i, : sequence_length[i]] = torch.tensor(prompt + answer)
    columns = torch.arange(token_ids.shape[1])
    loss_mask = (columns >= prompt_length[:, None]) & (columns < sequence_length[:, None])
    batch = Batch(
        token_ids=token_ids,
        loss_mask=loss_mask,
        sequence_length=sequence_length,
        prompt_length=prompt_length,
        group_index=torch.arange(len(rows)) // 2,
        denominators=count_denominators(loss_mask),
        whole_groups=True,
    )
    return replace(batch, reference_logprobs=row_logprobs(rig.policy.reference_logprobs(batch), loss_mask))


def our_step(rig: Rig, case: Case) -> StepOutput:
    """A step with a learning rate of 0; its gradient is left in the policy."""
    config = DpoConfig(reference_policy_kl_penalty=BETA, label_smoothing=case.label_smoothing, **case.ours)
    batch = our_batch(rig, [i for pairs in case.batches for i in pairs])
    return rig.policy.train_step(batch, PreferenceLoss(config=config))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_loss_and_adapter_gradients_equal_trl(rig: Rig, monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    expected = trl_loss(rig, monkeypatch, case)
    output = our_step(rig, case)
    assert output.loss == pytest.approx(expected, rel=1e-4)
    gradients = rig.trl_gradients()
    ours = rig.our_adapter()
    assert gradients.keys() == ours.keys()
    for name, gradient in gradients.items():
        assert gradient.norm() > 0, name
        found = ours[name].grad
        assert found is not None, name
        assert (found - gradient).norm() <= 1e-4 * gradient.norm(), name


def test_metrics_equal_trl(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["sigmoid"]
    expected = trl_loss(rig, monkeypatch, case)
    rig.trl_gradients()
    metrics = our_step(rig, case).metrics
    theirs = {name: values[-1] for name, values in rig.trainer._metrics["train"].items()}
    assert 0 < theirs["rewards/accuracies"] < 1
    assert abs(theirs["rewards/margins"]) > 0.1
    rounding = 2e-5  # of fp32 in sums of log-probabilities around -100
    assert metrics == {
        "preference_loss": pytest.approx(expected, rel=1e-4),
        "accuracy": pytest.approx(theirs["rewards/accuracies"]),
        "rewards_chosen_mean": pytest.approx(theirs["rewards/chosen"], abs=rounding),
        "rewards_rejected_mean": pytest.approx(theirs["rewards/rejected"], abs=rounding),
        "rewards_margin_mean": pytest.approx(theirs["rewards/margins"], abs=rounding),
    }
