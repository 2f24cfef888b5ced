"""Each LoRA recipe, expanded, differs from its expanded base file in exactly the values written here by hand.

Values that follow from others (a token budget from the sequence length) are worked out here, not read.
"""

from pathlib import Path

import pytest

from nemo_rl_lora.config.differences import differences
from nemo_rl_lora.config.load import CONFIG_DIR, algorithm_of, load_config, read_tree
from nemo_rl_lora.config.master import GrpoMaster
from nemo_rl_lora.config.refused_keys import refused_keys
from nemo_rl_lora.config.tree import flatten

NANO = "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-Base-BF16"
NANO_TOKENIZER = "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"

LLAMA_8B = {
    "sft.max_num_steps": 350,
    "sft.val_period": 20,
    "sft.val_global_batch_size": 128,
    "sft.val_micro_batch_size": 2,
    "checkpointing.save_period": 20,
    "policy.model_name": "meta-llama/Llama-3.1-8B",
    "policy.tokenizer.name": "meta-llama/Llama-3.1-8B-Instruct",
    "policy.tokenizer.chat_template": "default",
    "policy.train_global_batch_size": 128,
    "policy.max_total_sequence_length": 4096,
    "policy.make_sequence_length_divisible_by": 2,
    "policy.dynamic_batching.train_mb_tokens": 4096,
    "policy.sequence_packing.train_mb_tokens": 4096,
    "data.add_generation_prompt": True,
    "data.max_input_seq_length": 4096,
    "data.train.dataset_name": "tulu3_sft_mixture",
    "data.train.split_validation_size": 0.05,
    "data.validation": None,
    "logger.wandb.name": "sft-dev-tulu3_sft_mixture",
    "logger.swanlab.name": "sft-dev-tulu3_sft_mixture",
    "logger.mlflow.run_name": "sft-dev-tulu3_sft_mixture",
    "logger.tensorboard.log_dir": "tb_logs-sft-dev-tulu3_sft_mixture",
    "cluster.gpus_per_node": 8,
}

QWEN_8B = {
    "grpo.val_at_start": True,
    "grpo.reward_shaping.max_response_length": 2048,
    "policy.model_name": "Qwen/Qwen3-8B-Base",
    "policy.tokenizer.name": "Qwen/Qwen3-8B-Base",
    "policy.max_total_sequence_length": 2048,
    "policy.dynamic_batching.train_mb_tokens": 8192,
    "policy.dynamic_batching.logprob_mb_tokens": 8192,
    "policy.sequence_packing.enabled": False,
    "policy.sequence_packing.train_mb_tokens": 8192,
    "policy.sequence_packing.logprob_mb_tokens": 8192,
    "policy.generation.max_new_tokens": 2048,
    "policy.generation.vllm_cfg.max_model_len": 2048,
    "data.max_input_seq_length": 2048,
    "cluster.gpus_per_node": 8,
}

NANO_GRPO = {
    "grpo.num_prompts_per_step": 2,
    "grpo.num_generations_per_prompt": 8,
    "grpo.reward_shaping.max_response_length": 2048,
    "policy.model_name": NANO,
    "policy.tokenizer.name": NANO_TOKENIZER,
    "policy.train_global_batch_size": 16,
    "policy.train_micro_batch_size": 1,
    "policy.logprob_batch_size": 1,
    "policy.max_total_sequence_length": 2048,
    "policy.sequence_packing.enabled": False,
    "policy.generation.max_new_tokens": 2048,
    "policy.generation.vllm_cfg.max_model_len": 2048,
    "policy.generation.vllm_cfg.tensor_parallel_size": 4,
    "policy.generation.vllm_cfg.gpu_memory_utilization": 0.7,
    "data.max_input_seq_length": 2048,
    "cluster.gpus_per_node": 8,
    "cluster.num_nodes": 2,
}

MEGATRON = {
    "policy.dtensor_cfg.enabled": False,
    "policy.megatron_cfg.enabled": True,
    "policy.megatron_cfg.peft.enabled": True,
}

DPO_LLAMA_8B = {
    "policy.model_name": "meta-llama/Llama-3.1-8B-Instruct",
    "policy.tokenizer.name": "meta-llama/Llama-3.1-8B-Instruct",
    "policy.train_micro_batch_size": 1,
    "policy.max_total_sequence_length": 4096,
    "data.max_input_seq_length": 4096,
    "cluster.gpus_per_node": 8,
}

