"""Inheritance, overrides and resolvers, on files written here over the quick start."""

from pathlib import Path

import pytest

from nemo_rl_lora.config.errors import ConfigError
from nemo_rl_lora.config.load import CONFIG_DIR, load_config, read_tree, register_resolvers
from nemo_rl_lora.config.master import DpoMaster, SftMaster
from nemo_rl_lora.config.overrides import apply_overrides
from nemo_rl_lora.config.tree import merged

QUICK = CONFIG_DIR / "quickstart" / "grpo.yaml"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_defaults_are_read_depth_first_and_the_last_wins(tmp_path: Path) -> None:
    write(tmp_path / "base" / "root.yaml", "a: {x: root, y: root, z: root, w: root}")
    write(tmp_path / "base" / "left.yaml", "defaults: root.yaml\na: {x: left, y: left}")
    write(tmp_path / "right.yaml", "a: {y: right}")
    file = write(tmp_path / "sub" / "top.yaml", "defaults: [../base/left.yaml, ../right.yaml]\na: {z: top}")
    assert read_tree(file) == {"a": {"x": "left", "y": "right", "z": "top", "w": "root"}}


def test_lists_replace_and_null_replaces_a_mapping() -> None:
    assert merged({"a": [1, 2], "b": {"c": 1}}, {"a": [3], "b": None}) == {"a": [3], "b": None}


def test_override_mark_replaces_a_mapping_and_vanishes(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "a: {x: 1, y: {z: 2, w: 3}}\nb: {c: 1}")
    file = write(
        tmp_path / "top.yaml",
        "defaults: base.yaml\na: {y: {_override_: true, z: 5}}\nb: {_override_: false, d: 2}",
    )
    assert read_tree(file) == {"a": {"x": 1, "y": {"z": 5}}, "b": {"c": 1, "d": 2}}


def test_resolvers_and_relative_references(tmp_path: Path) -> None:
    register_resolvers()
    register_resolvers()
    text = """
    defaults: {base}
    grpo:
      val_batch_size: ${{add:1,2,3}}
      max_val_samples: ${{sub:10,3}}
      val_period: ${{.val_batch_size}}
      max_num_steps: ${{max:3,9,4}}
    policy:
      train_micro_batch_size: ${{mul:2,3}}
      logprob_batch_size: ${{min:7,5}}
      optimizer: {{kwargs: {{lr: "${{div:1,4}}", eps: 1e-6}}}}
    """
    config = load_config(write(tmp_path / "x.yaml", text.format(base=QUICK)), [], "grpo")
    assert (config.grpo.val_batch_size, config.grpo.max_val_samples, config.grpo.val_period) == (6, 7, 6)
    assert (config.grpo.max_num_steps, config.policy.train_micro_batch_size) == (9, 6)
    assert (config.policy.logprob_batch_size, config.policy.optimizer.kwargs.lr) == (5, 0.25)
    assert config.policy.optimizer.kwargs.eps == 1e-6


def test_interpolations_see_the_overrides() -> None:
    config = load_config(QUICK, ["policy.max_total_sequence_length=256", "grpo.seed=7"], "grpo")
    assert config.data.max_input_seq_length == 256
    assert config.data.train is not None
    assert config.data.train.seed == 7


@pytest.mark.parametrize(
    ("overrides", "read", "expected"),
    [
        (["policy.optimizer.kwargs.lr=1e-4"], lambda c: c.policy.optimizer.kwargs.lr, 1e-4),
        (["policy.lora.dim=4"], lambda c: c.policy.lora.dim, 4),  # in the schema, in no file
        (["++policy.lora.dim=4", "++policy.lora.alpha=8"], lambda c: c.policy.lora.alpha, 8),
        (["+policy.hf_config_overrides.rope_theta=5e5"], lambda c: c.policy.hf_config_overrides, {"rope_theta": 5e5}),
        (["policy.hf_config_overrides.rope_theta=5e5"], lambda c: c.policy.hf_config_overrides, {"rope_theta": 5e5}),
        (["~policy.max_grad_norm", "policy.megatron_cfg.optimizer.clip_grad=1"], lambda c: c.policy.max_grad_norm, 1.0),
        (["~policy.max_grad_norm=1.0", "~policy.megatron_cfg"], lambda c: c.policy.megatron_cfg.peft.dim, 32),
        (["policy.scheduler={name: wsd, total_steps: 9, decay_steps: 2}"], lambda c: c.policy.scheduler.name, "wsd"),
        (["policy.optimizer.kwargs.betas=[0.8,0.9]"], lambda c: c.policy.optimizer.kwargs.betas, (0.8, 0.9)),
        (["policy.optimizer.kwargs.betas.0=0.7"], lambda c: c.policy.optimizer.kwargs.betas, (0.7, 0.999)),
        (["policy.train_micro_batch_size=${grpo.num_prompts_per_step}"], lambda c: c.policy.train_micro_batch_size, 8),
        (["policy.dtensor_cfg={tensor_parallel_size: 2}"], lambda c: c.policy.dtensor_cfg.lora_cfg.dim, 16),
        (["grpo.seed=1", "grpo.seed=2"], lambda c: c.grpo.seed, 2),
        (["policy.dtensor_cfg._v2=false"], lambda c: c.policy.dtensor_cfg.v2, False),
    ],
)
def test_override(overrides, read, expected) -> None:
    assert read(load_config(QUICK, overrides, "grpo")) == expected


def test_overrides_leave_the_tree_as_it_was() -> None:
    from nemo_rl_lora.config.master import GrpoMaster

    tree = read_tree(QUICK)
    before = repr(tree)
    changed = apply_overrides(tree, ["grpo.seed=1", "~policy.optimizer", "data.train.low=3"], GrpoMaster)
    assert changed["grpo"]["seed"] == 1
    assert repr(tree) == before


def test_backend_key_stands_above_the_flags() -> None:
    assert load_config(QUICK, [], "grpo").policy.active_backend == "dtensor"
    assert load_config(QUICK, ["policy.backend=megatron"], "grpo").policy.active_backend == "megatron"
    both = ["policy.megatron_cfg.enabled=true", "policy.backend=dtensor"]
    assert load_config(QUICK, both, "grpo").policy.active_backend == "dtensor"


def test_unset_token_budgets_follow_from_the_rows() -> None:
    overrides = ["policy.dynamic_batching.train_mb_tokens=null", "policy.dynamic_batching.logprob_mb_tokens=null"]
    overrides += ["policy.train_micro_batch_size=3", "policy.logprob_batch_size=5"]
    policy = load_config(QUICK, overrides, "grpo").policy
    assert policy.microbatch_tokens("train", 3) == 3 * 128
    assert policy.microbatch_tokens("logprob", 5) == 5 * 128
    assert load_config(QUICK, [], "grpo").policy.microbatch_tokens("train", 4) == 4096


def test_other_algorithms_load_their_own_classes() -> None:
    assert isinstance(load_config(CONFIG_DIR / "sft.yaml", [], "sft"), SftMaster)
    dpo = load_config(CONFIG_DIR / "dpo.yaml", ["dpo.preference_average_log_probs=true"], "dpo")
    assert isinstance(dpo, DpoMaster)
    assert dpo.dpo.sft_average_log_probs is True


def test_configuration_is_frozen() -> None:
    config = load_config(QUICK, [], "grpo")
    with pytest.raises(ValueError, match="frozen"):
        config.policy.model_name = "other"  # type: ignore[misc]


def test_config_error_is_a_value_error() -> None:
    assert issubclass(ConfigError, ValueError)
