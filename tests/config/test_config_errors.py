"""What wrong configurations say, word for word: key, value, rule, remedy."""

from pathlib import Path

import pytest

from nemo_rl_lora.config.errors import ConfigError
from nemo_rl_lora.config.load import CONFIG_DIR, algorithm_of, load_config

QUICK = CONFIG_DIR / "quickstart" / "grpo.yaml"

OVERRIDES = {
    "grpo.sed=3": "grpo.sed=3: unknown key. Did you mean 'seed'? Keys of grpo: ",
    "train_micro_batch_size=4": "train_micro_batch_size=4: unknown key. Did you mean 'policy.train_micro_batch_size'? "
    "Keys of the top level: checkpointing, cluster, data, env, evaluate, grpo, logger, loss_fn, policy.",
    "+cluster.gpu_per_node=1": "cluster.gpu_per_node=1: unknown key. Did you mean 'gpus_per_node'? Keys of cluster: "
    "gpus_per_node, max_restarts, num_nodes, ",
    "policy.lora.dim.x=3": "policy.lora.dim.x=3: unknown key. Keys of policy.lora.dim: none.",
    "policy.precision=bfloat": "policy.precision='bfloat': must be one of 'float32' or 'bfloat16'. "
    "Did you mean 'bfloat16'?",
    "policy.train_micro_batch_size=0": "policy.train_micro_batch_size=0: must be at least 1. "
    "Correct the value (the schema's default is 1).",
    "policy.train_micro_batch_size=1.5": "policy.train_micro_batch_size=1.5: must be a whole number. "
    "Correct the value (the schema's default is 1).",
    "policy.optimizer.kwargs.lr=fast": "policy.optimizer.kwargs.lr='fast': must be a number. "
    "Correct the value (the schema's default is 5e-06).",
    "policy.max_grad_norm=nan": "policy.max_grad_norm=nan: must be a finite number. "
    "Correct the value (the schema's default is 1.0).",
    "policy.shared_prefix.enabled=sometimes": "policy.shared_prefix.enabled='sometimes': must be one of 'auto' or "
    "true or false. Correct the value (the schema's default is 'auto').",
    "policy.dtensor_cfg=3": "policy.dtensor_cfg=3: must be a mapping. Its keys: _v2, activation_checkpointing, ",
    "policy.megatron_cfg.optimizer.optimizer_cpu_offload=true": "policy.megatron_cfg.optimizer.optimizer_cpu_offload="
    "True: only False is supported. Activations and optimizer state stay on their device: remove the key.",
    "policy.optimizer.name=torch.optim.SGD": "policy.optimizer.name='torch.optim.SGD': only 'torch.optim.AdamW' is "
    "supported. Leave the name out and set policy.optimizer.kwargs.",
    "policy.megatron_cfg.enabled=true": "policy.megatron_cfg.enabled=True: one backend trains, and "
    "policy.dtensor_cfg.enabled is true as well. Set policy.backend=dtensor or policy.backend=megatron, or one of "
    "the two flags to false.",
    "policy.dtensor_cfg.enabled=false": "policy.backend=None: one backend has to train, and "
    "policy.dtensor_cfg.enabled and policy.megatron_cfg.enabled are both false. Set policy.backend=dtensor or "
    "policy.backend=megatron.",
    "policy.sequence_packing.enabled=true": "policy.sequence_packing.enabled=True: microbatches are either packed or "
    "filled by length, and policy.dynamic_batching.enabled is true as well. Set one of the two to false.",
    "policy.dynamic_batching.train_mb_tokens=100": "policy.dynamic_batching.train_mb_tokens=100: the longest sequence "
    "has to fit into a microbatch, and policy.max_total_sequence_length is 128. Raise it to 128 or more.",
    "policy.generation=null": "policy.generation=None: GRPO samples completions and needs an engine. Inherit "
    "examples/configs/grpo_math_1B.yaml, or set policy.generation.backend=auto.",
    "data.train=null": "data.train=None: there is nothing to train on. Name a dataset: data.train.dataset_name=NAME.",
    "data.train.env_name=last_numbers": "data.train.env_name='last_numbers': no environment scores these completions. "
    "Did you mean 'last_number'? Choose one of math, last_number, reasoning_gym, or add your own: "
    "env.NAME.reward_function=FILE.py:FUNCTION.",
    "policy.scheduler={name: cosin, total_steps: 3}": "policy.scheduler.name='cosin': must be one of 'constant', "
    "'linear', 'cosine' or 'wsd'. Did you mean 'cosine'?",
    "policy.scheduler={name: cosine, total_steps: null}": "policy.scheduler.total_steps=None: the cosine scheduler "
    "has to know where its "
    "decay ends. Set it to the number of the run's steps.",
    "policy.scheduler=[3]": "policy.scheduler.0=3: must be a mapping. Correct the value.",
    "policy.optimizer.kwargs={foreach: true, fused: true}": "policy.optimizer.kwargs.fused=True: AdamW runs either "
    "fused or foreach, and both are true. Set one of the two to false.",
    "policy.optimizer.kwargs.betas.5=2": "policy.optimizer.kwargs.betas.5=2: policy.optimizer.kwargs.betas is a list "
    "of 2 elements, counted from 0. Give the whole list: policy.optimizer.kwargs.betas=[...].",
    "policy.model_name=${policy.modl}": "policy.model_name='${policy.modl}': this reference has no value "
    "(Interpolation key 'policy.modl' not found). Correct it.",
    "policy.model_name=${policy.tokenizer.name}": "policy.model_name='${policy.tokenizer.name}': this reference has no "
    "value (Recursive interpolation detected). Correct it.",
    "policy.model_name=???": "policy.model_name='???': is mandatory, and the file leaves it open. Set it in a file "
    "that inherits this one, or on the command line: policy.model_name=VALUE. It is: A local directory or a Hugging "
    "Face name.",
    "grpo.seed=1,2": "grpo.seed=1,2: one run takes one value. For a list write grpo.seed=[1,2].",
    "grpo.seed": "grpo.seed: this override cannot be read (missing EQUAL at '<EOF>'). "
    "Write key=value, +key=value, ++key=value or ~key.",
    "policy.model_name=/a b(1)": "policy.model_name=/a b(1): this override cannot be read (mismatched input '(' "
    "expecting <EOF>). Put the value in quotes of its own: 'policy.model_name=\"/a b(1)\"'.",
    "data.train={dataset_name: squad, low: 3, input_key: x}": "data.train.input_key='x': has no meaning with "
    "dataset_name='squad' (nor have low=3), whose own keys are data_path, split, subset. Remove it; what another file "
    "set goes with `_override_: true` in this block.",
    "=3": "=3: this override names no key. Write key=value, +key=value, ++key=value or ~key.",
    "grpo@x=1": "grpo@x=1: overrides have no package ('@'). Write key=value, +key=value, ++key=value or ~key.",
    "~cluster.gpus": "~cluster.gpus: there is nothing to delete. Keys of cluster: gpus_per_node, "
    "master_port_range_high, master_port_range_low, ",
    "~grpo.seed=1": "~grpo.seed=1: the value is 42. Leave the value out to delete it.",
    "+grpo.seed=1": "+grpo.seed=1: the key exists, with the value 42. Leave the '+' out to change it, or write '++'.",
}

