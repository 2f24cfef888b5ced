"""Directories whose weights, config or tokenizer are not those of one model: refused by name before a weight is loaded,
by every driver and backend, at the plan and at the start."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig

from tests.driver import TinyRun, run_command
from tests.tiny_models import save_random_model

Change = Callable[[Path], object]
FILE = "model.safetensors"
Q = "model.layers.1.self_attn.q_proj.weight"
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Change:
    """Change the tensors of a directory's one file."""

    def apply(path: Path) -> None:
        held = load_file(path / FILE)
        change(held)
        save_file({name: tensor.contiguous() for name, tensor in held.items()}, path / FILE, metadata={"format": "pt"})

    return apply


def config(**values: object) -> Change:
    """Change keys of config.json."""

    def apply(path: Path) -> None:
        file = path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return apply


def in_shards(change: Callable[[Path, dict[str, str]], object]) -> Change:
    """Write the model in several files, and change these or the index's map."""

    def apply(path: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(path)
        (path / FILE).unlink()
        model.save_pretrained(path, max_shard_size="50KB")
        index = path / "model.safetensors.index.json"
        document = json.loads(index.read_text())
        change(path, document["weight_map"])
        index.write_text(json.dumps(document))

    return apply


def pickled(change: Callable[[dict[str, Tensor]], object]) -> Change:
    """Write the model as pytorch_model.bin."""

    def apply(path: Path) -> None:
        held = dict(AutoModelForCausalLM.from_pretrained(path).state_dict())
        change(held)
        (path / FILE).unlink()
        torch.save(held, path / "pytorch_model.bin")

    return apply


def another_layer(held: dict[str, Tensor]) -> None:
    for name in [name for name in held if ".layers.1." in name]:
        held[name.replace(".1.", ".2.")] = held[name].clone()


def in_two_files(path: Path, weight_map: dict[str, str]) -> None:
    other = next(file for file in weight_map.values() if file != weight_map[Q])
    save_file(load_file(path / other) | {Q: load_file(path / weight_map[Q])[Q]}, path / other)


def truncated(path: Path) -> None:
    (path / FILE).write_bytes((path / FILE).read_bytes()[:-8])


def not_json(path: Path) -> None:
    (path / "config.json").write_text('{"model_type": "llama"')


NOT_THOSE = "its tensors are not those of the LlamaForCausalLM that its config.json describes"

# fmt: off
WRONG: dict[str, tuple[Change, str]] = {
    "a tensor that is missing": (tensors(lambda t: t.pop(Q)), f"{NOT_THOSE} (1 missing: {Q})"),
    "a layer more in the files": (tensors(another_layer), f"{NOT_THOSE} (9 unexpected: model.layers.2.input_layernorm"),
    "fewer layers in the config": (config(num_hidden_layers=1), f"{NOT_THOSE} (9 unexpected: model.layers.1.input"),
    "more layers in the config": (config(num_hidden_layers=3), f"{NOT_THOSE} (9 missing: model.layers.2.input"),
    "an untied head that the files lack": (config(tie_word_embeddings=False), f"{NOT_THOSE} (1 missing: {HEAD})"),
    "a tied head of other values": (tensors(lambda t: t.update({HEAD: t[EMBEDDINGS] + 1})),
        f"its config.json ties {HEAD} to {EMBEDDINGS}, and its files hold two that differ."),
    "another architecture's config": (config(model_type="qwen2", architectures=["Qwen2ForCausalLM"]),
        "its tensors are not those of the Qwen2ForCausalLM that its config.json describes (6 missing: model."),
    "a transposed tensor": (tensors(lambda t: t.update({"model.layers.0.mlp.up_proj.weight":
        t["model.layers.0.mlp.up_proj.weight"].T})), f"{NOT_THOSE} (1 of another shape: model.layers.0.mlp"),
    "another vocabulary": (config(vocab_size=300), f"{NOT_THOSE} (1 of another shape: {EMBEDDINGS} (259, 48) inst"),
    "another hidden size": (config(hidden_size=64), f" of another shape: {EMBEDDINGS} (259, 48) instead of (259, 64)"),
    "a bias that the config does not have": (tensors(lambda t: t.update({Q.replace("weight", "bias"): torch.ones(48)})),
        f"{NOT_THOSE} (1 unexpected: model.layers.1.self_attn.q_proj.bias)"),
    "an index of a file that is absent": (in_shards(lambda path, m: (path / m[Q]).unlink()), "is missing"),
    "one tensor in two files": (in_shards(in_two_files), f"both hold {Q}"),
    "an index of a tensor that no file holds": (in_shards(lambda _, m: m.update({"more": m[Q]})), "names more, which"),
    "a file that is cut short": (truncated, "bytes instead of"),
    "a pickled file without a tensor": (pickled(lambda t: t.pop(Q)), f"{NOT_THOSE} (1 missing: {Q})"),
    "a pickled file with one more": (pickled(lambda t: t.update(more=torch.ones(2))), f"{NOT_THOSE} (1 unexpected: mo"),
    "no weights but something else": (lambda path: (path / FILE).rename(path / "other.safetensors"),
        "holds no model.safetensors, no pytorch_model.bin"),
    "a config that is no JSON": (not_json, "its config.json cannot be read (Expecting ',' delimiter"),
    "heads that do not divide": (config(num_attention_heads=5),
        "The hidden size (48) is not a multiple of the number of attention heads (5)"),
    "key-value heads that do not divide": (config(num_key_value_heads=3),
        "its config.json has num_key_value_heads=3, which must divide num_attention_heads=4."),
    "an unknown architecture": (config(model_type="lama"), "its config.json has model_type='lama', which transformers"),
    "code that comes with the model": (config(model_type="mine", auto_map={"AutoConfig": "mine.Config"}),
        "and names code that comes with the model (auto_map). Such code is not run here (trust_remote_code)."),
    "no causal language model": (config(model_type="vit"), "describes a 'vit', which is no causal language model"),
}
# fmt: on


@pytest.fixture
def directory(tiny_llama, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.mark.parametrize("change", WRONG)
def test_a_directory_that_is_not_one_model_is_refused_by_name(directory, tmp_path, change):
    apply, says = WRONG[change]
    apply(directory)
    run = TinyRun(root=tmp_path, model=directory, algorithm="sft")

    ended = run()

    assert ended.code == 2, ended.err
    assert f"Error: policy.model_name={str(directory)!r}: " in ended.err
    assert says in ended.err
    assert not run.steps()
    if change not in ("no weights but something else", "an index of a file that is absent"):  # need not be there yet
        planned = run("--plan")
        assert planned.code == 2
        assert "".join(says.split()) in "".join((planned.err + planned.out).split())


@pytest.mark.parametrize("algorithm", ["grpo", "dpo", "eval"])
@pytest.mark.parametrize("backend", ["dtensor", "megatron"])
def test_every_driver_and_backend_refuses(directory, tmp_path, algorithm, backend):
    tensors(lambda t: t.pop(Q))(directory)
    if algorithm == "eval":
        ended = run_command("eval", f"policy.model_name={directory}", "eval.include_base=true", "eval.save_path=null")
    else:
        run = TinyRun(root=tmp_path, model=directory, algorithm=algorithm)
        lora = ("policy.dtensor_cfg.lora_cfg.enabled=false", "policy.lora.enabled=true") * (backend == "megatron")
        ended = run(f"policy.backend={backend}", *lora)

    assert ended.code == 2, ended.err
    assert f"{NOT_THOSE} (1 missing: {Q})" in ended.err


def put(name: str, value: float) -> Change:
    """One number of a tensor."""
    return tensors(lambda t: t[name].view(-1).__setitem__(3, value))


@pytest.mark.parametrize("backend", ["dtensor", "megatron"])
@pytest.mark.parametrize(("name", "value"), [(Q, float("nan")), ("model.norm.weight", float("-inf"))])
def test_weights_that_are_not_finite_are_named(directory, tmp_path, backend, name, value):
    put(name, value)(directory)
    run = TinyRun(root=tmp_path, model=directory, algorithm="dpo")
    lora = ("policy.dtensor_cfg.lora_cfg.enabled=false", "policy.lora.enabled=true") * (backend == "megatron")

    ended = run(f"policy.backend={backend}", *lora)

    assert ended.code == 2, ended.err
    assert f"1 of its tensors hold NaN or infinity ({name}: 1)." in ended.err
    assert not run.steps()


def test_an_evaluation_names_weights_that_are_not_finite(directory):
    put(Q, float("inf"))(directory)

    ended = run_command("eval", f"policy.model_name={directory}", "eval.include_base=true", "eval.save_path=null")

    assert ended.code == 2, ended.err
    assert f"({Q}: 1)" in ended.err


def test_a_plan_needs_no_weights_and_compares_those_that_are_there(directory, tmp_path):
    run = TinyRun(root=tmp_path, model=directory, algorithm="sft")
    in_shards(lambda path, weight_map: (path / weight_map[Q]).unlink())(directory)
    assert run("--plan").code == 0
    config(num_hidden_layers=1)(directory)
    assert "unexpected: model.layers.1." in " ".join(run("--plan").out.split())
    for file in directory.glob("*.safetensors*"):
        file.unlink()
    assert run("--plan").code == 0


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "num_hidden_layers=1",
            "that its config.json with policy.hf_config_overrides={'num_hidden_layers': 1} describes",
        ),
        (
            "num_hiden_layers=1",
            "num_hiden_layers=1: the config of 'llama' has no such key, so it would change nothing. Did",
        ),
        (
            "rope_theta=1e6",
            "rope_theta=1000000.0: the config of 'llama' has no such key, so it would change nothing. It",
        ),
        ("trust_remote_code=true", "trust_remote_code=True: the config of 'llama' has no such key"),
        ("num_hidden_layers=many", "={'num_hidden_layers': 'many'}: "),
    ],
)
def test_an_override_of_the_config_fits_the_model(tiny_llama, tmp_path, override, says):
    ended = TinyRun(root=tmp_path, model=tiny_llama, algorithm="sft")(f"+policy.hf_config_overrides.{override}")

    assert ended.code == 2, ended.err
    assert "policy.hf_config_overrides" in ended.err
    assert says in ended.err


