"""The DTensor policy against transformers + PEFT, with adapters whose B is not zero."""

import math
from dataclasses import replace

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_rl_lora.algorithms.losses.policy import make_policy_loss
from nemo_rl_lora.config.loss_fn import LossFnConfig
from nemo_rl_lora.config.optimizer_settings import adam_settings
from nemo_rl_lora.config.policy import PolicyConfig
from nemo_rl_lora.lora.files import AdapterBase, adapter_tensor_name
from nemo_rl_lora.lora.spec import LoraSpec
from nemo_rl_lora.policy.dtensor.linear import AdapterLinear, named_adapters
from nemo_rl_lora.policy.dtensor.policy import DTensorPolicy
from nemo_rl_lora.policy.protocol import PolicySetup
from nemo_rl_lora.types import StepOutput

LR = 1e-2


def make_policy(
    path, *, spec: LoraSpec | None = None, temperature=1.0, keep_reference=False, backend=DTensorPolicy, **overrides
):
    config = PolicyConfig.model_validate(
        {
            "model_name": "tiny",
            "tokenizer": {"name": "tiny"},
            "precision": "float32",
            "max_total_sequence_length": 64,
            "train_micro_batch_size": 2,
            "optimizer": {"kwargs": {"lr": LR, "weight_decay": 0.0}},
            "generation": {"max_new_tokens": 8},
            **overrides,
        }
    )
    setup = PolicySetup(
        model_path=path,
        base_model_name="tiny",
        base=AdapterBase(name=str(path)),
        spec=spec,
        seed=7,
        temperature=temperature,
        keep_reference=keep_reference,
        logprob_rows=config.logprob_rows,
        adam=adam_settings(config, lora=spec is not None),
    )
    return backend(config, setup)


def spec(**fields) -> LoraSpec:
    return LoraSpec(**{"dim": 4, "alpha": 8, **fields})


def adapters_of(policy: DTensorPolicy):
    """Adapted modules by their full Hugging Face name."""
    return named_adapters(policy._model, policy.adapted)


@torch.no_grad()
def randomise_b(policy: DTensorPolicy, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _, linear in adapters_of(policy):
        linear.lora_B.weight.copy_(torch.randn(linear.lora_B.weight.shape, generator=generator) * 0.1)


def plain_logprobs(model, batch, temperature=1.0):
    """[B, T] by one padded pass of a stock model."""
    width = batch.token_ids.shape[1]
    mask = (torch.arange(width)[None] < batch.sequence_length[:, None]).long()
    logits = model(batch.token_ids, attention_mask=mask).logits.float() / temperature
    values = torch.log_softmax(logits, -1)[:, :-1].gather(2, batch.token_ids[:, 1:, None])[..., 0]
    return torch.cat([torch.zeros(len(values), 1), values], 1) * batch.loss_mask


def saved_adapter(policy: DTensorPolicy, path):
    policy.save(path)
    return path / "adapter"


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_fresh_adapter_is_the_base_model_exactly(tiny_model, groups_batch, family):
    policy = make_policy(tiny_model(family), spec=spec())
    assert torch.equal(policy.logprobs(groups_batch), policy.reference_logprobs(groups_batch))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral-window"])
def test_logprobs_and_gradients_equal_peft(tiny_model, groups_batch, family, tmp_path):
    policy = make_policy(tiny_model(family), spec=spec(), temperature=0.8)
    randomise_b(policy)
    base = AutoModelForCausalLM.from_pretrained(tiny_model(family), dtype=torch.float32)
    judge = peft.PeftModel.from_pretrained(base, saved_adapter(policy, tmp_path), is_trainable=True)
    judge.eval()
    expected = plain_logprobs(judge, groups_batch, temperature=0.8)
    torch.testing.assert_close(policy.logprobs(groups_batch), expected.detach(), atol=1e-5, rtol=0)
    num_tokens = groups_batch.denominators.num_loss_tokens
    loss = -(expected * groups_batch.advantages[:, None]).sum() / num_tokens
    loss.backward()
    output = policy.train_step(
        groups_batch, make_policy_loss(LossFnConfig(reference_policy_kl_penalty=0.0, ratio_clip_max=1e9))
    )
    # the ratio is 1, so the loss is the mean advantage, and its gradient that of the logprobs
    mean_advantage = -(groups_batch.loss_mask * groups_batch.advantages[:, None]).sum() / num_tokens
    assert output.loss == pytest.approx(float(mean_advantage), abs=1e-6)
    assert_gradients_equal(policy, output, judge)


def assert_gradients_equal(policy: DTensorPolicy, output: StepOutput, judge: peft.PeftModel) -> None:
    """The gradients of the last step are those that the judge's backward pass left."""
    stock = {name.replace(".default", ""): p for name, p in judge.named_parameters() if p.requires_grad}
    for name, linear in adapters_of(policy):
        for side, factor in (("A", linear.lora_A), ("B", linear.lora_B)):
            expected_gradient = stock[adapter_tensor_name(name, side)].grad
            # train_step clips to norm 1: undo by the reported norm
            clip = min(1.0, 1.0 / (output.grad_norm + 1e-6))
            assert relative(factor.weight.grad / clip, expected_gradient) <= 1e-4, (name, side)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"reference_policy_kl_type": "k1"},
        {"use_on_policy_kl_approximation": True},
        {"kl_gradient": "paper"},
        {"kl_gradient": "paper", "use_on_policy_kl_approximation": True},
    ],
    ids=lambda settings: ", ".join(settings) or "default",
)
def test_loss_and_gradients_with_a_kl_term_equal_a_formula(tiny_model, groups_batch, settings, tmp_path):
    policy = make_policy(tiny_model("llama"), spec=spec())
    randomise_b(policy)
    base = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32)
    reference = plain_logprobs(base, groups_batch).detach()
    judge = peft.PeftModel.from_pretrained(base, saved_adapter(policy, tmp_path), is_trainable=True).eval()
    engine = reference + 0.3 * groups_batch.generation_logprobs
    batch = replace(
        groups_batch, reference_logprobs=policy.reference_logprobs(groups_batch), generation_logprobs=engine
    )
    now = plain_logprobs(judge, batch)
    difference = reference - now
    kl = -difference if settings.get("reference_policy_kl_type") == "k1" else difference.exp() - 1 - difference
    weight = now - (engine if "use_on_policy_kl_approximation" in settings else now.detach())
    weight = weight.detach().exp() if "kl_gradient" in settings else weight.exp()
    ratio = (now - now.detach()).exp()
    loss = ((-batch.advantages[:, None] * ratio + 0.7 * weight * kl) * batch.loss_mask).sum()
    loss = loss / batch.denominators.num_loss_tokens
    loss.backward()
    output = policy.train_step(batch, make_policy_loss(LossFnConfig(reference_policy_kl_penalty=0.7, **settings)))
    assert output.loss == pytest.approx(loss.item(), abs=1e-6)
    assert_gradients_equal(policy, output, judge)


