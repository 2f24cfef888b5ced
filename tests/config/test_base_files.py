"""The base files have NeMo RL's keys and values: base_files.tsv holds its table, `-` where a key is absent."""

import csv
import json
from pathlib import Path

import pytest

from nemo_rl_lora.config.load import CONFIG_DIR, load_config, read_tree, resolved_yaml
from nemo_rl_lora.config.lora import lora_spec_from_policy
from nemo_rl_lora.config.optimizer import lr_factor

TABLE = Path(__file__).with_name("base_files.tsv")
OWN_TEMPLATE = "policy.tokenizer.chat_template"  # a long text; only its presence is compared


def expected_values(file: str) -> dict[str, object]:
    with TABLE.open(newline="") as lines:
        rows = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    return {row["key"]: as_read(json.loads(row[file])) for row in rows if row[file] != "-"}


def as_read(value: object) -> object:
    """'1e-5' is a number for the loader, and text for other readers of YAML."""
    return float(value) if value in ("1e-3", "1e-5", "1e-8") else value


def leaf_values(tree: dict, prefix: str = "") -> dict[str, object]:
    values = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        values |= leaf_values(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return values


@pytest.mark.parametrize("file", ["sft", "dpo", "grpo_math_1B"])
def test_base_file_has_exactly_the_keys_and_values_of_the_table(file: str) -> None:
    values = leaf_values(read_tree(CONFIG_DIR / f"{file}.yaml"))
    assert (file == "sft") == (OWN_TEMPLATE in values)
    values.pop(OWN_TEMPLATE, None)
    expected = expected_values(file)
    # a key that the table has both whole (`{}`) and with a key below it is there with the key below it
    expected = {key: value for key, value in expected.items() if not any(k.startswith(f"{key}.") for k in expected)}
    assert values == expected


@pytest.mark.parametrize("algorithm", ["sft", "dpo", "grpo"])
def test_resolved_yaml_loads_to_an_equal_configuration(algorithm, tmp_path) -> None:
    file = {"sft": "sft.yaml", "dpo": "dpo.yaml", "grpo": "grpo_math_1B.yaml"}[algorithm]
    config = load_config(
        CONFIG_DIR / file, [r"policy.hf_config_overrides={note: '\${x}', size: '1e-5', flag: 'true'}"], algorithm
    )
    assert config.policy.hf_config_overrides == {"note": "${x}", "size": "1e-5", "flag": "true"}
    (tmp_path / "config.yaml").write_text(resolved_yaml(config))
    assert load_config(tmp_path / "config.yaml", [], algorithm) == config


def test_interpolations_of_the_grpo_base_file_have_their_values() -> None:
    config = load_config(CONFIG_DIR / "grpo_math_1B.yaml", [], "grpo")
    assert config.policy.logprob_batch_size == 4
    assert config.policy.sequence_packing.train_mb_tokens == 512 * 4
    assert config.policy.dynamic_batching.logprob_mb_tokens == 512 * 4
    assert config.policy.tokenizer.name == "Qwen/Qwen2.5-1.5B"
    assert config.policy.megatron_cfg.optimizer.clip_grad == 1.0
    assert config.policy.megatron_cfg.scheduler.end_weight_decay == 0.01
    assert config.policy.optimizer.kwargs.eps == 1e-8
    assert config.data.train is not None
    assert config.data.train.seed == 42
    assert config.data.max_input_seq_length == 512


def test_text_none_of_lora_dtype_is_null() -> None:
    overrides = ["policy.backend=megatron", "policy.megatron_cfg.peft.enabled=true"]
    spec = lora_spec_from_policy(load_config(CONFIG_DIR / "grpo_math_1B.yaml", overrides, "grpo").policy)
    assert spec is not None
    assert spec.dtype is None


def test_chat_template_of_the_sft_base_file_renders_roles_and_content() -> None:
    import jinja2

    template = load_config(CONFIG_DIR / "sft.yaml", [], "sft").policy.tokenizer.chat_template
    assert template is not None
    messages = [{"role": "system", "content": "C"}, {"role": "user", "content": " Q "}]
    rendered = jinja2.Template(template).render(messages=messages, add_generation_prompt=True)
    assert rendered == "Context: C Question: Q Answer:"
    messages.append({"role": "assistant", "content": "A"})
    rendered = jinja2.Template(template).render(messages=messages, add_generation_prompt=False)
    assert rendered == "Context: C Question: Q Answer: A"


def test_quick_start_is_small_and_full_fine_tuning_takes_its_own_learning_rate() -> None:
    config = load_config(None, [], "grpo")
    optimizer = config.policy.optimizer
    assert (optimizer.learning_rate(lora=True), optimizer.learning_rate(lora=False)) == (2.5e-4, 2e-6)
    assert optimizer.model_copy(update={"full_finetuning_lr": None}).learning_rate(lora=False) == 2.5e-4
    assert not config.policy.dtensor_cfg.lora_cfg.enabled
    assert lr_factor(config.policy.scheduler, 0) == 1.0
    assert lr_factor(config.policy.scheduler, 30) == pytest.approx(0.1)
    assert config.grpo.num_prompts_per_step * config.grpo.num_generations_per_prompt == 64
    assert config.policy.train_global_batch_size == 64
    assert config.data.default.env_name == "last_number"
    assert config.data.train is not None
    assert config.data.train.env_name == "last_number"
    assert (config.data.train.low, config.data.train.high) == (1, 9)
    assert config.loss_fn.reference_policy_kl_penalty == 0