RECIPES = {
    "dpo-llama3.1-8b-instruct-1n8g-fsdp2-lora": DPO_LLAMA_8B
    | {
        "checkpointing.checkpoint_dir": "results/dpo-llama3.1-8b-instruct-1n8g-fsdp2-lora",
        "policy.dtensor_cfg.activation_checkpointing": True,
        "policy.dtensor_cfg.lora_cfg.enabled": True,
        "policy.dtensor_cfg.lora_cfg.dim": 128,
        "policy.dtensor_cfg.lora_cfg.alpha": 128,
        "policy.optimizer.kwargs.lr": 2e-5,
    },
    "dpo-llama3.1-8b-instruct-1n8g-megatron-lora": DPO_LLAMA_8B
    | MEGATRON
    | {
        "checkpointing.checkpoint_dir": "results/dpo-llama3.1-8b-instruct-1n8g-megatron-lora",
        "policy.scheduler": None,
        "policy.megatron_cfg.activation_checkpointing": True,
        "policy.megatron_cfg.tensor_model_parallel_size": 1,
        "policy.megatron_cfg.sequence_parallel": False,
        "policy.megatron_cfg.peft.dim": 128,
        "policy.megatron_cfg.peft.alpha": 128,
        "policy.megatron_cfg.optimizer.lr": 2e-5,
        "policy.megatron_cfg.optimizer.min_lr": 2e-5,
        "policy.megatron_cfg.scheduler.lr_warmup_iters": 20,
        "policy.megatron_cfg.scheduler.lr_warmup_init": 2e-6,
    },
    "sft-llama3.1-8b-1n8g-fsdp2tp1-lora": LLAMA_8B
    | {
        "checkpointing.checkpoint_dir": "results/sft-tmblog-llama3.1-8b",
        "policy.dtensor_cfg.lora_cfg.enabled": True,
        "policy.dtensor_cfg.lora_cfg.dim": 128,
        "policy.dtensor_cfg.lora_cfg.alpha": 128,
        "policy.optimizer.kwargs.lr": 2e-5,
        "policy.optimizer.kwargs.weight_decay": 0.01,
        "policy.optimizer.kwargs.eps": 1e-8,
    },
    "sft-llama3.1-8b-1n8g-megatron-lora": LLAMA_8B
    | MEGATRON
    | {
        "checkpointing.checkpoint_dir": "results/sft-tmblog-llama3.1-8b-lora-megatron",
        "policy.megatron_cfg.peft.dim": 128,
        "policy.megatron_cfg.peft.alpha": 128,
        "policy.megatron_cfg.optimizer.lr": 2e-5,
        "policy.megatron_cfg.optimizer.min_lr": 2e-5,
        "policy.megatron_cfg.optimizer.weight_decay": 0.01,
        "policy.megatron_cfg.optimizer.adam_eps": 1e-8,
        "policy.megatron_cfg.scheduler.start_weight_decay": 0.01,
        "policy.megatron_cfg.scheduler.end_weight_decay": 0.01,
    },
    "sft-nanov3-30BA3B-2n8g-fsdp2-lora": {
        "sft.max_num_steps": 100,
        "checkpointing.enabled": False,
        "policy.model_name": NANO,
        "policy.tokenizer.name": NANO,
        "policy.train_global_batch_size": 16,
        "policy.max_total_sequence_length": 2048,
        "policy.dynamic_batching.train_mb_tokens": 2048,
        "policy.sequence_packing.train_mb_tokens": 2048,
        "policy.dtensor_cfg.automodel_kwargs.force_hf": True,
        "policy.dtensor_cfg.lora_cfg.enabled": True,
        "policy.dtensor_cfg.lora_cfg.dim": 256,
        "policy.dtensor_cfg.lora_cfg.alpha": 512,
        "policy.dtensor_cfg.lora_cfg.exclude_modules": ["*out_proj*"],
        "policy.dtensor_cfg.lora_cfg.match_all_linear": False,
        "policy.dtensor_cfg.lora_cfg.use_triton": False,
        "data.max_input_seq_length": 2048,
        "cluster.gpus_per_node": 8,
        "cluster.num_nodes": 2,
    },
    "grpo-qwen3-8B-base-1n8g-fsdp2-lora": QWEN_8B
    | {
        "checkpointing.checkpoint_dir": "results/grpo-qwen3-8B-base-1n8g-fsdp2-lora",
        "policy.dtensor_cfg.activation_checkpointing": True,
        "policy.dtensor_cfg.lora_cfg.enabled": True,
        "policy.dtensor_cfg.lora_cfg.dim": 128,
        "policy.dtensor_cfg.lora_cfg.alpha": 128,
    },
    "grpo-qwen3-8b-base-1n8g-megatron-lora": QWEN_8B
    | MEGATRON
    | {
        "checkpointing.enabled": False,
        "checkpointing.checkpoint_dir": "results/grpo-qwen3-8b-base-1n8g-megatron-lora",
        "policy.megatron_cfg.activation_checkpointing": True,
        "policy.megatron_cfg.peft.dim": 128,
        "policy.megatron_cfg.peft.alpha": 128,
        "policy.megatron_cfg.scheduler.lr_warmup_iters": 50,
    },
    "grpo-nanov3-30BA3B-2n8g-fsdp2-lora": NANO_GRPO
    | {
        "checkpointing.checkpoint_dir": "results/grpo-nanov3-30BA3B-2n8g-fsdp2-lora",
        "policy.dtensor_cfg.automodel_kwargs.force_hf": True,
        "policy.dtensor_cfg.lora_cfg.enabled": True,
        "policy.dtensor_cfg.lora_cfg.dim": 128,
        "policy.dtensor_cfg.lora_cfg.alpha": 512,
        "policy.dtensor_cfg.lora_cfg.exclude_modules": ["*out_proj*"],
        "policy.dtensor_cfg.lora_cfg.match_all_linear": False,
        "policy.dtensor_cfg.lora_cfg.use_triton": False,
    },
    "grpo-nanov3-30BA3B-2n8g-megatron-lora": NANO_GRPO
    | MEGATRON
    | {
        "checkpointing.checkpoint_dir": "results/grpo-nanov3-30BA3B-2n8g-megatron-lora",
        "policy.megatron_cfg.bias_activation_fusion": False,
        "policy.megatron_cfg.tensor_model_parallel_size": 2,
        "policy.megatron_cfg.expert_model_parallel_size": 8,
        "policy.megatron_cfg.sequence_parallel": True,
        "policy.megatron_cfg.peft.dim": 128,
        "policy.megatron_cfg.peft.alpha": 512,
        "policy.megatron_cfg.peft.exclude_modules": ["*out_proj*"],
    },
}

