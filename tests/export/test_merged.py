"""Merged exports against fp64 and against stock PEFT."""

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_rl_lora import tensors as tensors_module
from nemo_rl_lora.lora.merge import merged_weight
from tests.evaluation.evaluation_runs import save_peft_adapter
from tests.export.exports import bytes_of, convert, converted, report_of, same_bits, tensors_of, write_tensors
from tests.tiny_models import ALL_LINEAR


def exact_weights(base, adapter):
    """Every weight of base + adapter in fp64, with PEFT's own factors and scale."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    wrapped = peft.PeftModel.from_pretrained(model, adapter)
    exact = {}
    for name, module in wrapped.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            a, b = module.lora_A["default"].weight.double(), module.lora_B["default"].weight.double()
            plain = name.removeprefix("base_model.model.") + ".weight"
            exact[plain] = module.base_layer.weight.double() + module.scaling["default"] * b @ a
    return exact


def with_a_head(base, directory):
    """An adapter on q_proj and the output head, without the copy of the head's weight that PEFT puts beside it."""
    adapter = save_peft_adapter(base, directory, 2, r=4, target_modules=["q_proj", "lm_head"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({k: v for k, v in tensors.items() if "base_layer" not in k}, adapter / "adapter_model.safetensors")
    return adapter


def test_each_merged_weight_is_one_rounding_from_fp64_and_every_other_is_the_base(bf16_llama, peft_adapter, tmp_path):
    base, merged = tensors_of(bf16_llama), tensors_of(converted(peft_adapter, tmp_path / "out"))
    exact = exact_weights(bf16_llama, peft_adapter)
    assert merged.keys() == base.keys()
    assert len(exact) == 14
    for name, weight in merged.items():
        assert weight.dtype == torch.bfloat16
        if name in exact:
            error = (weight.double() - exact[name]).abs()
            assert (error <= 2.0**-8 * exact[name].abs() * (1 + 1e-5) + 1e-6).all(), name
            assert not torch.equal(weight, base[name])
        else:
            assert same_bits(weight, base[name]), name


def test_the_report_states_the_measured_error_and_a_bound_above_it(bf16_llama, peft_adapter, tmp_path):
    out = converted(peft_adapter, tmp_path / "out", "--verify-full")
    accuracy = report_of(out)["accuracy"]
    exact, merged = exact_weights(bf16_llama, peft_adapter), tensors_of(out)
    largest = max(float((merged[name].double() - exact[name]).abs().max()) for name in exact)
    assert accuracy["max_abs_error"] == pytest.approx(largest, rel=1e-6)
    assert accuracy["num_rows"] == sum(len(weight) for weight in exact.values())
    assert 0.5 < accuracy["worst_ratio"] <= 1
    assert accuracy["bound"] >= accuracy["max_abs_error"]


def test_blocks_of_few_rows_give_the_weight_of_one_block(bf16_llama, peft_adapter, tmp_path, monkeypatch):
    whole = tensors_of(converted(peft_adapter, tmp_path / "whole"))
    monkeypatch.setattr(tensors_module, "BLOCK_ELEMENTS", 100)  # two rows of 48
    parts = tensors_of(converted(peft_adapter, tmp_path / "parts", "--verify-full"))
    assert all(torch.allclose(parts[name], whole[name], rtol=2.0**-7, atol=0) for name in whole)
    assert sum(int((parts[name] != whole[name]).sum()) for name in whole) < 5  # where fp32 sums differ by their order


def test_an_export_repeated_has_the_same_bytes(peft_adapter, tmp_path):
    first, second = (bytes_of(converted(peft_adapter, tmp_path / name)) for name in ("one", "two"))
    assert first.keys() == second.keys() >= {"model.safetensors", "config.json", "tokenizer.json", "export_report.json"}
    assert first == second


def test_shards_with_an_index_hold_the_same_model(peft_adapter, tmp_path):
    single = tensors_of(converted(peft_adapter, tmp_path / "single"))
    out = converted(peft_adapter, tmp_path / "sharded", "--max-shard-size", "30KB")
    shards = sorted(out.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert all(path.stat().st_size < 34_000 for path in shards)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == single.keys()
    sharded = tensors_of(out)
    assert all(same_bits(sharded[name], single[name]) for name in single)
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(loaded[name], single[name]) for name in single)


def test_a_sharded_base_is_read_like_one_file(bf16_llama, peft_adapter, tmp_path):
    sharded = tmp_path / "base"
    shutil.copytree(bf16_llama, sharded)
    (sharded / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(bf16_llama, dtype=torch.bfloat16).save_pretrained(
        sharded, max_shard_size="30KB"
    )
    assert (sharded / "model.safetensors.index.json").is_file()
    out = tensors_of(converted(peft_adapter, tmp_path / "out", "--base-ckpt", str(sharded)))
    single = tensors_of(converted(peft_adapter, tmp_path / "single"))
    assert out.keys() == single.keys()
    assert all(same_bits(out[name], single[name]) for name in single)


@pytest.mark.parametrize("name", ["float32", "float16"])
def test_another_dtype_is_rounded_once_from_fp32(bf16_llama, peft_adapter, tmp_path, name):
    dtype = getattr(torch, name)
    out = converted(peft_adapter, tmp_path / "out", "--dtype", name, "--verify-full")
    exact, merged, base = exact_weights(bf16_llama, peft_adapter), tensors_of(out), tensors_of(bf16_llama)
    assert {weight.dtype for weight in merged.values()} == {dtype}
    for weight, value in exact.items():
        limit = 2.0**-11 if name == "float16" else 1e-6
        assert ((merged[weight].double() - value).abs() <= limit * value.abs() + 1e-6).all(), weight
    assert torch.equal(merged["model.norm.weight"], base["model.norm.weight"].to(dtype))
    assert AutoModelForCausalLM.from_pretrained(out).dtype == dtype  # by its config.json


def test_a_dtype_too_narrow_for_the_weights_fails_and_leaves_nothing(bf16_llama, peft_adapter, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(bf16_llama, base)
    tensors = tensors_of(bf16_llama)
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], 1e5)
    write_tensors(base, tensors)
    ended = convert(peft_adapter, tmp_path / "out", "--base-ckpt", str(base), "--dtype", "float16")
    assert ended.code == 1
    assert "model.norm.weight has values that are not finite in F16" in ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_an_untied_head_takes_its_adapter(tiny_model, tmp_path):
    base = tiny_model("qwen2")
    adapter = with_a_head(base, tmp_path / "adapter")
    merged = tensors_of(converted(adapter, tmp_path / "out", "--hf-model-name", str(base)))
    weights = tensors_of(base)
    changed = {name for name in merged if not torch.equal(merged[name], weights[name])}
    assert changed == {"lm_head.weight", *(f"model.layers.{i}.self_attn.q_proj.weight" for i in range(3))}


def test_an_adapter_on_a_tied_head_is_refused(bf16_llama, tmp_path):
    adapter = with_a_head(bf16_llama, tmp_path / "adapter")
    ended = convert(adapter, tmp_path / "out")
    assert ended.code == 2
    assert "shares its weight with the input embeddings" in ended.err
    assert not (tmp_path / "out").exists()


def test_a_tied_head_follows_its_embeddings(peft_adapter, tmp_path):
    out = converted(peft_adapter, tmp_path / "out")
    assert "lm_head.weight" not in tensors_of(out)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_a_merge_that_changes_nothing_warns(bf16_llama, tmp_path):
    adapter = save_peft_adapter(bf16_llama, tmp_path / "adapter", 2, scale=0.0, r=4, target_modules=list(ALL_LINEAR))
    ended = convert(adapter, tmp_path / "out")
    assert ended.code == 0
    assert "the merge changes nothing" in ended.out
    assert report_of(tmp_path / "out")["changed_fraction"] == 0


def test_an_update_that_bfloat16_cannot_hold_warns_too_and_float32_holds_it(bf16_llama, tmp_path):
    adapter = save_peft_adapter(bf16_llama, tmp_path / "adapter", 2, scale=1e-7, r=4, target_modules=["q_proj"])
    assert "the merge changes nothing" in convert(adapter, tmp_path / "narrow").out
    wide = convert(adapter, tmp_path / "wide", "--dtype", "float32")
    assert "changes nothing" not in wide.out
    assert report_of(tmp_path / "wide")["changed_fraction"] > 0.5


def test_the_share_of_the_update_that_survives_the_dtype_is_said_with_the_remedy(bf16_llama, tmp_path):
    """Against the formula in fp64, on the files; B is so small that most of it is lost in bfloat16."""
    adapter = save_peft_adapter(bf16_llama, tmp_path / "adapter", 3, 1e-4, r=4, target_modules=list(ALL_LINEAR))
    base, exact = tensors_of(bf16_llama), exact_weights(bf16_llama, adapter)
    for dtype in ("bfloat16", "float32"):
        ended = convert(adapter, tmp_path / dtype, "--dtype", dtype)
        merged, report = tensors_of(tmp_path / dtype), report_of(tmp_path / dtype)
        update = torch.cat([(exact[name] - base[name].double()).flatten() for name in exact])
        left = torch.cat([(merged[name].double() - base[name].double()).flatten() for name in exact])
        share, error = float(left @ update / (update @ update)), float((left - update).norm() / update.norm())
        assert report["surviving_share"] == pytest.approx(share, rel=1e-3)
        assert report["relative_rounding_error"] == pytest.approx(error, rel=1e-2, abs=1e-4)
        said = f"In {report['merged_dtypes'][0]} {share:.1%} of the update survives, and rounding adds {error:.1%} of"
        last = ended.out.strip().splitlines()[-1]
        assert said in last
        assert ("--adapter-only, or write --dtype float32" in last) == (dtype == "bfloat16")
    assert share > 0.999
    with_zero = save_peft_adapter(bf16_llama, tmp_path / "zero", 4, 0.0, r=4, target_modules=["q_proj"])
    assert "survives" not in convert(with_zero, tmp_path / "of_zero").out


def test_config_generation_config_and_tokenizer_come_along(bf16_llama, peft_adapter, tmp_path):
    out = converted(peft_adapter, tmp_path / "out")
    assert json.loads((out / "config.json").read_text()) == json.loads((bf16_llama / "config.json").read_text())
    assert (out / "generation_config.json").read_bytes() == (bf16_llama / "generation_config.json").read_bytes()
    mine, theirs = (AutoTokenizer.from_pretrained(directory) for directory in (out, bf16_llama))
    assert mine("7 + 7?").input_ids == theirs("7 + 7?").input_ids
    assert mine.chat_template == theirs.chat_template


def test_the_configuration_says_the_dtype_that_was_asked_for_and_no_older_one(bf16_llama, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(bf16_llama, base)
    config = json.loads((base / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")  # as transformers 4 wrote it
    (base / "config.json").write_text(json.dumps(config))
    adapter = save_peft_adapter(base, tmp_path / "adapter", 3, 0.1, r=4, target_modules=["q_proj"])
    written = json.loads((converted(adapter, tmp_path / "out", "--dtype", "float32") / "config.json").read_text())
    assert {key: written.get(key) for key in ("dtype", "torch_dtype")} == {"dtype": "float32", "torch_dtype": None}


def test_logits_are_compared_through_stock_software(peft_adapter, tmp_path):
    ended = convert(peft_adapter, tmp_path / "out", "--verify-logits")
    assert ended.code == 0, ended.err
    logits = report_of(tmp_path / "out")["logits"]
    assert logits["num_tokens"] > 100
    assert 0 < logits["mean_abs_error"] < 0.05 * logits["adapter_effect"]
    assert "the adapter moves them" in ended.out


def test_a_merge_that_is_no_nearer_than_the_base_fails_the_comparison(bf16_llama, tmp_path):
    adapter = save_peft_adapter(bf16_llama, tmp_path / "adapter", 2, scale=1e-7, r=4, target_modules=["q_proj"])
    ended = convert(adapter, tmp_path / "out", "--verify-logits")
    assert ended.code == 1
    assert "rounding lost the adapter" in ended.err
    assert not (tmp_path / "out").exists()


def test_a_damaged_output_is_found_when_it_is_read_back(peft_adapter, tmp_path, monkeypatch):
    """What is written is not what was computed: every weight a little off, as by a wrong scale."""
    from nemo_rl_lora.export import merged

    def off(weight, a, b, scale, **kwargs):
        return merged_weight(weight, a, b, scale * 1.05, **kwargs)

    monkeypatch.setattr(merged, "merged_weight", off)
    ended = convert(peft_adapter, tmp_path / "out")
    assert ended.code == 1
    assert "times as far from base + adapter in fp64 as rounding explains" in ended.err
    assert not list(tmp_path.iterdir())


def test_a_weight_without_an_adapter_that_is_not_the_bases_is_found(peft_adapter, tmp_path, monkeypatch):
    plain = tensors_module.TensorWriter.write

    def spoil(self, block):
        if isinstance(block, memoryview) and len(block) == 2 * 48:  # a norm's weight
            block = memoryview(bytearray(block))
            block[0] ^= 1
        plain(self, block)

    monkeypatch.setattr(tensors_module.TensorWriter, "write", spoil)
    ended = convert(peft_adapter, tmp_path / "out")
    assert ended.code == 1
    assert "has no adapter and is not the base's" in ended.err


def test_a_file_that_changed_on_its_way_to_the_disk_is_found(peft_adapter, tmp_path, monkeypatch):
    plain = tensors_module.TensorWriter.finish

    def spoil(self):
        written = plain(self)
        with (tmp_path / "tmp_export_out" / "model.safetensors").open("r+b") as file:
            file.seek(-3, 2)
            file.write(b"x")
        return written

    monkeypatch.setattr(tensors_module.TensorWriter, "finish", spoil)
    ended = convert(peft_adapter, tmp_path / "out")
    assert ended.code == 1
    assert "reads back otherwise than it was written" in ended.err


def test_weights_of_several_dtypes_keep_theirs(bf16_llama, peft_adapter, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(bf16_llama, base)
    tensors = tensors_of(bf16_llama)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].half()
    odd = "model.layers.0.self_attn.rotary_emb.inv_freq"  # a file may hold it, and no model reads it
    tensors[odd] = torch.arange(3, dtype=torch.uint8)
    write_tensors(base, tensors)
    out = converted(peft_adapter, tmp_path / "out", "--base-ckpt", str(base), "--verify-full")
    merged = tensors_of(out)
    assert all(
        t.offset % merged[name].itemsize == 0 for name, t in tensors_module.stored_tensors(out).items()
    )  # readers may map it
    assert {name: weight.dtype for name, weight in merged.items()} == {n: w.dtype for n, w in tensors.items()}
    assert torch.equal(merged[odd], tensors[odd])
