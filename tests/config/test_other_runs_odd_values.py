"""Odd values at every key that the translations of other tools' files ask for, or that their files have."""

import pytest
import yaml

from nemo_rl_lora.config.errors import ConfigError
from nemo_rl_lora.config.load import load_config, read_file, theirs_of
from nemo_rl_lora.config.other_runs import algorithm_of_run, run_of
from nemo_rl_lora.config.their_keys import Theirs
from nemo_rl_lora.config.tree import flatten, merged, with_value
from tests.config.other_files import FILES, write_file

ODD = (None, "x", -1, 0, [], {}, True, 0.5, float("nan"))
SQUAD = {"pre_lora_dataset": [[{"name": "squad"}]] * 2, "post_lora_dataset": [[{"name": "squad", "rate": 0.5}]]}
# What makes a translation ask for keys that it does not ask for otherwise.
MORE = {
    "veomni": [
        {},
        {"train": {"wandb": {"enable": True}, "dyn_bsz": True}},
        {"data": {"data_type": "dpo"}, "dpo_config": {"beta": 0.2}},
    ],
    "verl_sft": [{}, {"trainer": {"logger": ["wandb"]}, "data": {"multiturn": {"enable": True}}}],
    "verl_grpo": [
        {},
        {"algorithm": {"filter_groups": {"enable": True}}, "reward_model": {"overlong_buffer": {"enable": True}}},
        {"reward": {"reward_kwargs": {"overlong_buffer_cfg": {"enable": True}, "max_resp_len": 9}}},
        {
            "actor_rollout_ref": {
                "actor": {"fsdp_config": {"dtype": "bf16", "mixed_precision": {"param_dtype": "bf16"}}}
            }
        },
    ],
    "theseus": [{"training": SQUAD}],
}
CASES = [(tool, more) for tool in FILES for more in MORE[tool]]


class Asked(Theirs):
    """A document that knows what it was asked for."""

    def __init__(self, document):
        super().__init__(document)
        self.asked = set()

    def take(self, *keys, default=None):
        self.asked |= set(keys)
        return super().take(*keys, default=default)


def sections_of(document, prefix=""):
    for key, value in document.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from sections_of(value, f"{prefix}{key}.")


@pytest.mark.parametrize(("tool", "more"), CASES)
def test_an_odd_value_is_named_by_its_key_or_makes_a_run_that_loads(tool, more, tmp_path):
    source = write_file(tmp_path, tool)
    document = merged(theirs_of(source, read_file(source)).document, more)
    plain = Asked(document)
    expected = run_of(plain)
    assert len(plain.asked) > 15
    file, bad = tmp_path / "translated.yaml", []
    asked = {key for key in plain.asked if key.split(".")[0] in document}  # another section is another trainer's
    absent = (None, {})  # where a default takes their place, what else the file has may not fit
    for key in sorted({*asked, *flatten(document), *sections_of(document)}):
        for odd in ODD:
            replaced = with_value(with_value(document, key.split("."), None), key.split("."), odd)
            try:
                run = run_of(Theirs(replaced))
            except ValueError as error:
                bad += [] if key.split(".")[-1] in str(error) or odd in absent else [(key, odd, str(error))]
                continue
            except Exception as error:
                bad.append((key, odd, repr(error)))
                continue
            if run is None or not run.is_whole or run.tree == expected.tree:
                continue
            file.write_text(yaml.safe_dump(run.tree))
            try:
                load_config(file, [], algorithm_of_run(run))
            except ConfigError as error:
                bad += [] if odd in absent else [(key, odd, f"loading: {error}")]
    assert bad == []


def test_odd_values_within_lists_are_named_with_their_number(tmp_path):
    document = merged(yaml.safe_load(write_file(tmp_path, "theseus").read_text()), {"training": SQUAD})
    for key, value, said in (
        ("pre_lora_tokens", [100, "many"], "training.pre_lora_tokens.1='many': must be a number of at least 1"),
        ("pre_lora_tokens", [True, 1], "training.pre_lora_tokens.0=True: must be a number of at least 1"),
        ("post_lora_tokens", [0.5], "training.post_lora_tokens.0=0.5: must be a number of at least 1"),
        ("post_lora_dataset", [["squad"]], "training.post_lora_dataset.0.0='squad': must be a mapping with name and"),
        ("post_lora_dataset", [[]], "training.post_lora_dataset.0=[]: a stage needs a dataset"),
        (
            "post_lora_dataset",
            [[{"name": "squad", "rate": "much"}]],
            "training.post_lora_dataset.0.0.rate='much': must be a number above 0",
        ),
    ):
        with pytest.raises(ValueError) as raised:  # noqa: PT011
            run_of(Theirs(merged(document, {"training": {key: value}})))
        assert said in str(raised.value)
