"""Every wrong input ends with exit code 2 and one paragraph, before anything is written."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from tests.evaluation.evaluation_runs import save_peft_adapter
from tests.export.exports import convert, converted, tensors_of, write_tensors
from tests.tiny_models import save_random_model

PARTS = ("gate", "up", "down")
ROOT = Path(__file__).parents[2]


def refused(adapter, out, *flags, says: str):
    existed = out.exists()
    ended = convert(adapter, out, *flags)
    assert ended.code == 2, ended
    assert says in ended.err, ended.err
    assert ended.out == ""
    message = ended.err[ended.err.index("Error: ") :]
    assert "\n" not in message.strip()
    assert "Traceback" not in message
    assert existed or not out.exists()
    assert not list(out.parent.glob("tmp_export_*"))


@pytest.fixture
def step(trained_run, tmp_path):
    return shutil.copytree(trained_run.checkpoints / "step_1", tmp_path / "step_1")


@pytest.fixture
def adapter(peft_adapter, tmp_path):
    return shutil.copytree(peft_adapter, tmp_path / "adapter")


def change_config(adapter, **values):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_tensors(adapter, change):
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_a_base_with_other_values_is_refused_by_its_digest(step, tiny_llama, tmp_path):
    other = shutil.copytree(tiny_llama, tmp_path / "other")
    tensors = tensors_of(tiny_llama)
    tensors["model.layers.0.mlp.gate_proj.weight"][3, 4] += 1e-3
    write_tensors(other, tensors)
    for flag in ("--hf-model-name", "--base-ckpt"):
        refused(step, tmp_path / "out", flag, str(other), says="has other weights than those that")
    write_tensors(other, tensors_of(tiny_llama))
    converted(step, tmp_path / "out", "--base-ckpt", str(other))


def test_an_existing_output_is_refused(step, tmp_path):
    out = converted(step, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    refused(step, out, says="exists already. Name another directory, or replace this one with --overwrite.")
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_what_is_no_export_is_not_replaced(step, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    refused(step, tmp_path / "mine", "--overwrite", says="so it is no export and is not replaced")
    refused(step, tmp_path / "mine" / "thesis.tex", says="is a file")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "x"


def test_an_output_that_holds_an_input_is_refused(step, tmp_path):
    out = converted(step, tmp_path / "out")
    shutil.copytree(step, out / "step_1")
    refused(out / "step_1", out, "--overwrite", says="which is read. Name another directory.")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "there is no such directory"),
        (lambda path: path.mkdir(), "holds no adapter_config.json, only nothing"),
        (lambda path: (path / "step_4").mkdir(parents=True), "Name one of its steps: step_4. --all converts every one"),
        (lambda path: (path / "policy" / "weights").mkdir(parents=True), "is a step of full fine-tuning"),
    ],
)
def test_a_place_without_an_adapter_says_what_is_there(tmp_path, make, says):
    make(tmp_path / "place")
    refused(tmp_path / "place", tmp_path / "out", says=says)


def test_all_needs_a_run(peft_adapter, tmp_path):
    refused(peft_adapter, tmp_path / "out", "--all", says="holds no step_N directory")


@pytest.mark.parametrize("flags", [(), ("--adapter-only",)])
def test_an_adapter_in_pickle_is_read_without_running_it(adapter, peft_adapter, tmp_path, flags):
    path = adapter / "adapter_model.safetensors"
    torch.save(load_file(path), adapter / "adapter_model.bin")
    path.unlink()
    name = "adapter_model.safetensors" if flags else "model.safetensors"
    out, expected = (converted(source, tmp_path / source.parent.name, *flags) for source in (adapter, peft_adapter))
    one, other = load_file(out / name), load_file(expected / name)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in other)
    torch.save({"code": Path}, adapter / "adapter_model.bin")
    refused(adapter, tmp_path / "no", *flags, says="holds something other than tensors")


def test_values_that_are_not_finite_are_refused(adapter, tmp_path):
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    change_tensors(adapter, lambda tensors: tensors[name].view(-1)[5:6].fill_(float("nan")))
    refused(adapter, tmp_path / "out", says=f"{name} holds values that are not finite")


def test_a_module_that_the_base_does_not_have_is_named(adapter, tmp_path):
    def move(tensors):
        for side in "AB":
            prefix = "base_model.model.model.layers."
            tensors[f"{prefix}9.mlp.up_proj.lora_{side}.weight"] = tensors.pop(
                f"{prefix}1.mlp.up_proj.lora_{side}.weight"
            )

    change_config(adapter, rank_pattern={})
    change_tensors(adapter, move)
    refused(adapter, tmp_path / "out", says="the adapter changes model.layers.9.mlp.up_proj, which it does not have")


def test_a_target_without_tensors_is_named(adapter, tmp_path):
    def drop(tensors):
        for side in "AB":
            del tensors[f"base_model.model.model.layers.1.self_attn.o_proj.lora_{side}.weight"]

    change_tensors(adapter, drop)
    refused(adapter, tmp_path / "out", says="has no tensors for model.layers.1.self_attn.o_proj")


def test_a_rank_other_than_the_config_says_is_named(adapter, tmp_path):
    change_config(adapter, r=8)
    refused(adapter, tmp_path / "out", says="lora_A of model.layers.0.mlp.down_proj is [4, 80], and [8, 80] is needed")


def test_an_a_without_its_b_is_named(adapter, tmp_path):
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    change_tensors(adapter, lambda tensors: tensors.pop(name))
    refused(adapter, tmp_path / "out", says=f"1 missing: {name}")


@pytest.mark.parametrize("key", ["use_dora", "fan_in_fan_out"])
def test_a_feature_that_a_merge_would_lose_is_named(adapter, tmp_path, key):
    change_config(adapter, **{key: True})
    refused(adapter, tmp_path / "out", says=f"adapter_config.{key}=True")


def test_a_larger_base_is_refused(adapter, tiny_model, tmp_path):
    refused(
        adapter, tmp_path / "out", "--hf-model-name", str(tiny_model("qwen2")), says="does not fit --hf-model-name="
    )


def test_a_base_without_safetensors_is_refused(adapter, bf16_llama, tmp_path):
    other = shutil.copytree(bf16_llama, tmp_path / "other")
    (other / "model.safetensors").rename(other / "pytorch_model.bin")
    refused(adapter, tmp_path / "out", "--base-ckpt", str(other), says="holds no model.safetensors")


def test_a_quantized_base_is_refused(adapter, bf16_llama, tmp_path):
    other = shutil.copytree(bf16_llama, tmp_path / "other")
    config = json.loads((other / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (other / "config.json").write_text(json.dumps(config))
    refused(adapter, tmp_path / "out", "--base-ckpt", str(other), says="its weights are quantized (fp8)")


def test_a_weight_that_is_no_float_is_refused(adapter, bf16_llama, tmp_path):
    other = shutil.copytree(bf16_llama, tmp_path / "other")
    tensors = tensors_of(bf16_llama)
    name = "model.layers.1.self_attn.v_proj.weight"
    write_tensors(other, tensors | {name: tensors[name].to(torch.float8_e4m3fn)})
    refused(adapter, tmp_path / "out", "--base-ckpt", str(other), says=f"{name} is stored as F8_E4M3")


def expert_base(directory: Path, *, stacked: bool) -> dict[str, torch.Tensor]:
    """Make a directory's model one of two layers, the first of two experts, and return its tensors."""
    config = Qwen3MoeConfig(
        hidden_size=48,
        intermediate_size=80,
        moe_intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=2,
        num_experts_per_tok=1,
        mlp_only_layers=[1],
        vocab_size=64,
    )
    save_random_model(config, directory)
    tensors = {name: tensor.bfloat16() for name, tensor in tensors_of(directory).items()}
    if stacked:
        experts = "model.layers.0.mlp.experts"
        parts = {part: [tensors.pop(f"{experts}.{i}.{part}_proj.weight") for i in (0, 1)] for part in PARTS}
        gate_up = [torch.cat(pair) for pair in zip(parts["gate"], parts["up"], strict=True)]
        tensors |= {f"{experts}.gate_up_proj": torch.stack(gate_up), f"{experts}.down_proj": torch.stack(parts["down"])}
    write_tensors(directory, tensors)
    return tensors


