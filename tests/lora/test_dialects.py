"""Every way to describe an adapter comes to the LoraSpec that it means; PEFT's own package is the reference for its."""

import json
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from nemo_rl_lora.config.lora import (
    LoraCfg,
    PeftCfg,
    UnifiedLora,
    kernels_in_force,
    kernels_off_because,
    lora_spec_from_policy,
    unified_from_spec,
)
from nemo_rl_lora.config.schema import field_map
from nemo_rl_lora.lora.peft_config import spec_from_peft_config, spec_to_peft_config
from nemo_rl_lora.lora.spec import LoraSpec
from tests.lora.resolved import resolved
from tests.tiny_models import small_llama

DOCS = Path(__file__).resolve().parents[2] / "docs" / "lora.md"

# concept; keys of dtensor, megatron and policy.lora; LoraSpec field; defaults of dtensor, megatron and policy.lora
ROWS = [
    ("Enable LoRA", "enabled", "enabled", "enabled", None, False, False, True),
    ("Modules to adapt", "target_modules", "target_modules", "target_modules", "targets", [], [], "all-linear"),
    ("Modules to skip", "exclude_modules", "exclude_modules", "exclude_modules", "excludes", [], [], []),
    ("Adapt all linear layers", "match_all_linear", None, None, "targets", True, None, None),
    ("Rank (r)", "dim", "dim", "dim", "dim", 8, 32, 8),
    ("Scaling factor", "alpha", "alpha", "alpha", "alpha", 32, 32, 32),
    ("Dropout probability", "dropout", "dropout", "dropout", "dropout", 0.0, 0.0, 0.0),
    (*("Dropout position", *("dropout_position",) * 4), "post", "pre", "post"),
    ("A-matrix init", "lora_A_init", "lora_A_init_method", "A_init", "A_init", "xavier", "xavier", "xavier"),
    ("B-matrix init", None, "lora_B_init_method", "B_init", "B_init", None, "zero", "zero"),
    ("Optimized kernels", "use_triton", None, "use_triton", "kernels", True, None, None),
    ("Adapter dtype", "lora_dtype", "lora_dtype", "dtype", "dtype", None, None, None),
    ("Experimental A2A comm", None, "a2a_experimental", "a2a", "a2a", None, False, False),
    (*("Ranks of single modules", *("rank_pattern",) * 4), {}, {}, {}),
    (*("Alphas of single modules", *("alpha_pattern",) * 4), {}, {}, {}),
    (*("Rank-stabilised scaling", *("use_rslora",) * 4), False, False, False),
    ("One A per fused layer", None, None, None, "fused", None, None, None),
]


def _policy(backend="dtensor", lora_cfg=None, peft_block=None, lora=None, tensor_parallel_size=1):
    """A policy's section with only what the LoRA blocks' reader reads."""
    return SimpleNamespace(
        active_backend=backend,
        precision="bfloat16",
        dtensor_cfg=SimpleNamespace(lora_cfg=LoraCfg(**(lora_cfg or {})), tensor_parallel_size=tensor_parallel_size),
        megatron_cfg=SimpleNamespace(peft=PeftCfg(**(peft_block or {}))),
        lora=None if lora is None else UnifiedLora(**lora),
    )


def _dtensor(**block):
    return lora_spec_from_policy(_policy(lora_cfg={"enabled": True, **block}))


def _megatron(**block):
    return lora_spec_from_policy(_policy("megatron", peft_block={"enabled": True, **block}))


def _unified(backend="dtensor", **block):
    return lora_spec_from_policy(_policy(backend, lora=block))


def test_the_documented_schema_table_has_these_rows():
    table = DOCS.read_text().split("## The schema")[1].split("---|\n", 1)[1].split("\n\n")[0]
    documented = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    keys = [[cell.strip("`") if cell.startswith("`") else None for cell in row[1:5]] for row in documented]
    assert [row[0] for row in documented] == [row[0] for row in ROWS]
    assert keys == [list(row[1:5]) for row in ROWS]


def test_every_key_of_a_block_stands_in_the_table_with_its_default():
    for block, column, default in ((LoraCfg, 1, 5), (PeftCfg, 2, 6), (UnifiedLora, 3, 7)):
        expected = {row[column]: row[default] for row in ROWS if row[column]}
        assert block().model_dump(by_alias=True) == expected


