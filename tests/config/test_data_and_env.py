import pytest

from nemo_rl_lora.config.data import DataConfig, DatasetConfig
from nemo_rl_lora.config.env import EnvConfig
from nemo_rl_lora.config.errors import ConfigError
from nemo_rl_lora.config.load import load_config
from nemo_rl_lora.data.catalog import DATASETS, names_for, require_reader


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


@pytest.mark.parametrize(
    ("algorithm", "kind"),
    [("grpo", "prompts for GRPO"), ("sft", "conversations for SFT"), ("dpo", "preference pairs for DPO")],
)
def test_datasets_of_every_kind_load_and_serve_their_algorithms_alone(algorithm, kind):
    names = names_for(algorithm)
    for name, dataset in DATASETS.items():
        section = {"dataset_name": name, "data_path": "a.jsonl", "task": "chain_sum"}
        own = {key: value for key, value in section.items() if key in {"dataset_name", *dataset.keys}}
        section = DatasetConfig.model_validate(own)
        if name in names:
            require_reader(algorithm, section, "data.train")
            continue
        with pytest.raises(ValueError) as error:
            require_reader(algorithm, section, "data.train")
        assert str(error.value) == (
            f"data.train.dataset_name={name!r}: holds no {kind}. Use one of {', '.join(names)}."
        )


def test_list_of_datasets_takes_the_defaults_and_their_rates():
    config = data(
        default={"system_prompt_file": "s.txt"},
        train=[{"dataset_name": "gsm8k", "rate": 2}, {"dataset_name": "squad", "system_prompt_file": None}],
        validation=[{"dataset_name": "squad"}],
    )
    assert [(key, section.dataset_name, section.rate) for key, section in config.sections("train")] == [
        ("data.train.0", "gsm8k", 2.0),
        ("data.train.1", "squad", 1.0),
    ]
    assert [section.system_prompt_file for _, section in config.sections("train")] == ["s.txt", None]
    assert [section.system_prompt_file for _, section in config.sections("validation")] == ["s.txt"]
    assert DataConfig.model_validate(config.model_dump(mode="json")) == config
    one = data(train={"dataset_name": "squad"})
    assert [(key, section.dataset_name) for key, section in one.sections("train")] == [("data.train", "squad")]
    assert one.sections("validation") == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "data.train=[{dataset_name: squad}, {dataset_name: squad, rate: 0}]",
            "data.train.1.rate=0: must be greater than 0.0. Correct the value (the schema's default is 1.0).",
        ),
        (
            "data.train=[{dataset_name: squad, low: 5}]",
            "data.train.0.low=5: has no meaning with dataset_name='squad', whose own keys are data_path, split, subse",
        ),
        ("data.train=[]", "data.train=[]: a list of datasets needs at least one. Add one, or give null."),
        ("data.train=[{dataset_name: squad, splt: a}]", "data.train.0.splt='a': unknown key. Did you mean 'split'?"),
        ("data.train.rate=2", "data.train.rate=2.0: has no meaning here, since rates mix a list of training datasets."),
        (
            "data.validation=[{dataset_name: squad, rate: 2}]",
            "data.validation.0.rate=2.0: has no meaning here, since rates mix a list of training datasets. Remove it.",
        ),
        ("data.train=squad", "data.train='squad': must be a mapping. Its keys: chat_key"),
    ],
)
def test_wrong_list_is_named_by_its_element(override, message):
    names = [f"logger.{sink}=x" for sink in ("wandb.name", "swanlab.name", "mlflow.run_name", "tensorboard.log_dir")]
    with pytest.raises(ConfigError) as error:
        load_config(None, [override, *names], "sft")
    assert str(error.value).startswith(message)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"dataset_name": "gsm8kk"}, "no such dataset. Did you mean 'gsm8k'"),
        ({"dataset_name": "gsm8k", "low": 5}, "low=5: has no meaning with dataset_name='gsm8k'"),
        ({"dataset_name": "generated_sums", "data_path": "a.jsonl"}, "data_path='a.jsonl': has no meaning"),
        ({"dataset_name": "generated_sums", "low": 5, "high": 4}, "low=5: is above high=4"),
        ({"dataset_name": "jsonl"}, "data_path=None"),
        ({"dataset_name": "reasoning_gym"}, "task=None"),
        ({"dataset_name": "gsm8k", "splt": "train"}, "Extra inputs are not permitted"),
        ({"dataset_name": "gsm8k", "chosen_key": "better"}, "chosen_key='better': has no meaning"),
        ({"dataset_name": "squad", "chat_key": "chat"}, "chat_key='chat': has no meaning"),
        ({"dataset_name": "HelpSteer3", "pairs": "one"}, "pairs='one': has no meaning"),
        ({"dataset_name": "gsm8k_solutions"}, "data_path=None"),
        ({"dataset_name": "generated_sums", "subset": "main"}, "subset='main': has no meaning"),
    ],
)
def test_dataset_that_cannot_be_meant_is_refused(train, message):
    with pytest.raises(ValueError) as error:
        data(train=train)
    assert message in str(error.value)


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
        ({"mine": {"reward_function": "a.py:f", "num_workers": -1}}, "greater than or equal to 0"),
        ({"mine": {"reward_function": "a.py:f", "timeout_seconds": 0}}, "greater than 0"),
        ({"mine": {"reward_function": "a.py:f", "timeout_seconds": "inf"}}, "finite number"),
        ({"mine": {"reward_function": "a.py:f", "on_failure": "nan"}}, "finite number"),
        ({"mine": {"reward_function": "a.py:f", "on_failure": "ignore"}}, "'error'"),
        (
            {"mine": {"reward_function": "a.py:f", "num_workers": 4, "concurrency": 2}},
            "concurrency=2: must be num_workers=4 or more",
        ),
    ],
)
def test_environment_that_cannot_be_meant_is_refused(block, message):
    with pytest.raises(ValueError) as error:
        EnvConfig.model_validate(block)
    assert message in str(error.value)
