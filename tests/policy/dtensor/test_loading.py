"""Weights into sharded models of the meta device: what transformers loads, bit for bit, on every layout, both ways."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    NemotronHConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from nemo_rl_lora.policy.dtensor import own_part
from nemo_rl_lora.policy.dtensor.loading import How, load_weights, reads_by_slices
from tests.policy.dtensor.loading_memory import make_llama, measure
from tests.policy.dtensor.sharded_models import LAYOUTS, empty_sharded, num_processes, whole
from tests.rank_processes import run_ranks
from tests.tiny_models import LLAMA3, random_model, save_random_model

TOKENS = torch.arange(12).view(2, 6)
WAYS: tuple[How, ...] = ("all_ranks", "broadcast")
CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 211,
    "max_position_embeddings": 64,
}


def load_and_compare(rank: int, path: Path, layout: str | None, how: How, dtype: torch.dtype) -> None:
    """Against transformers: names, dtypes, bits and logits. Most tensors come in several blocks."""
    own_part.MAX_BLOCK_BYTES = 4000
    model = empty_sharded(path, layout)
    load_weights(model, path, how=how, dtype=dtype, device=CPU)
    compare(model, path, dtype)


def compare(model: PreTrainedModel, path: Path, dtype: torch.dtype) -> None:
    expected = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager")
    found = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    tensors = {**dict(expected.named_parameters(remove_duplicate=False)), **dict(expected.named_buffers())}
    adapters = {name for name in found if ".lora_A." in name}
    assert set(found) - adapters == set(tensors)
    for name, tensor in tensors.items():
        same_bits(name, whole(found[name]), tensor)
    assert adapters
    assert not any(whole(found[name]).any() for name in adapters)
    with torch.no_grad():
        torch.testing.assert_close(whole(model(TOKENS).logits), expected(TOKENS).logits)


def same_bits(name: str, found: Tensor, expected: Tensor) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
    first, second = (tensor.detach().flatten().view(torch.uint8) for tensor in (found, expected))
    assert torch.equal(first, second), name


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("layout", [None, *LAYOUTS])
def test_every_layout_gets_what_transformers_loads(
    layout: str | None, how: How, tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if layout is None:
        monkeypatch.setattr(own_part, "MAX_BLOCK_BYTES", own_part.MAX_BLOCK_BYTES)  # put back after the test
        load_and_compare(0, tiny_model("qwen3"), None, how, torch.float32)
    else:
        run_ranks(num_processes(layout), tmp_path, load_and_compare, tiny_model("qwen3"), layout, how, torch.float32)


NEMOTRON: dict[str, Any] = {
    "hidden_size": 32,
    "vocab_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "ssm_state_size": 8,
    "chunk_size": 8,
    "use_mamba_kernels": False,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
}
DENSE, EXPERTS = ["linear_attention", "mlp", "full_attention"], ["linear_attention", "moe", "full_attention"]


def make_directory(kind: str, path: Path) -> Path:
    """A random model in a form in which directories come."""
    if kind.startswith("nemotron"):
        layers = EXPERTS if "experts" in kind else DENSE
        model = random_model(NemotronHConfig(**NEMOTRON, layers_block_type=layers))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_()
        model.save_pretrained(path)
        if "predictor" in kind:
            rewrite(path, lambda tensors: tensors | {"mtp.layers.0.weight": torch.ones(3)})
        return path
    if kind == "scaled embeddings":
        config = Gemma3TextConfig(**SIZES, head_dim=16, query_pre_attn_scalar=16, tie_word_embeddings=True)
        return save_random_model(config, path)
    if kind == "stacked experts":
        sizes = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
        return save_random_model(Qwen3MoeConfig(**SIZES, **sizes, tie_word_embeddings=False), path)
    config = LlamaConfig(**SIZES, rope_parameters=LLAMA3, tie_word_embeddings=kind != "untied")
    model = random_model(config)
    if kind == "the body alone":
        model.get_decoder().save_pretrained(path)
    else:
        model.save_pretrained(path, max_shard_size="100KB" if kind == "several files" else "1GB")
    embeddings = "model.embed_tokens.weight"
    if kind == "tied, both written":
        rewrite(path, lambda tensors: tensors | {"lm_head.weight": tensors[embeddings].clone()})
    if kind == "tied, the head written":
        rewrite(path, lambda tensors: tensors | {"lm_head.weight": tensors.pop(embeddings)})
    if kind == "old rotary frequencies":
        rewrite(path, lambda tensors: tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)})
    return path


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Change the tensors of a directory's one file."""
    save_file(change(load_file(path / "model.safetensors")), path / "model.safetensors", metadata={"format": "pt"})


