"""Which configurations belong to one run, those of an older version among them; where a step says that it stands."""

import json
import re
from pathlib import Path

import pytest
import yaml

from nemo_rl_lora.checkpoints.durable_files import DamagedError
from nemo_rl_lora.checkpoints.record import (
    FREE_KEYS,
    FREE_SECTIONS,
    INFO_FILE,
    PhaseBegin,
    TrainingInfo,
    config_differences,
    read_info,
    write_records,
)
from nemo_rl_lora.checkpoints.steps import Checkpointer
from nemo_rl_lora.config.load import load_config, resolved_tree


@pytest.fixture(scope="module")
def config():
    return load_config(None, [], "grpo")


def without(resolved, *keys):
    """The configuration as a version wrote it that did not have these keys."""
    older = yaml.safe_load(yaml.safe_dump(resolved))
    for key in keys:
        *sections, name = key.split(".")
        section = older
        for part in sections:
            section = section[part]
        del section[name]
    return older


def resume(directory, config, older):
    checkpointing = config.checkpointing.model_copy(update={"checkpoint_dir": str(directory)})
    Checkpointer(checkpointing, older).save(TrainingInfo(step=1, phase="grpo"), lambda path: None)
    resolved = config.model_dump(mode="json", by_alias=True)
    return Checkpointer(checkpointing, resolved, type(config)).find_resume()


def test_a_step_from_before_a_key_existed_continues_where_the_key_has_its_default(tmp_path, config):
    resolved = config.model_dump(mode="json", by_alias=True)
    older = without(resolved, "grpo.keep_surplus_groups", "policy.adapter")
    assert resume(tmp_path, config, older).step == 1


def test_a_step_with_a_key_that_has_no_effect_any_more_continues(tmp_path, config):
    older = without(config.model_dump(mode="json", by_alias=True), "grpo.keep_surplus_groups")
    older["data"]["num_workers"] = 1
    assert resume(tmp_path, config, older).step == 1


def test_a_key_that_is_newer_than_the_step_and_has_another_value_is_named(tmp_path):
    changed = load_config(None, ["grpo.use_dynamic_sampling=true", "grpo.keep_surplus_groups=true"], "grpo")
    older = without(changed.model_dump(mode="json", by_alias=True), "grpo.keep_surplus_groups")
    with pytest.raises(ValueError, match="grpo.keep_surplus_groups was False, is True. Set the values back"):
        resume(tmp_path, changed, older)


def test_a_key_that_this_version_does_not_have_is_named(tmp_path, config):
    older = config.model_dump(mode="json", by_alias=True)
    older["grpo"]["left_out"] = 3
    with pytest.raises(ValueError, match="grpo.left_out was 3, is '<absent>'"):
        resume(tmp_path, config, older)


def test_a_section_that_is_absent_may_differ_where_all_of_its_keys_may():
    assert not config_differences({}, {"checkpointing": {"save_period": 3}, "logger": {"log_dir": "x"}})
    assert config_differences({}, {"checkpointing": {"metric_name": "val:accuracy"}})


def test_how_a_reward_runs_may_differ_and_which_it_is_may_not():
    before = {"env": {"mine": {"reward_function": "a.py:f", "num_workers": 0, "on_failure": "error"}}}
    after = {"env": {"mine": {"reward_function": "a.py:f", "num_workers": 2, "on_failure": 0.0}}}
    assert not config_differences(before, after)
    after["env"]["mine"]["reward_function"] = "b.py:f"
    assert config_differences(before, after) == {"env.mine.reward_function": ("a.py:f", "b.py:f")}


@pytest.mark.parametrize("algorithm", ["sft", "dpo", "grpo"])
def test_prompts_that_are_too_long_may_come_to_be_left_out_where_evaluations_alone_have_some(algorithm):
    before = {algorithm: {}, "data": {"on_long_prompt": "error", "max_input_seq_length": None}}
    after = {algorithm: {}, "data": {"on_long_prompt": "drop", "max_input_seq_length": None}, "evaluate": []}
    found = config_differences(before, after)
    assert found == ({"data.on_long_prompt": ("error", "drop")} if algorithm == "grpo" else {})
    after["data"]["max_input_seq_length"] = 9  # of rows that are trained on too
    assert "data.max_input_seq_length" in config_differences(before, after)


def test_the_page_lists_exactly_what_may_differ():
    page = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
    rows = page.split("### What may differ")[1].split("\n###")[0].splitlines()
    keys, sections = set(), set()
    for row in rows:
        if not row.startswith("| `"):
            continue
        first, second = (re.findall(r"`([\w.]+)`", cell) for cell in row.strip("|").split("|"))
        keys |= {f"{section}.{key}" for section in first for key in second}
        sections |= set() if second else set(first)
    assert keys == FREE_KEYS
    assert sections == set(FREE_SECTIONS)


