"""NeMo RL's own files: what they have beside the keys of the base files here, and what its recipes set."""

from pathlib import Path

import pytest

from nemo_rl_lora.config.errors import ConfigError
from nemo_rl_lora.config.load import CONFIG_DIR, load_config

# what its grpo_math_1B.yaml has of features that are not here, at the values that it has them
ABSENT = """
data_plane:
  enabled: false
  impl: transfer_queue
  backend: simple
  claim_meta_poll_interval_s: 0.5
  simple: {storage_capacity: 1000000, num_storage_units: "${mul:2, ${cluster.num_nodes}}"}
  mooncake_cpu: {global_segment_size: 68719476736, reuse_registered_buffers: true}
  observability: {enabled: true}
on_policy_distillation: null
reward_penalties:
  penalize_duplicated_reasoning: false
  penalize_empty_final_answer: false
  penalize_unwanted_tokens: false
  penalize_malformed_think_tag: false
  token_ids: null
checkpointing: {load_replay_buffer: true, save_data_plane: false}
loss_fn: {seq_logprob_error_in_loss: false}
policy:
  draft: {enabled: false, model_name: null, loss_weight: 0.1, num_layers: null, aux_layer_indices: null}
  router_replay: {enabled: false}
  quant_cfg: null
  worker_extension_cls_fqn: null
  tokenizer: {tokenizer_kwargs: null}
  dtensor_cfg:
    lora_cfg: {restore_from: null}
    checkpoint: {model_save_format: safetensors, save_consolidated: "false", consolidation_timeout_minutes: 30}
  megatron_cfg:
    converter_type: Qwen2ForCausalLM
    defer_fp32_logits: null
    empty_unused_memory_level: 0
    fp8_cfg: null
    peft: {restore_from: null}
    distributed_data_parallel_config: {average_in_collective: true}
  generation:
    quant_cfg: null
    mcore_generation_config:
      max_model_len: ${policy.max_total_sequence_length}
      cuda_graph_impl: local
      buffer_size_gb: 10
      parsers: []
    vllm_cfg: {refit_prequantize: false, fp32_lm_head: "${policy.megatron_cfg.fp32_lm_head}"}
"""


def loaded(tmp_path: Path, text: str, algorithm: str = "grpo"):
    file = tmp_path / "recipe.yaml"
    base = {"grpo": "grpo_math_1B.yaml", "sft": "sft.yaml", "dpo": "dpo.yaml"}[algorithm]
    file.write_text(f"defaults: {CONFIG_DIR}/{base}\n{text}")
    return load_config(file, [], algorithm)


def test_sections_of_absent_features_load_while_they_are_off(tmp_path):
    text = ABSENT.replace("megatron_cfg:\n", "megatron_cfg:\n    fp32_lm_head: false\n")
    assert loaded(tmp_path, text) == load_config(CONFIG_DIR / "grpo_math_1B.yaml", [], "grpo")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data_plane: {enabled: true}", "data_plane.enabled=True: only False is supported."),
        ("on_policy_distillation: {teachers: [a]}", "on_policy_distillation={'teachers': ['a']}: only None"),
        ("reward_penalties: {penalize_unwanted_tokens: true}", "reward_penalties.penalize_unwanted_tokens=True: "),
        ("policy: {draft: {enabled: true}}", "policy.draft.enabled=True: only False is supported. No draft model"),
        ("policy: {router_replay: {enabled: true}}", "policy.router_replay.enabled=True: only False"),
        ("policy: {quant_cfg: some}", "policy.quant_cfg='some': only None is supported."),
        ("policy: {megatron_cfg: {fp8_cfg: {enabled: true}}}", "policy.megatron_cfg.fp8_cfg.enabled=True: only False"),
        ("policy: {dtensor_cfg: {lora_cfg: {restore_from: x}}}", "policy.dtensor_cfg.lora_cfg.restore_from='x': only"),
        ("policy: {generation: {backend: sglang, sglang_cfg: {dp_size: 1}}}", "policy.generation.backend='sglang': "),
    ],
)
def test_a_feature_that_is_not_here_is_refused_by_name(tmp_path, text, message):
    with pytest.raises(ConfigError) as raised:
        loaded(tmp_path, text)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "algorithm"),
    [
        ("grpo: {val_period: -1, async_grpo: null}", "grpo"),
        ("env: {math: {math_verify_impl: dapo_math_verify}}", "grpo"),
        ("dpo: {val_period: -1}\ncheckpointing: {metric_name: null}\ndata: {num_workers: 8, validation: null}", "dpo"),
        ("policy: {generation_batch_size: 64, sequence_packing: {algorithm: modified_ffd}}", "grpo"),
        ("policy: {dtensor_cfg: {clear_cache_every_n_steps: 50}}\ncluster: {segment_size: 18}", "grpo"),
        ("policy: {dtensor_cfg: {automodel_kwargs: {backend: {attn: te, fake_balanced_gate: false}}}}", "grpo"),
        (
            "policy:\n  dtensor_cfg: {enabled: false}\n  optimizer: null\n  scheduler: null\n  megatron_cfg:\n"
            "    {enabled: true, defer_fp32_logits: true, attention_backend: unfused, peft: {target_modules: null}}",
            "sft",
        ),
        ("data: {train: {dataset_name: DeepScaler}, validation: {dataset_name: AIME2024, repeat: 16}}", "grpo"),
        (
            "policy: {generation: {vllm_cfg: {env_vars: {VLLM_USE_FLASHINFER_MOE_FP8: '0'}, async_engine: true}}}",
            "grpo",
        ),
        ("data: {train: {dataset_name: squad, split: train, max_samples: 100000}}", "sft"),
    ],
)
def test_what_its_recipes_set_and_changes_no_result_is_accepted(tmp_path, text, algorithm):
    config = loaded(tmp_path, text, algorithm)
    set_here = {"policy.generation_batch_size", "data.num_workers", "policy.dtensor_cfg.clear_cache_every_n_steps"}
    assert {key for key in config.layers.without_effect if key in set_here} == {
        key for key in set_here if key.rpartition(".")[2] in text
    }
