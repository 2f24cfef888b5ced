"""An adapter_config.json means what PEFT makes of it: PEFT's own merge is the judge, or the file is refused by name."""

import json
import tempfile
from copy import deepcopy
from pathlib import Path

import peft
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemo_rl_lora.config.lora import UnifiedLora
from nemo_rl_lora.config.translate import translate_file
from nemo_rl_lora.lora.adapter_tensors import AdapterTensors
from nemo_rl_lora.lora.files import read_adapter
from nemo_rl_lora.lora.fit import fit_adapter
from nemo_rl_lora.lora.targets import LinearModule, resolve_targets
from tests.tiny_models import small_llama

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:peft", "ignore::UserWarning:peft")

BASE = small_llama()
LINEARS = [
    LinearModule(name=name, in_features=module.in_features, out_features=module.out_features)
    for name, module in BASE.named_modules()
    if isinstance(module, torch.nn.Linear)
]

NAMES = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj", "self_attn.k_proj", "model.layers.1.mlp.gate_proj"]
PATTERNS = [
    *("q_proj", "^q_proj", "q_proj$", "^model.layers.0.self_attn.q_proj", "proj", "layers.1.mlp.up_proj"),
    *("model.layers.1.self_attn.q_proj", r"layers\.[01]\.self_attn\.q_proj", ".*v_proj", "q_proj|v_proj", "layers.1.*"),
    *("mlp.down_proj", "_proj", "[^.]*_proj", "linear_proj", "(?:up|down)_proj", r"\w+", "self_attn"),
]
names = st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True)
layers = st.none() | st.sampled_from([0, 2, [], [1], [0, 2]])
FIELDS = st.fixed_dictionaries(
    {
        "r": st.integers(1, 4),
        "lora_alpha": st.sampled_from([1, 8, 12, 2.5]),
        "use_rslora": st.booleans(),
        "lora_dropout": st.sampled_from([0.0, 0.1]),
        "init_lora_weights": st.sampled_from([True, False, "gaussian"]),
        "task_type": st.sampled_from([None, "CAUSAL_LM"]),
        "rank_pattern": st.dictionaries(st.sampled_from(PATTERNS), st.integers(1, 5), max_size=3),
        "alpha_pattern": st.dictionaries(st.sampled_from(PATTERNS), st.integers(1, 40), max_size=3),
        "exclude_modules": st.none() | names | st.sampled_from([r".*layers\.0\..*", "v_proj", r".*\.v_proj"]),
    }
).flatmap(
    lambda fields: st.one_of(
        st.fixed_dictionaries(
            {
                "target_modules": names | st.just(["q_proj", "c_attn", "*.up_proj"]),
                "layers_to_transform": layers,
                "layers_pattern": st.sampled_from([None, "layers", ["h", "layers"], "h", "lay.*"]),
            }
        ),
        st.fixed_dictionaries(
            {
                "target_modules": st.sampled_from(
                    ["all-linear", "All-Linear", r".*\.(q|v)_proj", r"model\.layers\.1\..*_proj"]
                )
            }
        ),
    ).map(lambda where: fields | where)
)
FEATURES = st.sampled_from(
    [
        {"use_dora": True},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"modules_to_save": ["lm_head"]},
        {"fan_in_fan_out": True},
        {"trainable_token_indices": [1, 2]},
        {"layer_replication": [[0, 2], [1, 3]]},
        {"lora_bias": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"use_bdlora": {"target_modules_bd_a": ["q_proj"], "nblocks": 2}},
        {"alora_invocation_tokens": [1]},
        {"a_feature_of_tomorrow": 1},
        {"a_feature_of_tomorrow": "on"},
        {"another_of_tomorrow": {}},
    ]
)


def written(directory: Path, fields: dict) -> bool:
    """Whether PEFT makes an adapter of these fields; B is random."""
    try:
        wrapped = peft.get_peft_model(deepcopy(BASE), peft.LoraConfig(**fields))
    except ValueError:  # no module is reached, or fields that contradict
        return False
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    wrapped.save_pretrained(str(directory))
    return True


def merged_by_peft(directory: Path) -> dict[str, torch.Tensor]:
    model = peft.PeftModel.from_pretrained(deepcopy(BASE), str(directory))
    return model.merge_and_unload().state_dict()


