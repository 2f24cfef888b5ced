"""The Megatron policy against its twin, transformers and PEFT, with adapters whose B is not zero."""

from __future__ import annotations

import math
from dataclasses import replace

import peft
import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

from nemo_rl_lora.algorithms.losses.likelihood import SftLoss
from nemo_rl_lora.algorithms.losses.policy import make_policy_loss
from nemo_rl_lora.algorithms.losses.preference import row_logprobs
from nemo_rl_lora.config.loss_fn import LossFnConfig
from nemo_rl_lora.lora.files import adapter_tensor_name
from nemo_rl_lora.policy.megatron.layers import Layer
from nemo_rl_lora.policy.megatron.lora import AdaptedLinear
from nemo_rl_lora.policy.megatron.policy import MegatronPolicy
from nemo_rl_lora.types import Batch, LossFn
from tests.policy.dtensor.test_policy import LAYOUTS, make_policy, plain_logprobs, relative, spec
from tests.policy.megatron.twins import (
    BOTH,
    distance,
    gradients,
    make_twins,
    masters,
    moments,
    random_adapter,
    set_masters,
)
from tests.policy.test_pairs import chats, pairs, preference_loss  # noqa: F401 (fixtures)

FAMILIES = ["llama", "qwen2", "qwen3"]
GRPO = make_policy_loss(LossFnConfig(reference_policy_kl_penalty=0.0))
SHARED = spec(targets=("linear_qkv", "linear_fc1", "linear_proj"), fused="shared")
PREFIX = "base_model.model.model.layers"


def megatron(path, **settings) -> MegatronPolicy:
    return make_policy(path, backend=MegatronPolicy, **{"spec": spec(), **settings})


def with_random_b(policy: MegatronPolicy, seed: int = 3) -> MegatronPolicy:
    set_masters(policy, random_adapter(policy, seed))
    return policy


def scale_of_loss(batch: Batch) -> float:
    """What 1e-5 of a loss is measured by: the mean of |terms|."""
    return 1.0 if batch.advantages is None else float(batch.advantages.abs().mean())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_adapter_is_the_base_model_exactly_and_the_twin_draws_the_same(tiny_model, groups_batch, family):
    dtensor, policy = (make_policy(tiny_model(family), spec=spec(), backend=backend) for backend in BOTH.values())
    assert torch.equal(policy.logprobs(groups_batch), policy.reference_logprobs(groups_batch))
    drawn, expected = masters(policy), masters(dtensor)
    assert drawn.keys() == expected.keys()
    assert policy.adapted == dtensor.adapted
    for name, tensor in expected.items():
        assert torch.equal(drawn[name], tensor), name


def algorithm(name: str, dtensor, request) -> tuple[Batch, LossFn]:
    """A batch of GRPO, SFT or DPO and its loss, with references by the DTensor backend."""
    if name == "sft":
        return request.getfixturevalue("chats"), SftLoss()
    if name == "dpo":
        batch = request.getfixturevalue("pairs")
        reference = row_logprobs(dtensor.reference_logprobs(batch), batch.loss_mask)
        return replace(batch, reference_logprobs=reference), preference_loss()
    batch = request.getfixturevalue("groups_batch")
    batch = replace(batch, reference_logprobs=dtensor.reference_logprobs(batch))
    return batch, make_policy_loss(LossFnConfig(reference_policy_kl_penalty=0.1))


