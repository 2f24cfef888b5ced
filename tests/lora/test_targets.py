"""The matching rule, against a second implementation by regular expressions, and every error it can give."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_rl_lora.lora.names import hf_names, hf_targets, megatron_name, names_fused_layer
from nemo_rl_lora.lora.spec import LoraSpec
from nemo_rl_lora.lora.targets import LinearModule, module_matches, name_matches, resolve_targets

KEY = "policy.dtensor_cfg.lora_cfg"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def _modules(num_layers=11, head=True, extra=()):
    names = []
    for layer in range(num_layers):
        names += [f"model.layers.{layer}.self_attn.{part}" for part in ATTENTION]
        names += [f"model.layers.{layer}.mlp.{part}" for part in MLP]
    names += [*extra, *(["lm_head"] if head else [])]
    return [LinearModule(name=name, in_features=8, out_features=16) for name in names]


def _resolve(modules=None, tied_head=True, key=KEY, **fields):
    spec = LoraSpec(**{"dim": 8, "alpha": 32, **fields})
    resolved = resolve_targets(spec, modules or _modules(), tied_head=tied_head, model_label="tiny", config_key=key)
    return [m.name for m in resolved]


def test_all_linear_is_every_linear_module_but_the_output_head():
    for tied in (True, False):
        names = _resolve(tied_head=tied)
        assert len(names) == 77
        assert "lm_head" not in names


def test_a_head_of_another_name_is_left_out_where_the_model_says_that_it_is_one():
    head = LinearModule(name="predict", in_features=8, out_features=99, is_output_head=True)
    assert "predict" not in _resolve([*_modules(head=False), head])


def test_a_plain_name_matches_the_last_component():
    names = _resolve(targets=("q_proj",))
    assert names == [f"model.layers.{layer}.self_attn.q_proj" for layer in range(11)]


def test_a_plain_name_is_no_substring():
    modules = _modules(num_layers=1, extra=("model.extra.q_proj_norm", "model.extra.my_q_proj"))
    assert _resolve(modules, targets=("q_proj",)) == ["model.layers.0.self_attn.q_proj"]


@pytest.mark.parametrize("target", ["to_out.0", "net.0.proj"])
def test_a_dotted_name_matches_a_suffix_on_component_boundaries(target):
    hit = f"transformer_blocks.3.attn.{target}"
    near = [f"transformer_blocks.3.attn.x{target}", f"{hit}.inner", hit.replace("0", "10")]
    modules = [LinearModule(name=name, in_features=8, out_features=8) for name in [hit, *near]]
    assert _resolve(modules, targets=(target,)) == [hit]


def test_a_glob_of_layer_0_never_reaches_layer_10():
    expected = [f"model.layers.0.self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj")]
    assert _resolve(targets=("*.layers.0.*.linear_qkv",), fused="shared") == expected
    assert all(".layers.0." in name for name in _resolve(targets=("*.layers.0.*",)))
    assert len(_resolve(targets=("*.layers.10.*",))) == 7


def test_a_glob_matches_the_full_name_and_not_a_part_of_it():
    assert name_matches("*.q_proj", "model.q_proj")
    assert not name_matches("layers.*.q_proj", "model.layers.0.q_proj")
    assert not name_matches("*.Q_proj", "model.q_proj")


def test_both_vocabularies_reach_the_same_modules():
    assert _resolve(targets=("linear_proj", "linear_fc2")) == _resolve(targets=("o_proj", "down_proj"))
    assert _resolve(targets=("decoder.layers.3.mlp.linear_fc2",)) == ["model.layers.3.mlp.down_proj"]


def test_excludes_are_taken_from_the_targets():
    names = _resolve(
        targets=("q_proj", "o_proj"), excludes=("*.layers.0.*", "decoder.layers.1.self_attention.linear_proj")
    )
    assert len(names) == 22 - 3
    assert not any(".layers.0." in name for name in names)
    assert len(_resolve(excludes=("linear_qkv",))) == 77 - 33


def test_resolved_modules_carry_shape_dim_alpha_and_scale():
    spec = LoraSpec(dim=8, alpha=32, rank_pattern={"up_proj": 2}, alpha_pattern={"up_proj": 6})
    resolved = resolve_targets(spec, _modules(1), tied_head=True, model_label="tiny", config_key=KEY)
    up = next(m for m in resolved if m.name.endswith("up_proj"))
    assert (up.in_features, up.out_features, up.dim, up.alpha, up.scale) == (8, 16, 2, 6, 3.0)
    assert up.num_params == 2 * (8 + 16)
    assert [m.name for m in resolved] == [m.name for m in _modules(1, head=False)]


def test_an_untied_head_may_be_targeted_by_name():
    assert _resolve(targets=("lm_head",), tied_head=False) == ["lm_head"]
    assert _resolve(targets=("output_layer",), tied_head=False) == ["lm_head"]


def _error(**kwargs):
    with pytest.raises(ValueError) as caught:
        _resolve(**kwargs)
    return str(caught.value)


def test_a_target_that_matches_nothing_is_told_the_likely_name_and_all_candidates():
    assert _error(targets=("q_prj",)) == (
        "policy.dtensor_cfg.lora_cfg.target_modules=['q_prj']: matches none of the 77 linear modules of tiny. Did you "
        "mean 'q_proj'? Candidates: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj."
    )


def test_of_several_targets_the_one_without_a_match_is_named():
    assert "=['q_proj', 'wrong']: 'wrong' matches none" in _error(targets=("q_proj", "wrong"))


def test_an_exclude_that_matches_nothing_is_an_error():
    message = _error(excludes=("*out_proj*",))
    assert message.startswith(f"{KEY}.exclude_modules=['*out_proj*']: matches none of the 77")


def test_a_pattern_that_matches_no_adapted_module_is_an_error():
    assert f"{KEY}.rank_pattern=['down_proj']" in _error(targets=("q_proj",), rank_pattern={"down_proj": 4})
    assert f"{KEY}.alpha_pattern=['lm_head']" in _error(alpha_pattern={"lm_head": 4})


def test_a_tied_head_is_refused_as_a_target_also_through_a_glob():
    for target in ("lm_head", "*", "output_layer"):
        message = _error(targets=(target,))
        assert message.startswith(f"{KEY}.target_modules=['{target}']: matches the output head 'lm_head'")
    assert len(_resolve(targets=("*",), excludes=("lm_head",))) == 77


def test_excluding_everything_is_an_error():
    assert "leaves none of the 77 linear modules of tiny" in _error(excludes=("*",))


def test_a_fused_layer_with_one_a_is_taken_whole():
    message = _error(targets=("linear_qkv",), fused="shared", excludes=("k_proj",))
    assert "so model.layers.0.self_attn.k_proj cannot be left out alone. Exclude 'linear_qkv'" in message
    assert "share one dim" in _error(targets=("linear_fc1",), fused="shared", rank_pattern={"up_proj": 4})


@given(layer=st.integers(0, 200), expert=st.integers(0, 300), part=st.sampled_from([*ATTENTION, *MLP, "expert"]))
def test_names_translate_there_and_back(layer, expert, part):
    if part == "expert":
        name = f"model.layers.{layer}.mlp.experts.{expert}.up_proj"
    else:
        name = f"model.layers.{layer}.{'self_attn' if part in ATTENTION else 'mlp'}.{part}"
    megatron = megatron_name(name)
    assert megatron is not None
    assert name in hf_names(megatron)
    assert {megatron_name(held) for held in hf_names(megatron)} == {megatron}


def test_names_translate_as_megatron_has_them():
    layer = "decoder.layers.7.self_attention.linear_qkv"
    assert hf_names(layer) == tuple(f"model.layers.7.self_attn.{p}" for p in ("q_proj", "k_proj", "v_proj"))
    assert hf_names("decoder.layers.7.mlp.linear_fc1")[1] == "model.layers.7.mlp.up_proj"
    assert megatron_name("model.layers.7.self_attn.o_proj") == "decoder.layers.7.self_attention.linear_proj"
    assert megatron_name("lm_head") == "output_layer"
    assert hf_names("output_layer") == ("lm_head",)
    for stranger in ("model.layers.0.mlp.q_proj", "model.layers.0.mixer.out_proj", "vision.layers.0.self_attn.q_proj"):
        assert megatron_name(stranger) is None
    assert hf_names("decoder.layers.0.mlp.linear_qkv") == ()


def test_targets_translate_with_their_path():
    assert hf_targets("linear_fc1") == ("gate_proj", "up_proj")
    assert hf_targets("*.layers.0.*.linear_qkv") == tuple(f"*.layers.0.*.{p}" for p in ("q_proj", "k_proj", "v_proj"))
    assert hf_targets("decoder.layers.2.self_attention.linear_proj") == ("model.layers.2.self_attn.o_proj",)


@pytest.mark.parametrize(
    ("pattern", "fused"),
    [
        ("linear_qkv", True),
        ("*.layers.0.*.linear_fc1", True),
        ("*linear_fc*", True),
        ("linear_proj", False),
        ("*.layers.0.*", False),
        ("q_proj", False),
        ("*_proj", False),
    ],
)
def test_a_shared_a_is_asked_for_by_naming_a_fused_layer(pattern, fused):
    assert names_fused_layer(pattern) is fused


_component = st.sampled_from(["model", "layers", "0", "1", "10", "11", "q_proj", "proj", "self_attn", "net"])
_name = st.lists(_component, min_size=1, max_size=6).map(".".join)
_glob = st.lists(st.one_of(_component, st.sampled_from(["*", "?", "*proj", "1*"])), min_size=1, max_size=5).map(
    ".".join
)


def _reference(pattern, name):
    """The rule as a regular expression."""
    if not set("*?") & set(pattern):
        return re.search(rf"(^|\.){re.escape(pattern)}$", name) is not None
    regex = "".join({"*": "(.|\n)*", "?": "."}.get(c, re.escape(c)) for c in pattern)
    return re.fullmatch(regex, name) is not None


@given(pattern=st.one_of(_name, _glob), name=_name)
def test_the_rule_equals_its_regular_expression(pattern, name):
    assert name_matches(pattern, name) == _reference(pattern, name)


@given(name=_name, cut=st.integers(0, 5))
def test_every_suffix_on_component_boundaries_matches(name, cut):
    parts = name.split(".")
    assert name_matches(".".join(parts[min(cut, len(parts) - 1) :]), name)


@given(layer=st.integers(0, 120), wanted=st.integers(0, 120), part=st.sampled_from(ATTENTION))
def test_a_layer_glob_hits_its_layer_alone(layer, wanted, part):
    assert module_matches(f"*.layers.{wanted}.*", f"model.layers.{layer}.self_attn.{part}") == (layer == wanted)
    qkv = module_matches(f"*.layers.{wanted}.*.linear_qkv", f"model.layers.{layer}.self_attn.{part}")
    assert qkv == (layer == wanted and part != "o_proj")