def test_every_field_of_the_spec_stands_in_the_table_under_the_key_that_sets_it():
    assert {row[4] for row in ROWS if row[4]} == set(LoraSpec.__dataclass_fields__)
    for block, column in ((LoraCfg, 1), (PeftCfg, 2), (UnifiedLora, 3)):
        named = {row[4]: row[column] for row in ROWS if row[4] and row[column] and row[0] != "Adapt all linear layers"}
        assert block.spec_keys() == named


def test_the_table_documents_the_defaults():
    text = DOCS.read_text()
    for concept, documented in (("Rank (r)", "`8` / `32`"), ("Dropout position", "`post` / `pre`")):
        row = next(line for line in text.splitlines() if line.startswith(f"| {concept} |"))
        assert row.endswith(f"| {documented} |")


def test_the_three_ways_in_describe_the_same_adapter():
    same = {"dim": 16, "alpha": 64, "dropout": 0.1, "dropout_position": "pre", "exclude_modules": ["k_proj"]}
    native = _dtensor(**same, lora_A_init="uniform", lora_dtype="bfloat16")
    assert native == _unified(**same, A_init="uniform", dtype="bfloat16")
    megatron = _megatron(**same, lora_A_init_method="uniform", lora_dtype="bfloat16")
    assert megatron == _unified("megatron", **same, A_init="uniform", dtype="bfloat16")
    expected = LoraSpec(
        dim=16,
        alpha=64,
        dropout=0.1,
        dropout_position="pre",
        excludes=("k_proj",),
        A_init="uniform",
        dtype="bfloat16",
    )
    assert native == expected
    assert megatron.kernels is False
    assert native.kernels is True


FLIPS = {
    "target_modules": (["q_proj"], "targets", ("q_proj",)),
    "exclude_modules": (["q_proj"], "excludes", ("q_proj",)),
    "dim": (4, "dim", 4),
    "alpha": (7, "alpha", 7),
    "dropout": (0.25, "dropout", 0.25),
    "dropout_position": ("pre", "dropout_position", "pre"),
    "lora_A_init": ("normal(0.5)", "A_init", "normal(0.5)"),
    "lora_A_init_method": ("normal", "A_init", "normal(0.2)"),
    "A_init": ("kaiming", "A_init", "kaiming"),
    "use_triton": (False, "kernels", False),
    "lora_dtype": ("torch.bfloat16", "dtype", "bfloat16"),
    "dtype": ("fp16", "dtype", "float16"),
    "a2a_experimental": (True, "a2a", True),
    "a2a": (True, "a2a", True),
    "rank_pattern": ({"q_proj": 2}, "rank_pattern", {"q_proj": 2}),
    "alpha_pattern": ({"q_proj": 2}, "alpha_pattern", {"q_proj": 2}),
    "use_rslora": (True, "use_rslora", True),
}


@pytest.mark.parametrize("key", [k for k in FLIPS if k in field_map(LoraCfg)])
def test_flipping_a_key_of_lora_cfg_changes_its_field(key):
    value, field, expected = FLIPS[key]
    assert getattr(_dtensor(match_all_linear=False, **{key: value}), field) == expected


@pytest.mark.parametrize("key", [k for k in FLIPS if k in field_map(PeftCfg)])
def test_flipping_a_key_of_peft_changes_its_field(key):
    value, field, expected = FLIPS[key]
    if key == "dropout_position":
        value = expected = "post"
    assert getattr(_megatron(**{key: value}), field) == expected


@pytest.mark.parametrize("key", [k for k in FLIPS if k in field_map(UnifiedLora)])
def test_flipping_a_key_of_policy_lora_changes_its_field(key):
    value, field, expected = FLIPS[key]
    assert getattr(_unified("megatron" if key == "a2a" else "dtensor", **{key: value}), field) == expected


def test_an_empty_list_and_match_all_linear_mean_all_linear():
    assert _dtensor().targets == "all-linear"
    assert _dtensor(match_all_linear=False).targets == "all-linear"
    assert _dtensor(match_all_linear=True, target_modules="all-linear").targets == "all-linear"
    assert _megatron().targets == "all-linear"
    assert _megatron(exclude_modules=None).excludes == ()


def test_nothing_is_trained_by_an_adapter_when_no_block_is_enabled():
    assert lora_spec_from_policy(_policy()) is None
    assert lora_spec_from_policy(_policy(lora={"enabled": False})) is None


