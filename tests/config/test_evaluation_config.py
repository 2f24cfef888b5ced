"""The evaluation's schema: what it refuses, word for word, and that nothing of training is accepted."""

import pytest

from nemo_rl_lora.config.data import DataConfig
from nemo_rl_lora.config.errors import ConfigError
from nemo_rl_lora.config.load import CONFIG_DIR, algorithm_of, load_config, resolved_yaml
from nemo_rl_lora.config.translate import translate_file

QUICK = CONFIG_DIR / "quickstart" / "eval.yaml"
GREEDY = "(policy.generation.val_temperature=0). Remove it, or raise the temperature."


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(None, list(overrides), "eval")
    return str(error.value)


def test_the_quick_start_asks_the_prompts_that_grpo_validates_on() -> None:
    ours, theirs = load_config(None, [], "eval"), load_config(None, [], "grpo")
    assert ours.data.validation == theirs.data.validation
    assert ours.policy.model_name == theirs.policy.model_name
    assert ours.policy.max_total_sequence_length == theirs.policy.max_total_sequence_length
    assert theirs.policy.generation is not None
    assert ours.policy.generation.max_new_tokens == theirs.policy.generation.max_new_tokens
    assert ours.policy.generation.val_temperature == 0


def test_resolved_yaml_loads_to_an_equal_configuration(tmp_path) -> None:
    config = load_config(
        None, ["eval.adapters=[a,b]", "eval.save_path=x", "policy.generation.stop_strings=['\\n']"], "eval"
    )
    (tmp_path / "config.yaml").write_text(resolved_yaml(config))
    assert algorithm_of(tmp_path / "config.yaml") == "eval"
    assert load_config(tmp_path / "config.yaml", [], "eval") == config


@pytest.mark.parametrize(
    "override",
    [
        "policy.optimizer.kwargs.lr=0.1",
        "policy.dtensor_cfg.lora_cfg.enabled=true",
        "policy.lora.dim=4",
        "policy.train_global_batch_size=4",
        "policy.generation.vllm_cfg.tensor_parallel_size=2",
        "checkpointing.save_period=3",
        "logger.log_dir=logs",
        "grpo.seed=1",
    ],
)
def test_keys_of_training_are_refused_by_name(override: str) -> None:
    key = override.partition("=")[0]
    assert refused(override).startswith(f"{key}=")
    assert ": unknown key. " in refused(override)


def test_sampling_keys_of_training_lead_to_those_of_evaluation() -> None:
    said = refused("policy.generation.temperature=0.5")
    assert said.startswith("policy.generation.temperature=0.5: unknown key. Did you mean 'val_temperature'? ")
    assert "Did you mean 'k_values'?" in refused("eval.k_value=2")


@pytest.mark.parametrize("key", sorted(DataConfig.model_fields))
def test_a_key_of_data_is_read_or_refused(key: str) -> None:
    if key in ("validation", "default", "max_input_seq_length", "on_long_prompt", "keep_nulls"):
        return
    value = {"train": "{dataset_name: generated_sums}"}.get(key, "false")
    assert refused(f"data.{key}={value}").startswith(f"data.{key}=")


# fmt: off
WRONG = [
    (("eval.include_base=false",),
     "eval.include_base=False: there is no adapter either, so nothing would be evaluated. Name adapters "
     "(eval.adapters=[DIR]), or set eval.include_base=true."),
    (("eval.adapters=[a,b,a]",), "eval.adapters=['a', 'b', 'a']: names 'a' twice. Name each adapter once."),
    (("eval.k_values=[1,8]", "eval.num_tests_per_prompt=4", "policy.generation.val_temperature=1"),
     "eval.k_values=[1, 8]: pass@8 needs 8 completions of each prompt, and eval.num_tests_per_prompt=4. Raise that, or "
     "give smaller values."),
    (("eval.k_values=[]",),
     "eval.k_values=[]: must be a list of at least 1 elements. Correct the value (the schema's default is (1,))."),
    (("eval.num_tests_per_prompt=4",),
     "policy.generation.val_temperature=0.0: always takes the likeliest token, so the 4 completions of a prompt would "
     "be the same. Set policy.generation.val_temperature above 0, or eval.num_tests_per_prompt=1."),
    (("policy.generation.val_top_p=0.9",),
     f"policy.generation.val_top_p=0.9: has no effect where the likeliest token is always taken {GREEDY}"),
    (("policy.generation.val_top_k=5",),
     f"policy.generation.val_top_k=5: has no effect where the likeliest token is always taken {GREEDY}"),
    (("data.validation=null",),
     "data.validation=None: there is nothing to ask. Name a dataset: data.validation.dataset_name=NAME."),
    (("data.validation=[{dataset_name: generated_sums}, {dataset_name: gsm8k}]",),
     "data.validation=[generated_sums, gsm8k]: evaluation asks one dataset. Give one, without a list."),
    (("data.shuffle=false",),
     "data.shuffle=False: is not read, since evaluation asks every prompt of data.validation once, in its order. "
     "Remove it."),
    (("data.validation.split_validation_size=0.5",),
     "data.validation.split_validation_size=0.5: evaluation holds out nothing and asks every row. Remove it."),
    (("data.default.env_name=last_numbr",),
     "data.validation.env_name='last_numbr': no environment scores these completions. Did you mean 'last_number'? "
     "Choose one of math, last_number, reasoning_gym, or add your own: env.NAME.reward_function=FILE.py:FUNCTION."),
]
# fmt: on


@pytest.mark.parametrize(("overrides", "says"), WRONG, ids=[row[0][0] for row in WRONG])
def test_what_cannot_be_evaluated_is_refused(overrides, says) -> None:
    assert refused(*overrides) == says


def test_a_file_that_evaluates_describes_no_adapter() -> None:
    with pytest.raises(ConfigError) as error:
        translate_file(QUICK)
    assert str(error.value) == f"{QUICK}: evaluates adapters and describes none. Give the adapter_config.json of one."


def test_a_file_of_another_driver_is_named_as_such() -> None:
    with pytest.raises(ConfigError, match=r"has a section 'grpo', which belongs to examples/run_grpo.py, and eval was"):
        load_config(CONFIG_DIR / "quickstart" / "grpo.yaml", [], "eval")
    with pytest.raises(ConfigError, match=r"has a section 'eval', which belongs to examples/run_eval.py, and grpo was"):
        load_config(QUICK, [], "grpo")