@pytest.mark.parametrize("module", ["mlp.experts.1.gate_proj", "mlp.experts"])
def test_an_adapter_on_stacked_experts_is_refused_by_name(bf16_llama, adapter, tmp_path, module):
    other = shutil.copytree(bf16_llama, tmp_path / "other")
    expert_base(other, stacked=True)

    def to_experts(tensors):
        for side in "AB":
            moved = tensors.pop(f"base_model.model.model.layers.0.mlp.gate_proj.lora_{side}.weight")
            tensors[f"base_model.model.model.layers.0.{module}.lora_{side}.weight"] = moved

    change_tensors(adapter, to_experts)
    says = f"has an adapter on model.layers.0.{module}, and the base holds those experts stacked in"
    refused(adapter, tmp_path / "out", "--base-ckpt", str(other), says=says)


def test_experts_that_the_base_stores_one_by_one_are_merged(bf16_llama, tmp_path):
    other = shutil.copytree(bf16_llama, tmp_path / "other")
    tensors = expert_base(other, stacked=False)
    experts = {name: tensor for name, tensor in tensors.items() if ".experts." in name and "gate_proj" in name}
    adapter = save_peft_adapter(bf16_llama, tmp_path / "adapter", 4, r=4, target_modules=["q_proj"])
    change_config(adapter, target_modules=["q_proj", "gate_proj"])
    shapes = {"A": (4, 48), "B": (80, 4)}
    prefix = "base_model.model.model.layers"
    outside = {f"{prefix}.1.mlp.gate_proj.lora_{s}.weight": torch.randn(shapes[s]) for s in "AB"}
    change_tensors(adapter, lambda tensors: tensors.update(outside))
    out = tensors_of(converted(adapter, tmp_path / "passed", "--base-ckpt", str(other)))
    assert all(torch.equal(out[name], weight) for name, weight in experts.items())
    inside = {name.replace(".1.mlp.", f".0.mlp.experts.{i}."): t.clone() for i in (0, 1) for name, t in outside.items()}
    change_tensors(adapter, lambda tensors: tensors.update(inside))
    out = tensors_of(converted(adapter, tmp_path / "merged", "--base-ckpt", str(other)))
    assert not any(torch.equal(out[name], weight) for name, weight in experts.items())


