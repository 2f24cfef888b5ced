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
OF_VALUES = {key: row for key, row in TABLE.items() if row.values}
ANY = [key for key, row in TABLE.items() if row.values is None]
SECTIONS = {key: row.switches for key, row in TABLE.items() if row.switches}


def override(key: str, value) -> str:
    text = re.sub(r'"(\w+)":', r"\1:", json.dumps(value))  # Hydra has no quotes around the keys of a mapping
    return f"{key}={text}"


@pytest.mark.parametrize("root", MASTERS.values())
def test_no_key_of_the_table_is_a_field_of_the_schema(root):
    assert [key for key in refused_keys(root) if types_at(root, key.split("."))] == []


def test_every_row_says_what_to_do():
    assert all(row.remedy.endswith(".") for row in TABLE.values())
    assert all((row.values is None) + bool(row.values) + bool(row.switches) == 1 for row in TABLE.values())


def test_every_key_passes_at_each_of_its_values_all_at_once(tmp_path):
    for number in range(2):
        values = {key: row.values[min(number, len(row.values) - 1)] for key, row in OF_VALUES.items()}
        values |= {key: [8, {"x": [True]}][number] for key in ANY}
        values |= {key: [None, {name: off[0] for name, off in SECTIONS[key].items()}][number] for key in SECTIONS}
        config = load_config(None, [override(key, value) for key, value in values.items()], "grpo")
        assert config == load_config(None, [], "grpo")
        assert set(config.layers.without_effect) == {
            *ANY,
            *(key for key, row in OF_VALUES.items() if number and len(row.values) > 1),
        }
        assert not any(config.is_set(key) for key in TABLE)
        (tmp_path / "config.yaml").write_text(resolved_yaml(config))
        assert load_config(tmp_path / "config.yaml", [], "grpo") == config


def test_every_key_is_refused_by_name_at_another_value():
    with pytest.raises(ConfigError) as raised:
        load_config(None, [f"++{key}=unheard_of" for key in TABLE], "grpo")
    lines = str(raised.value).splitlines()
    refused = {key: row for key, row in TABLE.items() if key not in ANY}
    assert [line.split("=")[0] for line in lines] == list(refused)
    assert all(line.endswith(f". {row.remedy}") for line, row in zip(lines, refused.values(), strict=True))


def test_every_section_is_refused_by_its_switch():
    for key, switches in SECTIONS.items():
        for name in switches:
            with pytest.raises(ConfigError) as raised:
                load_config(None, [f"++{key}={{{name}: unheard_of, other: 3}}"], "grpo")
            assert re.fullmatch(rf"{key}\.{name}='unheard_of': only [^\n]*", str(raised.value))
        config = load_config(None, [f"++{key}.anything.below=3"], "grpo")
        assert config == load_config(None, [], "grpo")


@pytest.mark.parametrize("written", ["1", "0", "yes", '"on"'])
def test_a_switch_of_the_table_is_no_number(written):
    for key in ("data_plane.enabled", "checkpointing.save_consolidated", "policy.draft.enabled"):
        with pytest.raises(ConfigError, match=rf"^{key}=[^\n]*: only False is supported"):
            load_config(None, [f"++{key}={written}"], "grpo")
    assert load_config(None, ['checkpointing.save_consolidated="false"'], "grpo") == load_config(None, [], "grpo")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("grpo.adv_estimator.name=gdpo", "gdpo, reinforce_plus_plus"),
        ("grpo.max_rollout_turns=2", "Rollouts have one turn"),
        ("grpo.seq_logprob_error_threshold=2.0", "truncated_importance_sampling_type=tis"),
        ("loss_fn.use_kl_in_reward=true", "reinforce_plus_plus"),
        ("loss_fn.positive_example_nll_weight=0.1", "not supported"),
        ("checkpointing.model_save_format=torch_save", "model_save_format"),
        ("checkpointing.save_consolidated=true", "save_consolidated"),
        ("policy.generation.refit_transport=nixl", "only None is supported"),
        ("policy.generation.vllm_cfg.kv_cache_dtype=fp8", "only 'auto' is supported"),
        ("env.math.math_verify_impl=other", "'hf_math_verify' or 'dapo_math_verify'"),
        ("data.use_multiple_dataloader=true", "only False is supported"),
    ],
)
def test_what_is_refused_says_why(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, [override], "grpo")


@pytest.mark.parametrize("file", ["sft", "dpo", "grpo_math_1B"])
def test_values_of_the_base_files_are_accepted(file):
    tree = flatten(read_tree(CONFIG_DIR / f"{file}.yaml"))
    written = {key: tree[key] for key in OF_VALUES.keys() & tree.keys()}
    assert len(written) > 20
    assert all("${" in str(value) or value in TABLE[key].values for key, value in written.items())


@pytest.mark.parametrize(
    ("override", "error"),
    [
        ("policy.dtensor_cfg.cpu_offlod=true", "unknown key. Did you mean 'cpu_offload'?"),
        (
            "policy.megatron_cfg.distributed_data_parallel_config.use_fsdp=1",
            "unknown key. Did you mean 'use_custom_fsdp'? Keys of policy.megatron_cfg.distributed_data",
        ),
        (
            "policy.megatron_cfg.distributed_data_parallel_config=3",
            "must be a mapping. Its keys: average_in_collective, ",
        ),
        ("policy.megatron_cfg.fp8_cfg=3", "must be a mapping or null. FP8 training is not part"),
        ("++policy.drafts=false", "unknown key. Did you mean 'draft'?"),
    ],
)
def test_mistakes_beside_the_table_are_explained(override, error):
    with pytest.raises(ConfigError, match=error.replace("?", r"\?")) as raised:
        load_config(None, [override], "grpo")
    assert str(raised.value).startswith(override.lstrip("+").split("=")[0])


def test_a_driver_has_the_keys_of_its_own_sections():
    assert not any(key.startswith(("grpo.", "loss_fn.")) for key in refused_keys(SftMaster))
    of_evaluation = {key for key in refused_keys(EvalMaster) if not key.startswith("data.")}
    assert of_evaluation == {
        "policy.tokenizer.tokenizer_kwargs",
        "policy.tokenizer.use_fastokens",
    }
    with pytest.raises(ConfigError, match=r"^policy.generation.port_range_low=3000: unknown key"):
        load_config(None, ["policy.generation.port_range_low=3000"], "eval")