def test_only_adapters_train_as_fp32_masters_and_the_optimizer_holds_nothing_else(tiny_model, groups_batch):
    policy = make_policy(tiny_model("llama"), spec=spec(), precision="bfloat16")
    before = {name: p.clone() for name, p in policy._model.named_parameters() if "lora_" not in name}
    loss = make_policy_loss(LossFnConfig(reference_policy_kl_penalty=0.0))
    for _ in range(2):
        policy.train_step(groups_batch, loss)
    held = {id(p) for group in policy._optimizer.param_groups for p in group["params"]}
    adapters = [f.weight for _, linear in adapters_of(policy) for f in (linear.lora_A, linear.lora_B)]
    assert held == {id(p) for p in adapters}
    assert {p.dtype for p in adapters} == {torch.float32}
    for name, p in policy._model.named_parameters():
        if "lora_" not in name:
            assert torch.equal(p, before[name]), name


def test_reference_is_the_base_before_and_after_training_and_after_a_resume(tiny_model, groups_batch, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32)
    expected = plain_logprobs(base, groups_batch).detach()
    policy = make_policy(tiny_model("llama"), spec=spec())
    before = policy.reference_logprobs(groups_batch)
    for _ in range(3):
        policy.train_step(groups_batch, make_policy_loss(LossFnConfig(reference_policy_kl_penalty=0.0)))
    assert not torch.allclose(policy.logprobs(groups_batch), before, atol=1e-3)
    assert torch.equal(policy.reference_logprobs(groups_batch), before)
    torch.testing.assert_close(before, expected, atol=1e-5, rtol=0)
    policy.save(tmp_path)
    resumed = make_policy(tiny_model("llama"), spec=spec())
    resumed.load(tmp_path)
    assert torch.equal(resumed.reference_logprobs(groups_batch), before)
    assert torch.equal(resumed.logprobs(groups_batch), policy.logprobs(groups_batch))