@pytest.mark.parametrize("algorithm", ["sft", "dpo", "grpo", "eval"])
def test_a_tokenizer_with_tokens_beyond_the_embedding_is_refused(directory, tmp_path, algorithm):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens(["<new>", "<newer>"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    given = f"policy.tokenizer.name={tmp_path / 'tokenizer'}"
    if algorithm == "eval":
        ended = run_command("eval", f"policy.model_name={directory}", given, "eval.include_base=true")
    else:
        ended = TinyRun(root=tmp_path, model=directory, algorithm=algorithm)(given)

    assert ended.code == 2, ended.err
    assert "it gives token ids up to 260 (2 beyond the embedding; the first is '<new>', 259)" in ended.err
    assert "has 259 embeddings (vocab_size)" in ended.err


def test_more_positions_than_a_model_with_rotary_ones_was_made_for_are_warned_of(tiny_llama, tmp_path):
    run = TinyRun(root=tmp_path, model=tiny_llama, algorithm="sft")
    says = "policy.max_total_sequence_length=300: "

    assert says in " ".join(run("--plan", "policy.max_total_sequence_length=300").out.split())
    ended = run("policy.max_total_sequence_length=300", "sft.max_num_steps=1")

    assert ended.code == 0
    assert f"WARNING {says}{tiny_llama} has 256 positions (max_position_embeddings)." in ended.err


def test_more_positions_than_a_model_with_learned_ones_has_are_refused(directory, tmp_path):
    sizes: dict[str, Any] = {
        "vocab_size": 259,
        "hidden_size": 48,
        "ffn_dim": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    learned = OPTConfig(**sizes, word_embed_proj_dim=48, max_position_embeddings=64, eos_token_id=0, pad_token_id=0)
    save_random_model(learned, directory)

    ended = TinyRun(root=tmp_path, model=directory, algorithm="sft")("policy.max_total_sequence_length=65")

    assert ended.code == 2, ended.err
    assert "has 64 positions (max_position_embeddings), each with an embedding, and none beyond." in ended.err


@pytest.mark.parametrize("backend", ["dtensor", "megatron"])
def test_what_a_save_of_all_weights_writes_is_tried_at_the_start(directory, tmp_path, backend):
    (directory / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.9}')
    run = TinyRun(root=tmp_path, model=directory, algorithm="sft")
    arguments = ("policy.dtensor_cfg.lora_cfg.enabled=false", f"policy.backend={backend}")

    ended = run(*arguments)

    assert ended.code == 2, ended.err
    assert (
        "every checkpoint of all weights holds its generation_config.json, and transformers does not save" in ended.err
    )
    assert f"Correct {directory}/generation_config.json" in ended.err
    assert not run.steps()
    (directory / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.9, "do_sample": true}')
    assert run(*arguments).code == 0
    saved = json.loads((run.checkpoints / "step_2/policy/weights/generation_config.json").read_text())
    assert saved["temperature"] == 0.6


def test_a_rank_above_that_of_a_matrix_is_warned_of(tiny_llama, tmp_path):
    run = TinyRun(root=tmp_path, model=tiny_llama, algorithm="sft")

    ended = run("policy.dtensor_cfg.lora_cfg.dim=40", "sft.max_num_steps=1")

    assert ended.code == 0, ended.err
    assert (
        "WARNING policy.dtensor_cfg.lora_cfg.dim=40: 4 of 14 adapted matrices are smaller "
        "(model.layers.0.self_attn.k_proj is 24 x 48)." in ended.err
    )


@pytest.mark.parametrize("alpha", ["inf", "nan", "-inf"])
def test_an_alpha_that_is_no_number_is_refused(tiny_llama, tmp_path, alpha):
    ended = TinyRun(root=tmp_path, model=tiny_llama, algorithm="sft")(f"policy.dtensor_cfg.lora_cfg.alpha={alpha}")

    assert ended.code == 2, ended.err
    assert "Error: policy.dtensor_cfg.lora_cfg.alpha=" in ended.err
    assert "finite" in ended.err


def test_the_tokenizer_of_a_checkpoint_is_a_tokenizer(tiny_llama, tmp_path):
    run = TinyRun(root=tmp_path, model=tiny_llama, algorithm="sft")
    assert run("policy.dtensor_cfg.lora_cfg.enabled=false", "sft.max_num_steps=1").code == 0
    step = run.checkpoints / "step_1" / "policy"

    ended = run(
        f"policy.model_name={step / 'weights'}",
        f"policy.tokenizer.name={step / 'tokenizer'}",
        f"checkpointing.checkpoint_dir={tmp_path / 'more'}",
    )

    assert ended.code == 0, ended.err
