"""refused_keys.tsv: NeMo RL's keys that have no effect here are known, and accepted at their values."""

import json
import re

import pytest

from nemo_rl_lora.config.errors import ConfigError
from nemo_rl_lora.config.load import CONFIG_DIR, load_config, read_tree, resolved_yaml
from nemo_rl_lora.config.master import MASTERS, EvalMaster, GrpoMaster, SftMaster
from nemo_rl_lora.config.refused_keys import refused_keys
from nemo_rl_lora.config.schema import types_at
from nemo_rl_lora.config.tree import flatten

TABLE = refused_keys(GrpoMaster)


def override(key: str, value) -> str:
    text = re.sub(r'"(\w+)":', r"\1:", json.dumps(value))  # Hydra has no quotes around the keys of a mapping
    return f"{key}={text}"


@pytest.mark.parametrize("root", MASTERS.values())
def test_no_key_of_the_table_is_a_field_of_the_schema(root):
    assert [key for key in refused_keys(root) if types_at(root, key.split("."))] == []


def test_every_row_says_what_to_do():
    assert all(row.values and row.remedy.endswith(".") for row in TABLE.values())


def test_every_key_passes_at_each_of_its_values_all_at_once(tmp_path):
    for number in range(2):
        values = {key: row.values[min(number, len(row.values) - 1)] for key, row in TABLE.items()}
        config = load_config(None, [override(key, value) for key, value in values.items()], "grpo")
        assert config == load_config(None, [], "grpo")
        assert not any(config.is_set(key) for key in TABLE)
        (tmp_path / "config.yaml").write_text(resolved_yaml(config))
        assert load_config(tmp_path / "config.yaml", [], "grpo") == config


def test_every_key_is_refused_by_name_at_another_value():
    with pytest.raises(ConfigError) as raised:
        load_config(None, [f"++{key}=unheard_of" for key in TABLE], "grpo")
    lines = str(raised.value).splitlines()
    assert [line.split("=")[0] for line in lines] == list(TABLE)
    assert all(line.endswith(f": {row.rule}") for line, row in zip(lines, TABLE.values(), strict=True))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("grpo.async_grpo.enabled=true", "Rollouts and training alternate"),
        ("grpo.adv_estimator.name=gdpo", "gdpo, reinforce_plus_plus"),
        ("grpo.max_rollout_turns=2", "Rollouts have one turn"),
        ("grpo.seq_logprob_error_threshold=2.0", "truncated_importance_sampling_type=tis"),
        ("loss_fn.use_kl_in_reward=true", "reinforce_plus_plus"),
        ("loss_fn.positive_example_nll_weight=0.1", "not supported"),
        ("checkpointing.model_save_format=torch_save", "model_save_format"),
        ("checkpointing.save_consolidated=true", "save_consolidated"),
        ("policy.generation.refit_transport=nixl", "only None is supported"),
        ("policy.generation.colocated.resources.num_nodes=2", "only None is supported"),
        ("policy.generation.vllm_cfg.kv_cache_dtype=fp8", "only 'auto' is supported"),
        ("env.math.math_verify_impl=other", "only 'hf_math_verify' is supported"),
        ("data.train.repeat=2", r"^data.train.repeat=2: only 1 is supported. Use the algorithm's max_num_epochs"),
        ("data.num_workers=4", r"^data.num_workers=4: only 0 or 1 is supported"),
        ("data.use_multiple_dataloader=true", "only False is supported"),
    ],
)
def test_what_is_refused_says_why(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, [override], "grpo")


def test_a_key_of_the_table_is_meant_for_each_section_of_a_list():
    listed = "data.train=[{dataset_name: gsm8k, repeat: 1}, {dataset_name: gsm8k, repeat: %s}]"
    config = load_config(None, [listed.replace("%s", "1")], "sft")
    assert [section.dataset_name for section in config.data.train] == ["gsm8k", "gsm8k"]
    for override in ([listed.replace("%s", "2")], [listed.replace("%s", "1"), "data.train.1.repeat=2"]):
        with pytest.raises(ConfigError, match=r"^data.train.1.repeat=2: only 1 is supported. [^\n]*$"):
            load_config(None, override, "sft")


@pytest.mark.parametrize("file", ["sft", "dpo", "grpo_math_1B"])
def test_values_of_the_base_files_are_accepted(file):
    tree = flatten(read_tree(CONFIG_DIR / f"{file}.yaml"))
    written = {key: tree[key] for key in TABLE.keys() & tree.keys()}
    assert len(written) > 20
    assert all("${" in str(value) or value in TABLE[key].values for key, value in written.items())


@pytest.mark.parametrize(
    ("override", "error"),
    [
        ("policy.dtensor_cfg.cpu_offlod=true", "unknown key. Did you mean 'cpu_offload'?"),
        (
            "policy.megatron_cfg.fp8_cfg.fp9=1",
            "unknown key. Did you mean 'fp8'? Keys of policy.megatron_cfg.fp8_cfg: e",
        ),
        ("policy.megatron_cfg.fp8_cfg=3", "must be a mapping. Its keys: enabled, fp8, fp8_param, fp8_recipe."),
        ("++grpo.async_grpo.seed=3", "Keys of grpo.async_grpo: enabled, in_flight_weight_updates, "),
    ],
)
def test_mistakes_beside_the_table_are_explained(override, error):
    with pytest.raises(ConfigError, match=error.replace("?", r"\?")) as raised:
        load_config(None, [override], "grpo")
    assert str(raised.value).startswith(override.lstrip("+").split("=")[0])


def test_a_driver_has_the_keys_of_its_own_sections():
    assert not any(key.startswith(("grpo.", "loss_fn.", "env.")) for key in refused_keys(SftMaster))
    of_evaluation = {key for key in refused_keys(EvalMaster) if not key.startswith("data.")}
    assert of_evaluation == {"policy.tokenizer.use_fastokens", "env.math.math_verify_impl"}
    with pytest.raises(ConfigError, match=r"^policy.generation.port_range_low=3000: unknown key"):
        load_config(None, ["policy.generation.port_range_low=3000"], "eval")