def saved(*overrides: str) -> dict:
    return yaml.safe_load(yaml.safe_dump(resolved_tree(load_config(None, overrides, "sft"))))


MEGATRON = ("policy.dtensor_cfg.enabled=false", "policy.megatron_cfg.enabled=true")
LORA_CFG, PEFT = "policy.dtensor_cfg.lora_cfg", "policy.megatron_cfg.peft"
WAYS = {
    "lora_cfg": (f"{LORA_CFG}.enabled=true", f"{LORA_CFG}.dim=4"),
    "peft": (*MEGATRON, f"{PEFT}.enabled=true", f"{PEFT}.dim=4", f"{PEFT}.alpha=32"),
    "policy.lora on dtensor": ("policy.lora.dim=4", "policy.lora.use_triton=false"),
    "policy.lora on megatron": (*MEGATRON, "policy.lora.dim=4", "policy.lora.a2a=true"),
}


@pytest.mark.parametrize("before", WAYS)
@pytest.mark.parametrize("now", WAYS)
def test_one_adapter_may_be_described_in_any_block(before, now):
    assert config_differences(saved(*WAYS[before]), saved(*WAYS[now])) == {}


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        (WAYS["lora_cfg"], (*WAYS["peft"], f"{PEFT}.dim=8"), {f"{PEFT}.dim": (4, 8)}),
        (WAYS["peft"], (*WAYS["lora_cfg"], f"{LORA_CFG}.dropout=0.1"), {f"{LORA_CFG}.dropout": (0.0, 0.1)}),
        (WAYS["peft"], ("policy.lora.dim=8",), {"policy.lora.dim": (4, 8)}),
        (
            (*WAYS["peft"], f"{PEFT}.target_modules=[linear_qkv]"),
            (*WAYS["peft"], f"{PEFT}.target_modules=[q_proj]"),
            {f"{PEFT}.target_modules": (["linear_qkv"], ["q_proj"])},
        ),
        (WAYS["lora_cfg"], MEGATRON, {f"{LORA_CFG}.enabled": (True, False)}),
        ((), WAYS["peft"], {f"{PEFT}.enabled": (False, True)}),
    ],
    ids=str,
)
def test_another_adapter_is_named_by_the_block_in_force(before, now, expected):
    found = config_differences(saved(*before), saved(*now))
    lora = {key: values for key, values in found.items() if not key.startswith("policy.optimizer.")}
    assert lora == expected


def test_how_processes_share_the_model_may_differ():
    sizes = (
        *("tensor_model_parallel_size=2", "pipeline_model_parallel_size=2", "context_parallel_size=2"),
        *("expert_model_parallel_size=2", "expert_tensor_parallel_size=2", "sequence_parallel=true"),
        *("num_layers_in_first_pipeline_stage=14", "num_layers_in_last_pipeline_stage=16"),
        "activation_checkpointing=true",
    )
    one, several = saved(*WAYS["peft"]), saved(*WAYS["peft"], *(f"policy.megatron_cfg.{size}" for size in sizes))
    assert config_differences(one, several) == {}
    sizes = ("tensor_parallel_size=2", "context_parallel_size=2", "dp_replicate_size=2", "sequence_parallel=true")
    several = saved(*WAYS["lora_cfg"], *(f"policy.dtensor_cfg.{size}" for size in sizes), "cluster.gpus_per_node=8")
    assert several["policy"]["make_sequence_length_divisible_by"] == 2  # the base file computes it
    assert config_differences(one, several) == {}


def test_an_adapter_of_an_older_file_with_keys_without_effect_is_read():
    older = saved(*WAYS["lora_cfg"])
    older["policy"]["dtensor_cfg"]["cpu_offload"] = False
    assert config_differences(older, saved(*WAYS["peft"])) == {}


@pytest.mark.parametrize("begin", [None, PhaseBegin(index=1, name="b", step=4, num_tokens=9.5, base="base_of_phase_2")])
def test_where_a_phase_began_is_read_as_it_was_written(tmp_path, begin):
    write_records(tmp_path, TrainingInfo(step=5, phase="sft", phase_begin=begin), {}, has_optimizer=True)
    found = read_info(tmp_path)
    assert found.phase_begin == begin
    assert found.begin == (begin or PhaseBegin(index=0, name="", step=0, num_tokens=0.0, base=None))


@pytest.mark.parametrize("other", [{"odd": 1}, {"phase_begin": {"odd": 1}}, {"phase_begin": 3}])
def test_a_record_of_other_fields_is_damaged(tmp_path, other):
    write_records(tmp_path, TrainingInfo(step=5, phase="sft"), {}, has_optimizer=True)
    path = tmp_path / INFO_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | other))
    with pytest.raises(DamagedError, match="does not have the fields of a checkpoint"):
        read_info(tmp_path)
