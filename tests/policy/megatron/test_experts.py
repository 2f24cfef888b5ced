"""Qwen3-MoE on the Megatron backend: adapters on attention, all weights, and what is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from nemo_rl_lora.algorithms.losses.policy import make_policy_loss
from nemo_rl_lora.config.loss_fn import LossFnConfig
from nemo_rl_lora.distributed.ranks import Ranks
from nemo_rl_lora.policy.megatron.policy import MegatronPolicy
from tests.policy.dtensor.test_policy import make_policy, plain_logprobs, relative, spec
from tests.policy.megatron.twins import distance, gradients, make_twins, masters
from tests.tiny_models import VOCABULARY, save_random_model

GRPO = make_policy_loss(LossFnConfig(reference_policy_kl_penalty=0.0))


@pytest.fixture(scope="module", params=[True, False], ids=["scores that sum to one", "scores of all experts"])
def tiny_experts(request, tmp_path_factory):
    config = Qwen3MoeConfig(
        hidden_size=48,
        intermediate_size=80,
        moe_intermediate_size=32,
        num_experts=6,
        num_experts_per_tok=2,
        norm_topk_prob=request.param,
        mlp_only_layers=[1],
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=VOCABULARY,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    return save_random_model(config, tmp_path_factory.mktemp("experts"))


def test_adapters_of_a_mixture_are_those_of_the_twin(tiny_experts, groups_batch):
    dtensor, policy = make_twins(tiny_experts, max_grad_norm=None)
    assert policy.adapted == dtensor.adapted
    stock = AutoModelForCausalLM.from_pretrained(tiny_experts, dtype=torch.float32).eval()
    expected = plain_logprobs(stock, groups_batch).detach()
    assert relative(policy.reference_logprobs(groups_batch), expected) <= 1e-5
    assert relative(policy.logprobs(groups_batch), dtensor.logprobs(groups_batch)) <= 1e-5
    dtensor.train_step(groups_batch, GRPO)
    policy.train_step(groups_batch, GRPO)
    assert distance(gradients(policy), gradients(dtensor)) <= 1e-5


def test_all_weights_of_a_mixture_have_transformers_gradients(tiny_experts, groups_batch):
    policy = make_policy(tiny_experts, backend=MegatronPolicy, max_grad_norm=None)
    judge = AutoModelForCausalLM.from_pretrained(tiny_experts, dtype=torch.float32).eval()
    num_tokens = groups_batch.denominators.num_loss_tokens
    (-(plain_logprobs(judge, groups_batch) * groups_batch.advantages[:, None]).sum() / num_tokens).backward()
    policy.train_step(groups_batch, make_policy_loss(LossFnConfig(reference_policy_kl_penalty=0.0, ratio_clip_max=1e9)))
    ours = gradients(policy)
    layer = "model.layers.2"
    experts = judge.get_submodule(f"{layer}.mlp.experts")
    for expert in range(6):
        gate, up = experts.gate_up_proj.grad[expert].chunk(2)
        parts = {"gate_proj": gate, "up_proj": up, "down_proj": experts.down_proj.grad[expert]}
        for part, expected in parts.items():
            actual = ours[f"{layer}.mlp.experts.{expert}.{part}.weight"]
            assert float((actual - expected).norm()) <= 1e-4 * float(experts.gate_up_proj.grad.norm()), (expert, part)
    named = dict(judge.named_parameters())
    for name in (f"{layer}.mlp.gate.weight", f"{layer}.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"):
        assert relative(ours[name], named[name].grad) <= 1e-4, name


def test_a_frozen_router_keeps_its_weight(tiny_experts, groups_batch):
    name = "model.layers.0.mlp.gate.weight"
    for is_frozen in (True, False):
        policy = make_policy(tiny_experts, backend=MegatronPolicy, megatron_cfg={"freeze_moe_router": is_frozen})
        before = masters(policy)[name].clone()
        policy.train_step(groups_batch, GRPO)
        assert torch.equal(masters(policy)[name], before) == is_frozen


def test_a_frozen_router_does_not_decay_where_processes_sum_gradients(tiny_experts, groups_batch, tmp_path):
    def make():
        return make_policy(
            tiny_experts,
            backend=MegatronPolicy,
            megatron_cfg={"freeze_moe_router": True},
            precision="bfloat16",
            optimizer={"kwargs": {"lr": 0.1, "weight_decay": 0.5}},
        )

    policy, name = make(), "model.layers.0.mlp.gate.weight"
    before = masters(policy)[name].clone()
    policy.train_step(groups_batch, GRPO)
    policy.save(tmp_path)
    resumed = make()
    resumed.load(tmp_path)
    for one in (policy, resumed):
        Ranks(number=2).sum_gradients(one._trained.masters())  # those of a process that had no microbatch are zeros
        one._optimizer.step()
        assert torch.equal(masters(one)[name], before)


def test_targets_that_reach_an_expert_are_refused(tiny_experts):
    with pytest.raises(ValueError, match="reaches the experts"):
        make_policy(tiny_experts, spec=spec(targets=("q_proj", "linear_fc2")), backend=MegatronPolicy)


def test_all_weights_of_a_mixture_are_saved_as_transformers_reads_them(tiny_experts, groups_batch, tmp_path):
    policy = make_policy(tiny_experts, backend=MegatronPolicy)
    policy.train_step(groups_batch, GRPO)
    policy.save(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "weights", dtype=torch.float32).eval()
    assert relative(policy.logprobs(groups_batch), plain_logprobs(saved, groups_batch).detach()) <= 1e-5


def test_the_base_for_the_engine_is_the_mixture_of_the_checkpoint(tiny_experts):
    stock = AutoModelForCausalLM.from_pretrained(tiny_experts, dtype=torch.float32).eval()
    base = make_policy(tiny_experts, spec=spec(), backend=MegatronPolicy).base_model()
    token_ids = torch.arange(20)[None]
    torch.testing.assert_close(base(token_ids).logits, stock(token_ids).logits)
