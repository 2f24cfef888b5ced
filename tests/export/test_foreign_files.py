"""What lies in a directory that somebody else made does not get into an export, nor is it followed to elsewhere."""

import json
import os
import shutil

import pytest
from transformers import AutoConfig, AutoTokenizer

from nemo_rl_lora.lora.fit import adapter_directory
from nemo_rl_lora.models.source import resolve_model
from tests.driver import run_command, run_driver
from tests.export.exports import convert, converted, report_of
from tests.export.test_inputs import refused

TOKENIZER = "policy/tokenizer"


@pytest.fixture
def step(trained_run, tmp_path):
    return shutil.copytree(trained_run.checkpoints / "step_1", tmp_path / "step_1")


@pytest.mark.parametrize("flags", [(), ("--adapter-only",)])
def test_only_a_tokenizers_files_come_from_its_directory(step, tmp_path, flags):
    directory = step / TOKENIZER
    (directory / "config.json").write_text(json.dumps({"auto_map": {"AutoModelForCausalLM": "evil.Model"}}))
    (directory / "evil.py").write_text("raise SystemExit")
    (directory / "generation_config.json").write_text('{"temperature": 9}')
    (directory / "model.safetensors.index.json").write_text("{}")
    (directory / ".hidden").write_text("x")
    tokenizer_config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(
        json.dumps(tokenizer_config | {"auto_map": {"AutoTokenizer": "e"}})
    )
    out = converted(step, tmp_path / "out", *flags)
    assert not list(out.rglob("*.py"))
    assert "auto_map" not in "".join(path.read_text() for path in out.glob("*config.json"))
    assert not {".hidden", "model.safetensors.index.json"} & {path.name for path in out.iterdir()}
    assert "holds .hidden, config.json, evil.py, generation_config.json, model" in report_of(out)["warnings"][0]
    if not flags:
        assert AutoConfig.from_pretrained(out).architectures == ["LlamaForCausalLM"]
        assert json.loads((out / "generation_config.json").read_text()).get("temperature") != 9
    assert AutoTokenizer.from_pretrained(out).chat_template


def test_a_run_does_not_bring_code_by_its_overrides(step, tmp_path):
    config = step / "config.yaml"
    text = config.read_text().replace("hf_config_overrides: {}", "hf_config_overrides: {auto_map: {AutoConfig: e.C}}")
    config.write_text(text)
    assert "auto_map" in text
    assert "auto_map" not in (converted(step, tmp_path / "out") / "config.json").read_text()


def links_file(step, secret):
    (step / TOKENIZER / "merges.txt").symlink_to(secret)


def links_directory(step, secret):
    outside = secret.parent / "outside"
    (step / TOKENIZER).rename(outside)
    (step / TOKENIZER).symlink_to(outside)


def links_templates(step, secret):
    (secret.parent / "templates").mkdir()
    (secret.parent / "templates" / "a.jinja").write_text("x")
    (step / TOKENIZER / "additional_chat_templates").symlink_to(secret.parent / "templates")


def links_config(step, secret):
    (step / "config.yaml").unlink()
    (step / "config.yaml").symlink_to(secret)


def links_weights(step, secret):
    path = step / "policy" / "adapter" / "adapter_model.safetensors"
    path.rename(secret.parent / "weights")
    path.symlink_to(secret.parent / "weights")


def makes_pipe(step, secret):
    os.mkfifo(step / TOKENIZER / "vocab.json")


def makes_directory(step, secret):
    (step / TOKENIZER / "vocab.json").mkdir()


@pytest.mark.parametrize("flags", [(), ("--adapter-only",)])
@pytest.mark.parametrize(
    "change",
    [links_file, links_directory, links_templates, links_config, links_weights, makes_pipe, makes_directory],
)
def test_a_link_to_elsewhere_is_refused(step, tmp_path, flags, change):
    secret = tmp_path / "secret.txt"
    secret.write_text("the secret")
    change(step, secret)
    says = "is no regular file" if change in (makes_pipe, makes_directory) else "is a link to"
    refused(step, tmp_path / "out", *flags, says=says)


def test_a_link_of_the_base_is_refused(step, tiny_llama, tmp_path):
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    (base / "tokenizer.json").rename(tmp_path / "moved.json")
    (base / "tokenizer.json").symlink_to(tmp_path / "moved.json")
    refused(step, tmp_path / "out", "--base-ckpt", str(base), says="is a link to")


def as_cached(directory, cache):
    """The directory as the hub's client caches it: names that are links into blobs."""
    repository = cache / "models--org--name"
    snapshot = repository / "snapshots" / "0123abc"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(directory.iterdir())):
        shutil.copy(path, repository / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    return snapshot


def test_the_links_of_the_hubs_cache_are_followed(peft_adapter, bf16_llama, tmp_path):
    base, adapter = as_cached(bf16_llama, tmp_path / "bases"), as_cached(peft_adapter, tmp_path / "adapters")
    out = converted(adapter, tmp_path / "out", "--hf-model-name", str(base))
    plain = converted(peft_adapter, tmp_path / "plain", "--hf-model-name", str(bf16_llama))
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (out / name).read_bytes() == (plain / name).read_bytes()
    converted(adapter, tmp_path / "alone", "--adapter-only")


def test_adapters_to_start_from_and_to_evaluate_are_files_of_their_directory(step, tmp_path):
    links_weights(step, tmp_path / "secret")
    for place in (step, step / "policy" / "adapter"):
        with pytest.raises(ValueError, match="is a link to"):
            adapter_directory(place)
    (tmp_path / "latest").symlink_to(step.parent / "other")
    shutil.copytree(step, tmp_path / "other", symlinks=False)
    assert adapter_directory(tmp_path / "latest") == tmp_path / "latest" / "policy" / "adapter"


LONG = "x" * 300


def test_a_name_that_is_too_long_is_a_message(step, tmp_path):
    refused(tmp_path / LONG, tmp_path / "out", says="File name too long")
    refused(step, tmp_path / "out", "--hf-model-name", LONG, says="File name too long")
    refused(step, tmp_path / "out", "--base-ckpt", f"/{LONG}", says="File name too long")
    for flags in ((), ("--adapter-only",)):
        refused(step, tmp_path / ("y" * 250), *flags, says="File name too long")  # by what it is called meanwhile
    ended = convert(step, tmp_path / LONG)
    assert (ended.code, "File name too long" in ended.err) == (2, True)
    with pytest.raises(ValueError, match="File name too long"):
        resolve_model(LONG)
    ended = run_command("transcode", "--adapter", str(tmp_path / LONG), "--to", "peft", "--out", str(tmp_path / "o"))
    assert (ended.code, "Error: --adapter='" in ended.err, "File name too long" in ended.err) == (2, True, True)
    ended = run_command("parity", "--checkpoint", LONG)
    assert (ended.code, "Error: --checkpoint='xxx" in ended.err, "File name too long" in ended.err) == (2, True, True)
    for key in ("policy.adapter.init_from", "checkpointing.checkpoint_dir", "policy.model_name", "logger.log_dir"):
        ended = run_driver("policy.dtensor_cfg.lora_cfg.enabled=true", f"{key}={tmp_path / LONG}", algorithm="sft")
        assert (ended.code, "too long" in ended.err, "Traceback" in ended.err) == (2, True, False), ended.err
    ended = run_command("transcode", "--adapter", str(step), "--to", "peft", "--out", str(tmp_path / LONG))
    assert (ended.code, "File name too long" in ended.err) == (2, True)
