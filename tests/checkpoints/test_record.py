"""Which configurations belong to one run, those of an older version among them."""

import pytest
import yaml

from nemo_rl_lora.checkpoints.record import TrainingInfo, config_differences
from nemo_rl_lora.checkpoints.steps import Checkpointer
from nemo_rl_lora.config.load import load_config


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
    older["data"]["num_workers"] = older["data"]["train"]["repeat"] = 1
    assert resume(tmp_path, config, older).step == 1
    assert not config_differences({"data": {"train": [{"rate": 2, "repeat": 1}]}}, {"data": {"train": [{"rate": 2}]}})


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
