"""Files of VeOmni, verl and theseus as their users write them, small, with a model and rows of a test's own."""

import json
from pathlib import Path

import yaml

VEOMNI = """
model:
  model_path: {model}
  ops_implementation:
    attn_implementation: flash_attention_2
    moe_implementation: fused_triton
  lora_config:
    rank: 4
    alpha: 8
    use_rslora: true
    lora_dropout: 0.1
    lora_modules: [q_proj, v_proj, down_proj]
    exclude_modules: [layers.0.mlp.down_proj]
    rank_pattern: {{v_proj: 2}}
    alpha_pattern: {{'layers\\.1\\.': 4}}
  optimizer:
    type: adamw
    lr: 1.0e-3
    lr_min: 1.0e-4
    lr_decay_style: cosine
    lr_warmup_ratio: 0.5
    max_grad_norm: 1.0
  accelerator:
    init_device: meta
    gradient_checkpointing: {{enable: false}}
    fsdp_config: {{fsdp_mode: fsdp2}}
data:
  train_path: {chats}
  data_type: conversation
  chat_template: chatml
  max_seq_len: 128
  text_keys: messages
train:
  dyn_bsz: false
  global_batch_size: 2
  micro_batch_size: 1
  num_train_epochs: 1
  max_steps: 2
  seed: 7
  checkpoint: {{output_dir: {root}/veomni, manager: dcp, save_steps: 1, save_epochs: 0}}
  wandb: {{enable: false, project: VeOmni}}
"""
VERL_SFT = """
data:
  train_batch_size: 2
  micro_batch_size_per_gpu: 2
  train_files: {rows}
  val_files: {rows}
  prompt_key: input
  response_key: output
  max_length: 96
  truncation: right
  custom_cls: {{path: null, name: null}}
model:
  partial_pretrain: {model}
  fsdp_config: {{model_dtype: fp32, wrap_policy: {{min_num_params: 0}}, cpu_offload: false}}
  enable_gradient_checkpointing: false
  trust_remote_code: false
  lora_rank: 4
  lora_alpha: 8
  target_modules: [q_proj, o_proj]
optim:
  lr: 1.0e-3
  betas: [0.9, 0.95]
  weight_decay: 0.01
  warmup_steps_ratio: 0.5
  clip_grad: 1.0
  lr_scheduler: cosine
ulysses_sequence_parallel_size: 1
use_remove_padding: false
trainer:
  default_local_dir: {root}/${{trainer.project_name}}
  project_name: own-sft
  experiment_name: test
  total_epochs: 1
  total_training_steps: 2
  logger: [console]
  seed: 1
  save_freq: -1
  test_freq: -1
  nnodes: 1
  n_gpus_per_node: 1
"""
VERL_GRPO = """
defaults: [ppo_trainer, _self_]
actor_rollout_ref:
  model:
    path: {model}
    lora_rank: 4
    lora_alpha: 8
    target_modules: all-linear
    exclude_modules: '.*(up|down)_proj'
    use_remove_padding: true
    enable_gradient_checkpointing: false
  actor:
    strategy: fsdp
    ppo_mini_batch_size: 1
    ppo_micro_batch_size_per_gpu: 2
    use_kl_loss: true
    kl_loss_coef: 0.002
    kl_loss_type: low_var_kl
    clip_ratio_high: 0.28
    loss_agg_mode: seq-mean-token-mean
    entropy_coeff: 0
    grad_clip: 0.5
    optim: {{lr: 1.0e-3}}
    fsdp_config: {{param_offload: false}}
  rollout: {{name: vllm, n: 2, temperature: 0.9, tensor_model_parallel_size: 1, layered_summon: true}}
  ref: {{log_prob_micro_batch_size_per_gpu: 2}}
data:
  train_files: {questions}
  val_files: {questions}
  train_batch_size: 2
  max_prompt_length: 64
  max_response_length: 4
  filter_overlong_prompts: true
  truncation: error
algorithm: {{adv_estimator: grpo, use_kl_in_reward: false, kl_ctrl: {{kl_coef: 0.001}}}}
custom_reward_function: {{path: {root}/reward.py, name: compute_score}}
trainer:
  default_local_dir: {root}/verl
  total_training_steps: 1
  logger: [console]
  val_before_train: false
  save_freq: -1
  test_freq: -1
  nnodes: 1
  n_gpus_per_node: 1
"""
THESEUS = """
job: gpt/train/lora
architecture:
  block_size: 96
  backbone: {{implementation: llama, weights: {model}}}
  dtype: {{param: float32, activation: bfloat16}}
optimization:
  lr: 0.0003
  weight_decay: 0.1
  lora: {{rank: 4, alpha: 8.0, target_modules: [kernel]}}
training:
  batch_size: 2
  per_device_batch_size: 2
  pre_lora_tokens: [100, 150]
  pre_lora_dataset:
    - [{{name: fineweb, rate: 1.0, style: PMD}}]
    - [{{name: fineweb, rate: 0.75, style: PMD}}, {{name: squad, rate: 0.25, style: PADDED}}]
  post_lora_tokens: [120]
  post_lora_dataset:
    - [{{name: cfq, rate: 1.0, style: PADDED, suffix: sparql}}]
  warmup_pct: 0.02
  decay_pct: 0.2
  validation: false
logging: {{wandb: false, checkpoint_interval: 95}}
request: {{chip: h200, min_chips: 4}}
"""
FILES = {"veomni": VEOMNI, "verl_sft": VERL_SFT, "verl_grpo": VERL_GRPO, "theseus": THESEUS}
REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    assert data_source == "sums" and ground_truth.isdigit() and extra_info["index"] >= 0
    return {"score": (sum(map(ord, solution_str)) % 5) / 4}
"""


def write_file(root: Path, tool: str, model: Path | str = "org/model") -> Path:
    """The file of a tool, and the rows and the reward that it names."""
    rows = [{"input": f"{i} + {i % 3}?", "output": "so " * (i % 4) + str(i + i % 3)} for i in range(12)]
    chats = [
        {
            "messages": [
                {"role": role, "content": row[key]} for role, key in (("user", "input"), ("assistant", "output"))
            ]
        }
        for row in rows
    ]
    questions = [
        {
            "data_source": "sums",
            "prompt": [{"role": "user", "content": row["input"]}],
            "reward_model": {"style": "rule", "ground_truth": str(i + i % 3)},
            "extra_info": {"index": i},
        }
        for i, row in enumerate(rows)
    ]
    named = {}
    for name, written in (("rows", rows), ("chats", chats), ("questions", questions)):
        named[name] = root / f"{name}.jsonl"
        named[name].write_text("".join(json.dumps(row) + "\n" for row in written))
    (root / "reward.py").write_text(REWARD)
    file = root / f"{tool}.yaml"
    file.write_text(FILES[tool].format(root=root, model=model, **named))
    assert isinstance(yaml.safe_load(file.read_text()), dict)
    return file
