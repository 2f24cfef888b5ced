import pytest

from nemo_rl_lora.config.data import OTHER_DATASETS, DataConfig
from nemo_rl_lora.config.env import EnvConfig


def data(**values):
    return DataConfig.model_validate(values)


def test_default_is_merged_into_both_datasets_and_yields_to_their_own_keys():
    config = data(
        default={"env_name": "math", "prompt_file": "p.txt"},
        train={"dataset_name": "gsm8k"},
        validation={"dataset_name": "gsm8k", "prompt_file": None, "env_name": "last_number"},
    )
    assert config.train is not None
    assert config.validation is not None
    assert (config.train.env_name, config.train.prompt_file) == ("math", "p.txt")
    assert (config.validation.env_name, config.validation.prompt_file) == ("last_number", None)


def test_resolved_configuration_loads_again():
    config = data(default={"env_name": "math"}, train={"dataset_name": "generated_sums", "low": 5})
    assert DataConfig.model_validate(config.model_dump()) == config
    env = EnvConfig.model_validate({"mine": {"reward_function": "a.py:f"}, "math": {"num_workers": 8}})
    assert EnvConfig.model_validate(env.model_dump()) == env


@pytest.mark.parametrize("name", OTHER_DATASETS)
def test_datasets_of_other_drivers_load(name):
    assert data(train={"dataset_name": name, "split": "train"}).train is not None


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"dataset_name": "gsm8kk"}, "no such dataset. Did you mean 'gsm8k'"),
        ({"dataset_name": "gsm8k", "low": 5}, "low=5: has no meaning with dataset_name='gsm8k'"),
        ({"dataset_name": "generated_sums", "data_path": "a.jsonl"}, "data_path='a.jsonl': has no meaning"),
        ({"dataset_name": "generated_sums", "low": 5, "high": 4}, "low=5: is above high=4"),
        ({"dataset_name": "jsonl"}, "data_path=None"),
        ({"dataset_name": "reasoning_gym"}, "task=None"),
        ({"dataset_name": "gsm8k", "repeat": 2}, "only 1 is supported"),
        ({"dataset_name": "gsm8k", "splt": "train"}, "Extra inputs are not permitted"),
        ([{"dataset_name": "gsm8k"}], "a list of datasets is not supported"),
    ],
)
def test_dataset_that_cannot_be_meant_is_refused(train, message):
    with pytest.raises(ValueError) as error:
        data(train=train)
    assert message in str(error.value)


def test_settings_of_loader_processes_are_accepted_at_their_inert_values_only():
    assert data(num_workers=1, use_multiple_dataloader=False).shuffle
    with pytest.raises(ValueError, match="only 0 or 1 is supported"):
        data(num_workers=4)
    with pytest.raises(ValueError, match="only False is supported"):
        data(use_multiple_dataloader=True)


def test_built_in_environments_are_always_there_and_own_ones_are_added():
    env = EnvConfig.model_validate({"math": None, "mine": {"reward_function": "pkg.mod:f"}})
    assert env.names == ("math", "last_number", "reasoning_gym", "mine")
    assert env.reward_functions["mine"].reward_function == "pkg.mod:f"


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"mth": {"num_workers": 8}}, "Did you mean 'math'"),
        ({"mine": {"reward_function": "a.py"}}, "should match pattern"),
        ({"mine": {"reward_function": "a.py:f", "timeout": 3}}, "Extra inputs are not permitted"),
        ({"math": {"num_workers": 0}}, "greater than or equal to 1"),
        ({"math": {"math_verify_impl": "other"}}, "only 'hf_math_verify' is supported"),
    ],
)
def test_environment_that_cannot_be_meant_is_refused(block, message):
    with pytest.raises(ValueError) as error:
        EnvConfig.model_validate(block)
    assert message in str(error.value)