def merged_here(directory: Path) -> dict[str, torch.Tensor]:
    tensors, config = read_adapter(directory)
    spec, adapted = fit_adapter(tensors, config, LINEARS, tied_head=False, model_name="tiny")
    weights = dict(BASE.state_dict())
    for module in adapted:
        assert spec.scale_of(module.name) == module.scale
        factors = AdapterTensors.of(module.name, module.scale, tensors)
        weights[f"{module.name}.weight"] = factors.merged(weights[f"{module.name}.weight"])
    return weights


def assert_same_merge(directory: Path) -> None:
    try:
        expected = merged_by_peft(directory)
    except RuntimeError as error:  # it sorts the patterns when it saves them, and the first match wins
        if "size mismatch" not in str(error):
            raise
        with pytest.raises(ValueError, match="is needed there"):
            merged_here(directory)
        return
    found = merged_here(directory)
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: name + text)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(fields=FIELDS)
def test_random_configurations_are_merged_as_peft_merges_them(fields):
    with tempfile.TemporaryDirectory() as place:
        if written(Path(place), fields):
            assert_same_merge(Path(place))


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(fields=FIELDS, feature=FEATURES)
def test_what_is_beyond_plain_lora_is_refused_by_its_name(fields, feature):
    with tempfile.TemporaryDirectory() as place:
        if not written(Path(place), fields):
            return
        file = Path(place) / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | feature))
        with pytest.raises(ValueError, match=rf"^adapter_config\.{next(iter(feature))}="):
            merged_here(Path(place))


def test_a_pattern_with_an_anchor_that_peft_applies_to_nothing_is_applied_to_nothing(tmp_path):
    assert written(tmp_path, {"r": 4, "target_modules": ["q_proj"], "alpha_pattern": {"^q_proj": 64}})
    assert_same_merge(tmp_path)
    tensors, config = read_adapter(tmp_path)
    _, adapted = fit_adapter(tensors, config, LINEARS, tied_head=False, model_name="tiny")
    assert {module.scale for module in adapted} == {8 / 4}


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_what_peft_writes_by_its_defaults_is_read(tmp_path, task_type):
    assert written(tmp_path, {"target_modules": ["q_proj", "v_proj"], "task_type": task_type})
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["auto_mapping"] is None) == (task_type is not None)
    assert_same_merge(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target_modules", {"q_proj": 1}),
        ("target_modules", ["q_proj", 3]),
        ("target_modules", []),
        ("target_modules", "("),
        ("exclude_modules", "["),
        ("rank_pattern", ["q_proj"]),
        ("rank_pattern", {"(": 3}),
        ("alpha_pattern", {"q_proj": float("nan")}),
        ("lora_alpha", float("nan")),
        ("lora_alpha", "16"),
        ("use_rslora", "no"),
        ("layers_to_transform", "1"),
        ("layers_to_transform", [True]),
        ("layers_pattern", "layers"),
        ("init_lora_weights", "eva"),
        ("init_lora_weights", 3),
        ("r", 4.0),
        ("r", "4"),
        ("base_model_name_or_path", 5),
    ],
)
def test_a_value_without_a_meaning_is_refused_by_its_field(tmp_path, field, value):
    assert written(tmp_path, {"target_modules": ["q_proj"]})
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(ValueError, match=rf"^adapter_config\.{field}(\.q_proj)?="):
        merged_here(tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": r".*\.(q|v)_proj"},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
        {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"^model.layers.1.*q_proj": 3, "^q_proj": 99}},
        {"target_modules": ["v_proj"], "rank_pattern": {r"layers\.[01]\.self_attn\.v_proj": 2}},
    ],
)
def test_a_translation_lists_the_modules_where_the_tensors_name_them(tmp_path, fields):
    """The block that a warm start needs; without the tensors it has no meaning, and is refused."""
    assert written(tmp_path, fields)
    block = yaml.safe_load(translate_file(tmp_path / "adapter_config.json"))["policy"]["lora"]
    spec = UnifiedLora(**block).spec("dtensor")
    tensors, config = read_adapter(tmp_path)
    _, adapted = fit_adapter(tensors, config, LINEARS, tied_head=False, model_name="tiny")
    assert resolve_targets(spec, LINEARS, tied_head=False, model_label="tiny", config_key="lora") == adapted
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="List"):
        translate_file(tmp_path / "adapter_config.json")