FILES = {
    "grpo: [1": "{file}: no valid YAML (line 1: expected ',' or ']', but got '<stream end>'). Correct the file.",
    "a: 1\na: 2": "{file}: no valid YAML (line 2: found duplicate key a). Correct the file.",
    "- a": "{file}: holds a list where a mapping of sections is needed. Give a YAML file.",
    "defaults: nope.yaml": "defaults='nope.yaml' in {file}: there is no file {dir}/nope.yaml. "
    "The base files, quick starts and recipes are in {configs}.",
    "defaults: wrong.yaml": "defaults='wrong.yaml': the files inherit each other (wrong.yaml -> wrong.yaml). "
    "Remove one `defaults`.",
    "defaults: 3": "defaults=3: must be a path or a list of paths, relative to {file}. "
    "Write for example `defaults: ../../sft.yaml`.",
    "defaults: {configs}/sft.yaml": "--config='{file}': has a section 'sft', which belongs to examples/run_sft.py, "
    "and grpo was started. Start that driver, or give a file that inherits examples/configs/grpo_math_1B.yaml.",
    "defaults: {configs}/quickstart/grpo.yaml\npolicy: {{train_micro_batch_size: '${{mul:1,'}}": "{file}: an "
    "interpolation cannot be read (missing BRACE_CLOSE at '<EOF>'). Correct it.",
    "grpo: {{seed: 1}}": "policy=<absent>: this key is required. Inherit a base file with `defaults:`.\n"
    "data=<absent>: this key is required. Inherit a base file with `defaults:`.",
}


