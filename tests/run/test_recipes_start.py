"""Every recipe starts: shrunk as the tables say, it takes two optimizer steps in several processes on a CPU.

A recipe keeps its algorithm, backend, precision, layout, adapter, loss, scheduler and kind of data. docs/recipes.md
says the same.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, PretrainedConfig, Qwen3Config

from nemo_rl_lora.config.load import CONFIG_DIR, algorithm_of, load_config
from tests.driver import REWARD, Ended, adapter, run_driver
from tests.tiny_models import LLAMA3, nemotron_h, save_byte_tokenizer, save_random_model

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"
DIRECTORY = CONFIG_DIR / "recipes" / "llm"
LONG = (pytest.mark.slow, pytest.mark.long)


@dataclass(frozen=True, slots=True, kw_only=True)
class Small:
    """How a recipe is run here. `processes`: instead of the recipe's; `overrides`: besides SHRINK's."""

    model: str  # a key of SHOWN
    processes: int
    overrides: tuple[str, ...] = ()
    refused: str = ""  # with this reason
    marks: tuple[pytest.MarkDecorator, ...] = (pytest.mark.slow,)


SHOWN = {"llama3.1": "Llama", "qwen3": "Qwen3", "nemotron-h": "Nemotron-H"}  # on the page

_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 0,
    "bos_token_id": None,
}


def model_config(name: str, vocab_size: int) -> PretrainedConfig:
    """The class of the recipes' model; two layers, which of Nemotron-H are a block of each of the four kinds."""
    if name == "nemotron-h":
        return nemotron_h(vocab_size)
    if name == "qwen3":
        return Qwen3Config(vocab_size=vocab_size, head_dim=16, tie_word_embeddings=False, **_SIZES)
    return LlamaConfig(vocab_size=vocab_size, rope_parameters=LLAMA3, tie_word_embeddings=False, **_SIZES)


# Batches, lengths and steps. {} is the directory of the run.
SHRINK: dict[str, tuple[str, ...]] = {
    "sft": (
        "sft.max_num_steps=2",
        "sft.val_batches=1",
        "sft.val_global_batch_size=2",
        "policy.train_global_batch_size=6",
        "policy.max_total_sequence_length=256",
        "logger.wandb_enabled=false",
    ),
    "dpo": (
        "dpo.max_num_steps=2",
        "dpo.val_batches=1",
        "dpo.val_global_batch_size=2",
        "policy.train_global_batch_size=6",
        "policy.max_total_sequence_length=256",
        "+data.validation.data_path={}/data",
    ),
    "grpo": (
        "grpo.max_num_steps=2",
        "grpo.num_prompts_per_step=2",
        "grpo.num_generations_per_prompt=4",
        "grpo.max_val_samples=2",
        "policy.train_global_batch_size=8",
        "policy.max_total_sequence_length=256",
        "policy.generation.max_new_tokens=6",
        "policy.generation.backend=in_process",
        "data.default.env_name=tiny",  # with rewards that differ within a group, whatever a random model writes
        "+env.tiny.reward_function={}/rewards.py:reward",
    ),
}
# Without vLLM nothing reads what these recipes set of it.
WITHOUT_VLLM = (
    "~policy.generation.vllm_cfg.tensor_parallel_size",
    "~policy.generation.vllm_cfg.gpu_memory_utilization",
)

RECIPES = {
    "sft-llama3.1-8b-1n8g-fsdp2tp1-lora": Small(model="llama3.1", processes=2),
    "sft-llama3.1-8b-1n8g-megatron-lora": Small(model="llama3.1", processes=2, marks=LONG),
    "sft-nanov3-30BA3B-2n8g-fsdp2-lora": Small(
        model="nemotron-h", processes=4, overrides=("+data.validation.data_path={}/data",)
    ),
    "dpo-llama3.1-8b-instruct-1n8g-fsdp2-lora": Small(model="llama3.1", processes=2, marks=()),
    "dpo-llama3.1-8b-instruct-1n8g-megatron-lora": Small(model="llama3.1", processes=2, marks=()),
    "grpo-qwen3-8B-base-1n8g-fsdp2-lora": Small(model="qwen3", processes=2, marks=LONG),
    "grpo-qwen3-8b-base-1n8g-megatron-lora": Small(model="qwen3", processes=2),
    "grpo-nanov3-30BA3B-2n8g-fsdp2-lora": Small(model="nemotron-h", processes=2, overrides=WITHOUT_VLLM),
    "grpo-nanov3-30BA3B-2n8g-megatron-lora": Small(
        model="nemotron-h",
        processes=4,
        overrides=(*WITHOUT_VLLM, "policy.megatron_cfg.expert_model_parallel_size=2"),
        refused="its architecture is NemotronHForCausalLM. The Megatron backend holds LlamaForCausalLM",
        marks=(),
    ),
}

ROWS: dict[str, list[dict[str, Any]]] = {
    "tulu3_sft_mixture": [
        {"messages": [{"role": "user", "content": f"{i} + 1?"}, {"role": "assistant", "content": "so " * (i % 4 + 1)}]}
        for i in range(40)
    ],
    "squad": [
        {"context": f"There are {i} cats.", "question": "How many?", "answers": {"text": [f"{i}" * (i % 3 + 1)]}}
        for i in range(40)
    ],
    "HelpSteer3": [
        {
            "context": [{"role": "user", "content": f"{i} + 1?"}],
            "response1": "so " * (i % 3 + 1),
            "response2": "no",
            "overall_preference": i % 2 * 2 - 1,
        }
        for i in range(40)
    ],
    "OpenMathInstruct-2": [{"problem": f"{i} + 1?", "expected_answer": str(i + 1)} for i in range(40)],
}


