"""The FLOP of a step, judged by torch's counter over the real forward and backward passes of both backends.

The counter sees every matrix product that runs. What it has more or less than the model's arithmetic is known to the
product, and listed in `besides`; with that the two are equal, so there is no tolerance.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, addmm_flop, baddbmm_flop
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from nemo_rl_lora.algorithms.losses.policy import make_policy_loss
from nemo_rl_lora.config.loss_fn import LossFnConfig
from nemo_rl_lora.distributed.ranks import Ranks
from nemo_rl_lora.models.flops import FlopRates, flop_rates
from nemo_rl_lora.policy.attention import plan_padded
from nemo_rl_lora.policy.dtensor.policy import DTensorPolicy
from nemo_rl_lora.policy.step import peak_gpu_gib
from tests.policy.batches import microbatches_of
from tests.policy.dtensor.test_policy import make_policy, spec
from tests.policy.megatron.twins import BOTH
from tests.policy.test_pairs import make_batch, plan
from tests.rank_processes import run_ranks
from tests.tiny_models import VOCABULARY, save_random_model

GRPO = make_policy_loss(LossFnConfig(reference_policy_kl_penalty=0.0))


def in_place(formula):
    """Of an operation that the counter does not know, since it writes over its first operand."""
    return lambda *shapes, out_shape=None, **_: formula(*shapes[:3])


def attention_flop(query, key, *_, out_shape=None, **__):
    """Scores and the sum of values; of a query's head, whose key may serve several."""
    rows, heads, length, size = query
    return 2 * 2 * rows * heads * length * key[2] * size


UNCOUNTED = {
    torch.ops.aten.addmm_: in_place(addmm_flop),
    torch.ops.aten.baddbmm_: in_place(baddbmm_flop),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flop,
}
SPECS = {
    "LoRA": spec(),
    "LoRA of some modules": spec(targets=("k_proj", "o_proj", "up_proj"), rank_pattern={"o_proj": 2}),
    "shared A": spec(targets=("linear_qkv", "linear_fc1", "linear_proj"), fused="shared"),
    "all weights": None,
}
LAYOUTS = {
    "packed, shared prompts": {
        "sequence_packing": {"enabled": True, "train_mb_tokens": 100, "sequence_length_round": 16}
    },
    "rows alone": {"train_micro_batch_size": 1, "shared_prefix": {"enabled": False}},
}
CASES = [
    (backend, family, trained)
    for backend in BOTH
    for family, names in {"llama": list(SPECS), "qwen3": ["LoRA"], "experts": ["LoRA", "all weights"]}.items()
    for trained in names
    if (backend, trained) != ("dtensor", "shared A")
]
REAL_TOKENS = {"packed, shared prompts": (11 + 22 + 0 + 26 + 8 + 1 + 19) + 9 + 14, "rows alone": 170}


@pytest.fixture(scope="module")
def model_of(tiny_model, tmp_path_factory):
    """A family's directory; `experts` has a dense layer between two of experts."""
    config = Qwen3MoeConfig(
        hidden_size=48,
        intermediate_size=80,
        moe_intermediate_size=32,
        num_experts=6,
        num_experts_per_tok=2,
        mlp_only_layers=[1],
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=VOCABULARY,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    experts = save_random_model(config, tmp_path_factory.mktemp("experts"))
    return lambda family: experts if family == "experts" else tiny_model(family)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("backend", "family", "trained"), CASES)
def test_the_flop_of_a_step_are_those_that_torch_counts(model_of, groups_batch, backend, family, trained, layout):
    chosen = SPECS[trained]
    policy = make_policy(model_of(family), backend=BOTH[backend], spec=chosen, **LAYOUTS[layout])
    if family == "experts" and isinstance(policy, DTensorPolicy):
        policy._model.set_experts_implementation("eager")  # the counter does not know grouped products
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        output = policy.train_step(groups_batch, GRPO)
    model = AutoModelForCausalLM.from_pretrained(model_of(family))
    rates = flop_rates(
        model,
        None if chosen is None else policy.adapted,
        shared_a=chosen is not None and chosen.fused == "shared",
    )
    assert output.num_forward_tokens - output.num_padding_tokens == REAL_TOKENS[layout]
    assert (output.num_padding_tokens > 0) is (layout != "rows alone")
    assert output.num_loss_tokens == groups_batch.loss_mask.sum()
    more = besides(policy, model, groups_batch, rates, output)
    assert counter.get_total_flops() - sum(more.values()) == rates.of_step(output), more


