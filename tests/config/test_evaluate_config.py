"""`evaluate`: what an entry of it inherits, and what is refused, word for word, in every driver."""

import pytest

from nemo_rl_lora.config.errors import ConfigError
from nemo_rl_lora.config.load import load_config, resolved_yaml
from nemo_rl_lora.config.master import Driver

SUMS = "data: {dataset_name: generated_sums, env_name: last_number}"
ENTRY = f"{{name: sums, every: 5, {SUMS}}}"


def entry(more: str = "", data: str = SUMS) -> str:
    return f"evaluate=[{{name: sums, every: 5, {data}{more}}}]"


def refused(*overrides: str, driver: Driver = "sft") -> str:
    with pytest.raises(ConfigError) as error:
        load_config(None, list(overrides), driver)
    return str(error.value)


@pytest.mark.parametrize("driver", ["sft", "dpo", "grpo"])
def test_a_resolved_file_loads_to_an_equal_configuration(driver, tmp_path) -> None:
    config = load_config(None, [entry(), "data.default.system_prompt_file=x.txt"], driver)

    assert config.evaluate[0].data.system_prompt_file == "x.txt"
    assert config.evaluate[0].data.processor is None
    assert config.policy.generation is not None
    (tmp_path / "config.yaml").write_text(resolved_yaml(config))
    assert load_config(tmp_path / "config.yaml", [], driver) == config


def test_an_engine_is_there_for_evaluations_alone() -> None:
    assert load_config(None, [], "sft").policy.generation is None
    engine = load_config(None, [entry(), "+policy.generation.max_new_tokens=7"], "sft").policy.generation
    assert engine is not None
    assert engine.max_new_tokens == 7


# fmt: off
WRONG = [
    ((f"evaluate=[{ENTRY}, {ENTRY}]",), "evaluate.1.name='sums': evaluate.0 has this name. Give each its own."),
    ((entry().replace("every: 5", "every: 0"),), "evaluate.0.every=0: must be at least 1. Correct the value."),
    ((entry().replace("every: 5, ", ""),),
     "evaluate.0.every=<absent>: this key is required. Set it in the file or on the command line."),
    ((entry().replace("name: sums", "name: timing"),),
     "evaluate.0.name='timing': stands in the names of metrics, so it has letters, digits, '_', '-' and '.' alone, "
     "and is not 'timing'. Write gsm8k, for example."),
    ((entry().replace("name: sums", "name: 'a/b'"),),
     "evaluate.0.name='a/b': stands in the names of metrics, so it has letters, digits, '_', '-' and '.' alone, and "
     "is not 'timing'. Write gsm8k, for example."),
    ((entry(", evry: 3"),),
     "evaluate.0.evry=3: unknown key. Did you mean 'every'? Keys of evaluate.0: at_end, at_start, data, every, "
     "k_values, max_new_tokens, max_num_prompts, name, num_tests_per_prompt, seed, solved_at, temperature, top_k, "
     "top_p."),
    ((entry(data="data: {dataset_name: gsm8, env_name: math}"),),
     "evaluate.0.data.dataset_name='gsm8': there is no such dataset. Did you mean 'gsm8k'? Known: "),
    ((entry(data="data: {dataset_name: generated_sums, env_name: last_numbr}"),),
     "evaluate.0.data.env_name='last_numbr': no environment scores these completions. Did you mean 'last_number'? "
     "Choose one of math, last_number, reasoning_gym, or add your own: env.NAME.reward_function=FILE.py:FUNCTION."),
    ((entry(data="data: {dataset_name: generated_sums}"),),
     "evaluate.0.data.env_name=None: no environment scores these completions. "),
    ((entry(data="data: {dataset_name: generated_sums, env_name: math, rate: 2, split_validation_size: 0.5}"),),
     "evaluate.0.data.split_validation_size=0.5: an evaluation holds out nothing and asks every row. Remove it.\n"
     "evaluate.0.data.rate=2.0: rates mix training datasets, and this one is asked. Remove it."),
    ((entry(", k_values: [1, 8], num_tests_per_prompt: 4, temperature: 1"),),
     "evaluate.0.k_values=[1, 8]: pass@8 needs 8 completions of each prompt, and evaluate.0.num_tests_per_prompt=4. "
     "Raise that, or give smaller values."),
    ((entry(", num_tests_per_prompt: 4"),),
     "evaluate.0.temperature=0.0: always takes the likeliest token, so the 4 completions of a prompt would be the "
     "same. Set evaluate.0.temperature above 0, or evaluate.0.num_tests_per_prompt=1."),
    ((entry(", top_p: 0.9"),),
     "evaluate.0.top_p=0.9: has no effect where the likeliest token is always taken (evaluate.0.temperature=0). Remove "
     "it, or raise the temperature."),
    (("checkpointing.metric_name=evl:sums/accuracy",),
     "checkpointing.metric_name='evl:sums/accuracy': must start with 'train:', 'val:' or 'eval:'. Write "
     "'val:accuracy', 'train:reward' or 'eval:gsm8k/accuracy', for example."),
    (("+policy.generation.max_new_tokens=7",),
     "policy.generation.backend='auto': SFT samples nothing without `evaluate`. Remove the policy.generation section."),
]
# fmt: on


@pytest.mark.parametrize(("overrides", "says"), WRONG, ids=[row[1][:40] for row in WRONG])
def test_what_cannot_be_evaluated_is_refused(overrides, says) -> None:
    said = refused(*overrides)
    assert said == says or (says.endswith(" ") and said.startswith(says)), said
