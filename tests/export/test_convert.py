"""What the converter makes of checkpoints, how outputs appear, and what --all does."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from nemo_rl_lora import tensors
from nemo_rl_lora.export import convert as convert_module
from nemo_rl_lora.lora.files import ADAPTER_FILE
from nemo_rl_lora.models import source
from tests.driver import TinyRun
from tests.export.exports import bytes_of, convert, converted, report_of, same_bits, tensors_of
from tests.export.test_merged import exact_weights


@pytest.fixture
def run(trained_run, tmp_path):
    """A copy of the run's checkpoints, to be damaged."""
    return shutil.copytree(trained_run.checkpoints, tmp_path / "run")


def test_a_step_is_merged_into_the_base_that_it_names(trained_run, tiny_llama, tmp_path):
    step = trained_run.checkpoints / "step_3"
    out = converted(step, tmp_path / "out")
    report = report_of(out)
    info = json.loads((step / "training_info.json").read_text())
    assert report["settings"]["base_digest"] == info["base_digest"] == source.base_digest(tiny_llama)
    assert report["warnings"] == []
    assert report["changed_fraction"] > 0.9
    base, merged = tensors_of(tiny_llama), tensors_of(out)
    adapter = load_file(step / "policy" / "adapter" / ADAPTER_FILE)
    name = "model.layers.1.mlp.down_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
    exact = base[f"{name}.weight"].double() + 32 / 4 * b @ a
    torch.testing.assert_close(merged[f"{name}.weight"].double(), exact, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("place", [".", "policy/adapter"])
def test_a_step_and_its_adapter_directory_give_the_same(trained_run, tmp_path, place):
    step = trained_run.checkpoints / "step_2"
    assert bytes_of(converted(step / place, tmp_path / "out")) == bytes_of(converted(step, tmp_path / "other"))


def test_the_tokenizer_is_the_one_of_the_run(run, tmp_path):
    template = run / "step_1" / "policy" / "tokenizer" / "chat_template.jinja"
    template.write_text("{{ messages[0].content }}")
    for flags in ((), ("--adapter-only",)):
        out = converted(run / "step_1", tmp_path / f"out{len(flags)}", *flags)
        assert (out / "chat_template.jinja").read_text() == "{{ messages[0].content }}"


def test_settings_of_the_model_that_the_run_overrode_stay_in_force(run, tmp_path):
    config = run / "step_1" / "config.yaml"
    text = config.read_text()
    assert "hf_config_overrides: {}" in text
    config.write_text(text.replace("hf_config_overrides: {}", "hf_config_overrides: {rms_norm_eps: 0.5}"))
    out = converted(run / "step_1", tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(out).config.rms_norm_eps == 0.5


def test_adapter_only_copies_the_tensors_bit_for_bit_under_the_name_that_is_given(trained_run, tmp_path):
    step = trained_run.checkpoints / "step_3"
    out = converted(step, tmp_path / "out", "--adapter-only", "--hf-model-name", "org/base")
    assert (out / ADAPTER_FILE).read_bytes() == (step / "policy" / "adapter" / ADAPTER_FILE).read_bytes()
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"


def test_adapter_only_opens_no_base(run, tiny_llama, tmp_path, monkeypatch):
    """Neither by a name that leads nowhere, nor by one whose weights could be opened."""
    config = run / "step_1" / "policy" / "adapter" / "adapter_config.json"
    (run / "step_1" / "checksums.json").unlink()
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "no/such-model"}))
    converted(run / "step_1", tmp_path / "one", "--adapter-only")
    opened = []
    plain_open = source.Path.open

    def spy(path, *args, **kwargs):
        opened.append(path)
        return plain_open(path, *args, **kwargs)

    monkeypatch.setattr(source.Path, "open", spy)
    converted(run / "step_1", tmp_path / "two", "--adapter-only", "--hf-model-name", str(tiny_llama))
    assert opened
    assert not [path for path in opened if path.is_relative_to(tiny_llama)]