def test_a_base_that_is_not_one_model_is_refused_by_name(adapter, bf16_llama, tmp_path):
    other = shutil.copytree(bf16_llama, tmp_path / "other")
    tensors = tensors_of(bf16_llama)
    name = "model.layers.1.mlp.up_proj.weight"
    write_tensors(other, {each: tensor for each, tensor in tensors.items() if each != name})
    refused(adapter, tmp_path / "out", "--base-ckpt", str(other), says=f"config.json describes (1 missing: {name})")


def test_a_base_that_is_nowhere_lists_the_places(adapter, tmp_path):
    refused(adapter, tmp_path / "out", "--hf-model-name", str(tmp_path / "gone"), says="--hf-model-name='")
    refused(adapter, tmp_path / "out", "--base-ckpt", str(tmp_path / "gone"), says="--base-ckpt='")
    change_config(adapter, base_model_name_or_path=None)
    refused(adapter, tmp_path / "out", says="does not say which model it was made for")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--max-shard-size", "0"), "--max-shard-size='0': must be a size"),
        (("--max-shard-size", "5 parsecs"), "--max-shard-size='5 parsecs': must be a size"),
        (("--no-verify", "--verify-full"), "--verify-full=True: contradicts --no-verify"),
        (("--adapter-only", "--dtype", "float16"), "--dtype='float16': is about merged weights"),
        (("--adapter-only", "--verify-logits"), "--verify-logits=True: is about merged weights"),
    ],
)
def test_flags_that_contradict_are_refused(peft_adapter, tmp_path, flags, says):
    refused(peft_adapter, tmp_path / "out", *flags, says=says)


def test_a_place_that_cannot_be_written_is_refused_before_the_work(peft_adapter, tmp_path):
    (tmp_path / "file").write_text("x")
    refused(peft_adapter, tmp_path / "file" / "below" / "out", says="cannot be written")


def test_logits_need_a_tokenizer(adapter, tiny_model, tmp_path):
    base = tiny_model("qwen2")
    other = save_peft_adapter(base, tmp_path / "other", 4, r=4, target_modules=["q_proj"])
    refused(other, tmp_path / "out", "--verify-logits", says="has no tokenizer to write prompts with")


@pytest.mark.parametrize("script", ["tools/convert_lora_to_hf.py", "examples/converters/convert_lora_to_hf.py"])
def test_the_command_shows_help_and_needs_its_two_paths(script):
    tool = [sys.executable, script]
    shown = subprocess.run([*tool, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert shown.returncode == 0
    for flag in ("--adapter-ckpt", "--base-ckpt", "--hf-model-name", "--hf-ckpt-path", "--adapter-only", "--all"):
        assert flag in shown.stdout
    without = subprocess.run([*tool, "--all"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert without.returncode == 2
    assert "--adapter-ckpt, --hf-ckpt-path" in without.stderr


@pytest.mark.parametrize("flags", [(), ("--adapter-only",)])
@pytest.mark.parametrize(
    ("field", "value"),
    [("lora_alpha", float("nan")), ("modules_to_save", ["lm_head"]), ("r", 3), ("alpha_pattern", {"(": 2})],
)
def test_the_configuration_is_checked_alike_with_and_without_a_base(adapter, tmp_path, flags, field, value):
    change_config(adapter, **{field: value})
    says = f"adapter_config.{field}=" if field != "r" else "is [4, 80], and [3, 80] is needed there"
    refused(adapter, tmp_path / "out", *flags, says=says)


@pytest.mark.parametrize("flags", [(), ("--adapter-only",)])
def test_a_regular_expression_of_targets_is_read_as_peft_reads_it(bf16_llama, tmp_path, flags):
    adapter = save_peft_adapter(bf16_llama, tmp_path / "adapter", 4, r=4, target_modules=r".*\.(q|v)_proj")
    out = converted(adapter, tmp_path / "out", *flags)
    if flags:
        assert json.loads((out / "adapter_config.json").read_text())["target_modules"] == r".*\.(q|v)_proj"
        return
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bf16_llama), adapter).merge_and_unload()
    for name, tensor in tensors_of(out).items():
        torch.testing.assert_close(tensor, expected.state_dict()[name], rtol=1e-2, atol=1e-2)


def test_tensors_that_no_target_reaches_are_named_without_a_base(adapter, tmp_path):
    change_config(adapter, target_modules=["q_proj"])
    says = "the adapter changes model.layers.0.mlp.down_proj and 11 other modules, which it does not have or"
    refused(adapter, tmp_path / "out", "--adapter-only", says=says)