@pytest.mark.parametrize("name", ["grpo", "sft", "dpo"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_losses_gradients_and_steps_are_those_of_the_twin(tiny_model, family, name, request):
    dtensor, policy = make_twins(tiny_model(family), temperature=0.8, max_grad_norm=None)
    batch, loss = algorithm(name, dtensor, request)
    assert relative(policy.logprobs(batch), dtensor.logprobs(batch)) <= 1e-5
    assert relative(policy.reference_logprobs(batch), dtensor.reference_logprobs(batch)) <= 1e-5
    expected, actual = dtensor.train_step(batch, loss), policy.train_step(batch, loss)
    assert abs(actual.loss - expected.loss) <= 1e-5 * scale_of_loss(batch)
    # the margin of rewards is a difference of sums over whole answers
    assert actual.metrics == pytest.approx(expected.metrics, rel=1e-4, abs=1e-5)
    assert actual.num_forward_tokens == expected.num_forward_tokens
    assert min(gradient.norm() for gradient in gradients(dtensor).values()) > 0
    assert distance(gradients(policy), gradients(dtensor)) <= 1e-5
    for _ in range(2):
        dtensor.train_step(batch, loss)
        policy.train_step(batch, loss)
    assert distance(masters(policy), masters(dtensor)) <= 1e-4


@pytest.mark.parametrize("position", ["pre", "post"])
def test_dropout_drops_what_the_twin_drops(tiny_model, groups_batch, position):
    chosen = spec(dropout=0.4, dropout_position=position)
    dtensor, policy = make_twins(tiny_model("qwen2"), spec=chosen, max_grad_norm=None)
    plain, _ = make_twins(tiny_model("qwen2"), max_grad_norm=None)
    assert relative(policy.logprobs(groups_batch), plain.logprobs(groups_batch)) <= 1e-5
    for twin in (dtensor, policy, plain):
        twin.train_step(groups_batch, GRPO)
    assert distance(gradients(policy), gradients(dtensor)) <= 1e-5
    assert distance(gradients(policy), gradients(plain)) > 0.1


@pytest.mark.parametrize(
    "layout",
    [
        *(layout for name, layout in LAYOUTS.items() if name != "checkpointed"),
        {"megatron_cfg": {"activation_checkpointing": True}},
    ],
    ids=[*(name for name in LAYOUTS if name != "checkpointed"), "checkpointed"],
)
def test_loss_and_gradients_do_not_depend_on_the_layout(tiny_model, groups_batch, layout):
    loss = make_policy_loss(LossFnConfig())
    plain, other = (with_random_b(megatron(tiny_model("llama"), **settings)) for settings in ({}, layout))
    batch = replace(groups_batch, reference_logprobs=plain.reference_logprobs(groups_batch))
    expected, actual = plain.train_step(batch, loss), other.train_step(batch, loss)
    assert abs(actual.loss - expected.loss) <= 1e-5 * scale_of_loss(batch)
    assert distance(gradients(other), gradients(plain)) <= 1e-5


def test_a_checkpointed_layer_runs_again_in_the_backward_pass(tiny_model, groups_batch, monkeypatch):
    runs = []
    forward = Layer.__base__.forward
    monkeypatch.setattr(Layer.__base__, "forward", lambda self, *a, **k: runs.append(self) or forward(self, *a, **k))
    counts = []
    for checkpointing in (False, True):
        policy = megatron(
            tiny_model("llama"),
            megatron_cfg={"activation_checkpointing": checkpointing},
            train_micro_batch_size=16,
        )
        runs.clear()
        policy.train_step(groups_batch, GRPO)
        counts.append(len(runs))
    assert counts == [3, 6]


@pytest.mark.parametrize(("writer", "reader"), [("dtensor", "megatron"), ("megatron", "dtensor")])
def test_a_checkpoint_of_one_backend_goes_on_with_the_other(tiny_model, groups_batch, tmp_path, writer, reader):
    scheduler = {"name": "linear", "warmup_steps": 3, "total_steps": 9}
    first, other = (
        make_policy(tiny_model("qwen3"), spec=spec(dropout=0.3), scheduler=scheduler, backend=BOTH[name])
        for name in (writer, reader)
    )
    for _ in range(2):
        first.train_step(groups_batch, GRPO)
    first.save(tmp_path / "first")
    other.load(tmp_path / "first")
    assert all(torch.equal(masters(other)[name], tensor) for name, tensor in masters(first).items())
    for name, (one, two) in moments(first).items():
        assert one.norm() > 0
        assert torch.equal(moments(other)[name][0], one)
        assert torch.equal(moments(other)[name][1], two)
    other.save(tmp_path / "other")
    for file in ("adapter/adapter_model.safetensors", "optimizer/adapter.safetensors"):
        saved, again = (safetensors.torch.load_file(tmp_path / name / file) for name in ("first", "other"))
        assert saved.keys() == again.keys()
        assert all(torch.equal(again[name], tensor) for name, tensor in saved.items())
    one, two = ((tmp_path / name / "adapter" / "adapter_config.json").read_text() for name in ("first", "other"))
    assert one == two
    expected, actual = first.train_step(groups_batch, GRPO), other.train_step(groups_batch, GRPO)
    assert actual.lr == expected.lr
    assert actual.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
    assert distance(masters(other), masters(first)) <= 1e-4


def test_a_resumed_step_is_the_step_of_the_run_that_went_on(tiny_model, groups_batch, tmp_path):
    straight, resumed = (megatron(tiny_model("llama"), spec=spec(dropout=0.3)) for _ in range(2))
    for _ in range(2):
        straight.train_step(groups_batch, GRPO)
    straight.save(tmp_path)
    resumed.load(tmp_path)
    assert straight.train_step(groups_batch, GRPO) == resumed.train_step(groups_batch, GRPO)
    assert all(torch.equal(masters(resumed)[name], tensor) for name, tensor in masters(straight).items())


def test_reference_is_the_base_before_and_after_training_and_after_a_resume(tiny_model, groups_batch, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32)
    policy = megatron(tiny_model("llama"))
    before = policy.reference_logprobs(groups_batch)
    torch.testing.assert_close(before, plain_logprobs(base, groups_batch).detach(), atol=1e-5, rtol=0)
    for _ in range(3):
        policy.train_step(groups_batch, GRPO)
    assert not torch.allclose(policy.logprobs(groups_batch), before, atol=1e-3)
    assert torch.equal(policy.reference_logprobs(groups_batch), before)
    policy.save(tmp_path)
    resumed = megatron(tiny_model("llama"))
    resumed.load(tmp_path)
    assert torch.equal(resumed.reference_logprobs(groups_batch), before)
    assert torch.equal(resumed.logprobs(groups_batch), policy.logprobs(groups_batch))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chosen", [spec(), SHARED], ids=["canonical", "shared"])
def test_stock_peft_loads_the_adapter_and_merges_to_what_is_published(
    tiny_model, groups_batch, family, chosen, tmp_path
):
    policy = with_random_b(megatron(tiny_model(family), spec=chosen)) if chosen is not SHARED else None
    if policy is None:
        policy = megatron(tiny_model(family), spec=chosen)
        with torch.no_grad():
            for master in policy._trained.masters().values():
                master.add_(torch.randn(master.shape, generator=torch.Generator().manual_seed(5)) * 0.1)
    policy.save(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tiny_model(family), dtype=torch.float32)
    judge = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    expected = plain_logprobs(judge, groups_batch).detach()
    torch.testing.assert_close(policy.logprobs(groups_batch), expected, atol=1e-5, rtol=0)
    assert not torch.allclose(policy.reference_logprobs(groups_batch), expected, atol=1e-3)
    merged = judge.merge_and_unload().state_dict()
    ref = policy.publish(1, "merged")
    assert {info.name for info in ref.manifest} == {f"{module.name}.weight" for module in policy.adapted}
    for name, tensor in ref.tensors.items():
        assert relative(tensor, merged[name]) <= 1e-6, name


def test_published_weights_are_those_of_the_twin_and_the_base_stays(tiny_model):
    dtensor, policy = make_twins(tiny_model("qwen2"))
    before = {name: p.detach().clone() for name, p in policy._weights.parameters.items()}
    for mode in ("merged", "adapter"):
        expected, actual = dtensor.publish(3, mode), policy.publish(3, mode)
        assert (actual.manifest, actual.digest, actual.num_bytes) == (
            expected.manifest,
            expected.digest,
            expected.num_bytes,
        )
        for name, tensor in expected.tensors.items():
            assert torch.equal(actual.tensors[name], tensor), name
    assert all(torch.equal(policy._weights.parameters[name], tensor) for name, tensor in before.items())


SELECTIONS = {
    "one of a fused layer": {"targets": ("v_proj", "up_proj")},
    "one layer, by Megatron's name": {"targets": ("*.layers.1.*.linear_proj", "decoder.layers.0.mlp.linear_fc2")},
    "excludes, by Megatron's name": {"excludes": ("*.layers.0.*", "linear_fc2", "*.self_attention.linear_proj")},
    "ranks of single modules": {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"*.layers.2.*": 3}},
    "rank-stabilised": {"use_rslora": True},
}


@pytest.mark.parametrize("fields", SELECTIONS.values(), ids=SELECTIONS.keys())
def test_selections_are_those_of_the_twin(tiny_model, groups_batch, fields):
    dtensor, policy = make_twins(tiny_model("llama"), spec=spec(**fields), max_grad_norm=None)
    assert policy.adapted == dtensor.adapted
    assert relative(policy.logprobs(groups_batch), dtensor.logprobs(groups_batch)) <= 1e-5
    dtensor.train_step(groups_batch, GRPO)
    policy.train_step(groups_batch, GRPO)
    assert distance(gradients(policy), gradients(dtensor)) <= 1e-5


def test_a_shared_a_has_the_gradient_of_all_its_modules(tiny_model, groups_batch):
    shared = megatron(tiny_model("qwen3"), spec=SHARED, max_grad_norm=None)
    with torch.no_grad():
        for master in shared._trained.masters().values():
            master.add_(torch.randn(master.shape, generator=torch.Generator().manual_seed(5)) * 0.1)
    names = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "o_proj")
    canonical = megatron(tiny_model("qwen3"), spec=spec(targets=names), max_grad_norm=None)
    set_masters(canonical, masters(shared))
    assert len(canonical._trained.masters()) == 2 * len(canonical.adapted)
    assert len(shared._trained.masters()) == 2 * 3 * 3  # three layers of three modules
    assert relative(shared.logprobs(groups_batch), canonical.logprobs(groups_batch)) <= 1e-5
    shared.train_step(groups_batch, GRPO)
    canonical.train_step(groups_batch, GRPO)
    together, alone = gradients(shared), gradients(canonical)
    for layer in range(3):
        parts = [f"{PREFIX}.{layer}.self_attn.{part}_proj.lora_" for part in "qkv"]
        total = sum(alone[f"{part}A.weight"] for part in parts)
        for part in parts:
            assert relative(together[f"{part}A.weight"], total) <= 1e-5
            assert relative(together[f"{part}B.weight"], alone[f"{part}B.weight"]) <= 1e-5