def test_yaml_none_is_null():
    assert _megatron(lora_dtype="None").dtype is None
    assert _dtensor(lora_dtype="None").dtype is None
    assert _unified(dtype="None").dtype is None


def test_megatron_names_share_one_a_and_hugging_face_names_do_not():
    assert _megatron(target_modules=["linear_qkv", "linear_proj"]).fused == "shared"
    assert _megatron(target_modules=["*.layers.0.*.linear_qkv", "*.layers.1.*.linear_qkv"]).fused == "shared"
    for targets in (["linear_proj", "linear_fc2"], ["q_proj", "k_proj"], []):
        assert _megatron(target_modules=targets).fused == "canonical"


def _message(parse, *args, **kwargs):
    with pytest.raises(ValueError) as caught:
        parse(*args, **kwargs)
    return str(caught.value)


def test_a_shared_a_is_refused_on_dtensor_naming_the_modules():
    for parse, key in ((_dtensor, "policy.dtensor_cfg.lora_cfg"), (_unified, "policy.lora")):
        more = {"match_all_linear": False} if parse is _dtensor else {}
        message = _message(parse, target_modules=["linear_qkv", "linear_proj"], **more)
        assert message.startswith(f"{key}.target_modules=['linear_qkv', 'linear_proj']: 'linear_qkv' means one A")
        assert "Use ['q_proj', 'k_proj', 'v_proj', 'linear_proj']" in message


def test_targets_beside_match_all_linear_are_refused_with_both_remedies():
    message = _message(_dtensor, target_modules=["q_proj"])
    assert message.startswith("policy.dtensor_cfg.lora_cfg.target_modules=['q_proj']: cannot be combined")
    assert "Set policy.dtensor_cfg.lora_cfg.match_all_linear=false" in message
    assert "or policy.dtensor_cfg.lora_cfg.target_modules=[]" in message


def test_an_empty_list_in_policy_lora_names_no_module():
    assert _message(_unified, target_modules=[]).startswith("policy.lora.target_modules=[]: names no module")


@pytest.mark.parametrize(
    ("parse", "block", "start"),
    [
        (_dtensor, {"dim": 0}, "policy.dtensor_cfg.lora_cfg.dim=0: "),
        (_dtensor, {"alpha": -1}, "policy.dtensor_cfg.lora_cfg.alpha=-1"),
        (_dtensor, {"dropout": 1.0}, "policy.dtensor_cfg.lora_cfg.dropout=1.0: must lie in [0, 1)"),
        (_dtensor, {"lora_A_init": "xaver"}, "policy.dtensor_cfg.lora_cfg.lora_A_init='xaver': must be 'xavier'"),
        (_dtensor, {"lora_dtype": "int8"}, "policy.dtensor_cfg.lora_cfg.lora_dtype='int8': must be one of"),
        (_dtensor, {"rank_pattern": {"q_proj": 0}}, "policy.dtensor_cfg.lora_cfg.rank_pattern.q_proj=0"),
        (_megatron, {"dim": -2}, "policy.megatron_cfg.peft.dim=-2"),
        (_megatron, {"lora_B_init_method": "xavier"}, "policy.megatron_cfg.peft.lora_B_init_method='xavier'"),
        (_megatron, {"lora_A_init_method": "zero"}, "policy.megatron_cfg.peft.lora_A_init_method='zero'"),
        (_unified, {"A_init": "normal"}, "policy.lora.A_init='normal': needs its standard deviation"),
        (_unified, {"B_init": "one"}, "policy.lora.B_init='one'"),
        (_unified, {"a2a": True}, "policy.lora.a2a=True: the all-to-all is a way of the Megatron backend"),
    ],
)
def test_an_impossible_value_is_named_by_the_key_of_its_block(parse, block, start):
    assert _message(parse, **block).startswith(start)


def test_kernels_are_refused_on_megatron_when_asked_for_by_name():
    message = _message(_unified, "megatron", use_triton=True)
    assert message.startswith("policy.lora.use_triton=True: the Triton kernels belong to the DTensor backend")
    assert _message(_unified, "megatron", use_triton="automodel").startswith("policy.lora.use_triton='automodel': the")
    assert _unified("megatron").kernels is False
    assert _unified("dtensor").kernels is True


@pytest.mark.parametrize("parse", [_dtensor, _unified])
def test_nemo_automodels_kernels_are_chosen_by_their_name(parse):
    assert parse(use_triton="automodel").kernels == "automodel"


