"""An adapter in PEFT's form and in Megatron's two: what a conversion is called, and that it is what it is called."""

import io
import json
from contextlib import redirect_stderr, redirect_stdout

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from nemo_rl_lora.export import transcode
from nemo_rl_lora.policy.megatron.convert import fuse
from nemo_rl_lora.policy.megatron.families import read_family
from nemo_rl_lora.run import cli
from tests.evaluation.evaluation_runs import save_peft_adapter

ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tiny_model):
    """A Llama with grouped queries, so that the order of linear_qkv's rows matters."""
    return tiny_model("llama")


@pytest.fixture(scope="module")
def family(base):
    return read_family(AutoConfig.from_pretrained(base), "base", 1)


@pytest.fixture
def adapter(base, tmp_path):
    """A PEFT adapter with an A for each module."""
    return save_peft_adapter(base, tmp_path / "peft", 1, r=4, lora_alpha=8, target_modules=ATTENTION + MLP)


@pytest.fixture
def sharing(adapter):
    """The same, with equal A in q, k and v, and in gate and up, as the Megatron backend writes it."""
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        first = name.replace("k_proj", "q_proj").replace("v_proj", "q_proj").replace("up_proj", "gate_proj")
        if ".lora_A." in name:
            tensors[name] = tensors[first].clone()
    save_file(tensors, path)
    return adapter