def test_moments_of_a_shared_a_stay_with_it(tiny_model, groups_batch, tmp_path):
    shared, again = (megatron(tiny_model("llama"), spec=SHARED) for _ in range(2))
    for _ in range(2):
        shared.train_step(groups_batch, GRPO)
    shared.save(tmp_path)
    again.load(tmp_path)
    assert shared.train_step(groups_batch, GRPO) == again.train_step(groups_batch, GRPO)
    names = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "o_proj")
    key = "linear_qkv and linear_fc1 share one A"
    for backend in BOTH.values():
        canonical = make_policy(tiny_model("llama"), spec=spec(targets=names), backend=backend)
        with pytest.raises(ValueError, match=f"moments of one A shared by .*, and this run trains an A each.*{key}"):
            canonical.load(tmp_path)
    (tmp_path / "optimizer" / "adapter.safetensors").unlink()
    (tmp_path / "optimizer").rmdir()
    shared.load(tmp_path)
    canonical.load(tmp_path)
    assert all(torch.equal(masters(canonical)[name], tensor) for name, tensor in masters(shared).items())


def test_an_adapter_with_an_a_each_has_no_shared_form(tiny_model, tmp_path):
    canonical = with_random_b(megatron(tiny_model("llama"), spec=spec(targets=("q_proj", "k_proj", "v_proj"))))
    canonical.save(tmp_path)
    shared = megatron(tiny_model("llama"), spec=spec(targets=("linear_qkv",), fused="shared"))
    with pytest.raises(ValueError, match="cannot become one shared A"):
        shared.load(tmp_path)