def test_a_resumed_step_is_the_step_of_the_run_that_went_on(tiny_model, groups_batch, tmp_path):
    loss = make_policy_loss(LossFnConfig(reference_policy_kl_penalty=0.0))
    scheduler = {"name": "linear", "warmup_steps": 3, "total_steps": 9}
    straight = make_policy(tiny_model("llama"), spec=spec(dropout=0.3), scheduler=scheduler)
    for _ in range(2):
        straight.train_step(groups_batch, loss)
    straight.save(tmp_path)
    resumed = make_policy(tiny_model("llama"), spec=spec(dropout=0.3), scheduler=scheduler)
    resumed.load(tmp_path)
    expected, actual = straight.train_step(groups_batch, loss), resumed.train_step(groups_batch, loss)
    assert expected == actual
    for (name, one), (_, other) in zip(adapters_of(straight), adapters_of(resumed), strict=True):
        assert torch.equal(one.lora_A.weight, other.lora_A.weight), name
        assert torch.equal(one.lora_B.weight, other.lora_B.weight), name


def test_logprobs_ignore_dropout_and_training_uses_it(tiny_model, groups_batch):
    policy = make_policy(tiny_model("llama"), spec=spec(dropout=0.5, dropout_position="pre"))
    randomise_b(policy)
    plain = make_policy(tiny_model("llama"), spec=spec())
    randomise_b(plain)
    assert torch.equal(policy.logprobs(groups_batch), policy.logprobs(groups_batch))
    assert torch.equal(policy.logprobs(groups_batch), plain.logprobs(groups_batch))
    loss = make_policy_loss(LossFnConfig(reference_policy_kl_penalty=0.0))
    assert policy.train_step(groups_batch, loss).grad_norm != plain.train_step(groups_batch, loss).grad_norm


@pytest.mark.parametrize("position", ["pre", "post"])
def test_dropout_keeps_the_expected_update(position):
    x = torch.ones(2000, 6)
    linear = torch.nn.Linear(6, 5, bias=False)
    from nemo_rl_lora.lora.targets import AdaptedModule
    from nemo_rl_lora.policy.dtensor.linear import install_adapters

    holder = torch.nn.Sequential(linear)
    module = AdaptedModule(name="0", in_features=6, out_features=5, dim=3, alpha=3, scale=1.0)
    switch = install_adapters(holder, [module], spec(dropout=0.25, dropout_position=position), kernels=None)
    torch.nn.init.normal_(linear.lora_B.weight)
    full = holder(x)
    switch.dropout_seed = 1
    dropped = holder(x)
    assert not torch.equal(full, dropped)
    # inverted dropout: the mean over 2000 rows is the full output within 5 standard errors
    error = (dropped.mean(0) - full.mean(0)).abs()
    assert bool((error < 5 * dropped.std(0) / math.sqrt(2000)).all())


LAYOUTS = {
    "one row": {"train_micro_batch_size": 1, "shared_prefix": {"enabled": False}},
    "all rows, shared": {"train_micro_batch_size": 16},
    "token budget": {"dynamic_batching": {"enabled": True, "train_mb_tokens": 80, "sequence_length_round": 16}},
    "packed, not shared": {
        "sequence_packing": {"enabled": True, "train_mb_tokens": 100, "sequence_length_round": 1},
        "shared_prefix": {"enabled": False},
    },
    "packed, shared": {"sequence_packing": {"enabled": True, "train_mb_tokens": 100, "sequence_length_round": 8}},
    "small chunks": {"logprob_chunk_size": 3},
    "checkpointed": {"dtensor_cfg": {"activation_checkpointing": True}},
}


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_loss_and_gradients_do_not_depend_on_the_layout(tiny_model, groups_batch, layout, level):
    loss = make_policy_loss(LossFnConfig(token_level_loss=level == "token"))
    results = []
    for overrides in ({}, layout):
        policy = make_policy(tiny_model("llama"), spec=spec(), **overrides)
        randomise_b(policy)
        from dataclasses import replace

        batch = replace(groups_batch, reference_logprobs=policy.reference_logprobs(groups_batch))
        output = policy.train_step(batch, loss)
        gradients = {
            (name, side): factor.weight.grad.clone()
            for name, linear in adapters_of(policy)
            for side, factor in (("A", linear.lora_A), ("B", linear.lora_B))
        }
        results.append((output, gradients))
    (expected, gradients), (actual, others) = results
    terms = float(groups_batch.advantages.abs().sum())  # scale of |terms| / N of design.md, point 10
    assert abs(actual.loss - expected.loss) <= 1e-5 * terms
    for key, gradient in gradients.items():
        assert relative(others[key], gradient) <= 1e-5, key