def test_all_exports_every_step_like_each_by_itself(trained_run, tmp_path):
    converted(trained_run.checkpoints, tmp_path / "all", "--all")
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == ["step_1", "step_2", "step_3"]
    for step in ("step_1", "step_2", "step_3"):
        alone = converted(trained_run.checkpoints / step, tmp_path / step)
        assert bytes_of(tmp_path / "all" / step) == bytes_of(alone)


def test_all_reads_the_base_once(trained_run, tiny_llama, tmp_path, monkeypatch):
    num_read = []
    plain = tensors.TensorReader.read_block

    def count(self, tensor, start, stop):
        block = plain(self, tensor, start, stop)
        if tensor.path.is_relative_to(tiny_llama):
            num_read.append(len(block))
        return block

    monkeypatch.setattr(tensors.TensorReader, "read_block", count)
    converted(trained_run.checkpoints, tmp_path / "all", "--all", "--no-verify")
    assert sum(num_read) == sum(weight.nbytes for weight in tensors_of(tiny_llama).values())


def test_a_second_all_does_nothing_and_a_new_step_is_added(run, tmp_path):
    late = run / "step_3"
    late.rename(tmp_path / "late")
    converted(run, tmp_path / "all", "--all")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "all").rglob("*")}
    again = convert(run, tmp_path / "all", "--all")
    assert again.code == 0
    assert again.out.count("finished before") == 2
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "all").rglob("*")} == before
    (tmp_path / "late").rename(late)
    third = convert(run, tmp_path / "all", "--all")
    assert (third.code, third.out.count("finished before")) == (0, 2)
    assert (tmp_path / "all" / "step_3" / "model.safetensors").is_file()
    assert all(path.stat().st_mtime_ns == at for path, at in before.items() if path.name != "all" and path.is_file())


@pytest.mark.parametrize("flags", [(), ("--adapter-only",)])
def test_a_damaged_step_is_reported_and_the_others_are_exported(run, tmp_path, flags):
    path = run / "step_2" / "policy" / "adapter" / ADAPTER_FILE
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    ended = convert(run, tmp_path / "all", "--all", *flags)
    assert ended.code == 1
    assert f"{path} has other contents than when it was saved" in ended.err
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == ["step_1", "step_3"]
    assert ended.out.count("written") == 3  # two rows and the sum


def test_an_output_of_other_options_is_refused_by_all_and_replaced_on_demand(trained_run, tmp_path):
    converted(trained_run.checkpoints, tmp_path / "all", "--all")
    ended = convert(trained_run.checkpoints, tmp_path / "all", "--all", "--dtype", "bfloat16")
    assert ended.code == 2
    assert "was made with another dtype. Replace it with --overwrite." in ended.err
    converted(trained_run.checkpoints, tmp_path / "all", "--all", "--dtype", "bfloat16", "--overwrite")
    assert tensors_of(tmp_path / "all" / "step_2")["model.norm.weight"].dtype == torch.bfloat16


def test_an_output_that_lost_bytes_is_not_taken_for_finished(trained_run, tmp_path):
    converted(trained_run.checkpoints, tmp_path / "all", "--all")
    weights = tmp_path / "all" / "step_1" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    ended = convert(trained_run.checkpoints, tmp_path / "all", "--all")
    assert (ended.code, ended.out.count("finished before")) == (1, 2)
    assert "step_1'" in ended.err
    assert "is not whole" in ended.err


def test_a_killed_export_leaves_no_output_and_the_next_one_clears_up(trained_run, tmp_path, monkeypatch):
    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    step, out = trained_run.checkpoints / "step_1", tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(convert_module, "write_merged", killed)
        patch.setattr(convert_module.shutil, "rmtree", lambda *args, **kwargs: None)  # SIGKILL clears nothing
        assert convert(step, out).code == 130
    assert [path.name for path in tmp_path.iterdir()] == ["tmp_export_out"]
    converted(step, out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["directory", "file", "link"])