def test_a_checkpoint_of_another_dim_is_refused(tiny_model, tmp_path):
    megatron(tiny_model("llama")).save(tmp_path)
    with pytest.raises(ValueError, match=r"has shape \(4, 48\), but this run trains \(6, 48\)"):
        megatron(tiny_model("llama"), spec=spec(dim=6)).load(tmp_path)


def test_only_adapters_train_as_fp32_masters_and_the_base_keeps_its_bits(tiny_model, groups_batch):
    policy = megatron(tiny_model("llama"), precision="bfloat16")
    before = {name: p.detach().clone() for name, p in policy._weights.parameters.items()}
    for _ in range(2):
        policy.train_step(groups_batch, GRPO)
    held = {id(p) for group in policy._optimizer.param_groups for p in group["params"]}
    factors = [
        p
        for linear in policy._model.modules()
        if isinstance(linear, AdaptedLinear)
        for p in linear.factors.parameters()
    ]
    assert held == {id(p) for p in factors}
    assert {p.dtype for p in factors} == {torch.float32}
    for name, p in policy._weights.parameters.items():
        assert p.dtype == torch.bfloat16
        assert torch.equal(p, before[name]), name


def test_the_adapter_is_computed_in_lora_dtype(tiny_model, groups_batch):
    """In a float32 model, rounding the adapter to bfloat16 moves logprobs, as it does on the twin."""
    dtensor, policy = make_twins(tiny_model("llama"), spec=spec(dtype="bfloat16"))
    wide = with_random_b(megatron(tiny_model("llama")))
    expected, actual = dtensor.logprobs(groups_batch), policy.logprobs(groups_batch)
    effect = relative(wide.logprobs(groups_batch), expected)
    assert effect > 1e-4
    assert relative(actual, expected) < effect / 3