KINDS = (
    "untied",
    "several files",
    "the body alone",
    "tied, both written",
    "tied, the head written",
    "old rotary frequencies",
    "scaled embeddings",
    "nemotron",
    "nemotron with a predictor",
    "nemotron with experts",
    "stacked experts",
)


def load_all(rank: int, directory: Path) -> None:
    for kind in KINDS:
        for how in WAYS if "experts" not in kind else WAYS[1:]:
            load_and_compare(rank, directory / kind, "fsdp 2", how, torch.bfloat16)


def test_every_form_of_a_directory_in_bf16(tmp_path: Path):
    for kind in KINDS:
        assert reads_by_slices(AutoConfig.from_pretrained(make_directory(kind, tmp_path / kind)), tmp_path / kind) == (
            "experts" not in kind
        )
    (tmp_path / "meeting").mkdir()
    run_ranks(2, tmp_path / "meeting", load_all, tmp_path)


def test_the_others_need_no_files_and_fail_with_the_first(tmp_path: Path):
    make_directory("untied", tmp_path / "model")
    (tmp_path / "meeting").mkdir()
    run_ranks(2, tmp_path / "meeting", load_on_the_first_alone, tmp_path / "model")


def load_on_the_first_alone(rank: int, path: Path) -> None:
    model = empty_sharded(path, "fsdp 2")
    own = path if rank == 0 else path / "not here"
    load_weights(model, own, how="broadcast", dtype=torch.float32, device=CPU)
    compare(model, path, torch.float32)
    model = empty_sharded(path, "fsdp 2")
    own = path.parent if rank == 0 else path
    with pytest.raises(ValueError, match=r"policy.model_name="):
        load_weights(model, own, how="broadcast", dtype=torch.float32, device=CPU)


def test_names_and_shapes_are_compared_before_anything_is_read(tmp_path: Path):
    path = make_directory("untied", tmp_path)

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for projection in ("q", "k", "v", "o"):
            del tensors[f"model.layers.0.self_attn.{projection}_proj.weight"]
        for projection in ("gate", "up"):
            del tensors[f"model.layers.1.mlp.{projection}_proj.weight"]
        tensors["model.norm.weight"] = torch.ones(47)
        return tensors | {"model.layers.0.self_attn.q_proj.bias": torch.ones(48)}

    rewrite(path, change)
    for how in WAYS:
        with pytest.raises(ValueError, match="policy.model_name=") as caught:
            load_weights(empty_sharded(path, None), path, how=how, dtype=torch.float32, device=CPU)
        attention = "model.layers.0.self_attn."
        assert (
            "its tensors are not those of the LlamaForCausalLM that its config.json describes (6 missing: "
            f"{attention}k_proj.weight, {attention}o_proj.weight, {attention}q_proj.weight, {attention}v_proj.weight, "
            "model.layers.1.mlp.gate_proj.weight, ...; "
            f"1 unexpected: {attention}q_proj.bias; 1 of another shape: model.norm.weight (47,) instead of (48,)). Use"
        ) in str(caught.value)


def test_a_tied_head_that_differs_is_refused(tmp_path: Path):
    path = make_directory("tied, both written", tmp_path)
    rewrite(path, lambda tensors: tensors | {"lm_head.weight": tensors["lm_head.weight"] + 1})
    with pytest.raises(ValueError, match="ties lm_head.weight to model.embed_tokens.weight, and its files hold two"):
        load_weights(empty_sharded(path, None), path, how="all_ranks", dtype=torch.float32, device=CPU)


def test_stacked_experts_cannot_be_read_by_all_ranks(tmp_path: Path):
    path = make_directory("stacked experts", tmp_path)
    with pytest.raises(ValueError, match=r"policy.dtensor_cfg.load='all_ranks'.*Qwen3MoeForCausalLM.*load=broadcast"):
        load_weights(empty_sharded(path, None), path, how="all_ranks", dtype=torch.float32, device=CPU)


@pytest.mark.slow
def test_no_process_but_the_first_holds_more_than_its_shard(tmp_path: Path):
    path = make_llama(tmp_path / "model", 500)
    for how in WAYS:
        for numbers in measure(path, how, tmp_path)[1:]:
            assert numbers["shard"] < numbers["peak"] < numbers["shard"] + 256