def load(file: Path) -> Any:
    """The configuration of a recipe as it ships."""
    algorithm: Any = algorithm_of(file)
    return load_config(file, [], algorithm)


def run(small: Small, root: Path, file: Path) -> Ended:
    """The driver of the recipe in this file, on a random model and a few rows in `root`."""
    algorithm: Any = algorithm_of(file)
    save_random_model(model_config(small.model, save_byte_tokenizer(root / "model")), root / "model")
    (root / "data").mkdir()
    dataset = load(file).data.train.dataset_name
    for split in ("train", "validation"):
        (root / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[dataset]))
    (root / "rewards.py").write_text(REWARD)
    shrink = [text.format(root) for text in (*SHRINK[algorithm], *small.overrides)]
    places = [
        f"policy.model_name={root}/model",
        f"policy.tokenizer.name={root}/model",
        f"+data.train.data_path={root}/data",
        f"checkpointing.checkpoint_dir={root}/results",
        f"logger.log_dir={root}/logs",
        f"cluster.gpus_per_node={small.processes}",
        "cluster.num_nodes=1",
    ]
    return run_driver("--config", str(file), *places, *shrink, algorithm=algorithm)


def assert_two_steps(root: Path, file: Path) -> None:
    """Both steps had a gradient, which the adapter has followed."""
    lines = [json.loads(line) for line in (root / "logs" / "exp_001" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["split"] == "train"]
    assert [line["step"] for line in steps] == [1, 2]
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in steps)
    if load(file).checkpointing.enabled:
        tensors = adapter(root / "results" / "step_2")
        assert all(tensor.any() for name, tensor in tensors.items() if ".lora_B." in name)


@pytest.mark.parametrize("recipe", [pytest.param(name, marks=small.marks) for name, small in RECIPES.items()])
def test_a_shipped_recipe_takes_two_steps_or_is_refused_by_name(recipe, tmp_path):
    small, file = RECIPES[recipe], DIRECTORY / f"{recipe}.yaml"
    ended = run(small, tmp_path, file)
    if small.refused:
        assert ended.code == 2
        assert small.refused in ended.err
        return
    assert ended.code == 0, ended.err
    assert_two_steps(tmp_path, file)


def test_the_table_has_every_recipe_that_ships():
    assert sorted(RECIPES) == sorted(file.stem for file in DIRECTORY.glob("*.yaml"))


# NeMo RL's two recipes that do not ship: each is one that does, and a few keys.


@pytest.mark.slow
@pytest.mark.long
def test_the_recipe_for_half_the_gpus_takes_two_steps(tmp_path):
    recipe = "sft-nanov3-30BA3B-2n8g-fsdp2-lora"
    file = tmp_path / "sft-nanov3-30BA3B-2n4g-fsdp2-lora.yaml"
    file.write_text(f"defaults: {DIRECTORY / recipe}.yaml\ncluster: {{gpus_per_node: 4}}\n")
    ended = run(replace(RECIPES[recipe], processes=2), tmp_path, file)
    assert ended.code == 0, ended.err
    assert_two_steps(tmp_path, file)


def test_the_recipe_with_a_data_plane_is_refused_by_name(tmp_path):
    recipe = "grpo-qwen3-8B-base-1n8g-fsdp2-lora"
    file = tmp_path / "grpo-qwen3-8B-base-1n8g-fsdp2-lora-tq_mooncake.yaml"
    plane = "data_plane: {enabled: true, backend: mooncake_cpu}"
    file.write_text(f"defaults: {DIRECTORY / recipe}.yaml\n{plane}\n")
    ended = run_driver("--config", str(file), algorithm="grpo")
    assert ended.code == 2
    assert "data_plane.enabled=True: only False is supported." in ended.err


# docs/recipes.md


def test_the_page_says_what_ran_where():
    rows = re.findall(r"^\| `([\w.-]+)` \| (\d+) \| (\d+) \| (.+?) \| (.+?) \|$", PAGE.read_text(), re.MULTILINE)
    expected = []
    for name, small in RECIPES.items():
        config = load(DIRECTORY / f"{name}.yaml")
        shares = "FSDP2" if config.policy.active_backend == "dtensor" else "DP"
        outcome = "refused" if small.refused else f"two steps, {shares}"
        expected.append((name, str(config.cluster.num_processes), str(small.processes), SHOWN[small.model], outcome))
    assert [(*row, outcome.split(":")[0]) for *row, outcome in rows] == expected


def test_no_recipe_that_starts_shares_more_than_its_batch():
    for name, small in RECIPES.items():
        policy = load(DIRECTORY / f"{name}.yaml").policy
        sizes = policy.dtensor_cfg if policy.active_backend == "dtensor" else policy.megatron_cfg
        shared = {key: size for key, size in sizes.model_dump().items() if key.endswith("_parallel_size") and size != 1}
        assert bool(shared) == bool(small.refused), shared


def test_the_page_names_every_key_that_is_changed():
    page = PAGE.read_text()
    fixed = ["policy.model_name", "policy.tokenizer.name", "data.train.data_path", "checkpointing.checkpoint_dir"]
    fixed += ["logger.log_dir", "cluster.gpus_per_node", "cluster.num_nodes"]
    changed = [text for texts in SHRINK.values() for text in texts]
    changed += [text for small in RECIPES.values() for text in small.overrides]
    keys = {text.split("=")[0].lstrip("+~") for text in changed}
    assert [key for key in sorted(keys.union(fixed)) if f"`{key}`" not in page] == []
