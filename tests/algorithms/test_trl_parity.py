"""On frozen rollouts, loss and adapter gradients equal those of TRL 1.16's own trainer, for each loss type it has.

TRL gets left-padded prompts and its fused head; our side is a plain transformers forward of right-padded rows.
"""

from __future__ import annotations

import copy
import inspect
import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_rl_lora.algorithms.losses.policy import count_denominators, make_policy_loss
from nemo_rl_lora.config.loss_fn import LossFnConfig
from nemo_rl_lora.types import LossInputs

VOCABULARY, MAX_COMPLETION_LENGTH = 40, 7
PROMPTS = ([3, 4, 5], [6, 7, 8, 9, 10])
COMPLETIONS = ([11, 12, 13], [14, 15, 16, 17, 18, 19, 20], [21], [22, 23, 24, 25])
ADVANTAGES = torch.tensor([1.2, -0.8, -1.1, 0.7])

# Trainer attributes, trainer.args attributes, and our configuration, without the KL term.
CASES: dict[str, tuple[dict, dict, dict]] = {
    "grpo": ({"loss_type": "grpo"}, {}, {"token_level_loss": False}),
    "bnpo": ({"loss_type": "bnpo"}, {}, {}),
    "dr_grpo": ({"loss_type": "dr_grpo"}, {}, {"constant_length_normalizer": MAX_COMPLETION_LENGTH}),
    "dapo": ({"loss_type": "dapo"}, {}, {}),
    "cispo": (
        {"loss_type": "cispo", "epsilon_high": 1.05},
        {},
        {"use_cispo": True, "ratio_clip_min": 1.0, "ratio_clip_max": 0.05},
    ),
    "sapo": ({"loss_type": "sapo"}, {}, {"sapo": {}, "token_level_loss": False}),
    "luspo": (
        {"loss_type": "luspo", "importance_sampling_level": "sequence"},
        {},
        {"sequence_level_importance_ratios": True, "constant_length_normalizer": 1},
    ),
    "vespo": ({"loss_type": "vespo"}, {}, {"vespo": {}}),
    "gspo": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
        {},
        {"sequence_level_importance_ratios": True, "token_level_loss": False},
    ),
    "clip higher": (
        {"loss_type": "dapo", "epsilon_low": 0.05, "epsilon_high": 0.3},
        {},
        {"ratio_clip_min": 0.05, "ratio_clip_max": 0.3},
    ),
    "dual clip": ({"loss_type": "grpo"}, {"delta": 1.15}, {"token_level_loss": False, "ratio_clip_c": 1.15}),
    "sapo, own temperatures": (
        {"loss_type": "sapo"},
        {"sapo_temperature_pos": 2.0, "sapo_temperature_neg": 3.0},
        {"sapo": {"temperature_positive": 2.0, "temperature_negative": 3.0}, "token_level_loss": False},
    ),
}
DEFAULTS = {"importance_sampling_level": "token", "epsilon_low": 0.1, "epsilon_high": 0.1, "beta": 0.0}
OUR_DEFAULTS = {
    "ratio_clip_min": 0.1,
    "ratio_clip_max": 0.1,
    "reference_policy_kl_penalty": 0.0,
    "kl_input_clamp_value": None,
    "kl_output_clamp_value": None,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rig:
    """A trainer and a plain copy of its model, with the logprobs of the rollout in both layouts."""

    trainer: Any
    plain: Any
    inputs: dict[str, Tensor]  # TRL's
    token_ids: Tensor  # ours
    loss_mask: Tensor


def tiny_model() -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = get_peft_model(LlamaForCausalLM(config).float(), LoraConfig(r=2, lora_alpha=4, target_modules="all-linear"))
    perturb(model, seed=1)
    return model.train()


def perturb(model: torch.nn.Module, seed: int, scale: float = 0.1) -> None:
    """Move every adapter tensor, B included, the same way for every model it is called on."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            assert "lora_" in name, name
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)


def tiny_tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="<pad>")),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
    )


def padded(rows: list[list[int]], side: str) -> tuple[Tensor, Tensor]:
    length = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(length - len(row), None) if side == "left" else slice(0, len(row))
        ids[i, where], mask[i, where] = torch.tensor(row), 1
    return ids, mask


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Rig:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    model = tiny_model()
    plain = copy.deepcopy(model)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")),
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=MAX_COMPLETION_LENGTH,
            temperature=1.0,
            bf16=False,
            use_cpu=True,
            report_to="none",
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["w3 w4"]}),
        processing_class=tiny_tokenizer(),
    )
    trainer.current_gradient_accumulation_steps = 1
    prompts = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    prompt_ids, prompt_mask = padded(prompts, "left")
    completion_ids, completion_mask = padded(list(COMPLETIONS), "right")
    inputs = {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "advantages": ADVANTAGES,
        "num_items_in_batch": completion_mask.sum(),
    }
    token_ids, _ = padded([p + c for p, c in zip(prompts, COMPLETIONS, strict=True)], "right")
    loss_mask = torch.zeros_like(token_ids, dtype=torch.bool)
    for i, (prompt, completion) in enumerate(zip(prompts, COMPLETIONS, strict=True)):
        loss_mask[i, len(prompt) : len(prompt) + len(completion)] = True
    return Rig(trainer=trainer, plain=plain, inputs=inputs, token_ids=token_ids, loss_mask=loss_mask)


def plain_logprobs(rig: Rig) -> Tensor:
    """[B, T] of the plain model, at each token's own position."""
    length = rig.loss_mask.shape[1] - rig.loss_mask.flip(1).int().argmax(dim=1)
    attention_mask = (torch.arange(rig.token_ids.shape[1]) < length[:, None]).long()
    logits = rig.plain(input_ids=rig.token_ids, attention_mask=attention_mask).logits[:, :-1]
    logprobs = logits.log_softmax(-1).gather(2, rig.token_ids[:, 1:, None]).squeeze(2)
    return torch.cat([torch.zeros(len(logprobs), 1), logprobs], dim=1)


def as_completions(rig: Rig, values: Tensor) -> Tensor:
    """[B, T] at our positions to TRL's [B, C]."""
    result = torch.zeros(rig.inputs["completion_ids"].shape)
    result[rig.inputs["completion_mask"].bool()] = values[rig.loss_mask]
    return result


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    assert len(found) == 2 * 2 * 7, sorted(found)
    return found


def trl_loss(rig: Rig, monkeypatch, attributes: dict, args: dict, extra: dict[str, Tensor]):
    for name, value in (DEFAULTS | attributes).items():
        monkeypatch.setattr(rig.trainer, name, value)
    for name, value in args.items():
        monkeypatch.setattr(rig.trainer.args, name, value)
    loss = rig.trainer._compute_loss(rig.trainer.model, rig.inputs | extra)
    loss.backward()
    return loss.item(), gradients(rig.trainer.model)


def our_loss(rig: Rig, settings: dict, **logprobs: Tensor | None):
    logprobs_now = plain_logprobs(rig)
    outside = ~rig.loss_mask
    old = logprobs.get("old")
    reference, generation = logprobs.get("reference"), logprobs.get("generation")
    inputs = LossInputs(
        logprobs=logprobs_now.masked_fill(outside, 0.0),
        old_logprobs=logprobs_now.detach() if old is None else old,
        reference_logprobs=reference,
        generation_logprobs=generation,
        advantages=ADVANTAGES,
        loss_mask=rig.loss_mask,
        sequence_length=rig.loss_mask.sum(1),
        group_index=torch.tensor([0, 0, 1, 1]),
        denominators=count_denominators(rig.loss_mask),
    )
    loss, metrics = make_policy_loss(LossFnConfig(**(OUR_DEFAULTS | settings)))(inputs)
    loss.backward()
    return loss.item(), gradients(rig.plain), metrics


def assert_equal(ours: tuple[float, dict[str, Tensor]], trl: tuple[float, dict[str, Tensor]]) -> None:
    assert ours[0] == pytest.approx(trl[0], rel=1e-4, abs=1e-6)
    assert ours[1].keys() == trl[1].keys()
    for name, gradient in trl[1].items():
        assert gradient.norm() > 0, name
        error = (ours[1][name] - gradient).norm() / gradient.norm()
        assert error < 1e-4, (name, error)


def moved(rig: Rig, scale: float) -> None:
    for model in (rig.trainer.model, rig.plain):
        perturb(model, seed=2, scale=scale)


@pytest.fixture
def second_step(rig: Rig):
    """The rollout's logprobs, with both models one optimizer step further."""
    old = plain_logprobs(rig).detach()
    moved(rig, 0.03)
    yield old
    moved(rig, -0.03)


def test_every_loss_type_of_trl_has_a_case(rig: Rig) -> None:
    source = inspect.getsource(type(rig.trainer)._compute_loss)
    branches = re.findall(r"self\.loss_type (?:==|in) (.*?):\n", source)
    types = {name for branch in branches for name in re.findall(r'"(\w+)"', branch)}
    assert len(types) == 8
    assert types <= CASES.keys()


@pytest.mark.parametrize("case", CASES)
def test_the_first_optimizer_step_equals_trl(rig: Rig, monkeypatch, case: str) -> None:
    attributes, args, settings = CASES[case]
    trl = trl_loss(rig, monkeypatch, attributes, args, {})
    assert_equal(our_loss(rig, settings)[:2], trl)


@pytest.mark.parametrize("case", CASES)
def test_a_second_optimizer_step_with_moved_ratios_equals_trl(
    rig: Rig, monkeypatch, second_step: Tensor, case: str
) -> None:
    attributes, args, settings = CASES[case]
    extra = {"old_per_token_logps": as_completions(rig, second_step)}
    trl = trl_loss(rig, monkeypatch, attributes, args, extra)
    loss, found, metrics = our_loss(rig, settings, old=second_step)
    assert metrics["probs_ratio_max"] > 1.05
    if case in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "gspo", "luspo", "clip higher"):
        assert metrics["clip_fraction"] > 0
    if case == "dual clip":
        assert loss < our_loss(rig, settings | {"ratio_clip_c": None}, old=second_step)[0] - 1e-3
    assert_equal((loss, found), trl)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("case", ["grpo", "dr_grpo", "dapo", "cispo", "sapo", "gspo", "luspo", "vespo"])
