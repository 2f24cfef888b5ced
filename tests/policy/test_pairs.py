"""SFT rows and DPO pairs train the same in every layout, with adapters whose B is not zero."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nemo_rl_lora.algorithms.losses.likelihood import SftLoss
from nemo_rl_lora.algorithms.losses.policy import count_denominators
from nemo_rl_lora.algorithms.losses.preference import PreferenceLoss, row_logprobs
from nemo_rl_lora.config.dpo import DpoConfig
from nemo_rl_lora.policy.dtensor.policy import DTensorPolicy
from nemo_rl_lora.policy.microbatches import MicrobatchPlan
from nemo_rl_lora.types import Batch, LossFn, StepOutput
from tests.policy.batches import microbatches_of
from tests.policy.dtensor.test_policy import adapters_of, make_policy, randomise_b, relative, spec
from tests.tiny_models import VOCABULARY

PROMPTS = [9, 14, 5, 20]
ANSWERS = [(11, 7), (6, 25), (17, 3), (16, 22)]  # tokens of the chosen and the rejected one
SHARED_TOKENS = sum(PROMPTS) + sum(map(sum, ANSWERS))
LONGEST_PAIR = 20 + 16 + 22
ALONE = {"train_micro_batch_size": 1, "shared_prefix": {"enabled": False}}
ROUND_TO = 8
LAYOUTS = {
    "rows": {"train_micro_batch_size": 3},
    "sorted": {"dynamic_batching": {"enabled": True, "train_mb_tokens": 100, "sequence_length_round": ROUND_TO}},
    "packed": {"sequence_packing": {"enabled": True, "train_mb_tokens": 100, "sequence_length_round": ROUND_TO}},
}


def make_batch(lengths: list[tuple[int, int]], groups: list[int], gap: int = 0) -> Batch:
    """Random rows of (prompt, answer) tokens; rows of a group have one prompt. Every `gap`-th answer token is no
    loss token, as in a chat of several turns."""
    generator = torch.Generator().manual_seed(5)
    prompt_length = torch.tensor([prompt for prompt, _ in lengths])
    sequence_length = torch.tensor([sum(row) for row in lengths])
    group_index = torch.tensor(groups)
    token_ids = torch.randint(0, VOCABULARY, (len(lengths), int(sequence_length.max())), generator=generator)
    columns = torch.arange(token_ids.shape[1])
    in_prompt = columns < prompt_length[:, None]
    first_of_group = torch.tensor([groups.index(group) for group in groups])
    loss_mask = ~in_prompt & (columns < sequence_length[:, None])
    if gap:
        loss_mask &= columns % gap != 0
    return Batch(
        token_ids=torch.where(in_prompt, token_ids[first_of_group], token_ids),
        loss_mask=loss_mask,
        sequence_length=sequence_length,
        prompt_length=prompt_length,
        group_index=group_index,
        denominators=count_denominators(loss_mask),
    )


@pytest.fixture
def chats() -> Batch:
    return make_chats()


@pytest.fixture
def pairs() -> Batch:
    return make_pairs()


def make_chats() -> Batch:
    lengths = [*zip(PROMPTS, (first for first, _ in ANSWERS), strict=True), (2, 31), (8, 4)]
    return make_batch(lengths, groups=list(range(6)), gap=3)


def make_pairs() -> Batch:
    lengths = [(prompt, answer) for prompt, answers in zip(PROMPTS, ANSWERS, strict=True) for answer in answers]
    return replace(make_batch(lengths, groups=[3, 3, 7, 7, 1, 1, 4, 4]), whole_groups=True)


def step(path, batch: Batch, loss_fn: LossFn, **settings) -> tuple[StepOutput, dict[str, torch.Tensor]]:
    """A step of a new policy, always the same one, and its adapter gradients."""
    policy: DTensorPolicy = make_policy(path, spec=spec(), max_grad_norm=None, **settings)
    randomise_b(policy)
    if batch.whole_groups:
        reference = row_logprobs(policy.reference_logprobs(batch), batch.loss_mask)
        batch = replace(batch, reference_logprobs=reference)
    output = policy.train_step(batch, loss_fn)
    gradients = {}
    for name, linear in adapters_of(policy):
        gradients |= {f"{name}.A": linear.lora_A.weight.grad, f"{name}.B": linear.lora_B.weight.grad}
    return output, gradients


def assert_same_step(actual, expected) -> None:
    """1e-5 is fp32 rounding through three layers and a sum of rows in another order."""
    (output, gradients), (other, others) = actual, expected
    assert output.loss == pytest.approx(other.loss, rel=1e-5)
    assert output.metrics == pytest.approx(other.metrics, rel=1e-4, abs=1e-6)
    for name, gradient in others.items():
        assert gradient.norm() > 0, name
        assert relative(gradients[name], gradient) <= 1e-5, name


def preference_loss() -> PreferenceLoss:
    return PreferenceLoss(config=DpoConfig(reference_policy_kl_penalty=0.5, sft_loss_weight=0.2))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_sft_rows_that_share_a_microbatch_train_as_if_alone(tiny_model, chats, layout):
    alone = step(tiny_model("llama"), chats, SftLoss(), **ALONE)
    together = step(tiny_model("llama"), chats, SftLoss(), **layout)
    assert_same_step(together, alone)
    num_tokens = together[0].num_forward_tokens - together[0].num_padding_tokens
    assert num_tokens == alone[0].num_forward_tokens == int(chats.sequence_length.sum())


@pytest.mark.parametrize("family", ["llama", "mistral-window"])
@pytest.mark.parametrize("share", ["auto", False])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_pairs_train_as_if_alone_with_their_prompt_repeated(tiny_model, pairs, layout, share, family):
    if family == "mistral-window":
        layout = {key: value for key, value in layout.items() if key != "sequence_packing"}
    alone = step(tiny_model(family), pairs, preference_loss(), **ALONE)
    together = step(tiny_model(family), pairs, preference_loss(), **layout, shared_prefix={"enabled": share})
    assert_same_step(together, alone)
    num_tokens = together[0].num_forward_tokens - together[0].num_padding_tokens
    assert alone[0].num_forward_tokens == int(pairs.sequence_length.sum())
    is_shared = share == "auto" and family == "llama"
    assert num_tokens == (SHARED_TOKENS if is_shared else alone[0].num_forward_tokens)


def test_prompt_of_a_pair_is_computed_once(tiny_model, pairs):
    output, _ = step(tiny_model("llama"), pairs, preference_loss())
    assert output.num_forward_tokens == SHARED_TOKENS
    assert output.num_padding_tokens == 0


@pytest.mark.parametrize("layout", ["sorted", "packed"])
@pytest.mark.parametrize(("max_row_tokens", "is_shared"), [(LONGEST_PAIR, True), (LONGEST_PAIR - 1, False)])
def test_pair_over_the_token_budget_still_trains_whole(tiny_model, pairs, layout, max_row_tokens, is_shared):
    settings = {
        key: value | {"train_mb_tokens": 44, "sequence_length_round": 1} for key, value in LAYOUTS[layout].items()
    }
    alone = step(tiny_model("llama"), pairs, preference_loss(), **ALONE, max_total_sequence_length=44)
    shared_prefix = {"enabled": "auto", "max_row_tokens": max_row_tokens}
    over = step(
        tiny_model("llama"),
        pairs,
        preference_loss(),
        **settings,
        shared_prefix=shared_prefix,
        max_total_sequence_length=44,
    )
    assert_same_step(over, alone)
    assert over[0].num_forward_tokens == SHARED_TOKENS + (0 if is_shared else 20)


def plan(fill, max_rows: int, max_tokens: int, *, share: bool) -> MicrobatchPlan:
    return MicrobatchPlan(
        fill=fill, max_rows=max_rows, max_tokens=max_tokens, share_prefix=share, max_shared_tokens=10**6
    )


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("max_tokens", [44, 60, 100, 10**6])
@pytest.mark.parametrize("fill", ["rows", "sorted", "packed"])
def test_every_fill_keeps_pairs_whole_and_in_order(pairs, fill, max_tokens, share):
    microbatches = microbatches_of(pairs, plan(fill, 3, max_tokens, share=share))
    rows = [micro.rows.tolist() for micro in microbatches]
    assert all(
        first % 2 == 0 and second == first + 1
        for row in rows
        for first, second in zip(row[::2], row[1::2], strict=True)
    )
    assert sorted(sum(rows, [])) == list(range(8))
    for micro in microbatches:
        if len(micro.rows) > 2 and fill != "rows":
            assert micro.num_tokens <= max_tokens


def test_budget_of_rows_counts_pairs(pairs):
    microbatches = microbatches_of(pairs, plan("rows", 3, 1, share=True))
    assert [len(micro.rows) for micro in microbatches] == [6, 2]


@pytest.mark.parametrize(("share", "expected"), [(False, [3, 3, 2]), (True, [2, 2, 2, 2])])
def test_budget_of_rows_counts_rows_where_groups_may_be_cut(pairs, share, expected):
    microbatches = microbatches_of(replace(pairs, whole_groups=False), plan("rows", 3, 1, share=share))
    assert [len(micro.rows) for micro in microbatches] == expected