def change(directory, **values):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def transcoded(source, to, out):
    """(label, out) of a conversion by the command."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        assert cli.main(["transcode", "--adapter", str(source), "--to", to, "--out", str(out)]) == 0
    return printed.getvalue().split(": ")[1].split(", dim")[0], out


def updates(directory, family):
    """scale * B @ A of each module in fp64."""
    found = transcode.read(directory, family).factors
    return {name: f.scale * f.b.double() @ f.a.double() for name, f in found.items()}


def same_tensors(one, other):
    one, other = (load_file(directory / "adapter_model.safetensors") for directory in (one, other))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_shared_a_goes_to_megatron_and_back_bit_for_bit(sharing, tmp_path):
    label, shared = transcoded(sharing, "megatron-shared", tmp_path / "shared")
    assert label == "bit-exact"
    tensors = load_file(shared / "adapter_model.safetensors")
    assert tensors["decoder.layers.1.self_attention.linear_qkv.adapter.linear_in.weight"].shape == (4, 48)
    assert tensors["decoder.layers.1.mlp.linear_fc1.adapter.linear_out.weight"].shape == (160, 4)
    label, back = transcoded(shared, "peft", tmp_path / "back")
    assert label == "bit-exact"
    assert same_tensors(back, sharing)


@pytest.mark.parametrize("kind", ["adapter", "sharing"])
def test_canonical_megatron_is_peft_under_other_names(request, kind, tmp_path):
    source = request.getfixturevalue(kind)
    label, canonical = transcoded(source, "megatron-canonical", tmp_path / "canonical")
    assert label == "bit-exact"
    names = load_file(canonical / "adapter_model.safetensors").keys()
    assert "decoder.layers.0.self_attention.linear_qkv.adapter.adapter_q.linear_in.weight" in names
    assert "decoder.layers.0.mlp.linear_fc2.adapter.linear_out.weight" in names
    assert same_tensors(transcoded(canonical, "peft", tmp_path / "back")[1], source)


def test_megatrons_two_forms_go_into_each_other(sharing, tmp_path):
    _, shared = transcoded(sharing, "megatron-shared", tmp_path / "shared")
    label, canonical = transcoded(shared, "megatron-canonical", tmp_path / "canonical")
    assert label == "bit-exact"
    label, again = transcoded(canonical, "megatron-shared", tmp_path / "again")
    assert label == "bit-exact"
    assert same_tensors(again, shared)
    assert json.loads((again / "adapter_config.json").read_text())["form"] == "megatron-shared"


def test_different_a_share_by_growing_and_the_update_stays_exact(adapter, family, tmp_path):
    label, shared = transcoded(adapter, "megatron-shared", tmp_path / "shared")
    assert label == "exact with rank growth"
    config = json.loads((shared / "adapter_config.json").read_text())
    assert (config["dim"], config["alpha"]) == (12, 24)
    before, after = updates(adapter, family), updates(shared, family)
    assert before.keys() == after.keys()
    for name, update in before.items():
        torch.testing.assert_close(after[name], update, atol=1e-15, rtol=1e-14)
    label, back = transcoded(shared, "peft", tmp_path / "back")
    assert label == "bit-exact"
    for name, update in updates(back, family).items():
        torch.testing.assert_close(update, before[name], atol=1e-15, rtol=1e-14)


def test_the_fused_update_is_the_update_of_the_fused_weight(adapter, family, tmp_path):
    _, shared = transcoded(adapter, "megatron-shared", tmp_path / "shared")
    tensors, plain = load_file(shared / "adapter_model.safetensors"), updates(adapter, family)
    layer = "decoder.layers.2.self_attention.linear_qkv"
    a, b = (tensors[f"{layer}.adapter.linear_{side}.weight"].double() for side in ("in", "out"))
    parts = [plain[f"model.layers.2.self_attn.{part}_proj"] for part in "qkv"]
    torch.testing.assert_close(2.0 * b @ a, fuse(layer, parts, family), atol=1e-15, rtol=1e-14)


def test_a_module_left_out_is_filled_with_zeros(base, family, tmp_path):
    adapter = save_peft_adapter(base, tmp_path / "q", 2, r=4, target_modules=["q_proj"])
    label, shared = transcoded(adapter, "megatron-shared", tmp_path / "shared")
    assert label == "exact with rank growth"
    after = updates(shared, family)
    for name, update in updates(adapter, family).items():
        torch.testing.assert_close(after[name], update, atol=1e-15, rtol=1e-14)
    others = [update for name, update in after.items() if "q_proj" not in name]
    assert len(others) == 6
    assert not any(update.any() for update in others)


def test_scales_in_powers_of_two_fold_into_b_and_others_are_impossible(base, family, tmp_path):
    pattern = {"model.layers.0.self_attn.o_proj": 2}
    adapter = save_peft_adapter(
        base, tmp_path / "a", 2, r=4, lora_alpha=8, target_modules=ATTENTION, alpha_pattern=pattern
    )
    _, canonical = transcoded(adapter, "megatron-canonical", tmp_path / "canonical")
    after = updates(canonical, family)
    assert all(torch.equal(after[name], update) for name, update in updates(adapter, family).items())
    change(adapter, alpha_pattern={"model.layers.0.self_attn.o_proj": 3})
    planned = transcode.plan(transcode.read(adapter, family), "megatron-canonical", family)
    assert planned.label == "impossible"
    assert "which is no power of two, would round B" in planned.reasons[0]


def test_ranks_that_differ_are_padded(base, family, tmp_path):
    ranks = {"model.layers.1.mlp.down_proj": 2}
    adapter = save_peft_adapter(
        base, tmp_path / "a", 2, r=4, lora_alpha=8, target_modules=MLP, rank_pattern=ranks,
        alpha_pattern={"model.layers.1.mlp.down_proj": 4},
    )  # fmt: skip
    label, canonical = transcoded(adapter, "megatron-canonical", tmp_path / "canonical")
    assert label == "exact with rank growth"
    after = updates(canonical, family)
    for name, update in updates(adapter, family).items():
        torch.testing.assert_close(after[name], update, atol=1e-15, rtol=1e-14)


def test_what_comes_back_is_loaded_by_stock_peft(adapter, base, tmp_path):
    _, shared = transcoded(adapter, "megatron-shared", tmp_path / "shared")
    _, back = transcoded(shared, "peft", tmp_path / "back")
    tokens = torch.arange(5, 45)[None]
    logits = []
    for directory in (adapter, back):
        model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), directory).eval()
        logits.append(model(tokens).logits.detach())
    torch.testing.assert_close(*logits, atol=1e-4, rtol=0)
    plain = AutoModelForCausalLM.from_pretrained(base)(tokens).logits.detach()
    assert (logits[0] - plain).abs().mean() > 0.1


def test_the_plan_writes_nothing_and_the_impossible_is_refused(base, tmp_path):
    adapter = save_peft_adapter(
        base,
        tmp_path / "a",
        2,
        r=4,
        lora_alpha=8,
        target_modules=["o_proj"],
        alpha_pattern={"layers.0.self_attn.o_proj": 5},
    )
    printed, errors = io.StringIO(), io.StringIO()
    arguments = ["--adapter", str(adapter), "--to", "megatron-shared", "--out", str(tmp_path / "out")]
    with redirect_stdout(printed), redirect_stderr(errors):
        assert cli.main(["transcode", *arguments]) == 2
        plan = ["--adapter", str(adapter), "--to", "peft", "--out", str(tmp_path / "out"), "--plan"]
        assert cli.main(["transcode", *plan]) == 0
    assert "peft to megatron-shared: impossible" in printed.getvalue()
    assert "Keep PEFT's form, which any adapter has." in errors.getvalue()
    assert not (tmp_path / "out").exists()