def test_the_kl_term_equals_trl(rig: Rig, monkeypatch, second_step: Tensor, case: str, unbiased: bool) -> None:
    attributes, args, settings = CASES[case]
    with rig.plain.disable_adapter():
        reference = plain_logprobs(rig).detach()
    extra = {
        "old_per_token_logps": as_completions(rig, second_step),
        "ref_per_token_logps": as_completions(rig, reference),
    }
    args = args | {"use_bias_correction_kl": unbiased}
    trl = trl_loss(rig, monkeypatch, attributes | {"beta": 0.4}, args, extra)
    form = {"use_unbiased_kl_estimate": True} if unbiased else {"kl_gradient": "paper"}
    settings = settings | {"reference_policy_kl_penalty": 0.4, **form}
    assert_equal(our_loss(rig, settings, old=second_step, reference=reference)[:2], trl)


@pytest.mark.parametrize("case", ["grpo", "dapo", "cispo"])
def test_truncated_importance_sampling_equals_trl(rig: Rig, monkeypatch, second_step: Tensor, case: str) -> None:
    attributes, args, settings = CASES[case]
    generation = second_step + 0.3 * torch.randn(second_step.shape, generator=torch.Generator().manual_seed(3))
    weights = (second_step - generation).exp().clamp(max=1.1)
    extra = {
        "old_per_token_logps": as_completions(rig, second_step),
        "importance_sampling_ratio": as_completions(rig, weights),
    }
    attributes = attributes | {"use_vllm": True, "vllm_importance_sampling_correction": True}
    trl = trl_loss(rig, monkeypatch, attributes, args, extra)
    settings = settings | {
        "use_importance_sampling_correction": True,
        "truncated_importance_sampling_type": "tis",
        "truncated_importance_sampling_ratio": 1.1,
    }
    loss, found, metrics = our_loss(rig, settings, old=second_step, generation=generation)
    assert metrics["is_oob_ratio"] > 0
    assert_equal((loss, found), trl)