NO_GPU = "there is no CUDA device: plain torch products are used"


@pytest.mark.parametrize(
    ("written", "cuda", "expected"),
    [
        (True, True, "own"),
        ("automodel", True, "automodel"),
        (False, True, None),
        (True, False, None),
        ("automodel", False, None),
    ],
)
def test_the_kernels_in_force_are_those_asked_for_where_they_run(written, cuda, expected):
    policy = _policy(lora_cfg={"enabled": True, "use_triton": written})
    assert kernels_in_force(policy, _dtensor(use_triton=written), lacks=None if cuda else NO_GPU) == expected


def test_two_adapters_are_refused():
    message = _message(lora_spec_from_policy, _policy(lora_cfg={"enabled": True}, lora={}))
    assert message.startswith("policy.lora.enabled=True: policy.dtensor_cfg.lora_cfg is enabled as well")


def test_an_adapter_of_the_backend_that_is_off_is_refused():
    message = _message(lora_spec_from_policy, _policy(peft_block={"enabled": True}))
    assert message.startswith("policy.megatron_cfg.peft.enabled=True: the backend is dtensor")


def test_kernels_are_off_for_a_reason_that_names_the_keys():
    policy = _policy(lora_cfg={"enabled": True}, tensor_parallel_size=2)
    reason = kernels_off_because(policy, _dtensor(), lacks=None) or ""
    assert "policy.dtensor_cfg.lora_cfg.use_triton" in reason
    assert "policy.dtensor_cfg.tensor_parallel_size=2" in reason
    one = _policy(lora={})
    assert (kernels_off_because(one, _unified(), lacks=NO_GPU) or "").startswith("policy.lora.use_triton: off")
    assert kernels_off_because(one, _unified(), lacks=None) is None
    assert kernels_off_because(one, _unified(use_triton=False), lacks=NO_GPU) is None


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        ({"dim": 256}, None),
        ({"dim": 257}, "blocks of rank 257 in bfloat16"),
        ({"dim": 128, "dtype": "float32"}, None),
        ({"dim": 8, "dtype": "float32", "rank_pattern": {"q_proj": 256}}, "blocks of rank 256 in float32"),
    ],
)
def test_nemo_automodels_kernels_are_off_where_no_configuration_fits_a_gpu_and_ours_are_not(block, reason):
    policy = _policy(lora={})
    said = kernels_off_because(policy, _unified(**block, use_triton="automodel"), lacks=None)
    assert said == (
        reason
        and f"policy.lora.use_triton: off, because {reason} of nemo-automodel's kernels do not fit in a GPU's shared "
        f"memory. Set it to true, for kernels of any rank."
    )
    assert kernels_off_because(policy, _unified(**block), lacks=None) is None


_specs = st.builds(
    LoraSpec,
    dim=st.integers(1, 64),
    alpha=st.integers(1, 64),
    dropout=st.sampled_from([0.0, 0.5]),
    dropout_position=st.sampled_from(["pre", "post"]),
    targets=st.sampled_from(["all-linear", ("q_proj", "o_proj"), ("*.layers.0.*", "down_proj")]),
    excludes=st.sampled_from([(), ("k_proj",)]),
    A_init=st.sampled_from(["xavier", "uniform", "normal(0.02)"]),
    dtype=st.sampled_from([None, "float32", "bfloat16"]),
    kernels=st.sampled_from([True, False, "automodel"]),
    rank_pattern=st.sampled_from([{}, {"up_proj": 4}]),
    alpha_pattern=st.sampled_from([{}, {"*.layers.1.*": 8}]),
    use_rslora=st.booleans(),
)


@given(spec=_specs)
def test_a_spec_written_as_policy_lora_reads_back_as_itself(spec):
    assert UnifiedLora(**unified_from_spec(spec)).spec("dtensor") == spec


PEFT_SPECS = [
    LoraSpec(dim=4, alpha=16),
    LoraSpec(dim=4, alpha=16, targets=("q_proj", "v_proj")),
    LoraSpec(dim=4, alpha=16, excludes=("k_proj", "*.layers.1.*")),
    LoraSpec(dim=4, alpha=16, targets=("*.layers.0.*", "model.layers.2.mlp.up_proj")),
    LoraSpec(dim=4, alpha=16, targets=("linear_fc1", "linear_proj"), fused="shared"),
    LoraSpec(dim=4, alpha=16, rank_pattern={"*.layers.1.*": 2, "up_proj": 8}, alpha_pattern={"q_proj": 3}),
    LoraSpec(dim=4, alpha=16, use_rslora=True, dropout=0.1, rank_pattern={"lm_head": 2}, targets=("lm_head", "o_proj")),
]