USER_RECIPE = """
defaults: {base}
policy:
  model_name: Qwen/Qwen3-4B
  dtensor_cfg: {{tensor_parallel_size: 2, lora_cfg: {{enabled: true, dim: 64, alpha: 64}}}}
  optimizer: {{kwargs: {{lr: 1e-4}}}}
  scheduler:
    - name: torch.optim.lr_scheduler.LinearLR
      kwargs: {{start_factor: 0.1, end_factor: 1.0, total_iters: 10}}
    - name: torch.optim.lr_scheduler.CosineAnnealingLR
      kwargs: {{T_max: 90, eta_min: 1e-6}}
    - milestones: [10]
  generation: {{vllm_cfg: {{gpu_memory_utilization: 0.8}}}}
loss_fn: {{ratio_clip_max: 0.28, token_level_loss: true}}
logger: {{wandb_enabled: true, wandb: {{project: mine, name: "run-${{policy.model_name}}"}}}}
cluster: {{gpus_per_node: 4}}
"""


BASES = {"sft": "sft.yaml", "dpo": "dpo.yaml", "grpo": "grpo_math_1B.yaml"}


def test_the_table_lists_every_recipe() -> None:
    shipped = {file.stem for file in (CONFIG_DIR / "recipes" / "llm").glob("*.yaml")}
    assert shipped == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_differs_from_its_base_in_exactly_these_values(name: str) -> None:
    file = CONFIG_DIR / "recipes" / "llm" / f"{name}.yaml"
    algorithm = algorithm_of(file)
    base = CONFIG_DIR / BASES[algorithm]
    several = ["cluster.gpus_per_node=16"]  # in one process the base's tensor parallelism gives way
    before, after = (
        load_config(path, overrides, algorithm).model_dump(by_alias=True)
        for path, overrides in ((base, several), (file, []))
    )
    without_effect = {key: value for key, value in RECIPES[name].items() if _is_in_the_table(key)}
    expected = {key: value for key, value in RECIPES[name].items() if key not in without_effect}
    assert {key: value for key, (_, value) in differences(before, after).items()} == expected
    written = flatten(read_tree(file))
    assert {key: written[key] for key in without_effect} == without_effect


def _is_in_the_table(key: str) -> bool:
    """Whether it is a key of NeMo RL that has no effect here, which a loaded configuration does not have."""
    return any(f"{key}.".startswith(f"{known}.") for known in refused_keys(GrpoMaster))


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_inherits_on_one_level(name: str) -> None:
    text = (CONFIG_DIR / "recipes" / "llm" / f"{name}.yaml").read_text()
    assert f"defaults: ../../{BASES[name.split('-')[0]]}" in text.splitlines()


def test_users_recipe_that_inherits_a_base_file_loads(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(USER_RECIPE.format(base=CONFIG_DIR / "grpo_math_1B.yaml"))
    config = load_config(recipe, [], "grpo")
    assert config.policy.optimizer.kwargs.lr == 1e-4
    assert config.policy.make_sequence_length_divisible_by == 2
    assert config.policy.dtensor_cfg.lora_cfg.dim == 64
    assert config.loss_fn.ratio_clip_max == 0.28
    assert config.logger.wandb.name == "run-Qwen/Qwen3-4B"
    assert config.cluster.gpus_per_node == 4