@pytest.mark.parametrize("override", OVERRIDES)
def test_wrong_override_says(override: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(QUICK, [override], "grpo")
    expected = OVERRIDES[override]
    said = str(raised.value)
    assert said == expected or (expected.endswith((": ", ", ")) and said.startswith(expected)), said


@pytest.mark.parametrize("place", ["models/x", "a b/(c), d=e [f]"])
def test_a_path_below_the_home_directory_is_expanded_on_the_command_line_and_in_files(place, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "own.yaml"
    file.write_text(f"defaults: {QUICK}\ncheckpointing: {{checkpoint_dir: '~/{place}'}}\n")
    config = load_config(file, [f"policy.model_name=~/{place}"], "grpo")
    assert config.policy.model_name == config.checkpointing.checkpoint_dir == f"{tmp_path}/{place}"


@pytest.mark.parametrize("text", FILES)
def test_wrong_file_says(text: str, tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(text.format(configs=CONFIG_DIR))
    with pytest.raises(ConfigError) as raised:
        load_config(file, [], "grpo")
    assert str(raised.value) == FILES[text].format(file=file, dir=tmp_path, configs=CONFIG_DIR)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["policy.dtensor_cfg._v2=false", "policy.dtensor_cfg.lora_cfg.enabled=true"], "policy.dtensor_cfg._v2=False"),
        (["policy.megatron_cfg.peft.enabled=true"], "policy.megatron_cfg.peft.enabled=True"),
        (["policy.lora.dim=4", "policy.dtensor_cfg.lora_cfg.enabled=true"], "policy.lora.enabled=True"),
        (["policy.lora.dim=0"], "policy.lora.dim=0"),
        (
            ["policy.dtensor_cfg.lora_cfg.dim=0", "policy.dtensor_cfg.lora_cfg.enabled=true"],
            "policy.dtensor_cfg.lora_cfg.dim=0",
        ),
        (["policy.train_global_batch_size=7"], "policy.train_global_batch_size=7"),
        (["checkpointing.metric_name=accuracy"], "checkpointing.metric_name='accuracy'"),
        (["data.train.dataset_name=generated_sum"], "data.train.dataset_name='generated_sum'"),
        (["env.mine.module=x"], "env.mine"),
    ],
)
def test_rule_across_keys_names_its_key_in_full(overrides: list[str], key: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(QUICK, overrides, "grpo")
    assert str(raised.value).startswith(f"{key}: ")
    assert "\n" not in str(raised.value)


def test_every_mistake_gets_its_paragraph() -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(QUICK, ["grpo.val_period=x", "policy.precision=int8", "logger.log_dir=''"], "grpo")
    keys = sorted(line.split("=")[0] for line in str(raised.value).splitlines())
    assert keys == ["grpo.val_period", "logger.log_dir", "policy.precision"]


def test_value_derived_by_reference_is_not_a_second_mistake() -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(QUICK, ["policy.train_micro_batch_size=many"], "grpo")
    assert str(raised.value).count("must be") == 1


def test_cycle_of_files_is_named_in_its_order(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("defaults: b.yaml")
    (tmp_path / "b.yaml").write_text("defaults: a.yaml")
    with pytest.raises(ConfigError, match=r"a\.yaml -> b\.yaml -> a\.yaml"):
        load_config(tmp_path / "a.yaml", [], "grpo")


def test_missing_file_and_directory_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--config='.*none\.yaml': there is no file"):
        load_config(tmp_path / "none.yaml", [], "grpo")
    with pytest.raises(ConfigError, match=r"^--config='.*': .* is a directory\."):
        load_config(tmp_path, [], "grpo")


def test_sft_refuses_a_generation_engine() -> None:
    with pytest.raises(ConfigError, match=r"^policy\.generation\.backend='auto': SFT samples nothing"):
        load_config(CONFIG_DIR / "sft.yaml", ["policy.generation.backend=auto"], "sft")


def test_file_without_a_section_of_any_algorithm_is_named(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("policy: {}")
    with pytest.raises(ConfigError, match="one section out of sft, dpo, grpo, eval, and this one has none"):
        algorithm_of(file)