def test_a_bad_number_stops_before_the_optimizer_moves(tiny_model, groups_batch):
    policy = with_random_b(megatron(tiny_model("llama")))
    before = policy.logprobs(groups_batch)
    groups_batch.advantages[2:] = math.nan
    with pytest.raises(FloatingPointError, match="optimizer has not moved"):
        policy.train_step(groups_batch, GRPO)
    assert torch.equal(policy.logprobs(groups_batch), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_base_for_the_engine_shares_all_tensors_but_q_k_and_v(tiny_model, family):
    policy = megatron(tiny_model(family))
    base = policy.base_model()
    stock = AutoModelForCausalLM.from_pretrained(tiny_model(family), dtype=torch.float32, attn_implementation="eager")
    token_ids = torch.arange(30)[None]
    assert torch.equal(base(token_ids).logits, stock(token_ids).logits)
    held = {p.untyped_storage().data_ptr() for p in policy._weights.parameters.values()}
    own = [name for name, p in base.named_parameters() if p.untyped_storage().data_ptr() not in held]
    assert {name.split(".")[-2] for name in own} == {"q_proj", "k_proj", "v_proj"}


def test_targets_that_cannot_be_trained_are_refused(tiny_model):
    for backend in BOTH.values():
        with pytest.raises(ValueError, match=r"matches the output head 'lm_head', where no adapter is trained"):
            make_policy(tiny_model("qwen2"), spec=spec(targets=("q_proj", "lm_head")), backend=backend)


# Without an adapter


def test_full_fine_tuning_is_that_of_the_twin(tiny_model, groups_batch):
    dtensor, policy = make_twins(tiny_model("qwen2"), spec=None, keep_reference=True, max_grad_norm=None)
    before = policy.reference_logprobs(groups_batch)
    expected, actual = dtensor.train_step(groups_batch, GRPO), policy.train_step(groups_batch, GRPO)
    assert actual.loss == pytest.approx(expected.loss, abs=1e-5 * scale_of_loss(groups_batch))
    assert distance(gradients(policy), gradients(dtensor)) <= 1e-5
    assert not torch.allclose(policy.logprobs(groups_batch), before, atol=1e-4)
    assert torch.equal(policy.reference_logprobs(groups_batch), before)
    ref = policy.publish(1, "merged")
    assert set(ref.manifest) == set(dtensor.publish(1, "merged").manifest)
    assert all(torch.equal(ref.tensors[name], tensor) for name, tensor in masters(policy).items())
    with pytest.raises(ValueError, match=r"lora_sync='adapter': there is no adapter"):
        policy.publish(2, "adapter")


@pytest.mark.parametrize(("writer", "reader"), [("dtensor", "megatron"), ("megatron", "dtensor")])
def test_all_weights_of_one_backend_go_on_with_the_other(tiny_model, groups_batch, tmp_path, writer, reader):
    first, other = (make_policy(tiny_model("llama"), backend=BOTH[name]) for name in (writer, reader))
    first.train_step(groups_batch, GRPO)
    first.save(tmp_path)
    other.load(tmp_path)
    assert all(torch.equal(masters(other)[name], tensor) for name, tensor in masters(first).items())
    assert all(torch.equal(moments(other)[name][1], pair[1]) for name, pair in moments(first).items())
    expected, actual = first.train_step(groups_batch, GRPO), other.train_step(groups_batch, GRPO)
    assert actual.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)


def test_bfloat16_weights_have_fp32_masters_that_keep_small_steps(tiny_model, groups_batch, tmp_path):
    settings = {"spec": None, "precision": "bfloat16", "optimizer": {"kwargs": {"lr": 1e-6, "weight_decay": 0.0}}}
    policy = megatron(tiny_model("llama"), **settings)
    start = masters(policy)["model.layers.0.mlp.up_proj.weight"].clone()
    for _ in range(2):
        policy.train_step(groups_batch, GRPO)
    weight = policy._weights.parameters["decoder.layers.0.mlp.linear_fc1.weight"]
    moved = masters(policy)["model.layers.0.mlp.up_proj.weight"]
    assert weight.dtype == torch.bfloat16
    assert 1e-6 < float((moved - start).abs().max()) <= 2.1e-6  # far below what bfloat16 can hold
    assert torch.equal(weight.chunk(2)[1], moved.bfloat16())
    policy.save(tmp_path)
    resumed = megatron(tiny_model("llama"), **settings)
    resumed.load(tmp_path)
    assert resumed.train_step(groups_batch, GRPO) == policy.train_step(groups_batch, GRPO)


def test_names_are_canonical(tiny_model):
    names = set(masters(megatron(tiny_model("llama"))))
    assert adapter_tensor_name("model.layers.2.self_attn.k_proj", "A") in names
    assert len(names) == 3 * 7 * 2