@pytest.mark.parametrize("spec", PEFT_SPECS)
def test_stock_peft_loads_our_config_to_the_same_modules_ranks_and_scales(spec, tmp_path):
    model = small_llama()
    adapted = resolved(model, spec)
    config = spec_to_peft_config(spec, "tiny", adapted)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for m in adapted:
        prefix = f"base_model.model.{m.name}"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(m.dim, m.in_features, generator=generator)
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(m.out_features, m.dim, generator=generator)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    loaded = peft.PeftModel.from_pretrained(model, tmp_path).base_model.model
    layers = {n: m for n, m in loaded.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert {n: (m.r["default"], m.scaling["default"]) for n, m in layers.items()} == {
        m.name: (m.dim, pytest.approx(m.scale)) for m in adapted
    }
    for m in adapted:
        saved = tensors[f"base_model.model.{m.name}.lora_B.weight"]
        assert torch.equal(layers[m.name].lora_B["default"].weight, saved)


@pytest.mark.parametrize("spec", PEFT_SPECS)
def test_our_peft_config_reads_back_to_the_same_modules_ranks_and_scales(spec):
    model = small_llama()
    adapted = resolved(model, spec)
    read = spec_from_peft_config(spec_to_peft_config(spec, "tiny", adapted))
    assert resolved(model, read) == adapted
    assert (read.dropout, read.dropout_position, read.use_rslora) == (spec.dropout, "pre", spec.use_rslora)


def test_names_are_short_only_where_they_reach_exactly_the_adapted_modules():
    model = small_llama()

    def targets(**fields):
        spec = LoraSpec(dim=4, alpha=16, **fields)
        return spec_to_peft_config(spec, "tiny", resolved(model, spec))["target_modules"]

    assert targets() == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert targets(targets=("v_proj",)) == ["v_proj"]
    assert targets(targets=("*.layers.0.*.v_proj",)) == ["model.layers.0.self_attn.v_proj"]
    assert len(targets(excludes=("*.layers.0.*",))) == 14


def test_the_inits_carried_over_are_what_peft_draws():
    from nemo_rl_lora.lora.spec import init_distribution

    for value in (True, "gaussian"):
        torch.manual_seed(0)
        made = peft.LoraConfig(r=64, target_modules=["probe"], init_lora_weights=value, lora_alpha=8)
        host = torch.nn.Sequential()
        host.add_module("probe", torch.nn.Linear(1024, 8))
        drawn = peft.get_peft_model(host, made).base_model.model.probe.lora_A["default"].weight
        spec = spec_from_peft_config(made.to_dict() | {"task_type": "CAUSAL_LM"})
        kind, parameter = init_distribution(spec.A_init, 1024, 64)
        measured = drawn.abs().max() if kind == "uniform" else drawn.std()
        assert measured.item() == pytest.approx(parameter, rel=0.01)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": False}, "init_lora_weights"),
        ({"target_modules": ".*q_proj"}, "target_modules"),
        ({"target_modules": ["*.q_proj"]}, "target_modules"),
        ({"target_modules": None}, "target_modules"),
        ({"rank_pattern": {"layers.[01].*": 4}}, "rank_pattern"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"task_type": "SEQ_CLS"}, "task_type"),
        ({"r": 0}, "r"),
        ({"r": 0, "init_lora_weights": "gaussian"}, "r"),
        ({"feature_of_tomorrow": 3}, "feature_of_tomorrow"),
    ],
)
def test_a_peft_feature_that_we_lack_is_refused_by_name(change, named):
    config = {**peft.LoraConfig(r=8, target_modules=["q_proj"], task_type="CAUSAL_LM").to_dict(), **change}
    config["target_modules"] = list(config["target_modules"]) if named != "target_modules" else config["target_modules"]
    assert _message(spec_from_peft_config, config).startswith(f"adapter_config.{named}=")


def test_every_field_of_a_plain_peft_config_is_accepted_at_its_default():
    config = peft.LoraConfig(r=8, target_modules=["q_proj"], task_type="CAUSAL_LM").to_dict()
    assert spec_from_peft_config(config).targets == ("q_proj",)