def test_initial_adapters_follow_from_seed_and_name_and_have_the_specified_width(tiny_model):
    first = make_policy(tiny_model("llama"), spec=spec(dim=32))
    only_q = make_policy(tiny_model("llama"), spec=spec(dim=32, targets=("q_proj",)))
    for name, linear in adapters_of(only_q):
        twin = first._model.get_submodule(name)
        assert torch.equal(linear.lora_A.weight, twin.lora_A.weight), name
    drawn = torch.cat([linear.lora_A.weight.flatten() for _, linear in adapters_of(only_q)])
    assert drawn.std().item() == pytest.approx(math.sqrt(2 / (48 + 32)), rel=0.05)
    names = [name for name, _ in adapters_of(only_q)]
    a, b = (only_q._model.get_submodule(name).lora_A.weight for name in names[:2])
    assert not torch.equal(a, b)


def test_published_weights_are_the_merge_and_the_base_stays(tiny_model, groups_batch):
    policy = make_policy(tiny_model("llama"), spec=spec())
    randomise_b(policy)
    name = "model.layers.1.mlp.down_proj"
    linear = policy._model.get_submodule(name)
    assert isinstance(linear, AdapterLinear)
    base = linear.weight.detach().clone()
    ref = policy.publish(3, "merged")
    assert {info.name for info in ref.manifest} == {f"{n}.weight" for n, _ in adapters_of(policy)}
    exact = base.double() + 2.0 * linear.lora_B.weight.double() @ linear.lora_A.weight.double()
    torch.testing.assert_close(ref.tensors[f"{name}.weight"].double(), exact, atol=1e-6, rtol=0)
    assert torch.equal(linear.weight, base)
    adapter = policy.publish(3, "adapter")
    assert torch.equal(adapter.tensors[adapter_tensor_name(name, "B")], linear.lora_B.weight)
    assert adapter.digest == ref.digest
    randomise_b(policy, seed=4)
    assert policy.publish(4, "merged").digest != ref.digest


def test_full_fine_tuning_trains_all_weights_and_keeps_its_reference(tiny_model, groups_batch, tmp_path):
    policy = make_policy(tiny_model("llama"), keep_reference=True)
    before = policy.reference_logprobs(groups_batch)
    loss = make_policy_loss(LossFnConfig(reference_policy_kl_penalty=0.0))
    policy.train_step(groups_batch, loss)
    assert not torch.allclose(policy.logprobs(groups_batch), before, atol=1e-4)
    assert torch.equal(policy.reference_logprobs(groups_batch), before)
    ref = policy.publish(1, "merged")
    assert len(ref.manifest) == len(dict(policy._model.named_parameters()))
    policy.save(tmp_path)
    resumed = make_policy(tiny_model("llama"))
    resumed.load(tmp_path)
    assert torch.equal(resumed.logprobs(groups_batch), policy.logprobs(groups_batch))
    assert resumed.train_step(groups_batch, loss) == policy.train_step(groups_batch, loss)
    with pytest.raises(ValueError, match=r"lora_sync='adapter': there is no adapter"):
        policy.publish(2, "adapter")


def test_full_fine_tuning_gradients_equal_transformers(tiny_model, groups_batch):
    policy = make_policy(tiny_model("llama"), max_grad_norm=None)
    judge = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32).eval()
    num_tokens = groups_batch.denominators.num_loss_tokens
    (-(plain_logprobs(judge, groups_batch) * groups_batch.advantages[:, None]).sum() / num_tokens).backward()
    policy.train_step(groups_batch, make_policy_loss(LossFnConfig(reference_policy_kl_penalty=0.0, ratio_clip_max=1e9)))
    for (name, p), (_, q) in zip(policy._model.named_parameters(), judge.named_parameters(), strict=True):
        assert relative(p.grad, q.grad) <= 1e-4, name


def test_a_bad_number_stops_before_the_optimizer_moves(tiny_model, groups_batch):
    policy = make_policy(tiny_model("llama"), spec=spec())
    randomise_b(policy)
    before = policy.logprobs(groups_batch)
    groups_batch.advantages[2:] = math.nan
    with pytest.raises(FloatingPointError, match="optimizer has not moved"):
        policy.train_step(groups_batch, make_policy_loss(LossFnConfig(reference_policy_kl_penalty=0.0)))
    assert torch.equal(policy.logprobs(groups_batch), before)


def test_layouts_that_the_attention_cannot_serve_are_refused(tiny_model):
    path = tiny_model("mistral-window")
    with pytest.raises(ValueError, match=r"sequence_packing.enabled=True: packing needs full causal attention"):
        make_policy(path, spec=spec(), sequence_packing={"enabled": True})
    with pytest.raises(ValueError, match=r"shared_prefix.enabled=True: sharing needs full causal attention"):
        make_policy(path, spec=spec(), shared_prefix={"enabled": True})