def test_what_lies_where_an_export_is_made_and_is_no_export_stays(trained_run, tmp_path, kind):
    own = tmp_path / "own"
    own.mkdir()
    (own / "notes").write_text("mine")
    place = tmp_path / "tmp_export_out"
    if kind == "link":
        place.symlink_to(own)
    else:
        own.rename(place) if kind == "directory" else place.write_text("mine")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    for flags in ([], ["--adapter-only"]):
        ended = convert(trained_run.checkpoints / "step_1", tmp_path / "out", *flags)
        assert ended.code == 2
        assert f"is made in {place}, which is there and was not left by an export" in ended.err
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_an_interrupted_export_leaves_nothing(trained_run, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert_module, "write_merged", interrupted)
    assert convert(trained_run.checkpoints / "step_1", tmp_path / "out").code == 130
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_fails_the_export_and_leaves_nothing(trained_run, tmp_path, monkeypatch):
    def full(self, block):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensors.TensorWriter, "write", full)
    ended = convert(trained_run.checkpoints / "step_1", tmp_path / "out")
    assert ended.code == 1
    assert "No space left on device" in ended.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("lists_its_files", [True, False])
def test_overwrite_keeps_what_others_put_into_an_export(trained_run, tmp_path, lists_its_files):
    out = converted(trained_run.checkpoints / "step_1", tmp_path / "out")
    (out / "gguf").mkdir()
    (out / "gguf" / "model.gguf").write_text("mine")
    (out / "README.md").write_text("mine")
    if not lists_its_files:
        report = report_of(out)
        del report["written"]
        (out / "export_report.json").write_text(json.dumps(report))
    fresh = converted(trained_run.checkpoints / "step_2", tmp_path / "fresh")
    converted(trained_run.checkpoints / "step_2", out, "--overwrite")
    assert bytes_of(out) == bytes_of(fresh)
    assert {*bytes_of(tmp_path / "kept_from_out")} == {"gguf/model.gguf", "README.md"}


def test_overwrite_replaces_an_export_whole(trained_run, tmp_path):
    out = converted(trained_run.checkpoints / "step_1", tmp_path / "out")
    (out / "stale.txt").write_text("old")
    converted(trained_run.checkpoints / "step_2", out, "--overwrite")
    assert not (out / "stale.txt").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "kept_from_out"}
    fresh = converted(trained_run.checkpoints / "step_2", tmp_path / "fresh")
    assert bytes_of(out) == bytes_of(fresh)


def test_a_checkpoint_of_the_megatron_backend_with_shared_a_is_merged_alike(tiny_llama, tmp_path):
    run = TinyRun(root=tmp_path, model=tiny_llama, algorithm="sft")
    off = "policy.dtensor_cfg.lora_cfg.enabled=false"
    ended = run(off, "policy.lora.dim=4", "policy.lora.target_modules=[linear_qkv]", "policy.backend=megatron")
    assert ended.code == 0, ended.err
    out = converted(run.checkpoints / "step_2", tmp_path / "out")
    base, merged = tensors_of(tiny_llama), tensors_of(out)
    adapter = load_file(run.checkpoints / "step_2" / "policy" / "adapter" / ADAPTER_FILE)
    changed = {name for name in merged if not same_bits(merged[name], base[name])}
    assert changed == {name[17:].replace(".lora_A", "") for name in adapter if ".lora_A." in name}
    exact = exact_weights(tiny_llama, run.checkpoints / "step_2" / "policy" / "adapter")
    for name in changed:
        torch.testing.assert_close(merged[name].double(), exact[name], atol=1e-2, rtol=1e-2)
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_all_with_a_wrong_base_is_a_wrong_input(run, bf16_llama, tmp_path):
    ended = convert(run, tmp_path / "all", "--all", "--hf-model-name", str(bf16_llama))
    assert ended.code == 2
    assert ended.err.count("has other weights than those that") == 1
    assert not (tmp_path / "all").exists()


def test_a_finished_output_that_was_checked_less_is_not_taken_for_one_that_was_checked_more(trained_run, tmp_path):
    converted(trained_run.checkpoints, tmp_path / "all", "--all", "--no-verify")
    ended = convert(trained_run.checkpoints, tmp_path / "all", "--all", "--verify-full")
    assert ended.code == 2
    assert "was made with another verification" in ended.err
