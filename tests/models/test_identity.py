"""A base is what its weights are, not how or where they are stored."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nemo_rl_lora.models.source import base_digest
from nemo_rl_lora.tensors import digested_spans, stored_tensors
from tests.driver import TinyRun


@pytest.fixture
def base(tiny_llama, tmp_path):
    directory = tmp_path / "base"
    shutil.copytree(tiny_llama, directory)
    return directory


def test_the_digest_does_not_depend_on_shards_or_place(base, tmp_path):
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(sharded, max_shard_size="60KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    assert base_digest(sharded) == base_digest(base)
    tensors = load_file(base / "model.safetensors")
    other, files = tmp_path / "other", ("model-1.safetensors", "model-2.safetensors")
    other.mkdir()
    weight_map = {name: files[i % 2] for i, name in enumerate(tensors)}
    for file in files:
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, other / file)
    (other / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert base_digest(other) == base_digest(base)


@pytest.mark.parametrize("change", ["value", "name", "shape", "dtype"])
def test_the_digest_depends_on_names_shapes_dtypes_and_values(base, change):
    before = base_digest(base)
    tensors = load_file(base / "model.safetensors")
    weight = tensors.pop("model.layers.1.mlp.up_proj.weight")
    name = "model.layers.1.mlp.other.weight" if change == "name" else "model.layers.1.mlp.up_proj.weight"
    changed = weight.clone()
    changed[7, 5] += change == "value"
    changed = changed.reshape(40, 96) if change == "shape" else changed
    tensors[name] = changed.view(torch.int32) if change == "dtype" else changed
    save_file(tensors, base / "model.safetensors")
    assert base_digest(base) != before


def test_a_large_tensor_is_sampled_from_its_first_to_its_last_bytes(tmp_path):
    weight = torch.zeros(1 << 20)
    digests = set()
    for place in (None, 0, (1 << 20) - 1, (1 << 19) - (1 << 14)):
        changed = weight.clone()
        if place is not None:
            changed[place] = 1
        save_file({"w": changed}, tmp_path / "model.safetensors")
        digests.add(base_digest(tmp_path))
    assert len(digests) == 3  # the last place lies between two samples
    save_file({"w": weight + 1e-3}, tmp_path / "model.safetensors")
    assert base_digest(tmp_path) not in digests


def test_only_a_sample_of_a_large_tensor_is_read(tmp_path):
    save_file({"w": torch.zeros(1 << 20)}, tmp_path / "model.safetensors")
    spans = digested_spans(stored_tensors(tmp_path)["w"].num_bytes, whole=False)
    assert sum(stop - start for start, stop in spans) == 16 * 4096


def test_weights_in_other_files_have_no_digest(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"weights")
    assert base_digest(tmp_path) is None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-10], "bytes instead of"),
        (lambda data: b"\xff" * 16 + data, "does not begin with a header"),
        (lambda data: data[:8] + b"x" + data[9:], "cannot be read as safetensors"),
        (lambda data: data[:4], "cannot be read as safetensors"),
    ],
)
def test_a_file_that_is_not_whole_is_named(base, damage, message):
    path = base / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as raised:
        base_digest(base)
    assert str(path) in str(raised.value)


def test_a_missing_shard_and_a_missing_tensor_are_named(base, tmp_path):
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(sharded, max_shard_size="60KB")
    index = sharded / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"]["model.gone.weight"] = next(iter(document["weight_map"].values()))
    index.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"names model\.gone\.weight"):
        base_digest(sharded)
    next(iter(sorted(sharded.glob("model-*")))).unlink()
    with pytest.raises(ValueError, match="is missing"):
        base_digest(sharded)


def test_a_run_goes_on_only_from_the_base_that_it_was_trained_on(base, tmp_path):
    run = TinyRun(root=tmp_path, model=base, algorithm="sft")
    assert run("sft.max_num_steps=1").code == 0
    info = json.loads((run.checkpoints / "step_1" / "training_info.json").read_text())
    assert info["base_digest"] == base_digest(base)
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][3] += 0.5
    save_file(tensors, base / "model.safetensors")
    ended = run("sft.max_num_steps=2")
    assert ended.code == 2
    assert "was trained on other base weights" in ended.err
    assert run.steps() == ["step_1"]
    tensors["model.norm.weight"][3] -= 0.5
    save_file(tensors, base / "model.safetensors")
    assert run("sft.max_num_steps=2").code == 0