def besides(policy, model, batch, rates: FlopRates, output) -> dict[str, float]:
    """What runs and is no arithmetic of the model, and, below zero, what is counted and does not run."""
    config, tokens = model.config, output.num_forward_tokens
    is_dtensor, all_weights = isinstance(policy, DTensorPolicy), not policy.adapted
    dense = sum(
        bucket.num_segments * bucket.length * bucket.blocked.shape[-1]
        for micro in policy._portion(batch, "train").microbatches()
        for bucket in plan_padded(micro.segments).buckets
    )
    first_layer = [f"model.layers.0.self_attn.{side}_proj" for side in "qkv"]
    first_a = [module.dim * module.in_features for module in policy.adapted if module.name in first_layer]
    if policy._setup.spec is not None and policy._setup.spec.fused == "shared":
        first_a = first_a[:1]
    routers = [p for name, p in model.named_parameters() if name.endswith("mlp.gate.weight")]
    more = {
        "padding": rates.per_token * output.num_padding_tokens,
        # scores are computed for all pairs of padded segments, and a second time in the backward pass, where two of
        # the products have a column more
        "attention": rates.per_score * (dense * (7 + 2 / config.head_dim) / 6 - output.num_attention_scores),
    }
    if all_weights:
        more["logits again, for the head's gradient"] = 2.0 * model.lm_head.weight.numel() * output.num_loss_tokens
    else:
        weights = sum(model.get_submodule(name).weight.numel() for name in first_layer)
        more["no gradient of the first layer's input"] = -2.0 * tokens * (weights + sum(first_a))
    if is_dtensor:
        more["rotary angles"] = float(tokens * config.head_dim)
    elif not all_weights:
        more["gradient of frozen routers"] = 2.0 * tokens * sum(p.numel() for p in routers)
    return more


def test_scores_are_those_of_a_token_with_itself_and_all_that_it_sees():
    batch = make_batch([(3, 2), (3, 4), (5, 0), (2, 1)], groups=[0, 0, 1, 2])
    expected = {  # a prompt of 3: 6; its completions: 3 + 6 and 10 + 12; the other rows: 15 and 6
        True: 6 + 9 + 22 + 15 + 6,
        False: 15 + 28 + 15 + 6,
    }
    for share, scores in expected.items():
        micros = microbatches_of(batch, plan("packed", 1, 12, share=share))
        assert sum(micro.num_attention_scores for micro in micros) == scores


def test_padding_has_no_scores():
    (micro,) = microbatches_of(make_batch([(3, 2)], groups=[0]), replace(plan("rows", 1, 1, share=True), round_to=16))
    assert (micro.num_padding_tokens, micro.num_attention_scores) == (11, 15)


def largest_peak(rank: int) -> None:
    """Every process has the peak of that with the most, and forgets its own."""
    forgotten = []
    torch.cuda.is_available = lambda: True
    torch.cuda.max_memory_allocated = lambda: (rank + 1) * 2**29
    torch.cuda.reset_peak_memory_stats = lambda: forgotten.append(rank)
    assert peak_gpu_gib(Ranks(rank=rank, number=2)) == 1.0
    assert forgotten == [rank]


def test_the_peak_is_that_of_the_process_with_the_most(tmp_path):
    run_ranks(2, tmp_path, largest_peak)


@pytest.mark.parametrize("backend", BOTH)
def test_a_step_has_the_peak_of_its_processes(tiny_model, groups_batch, monkeypatch, backend):
    monkeypatch.setattr("nemo_rl_lora.policy.trained.peak_gpu_gib", lambda _ranks: 1.5)
    policy = make_policy(tiny_model("llama"), backend=BOTH[backend], spec=spec())
    assert policy.train_step(groups_batch, GRPO).peak_gpu_gib == 1.5


def test_without_a_gpu_there_is_no_peak(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert peak_gpu_gib(Ranks()) is None
