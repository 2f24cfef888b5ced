"""Files of NeMo RL, whole or a block alone, and of Hydra, as a policy.lora block; the tools are in tests/lora."""

import json

import pytest
import yaml

from nemo_rl_lora.config.errors import ConfigError
from nemo_rl_lora.config.load import CONFIG_DIR
from nemo_rl_lora.config.translate import translate_file

# as NeMo RL's documentation shows them
LORA_CFG = """
policy:
  dtensor_cfg:
    _v2: true
    lora_cfg:
      enabled: False
      target_modules: []
      exclude_modules: []
      match_all_linear: true
      dim: 8
      alpha: 32
      dropout: 0.0
      dropout_position: "post"
      lora_A_init: "xavier"
      use_triton: true
"""
PEFT = """
policy:
  megatron_cfg:
    peft:
      enabled: false
      target_modules: []
      exclude_modules: []
      dim: 32
      alpha: 32
      dropout: 0.0
      dropout_position: "pre"
      lora_A_init_method: "xavier"
      lora_B_init_method: "zero"
      a2a_experimental: false
      lora_dtype: None
"""


@pytest.fixture
def translated(tmp_path):
    """What a file of this text translates to: its comments, and its policy."""

    def of(text, name="some.yaml"):
        (tmp_path / name).write_text(text)
        shown = translate_file(tmp_path / name)
        return shown, yaml.safe_load(shown)["policy"]

    return of


def refusal(translated, text):
    with pytest.raises(ConfigError) as raised:
        translated(text)
    return str(raised.value)


def test_a_native_block_alone_is_read_and_stays_switched_off(translated):
    shown, policy = translated(LORA_CFG)
    assert "policy.dtensor_cfg.lora_cfg\n# It is switched off there. Set enabled: true to train it." in shown
    lora = policy["lora"]
    assert (lora["enabled"], lora["dim"], lora["alpha"], lora["dropout_position"]) == (False, 8, 32, "post")
    shown, policy = translated(PEFT)
    lora = policy["lora"]
    assert (lora["enabled"], lora["dim"], lora["dropout_position"], lora["dtype"]) == (False, 32, "pre", None)
    assert translated(PEFT.replace("enabled: false", "enabled: true"))[1]["lora"]["enabled"] is True


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("peft: {enabled: true, target_modules: [linear_qkv]}", ["linear_qkv"]),
        ("megatron_cfg: {peft: {enabled: true, target_modules: null}}", "all-linear"),
        ("lora_cfg: {enabled: true, match_all_linear: false, target_modules: [q_proj]}", ["q_proj"]),
        ("dtensor_cfg: {lora_cfg: {dim: 8}}", "all-linear"),
        ("policy: {lora: {target_modules: [linear_qkv]}}", ["linear_qkv"]),
        (
            "policy: {dtensor_cfg: {lora_cfg: {enabled: false}}, megatron_cfg: {peft: {enabled: true}}}",
            "all-linear",
        ),
    ],
)
def test_the_sections_around_a_block_may_be_left_out(translated, text, targets):
    assert translated(text)[1]["lora"]["target_modules"] == targets


def test_mistakes_in_a_block_are_named_as_in_a_run(translated):
    assert refusal(translated, "lora_cfg: {dimm: 8}").startswith("policy.dtensor_cfg.lora_cfg.dimm=8: unknown key.")
    assert refusal(translated, "peft: {dim: true}").startswith("policy.megatron_cfg.peft.dim=True: must be a whole")
    both = "policy: {dtensor_cfg: {lora_cfg: {dim: 8}}, megatron_cfg: {peft: {dim: 8}}}"
    assert "describe an adapter each" in refusal(translated, both)
    assert "holds no LoRA settings known here" in refusal(translated, "policy: {model_name: x}")
    assert "holds no LoRA settings known here" in refusal(translated, "policy: {dtensor_cfg: {lora_cfg: }}")


def test_only_the_adapter_of_a_whole_file_is_read(translated):
    base = f"defaults: {CONFIG_DIR}/grpo_math_1B.yaml\n"
    absent = "grpo: {async_grpo: {enabled: true}}\nnobody_knows: {a: 1}\n"
    text = base + absent + "policy: {dtensor_cfg: {lora_cfg: {enabled: true, dim: 4}}}\n"
    assert translated(text)[1]["lora"]["dim"] == 4
    assert "enables no adapter" in refusal(translated, base)


def test_hydras_files_are_read_as_they_stand(translated):
    shown, policy = translated(
        """
        defaults: [{actor@actor_rollout_ref.actor: dp_actor}, _self_]
        hydra: {searchpath: [file://x]}
        actor_rollout_ref:
          actor: {strategy: fsdp, other: "${oc.select:nothing,null}", broken: "${nowhere}"}
          model: {lora_rank: 32, lora_alpha: "${mul:2,${.lora_rank}}", target_modules: all-linear, lora: {rank: 0}}
        """
    )
    assert "verl, actor_rollout_ref.model" in shown
    assert (policy["lora"]["dim"], policy["lora"]["alpha"]) == (32, 64)
    text = "defaults: [ppo_trainer, _self_]\nactor_rollout_ref: {model: {lora: {rank: 16}}}"
    assert translated(text)[1]["lora"]["target_modules"][0] == "linear_qkv"
    assert "holds no LoRA settings known here" in refusal(translated, "defaults: [ppo_trainer, _self_]\nx: 1")


def test_json_may_be_indented_by_tabs_and_keys_stand_once(translated):
    adapter = json.dumps({"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"]}, indent="\t")
    assert translated(adapter, "adapter_config.json")[1]["lora"]["dim"] == 8
    assert "found duplicate key rank" in refusal(translated, "model:\n  lora_config: {rank: 1, rank: 2}")
    assert "holds no mapping" in refusal(translated, "")


def test_an_adapter_to_start_from_comes_along(translated):
    assert translated("lora_cfg: {enabled: true, restore_from: out/step_9}")[1]["adapter"] == {
        "init_from": "out/step_9"
    }
