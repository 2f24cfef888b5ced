"""LoraSpec's invariants, its scales and its inits; expected numbers are worked out by hand or drawn by torch."""

import math
import pickle
import subprocess
import sys

import pytest
import torch

from nemo_rl_lora.lora.spec import LoraFieldError, LoraSpec, init_distribution, parse_init, require_adapter_dtype

Q0 = "model.layers.0.self_attn.q_proj"
UP1 = "model.layers.1.mlp.up_proj"


def test_scale_is_alpha_over_dim():
    assert LoraSpec(dim=8, alpha=32).scale_of(Q0) == 4.0


def test_rslora_scale_is_alpha_over_the_root_of_dim():
    assert LoraSpec(dim=16, alpha=32, use_rslora=True).scale_of(Q0) == 8.0


def test_patterns_set_dim_and_alpha_of_the_modules_that_they_match():
    spec = LoraSpec(dim=8, alpha=32, rank_pattern={"up_proj": 4}, alpha_pattern={"*.layers.1.*": 16})
    assert (spec.dim_of(UP1), spec.alpha_of(UP1), spec.scale_of(UP1)) == (4, 16, 4.0)
    assert (spec.dim_of(Q0), spec.alpha_of(Q0), spec.scale_of(Q0)) == (8, 32, 4.0)


def test_the_first_matching_pattern_wins():
    spec = LoraSpec(dim=8, alpha=32, rank_pattern={"*.layers.1.*": 2, "up_proj": 4})
    assert spec.dim_of(UP1) == 2
    assert spec.dim_of("model.layers.0.mlp.up_proj") == 4


def test_a_pattern_may_use_megatron_names():
    assert LoraSpec(dim=8, alpha=32, rank_pattern={"linear_qkv": 2}).dim_of(Q0) == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dim", 0),
        ("dim", -1),
        ("dim", 8.5),
        ("dim", True),
        ("alpha", 0),
        ("alpha", -32),
        ("alpha", math.nan),
        ("alpha", math.inf),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("dropout", math.nan),
        ("dropout_position", "middle"),
        ("A_init", "orthogonal"),
        ("A_init", "normal"),
        ("A_init", "normal(0)"),
        ("A_init", "normal(-1)"),
        ("A_init", "normal(1e)"),
        ("A_init", None),
        ("B_init", "xavier"),
        ("dtype", "float8"),
        ("fused", "both"),
        ("targets", "q_proj"),
        ("targets", ()),
        ("targets", ("q_proj", "")),
        ("targets", ("all-linear", "q_proj")),
        ("excludes", ("",)),
    ],
)
def test_an_impossible_value_is_refused_by_field(field, value):
    with pytest.raises(LoraFieldError) as caught:
        LoraSpec(**{"dim": 8, "alpha": 32, field: value})
    assert caught.value.field == field
    assert str(caught.value).startswith(f"lora.{field}=")


def test_pattern_values_obey_the_same_rules():
    with pytest.raises(LoraFieldError, match=r"lora.rank_pattern.up_proj=0: must be a whole number of at least 1"):
        LoraSpec(dim=8, alpha=32, rank_pattern={"up_proj": 0})
    with pytest.raises(LoraFieldError, match=r"lora.alpha_pattern.up_proj=-1"):
        LoraSpec(dim=8, alpha=32, alpha_pattern={"up_proj": -1})


def test_fused_layers_and_the_modules_that_they_hold_are_not_mixed():
    with pytest.raises(LoraFieldError, match="Use 'q_proj', 'k_proj', 'v_proj' instead of 'linear_qkv'"):
        LoraSpec(dim=8, alpha=32, targets=("linear_qkv", "gate_proj"), fused="shared")
    LoraSpec(dim=8, alpha=32, targets=("linear_qkv", "o_proj", "linear_fc2"), fused="shared")


def test_sharing_follows_from_the_names():
    with pytest.raises(LoraFieldError, match="lora.fused='shared'"):
        LoraSpec(dim=8, alpha=32, targets=("q_proj",), fused="shared")
    with pytest.raises(LoraFieldError, match="lora.fused='canonical'"):
        LoraSpec(dim=8, alpha=32, targets=("linear_fc1",))


def test_a_spec_travels_between_processes_and_can_be_a_key():
    spec = LoraSpec(dim=8, alpha=32, rank_pattern={"up_proj": 4})
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert hash(spec) == hash(pickle.loads(pickle.dumps(spec)))


def test_a_field_error_travels_between_processes():
    error = pickle.loads(pickle.dumps(LoraFieldError("dim", 0, "must be positive.")))
    assert (error.field, str(error)) == ("dim", "lora.dim=0: must be positive.")


@pytest.mark.parametrize(
    ("A_init", "draw"),
    [
        ("xavier", torch.nn.init.xavier_normal_),
        ("uniform", lambda t: torch.nn.init.kaiming_uniform_(t, a=math.sqrt(5))),
        ("kaiming", lambda t: torch.nn.init.kaiming_uniform_(t, a=math.sqrt(5))),
        ("normal(0.02)", lambda t: torch.nn.init.normal_(t, std=0.02)),
    ],
)
def test_an_init_is_the_distribution_that_torch_draws(A_init, draw):
    in_features, dim = 2048, 256
    torch.manual_seed(0)
    drawn = draw(torch.empty(dim, in_features))
    kind, parameter = init_distribution(A_init, in_features, dim)
    if kind == "uniform":
        assert drawn.abs().max().item() == pytest.approx(parameter, rel=1e-4)
    else:
        assert drawn.std().item() == pytest.approx(parameter, rel=5e-3)
        assert drawn.abs().max().item() > 3 * parameter


def test_init_parameters_by_hand():
    assert init_distribution("xavier", 30, 20) == ("normal", 0.2)
    assert init_distribution("uniform", 16, 4) == ("uniform", 0.25)
    assert init_distribution("normal( 1e-2 )", 16, 4) == ("normal", 0.01)
    assert parse_init("xavier") == ("xavier", None)


def test_a_quantized_base_needs_an_adapter_dtype():
    spec = LoraSpec(dim=8, alpha=32)
    key = "policy.dtensor_cfg.lora_cfg"
    with pytest.raises(
        ValueError, match=r"policy\.dtensor_cfg\.lora_cfg\.lora_dtype=None: the base is quantized \(awq\)"
    ):
        require_adapter_dtype(spec, "awq", f"{key}.lora_dtype")
    with pytest.raises(ValueError, match=r"policy\.lora\.dtype=None"):
        require_adapter_dtype(spec, "awq", "policy.lora.dtype")
    require_adapter_dtype(spec, None, f"{key}.lora_dtype")
    require_adapter_dtype(LoraSpec(dim=8, alpha=32, dtype="bfloat16"), "awq", f"{key}.lora_dtype")


def test_describing_an_adapter_imports_no_torch():
    modules = ("spec", "targets", "names", "dialects", "other_tools")
    imports = "; ".join(f"import nemo_rl_lora.lora.{module}" for module in modules)
    code = f"import sys; {imports}; import nemo_rl_lora.config.lora; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
