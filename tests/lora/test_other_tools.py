"""Every other tool's description of an adapter comes to the LoraSpec that it means, or is refused by name."""

import math
import re

import peft
import pytest
import torch

from nemo_rl_lora.config.translate import read_adapter_description
from nemo_rl_lora.lora.other_tools import translate
from nemo_rl_lora.lora.spec import LoraSpec
from tests.lora.resolved import resolved
from tests.tiny_models import small_llama


def _message(document):
    with pytest.raises(ValueError) as caught:
        translate(document)
    return str(caught.value)


def test_a_config_made_by_peft_translates_to_what_peft_builds(tmp_path):
    made = peft.LoraConfig(
        r=4,
        lora_alpha=12,
        lora_dropout=0.1,
        target_modules=["q_proj", "layers.0.mlp.up_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 2, "^model.layers.2.self_attn.q_proj": 8},
        alpha_pattern={"up_proj": 5},
        task_type="CAUSAL_LM",
    )
    wrapped = peft.get_peft_model(small_llama(), made)
    wrapped.save_pretrained(tmp_path)
    layers = {n: m for n, m in wrapped.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    spec = read_adapter_description(tmp_path / "adapter_config.json").spec
    assert {m.name: (m.dim, m.scale) for m in resolved(small_llama(), spec)} == {
        n: (m.r["default"], m.scaling["default"]) for n, m in layers.items()
    }
    assert (spec.dropout, spec.dropout_position, spec.A_init) == (0.1, "pre", "uniform")


def test_veomni_names_and_init_are_pefts():
    document = {"model": {"lora_config": {"rank": 64, "alpha": 32, "lora_modules": ["attn.q", "to_out.0"]}}}
    found = translate(document)
    assert (found.dialect, found.key) == ("VeOmni lora_config", "model.lora_config")
    assert found.spec == LoraSpec(
        dim=64, alpha=32, dropout_position="pre", targets=("attn.q", "to_out.0"), A_init="uniform"
    )
    warm = translate({"lora_config": {**document["model"]["lora_config"], "lora_adapter": "./step_500"}})
    assert (warm.spec, warm.init_from, found.init_from) == (found.spec, "./step_500", None)
    assert "lora_config.ranks=3: is no key" in _message({"lora_config": {"lora_modules": ["a"], "ranks": 3}})


def _as_veomni_injects(block):
    """Rank and scale of each module, by the rule of VeOmni's own injection: ends of names, or a regular expression of
    the whole name; patterns that are found anywhere in a name, the first of them."""

    def matches(name, named):
        if isinstance(named, str):
            return re.fullmatch(named, name) is not None
        return name in named or any(name.endswith(f".{end}") for end in named)

    def first(patterns, name, default):
        return next((value for pattern, value in patterns.items() if re.search(pattern, name)), default)

    found = {}
    for name, module in small_llama().named_modules():
        if not isinstance(module, torch.nn.Linear) or not matches(name, block["lora_modules"]):
            continue
        if block.get("exclude_modules") and matches(name, block["exclude_modules"]):
            continue
        rank, alpha = (first(block.get(f"{key}_pattern", {}), name, block.get(key, 8)) for key in ("rank", "alpha"))
        found[name] = (rank, alpha / (math.sqrt(rank) if block.get("use_rslora") else rank))
    return found


@pytest.mark.parametrize(
    "block",
    [
        {"lora_modules": ["q_proj", "layers.1.mlp.up_proj"]},
        {"rank": 16, "alpha": 4, "use_rslora": True, "lora_modules": ["q_proj", "o_proj"]},
        {
            "rank": 16,
            "alpha": 32,
            "lora_modules": ["q_proj", "k_proj", "down_proj"],
            "exclude_modules": ["layers.0.self_attn.q_proj"],
            "rank_pattern": {r"layers\.1\.": 4, "down_proj": 2, "k_proj$": 8},
            "alpha_pattern": {r"model\.layers\.[02]\..*(q|k)_proj": 5, "^model.layers.1": 7},
        },
        {"rank": 2, "lora_modules": r".*\.layers\.(0|2)\..*(q_proj|v_proj)", "exclude_modules": r".*layers\.2.*v_proj"},
    ],
)
def test_what_veomnis_keys_adapt_is_what_veomni_injects(block):
    spec = translate({"model": {"lora_config": block}}).spec
    expected = _as_veomni_injects(block)
    assert expected
    assert {m.name: (m.dim, m.scale) for m in resolved(small_llama(), spec)} == expected


def test_veomni_takes_pefts_names_and_has_defaults():
    spec = translate({"model": {"lora_config": {"r": 4, "target_modules": ["q_proj"], "lora_dropout": 0.25}}}).spec
    assert (spec.dim, spec.alpha, spec.dropout, spec.dropout_position) == (4, 8, 0.25, "pre")
    both = {"rank": 8, "r": 4, "lora_modules": ["q_proj"]}
    assert "model.lora_config.r=4: rank=8 is the same setting" in _message({"model": {"lora_config": both}})


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("target_parameters", ["model.layers.*.mlp.experts.down_proj"], "adapters of experts that are one tensor"),
        ("share_expert_lora", True, "an adapter that all experts of a layer share"),
        ("bias", "lora_only", "trains no bias"),
        ("modules_to_save", ["embed_tokens"], "nothing is trained beside the adapter"),
        ("init_lora_weights", False, "A is drawn and B starts at zero"),
        ("is_trainable", False, "policy.adapter.trainable"),
        ("rank_pattern", {r"layers\.\d+": 4}, "a regular expression that no list of names and globs stands for"),
        ("rank_pattern", [4], "must map patterns of names to numbers"),
        ("rank_pattern", {"q_proj": 0}, "at least 1"),
        ("lora_dropout", 1.0, "must lie in"),
        ("lora_modules", "q_proj", "is compared with all of a module's name"),
        ("exclude_modules", "(?!q).*", "a regular expression that no list of names and globs stands for"),
    ],
)
def test_what_veomni_has_and_this_product_has_not_is_refused_by_name(key, value, why):
    said = _message({"model": {"lora_config": {"rank": 8, "alpha": 8, "lora_modules": ["q_proj"], key: value}}})
    assert said.startswith(f"model.lora_config.{key}")
    assert why in said


def test_verl_describes_a_peft_adapter_of_all_linear_layers():
    found = translate({"actor_rollout_ref": {"model": {"path": "x", "lora_rank": 32, "exclude_modules": ["k_proj"]}}})
    assert found.spec == LoraSpec(dim=32, alpha=16, dropout_position="pre", excludes=("k_proj",), A_init="uniform")
    assert "lora_rank=0: means no adapter there" in _message({"model": {"lora_rank": 0}})
    assert translate({"model": {"lora_rank": 1, "lora_adapter_path": "x"}}).init_from == "x"
    towers = {"lora_rank": 8, "exclude_modules": ".*visual.*", "target_modules": r"(?:.*\.)?[qk]_proj"}
    assert "target_modules" in _message({"model": towers})
    assert translate({"model": {**towers, "target_modules": r".*\.[qk]_proj"}}).spec == LoraSpec(
        dim=8, alpha=16, dropout_position="pre", targets=("*.[qk]_proj",), excludes=("*visual*",), A_init="uniform"
    )


def test_verl_on_megatron_shares_a_or_not_by_its_type():
    shared = translate({"actor_rollout_ref": {"model": {"lora": {"rank": 16}}}}).spec
    assert (shared.fused, shared.alpha, shared.dropout_position, shared.A_init) == ("shared", 32, "pre", "xavier")
    canonical = translate({"actor_rollout_ref": {"model": {"lora": {"rank": 16, "type": "canonical_lora"}}}}).spec
    assert canonical.fused == "canonical"
    assert translate({"model": {"lora": {"rank": 16, "adapter_path": "x"}}}).init_from == "x"
    assert {m.name for m in resolved(small_llama(), canonical)} == {m.name for m in resolved(small_llama(), shared)}
    assert "type='dora'" in _message({"model": {"lora": {"rank": 16, "type": "dora"}}})


def test_theseus_adapts_every_kernel_and_draws_a_with_one_over_rank():
    found = translate({"optimization": {"lora": {"rank": 4}}})
    assert found.spec == LoraSpec(dim=4, alpha=16, dropout_position="pre", A_init="normal(0.25)")
    some = translate({"optimization": {"lora": {"target_modules": ["attn/q"]}}}).spec
    assert (some.targets, some.A_init) == (("*attn.q*",), "normal(0.0625)")
    assert "adapts no module" in _message({"optimization": {"lora": {"target_modules": []}}})


@pytest.mark.parametrize("names", [["kernel", "embedding"], ["embedding"], ["kernel", "scale"], ["wte/embed"]])
def test_theseus_names_of_what_is_no_linear_layer_are_refused(names):
    said = _message({"optimization": {"lora": {"rank": 4, "target_modules": names}}})
    assert said.startswith(f"optimization.lora.target_modules={names!r}: {names[-1]!r} adapts what is no linear layer")


def test_theseus_kernels_may_be_named_by_their_path():
    assert translate({"optimization": {"lora": {"target_modules": ["attn/kernel"]}}}).spec.targets == ("*attn*",)
    both = {"optimization": {"lora": {"target_modules": ["kernel", "attn/kernel"]}}}
    assert translate(both).spec.targets == "all-linear"


def test_verls_documented_megatron_block_and_the_one_of_its_two_ways_that_is_on():
    frozen = {f"freeze_{part}": True for part in ("vision_model", "vision_projection", "language_model")}
    block = {"rank": 16, "merge": False, "fully_sharded_loras": False, **frozen}
    model = {"path": "x", "lora_rank": 0, "lora_alpha": 16, "lora": block}
    found = translate({"actor_rollout_ref": {"model": model}})
    assert (found.dialect, found.spec.dim) == ("verl (Megatron)", 16)
    model |= {"lora_rank": 32, "lora": {**block, "rank": 0}}
    found = translate({"actor_rollout_ref": {"model": model}})
    assert (found.dialect, found.spec.dim) == ("verl", 32)
    model |= {"lora": block}
    assert "describes an adapter, and so does actor_rollout_ref.model (verl)" in _message(
        {"actor_rollout_ref": {"model": model}}
    )
    model |= {"lora_rank": 0, "lora": {**block, "freeze_language_model": False}}
    assert "freeze_language_model=False: is no part of" in _message({"actor_rollout_ref": {"model": model}})
    assert "rank=0: means no adapter there" in _message({"model": {"lora_rank": 0, "lora": {"rank": 0}}})


@pytest.mark.parametrize("written", [8, 8.0, "8", "8.0", "8e0"])
def test_numbers_of_other_tools_are_read_as_ours(written):
    spec = translate({"model": {"lora_rank": written, "lora_alpha": "1e1"}}).spec
    assert (spec.dim, spec.alpha) == (8, 10)
    assert type(spec.dim) is int


@pytest.mark.parametrize("written", [True, 8.5, "8.5", "eight", [8]])
def test_what_is_no_rank_is_refused(written):
    assert _message({"model": {"lora_rank": written}}).startswith("model.lora_rank=")


def test_a_document_without_an_adapter_says_what_can_be_read():
    message = _message({"model": {"path": "x"}})
    assert re.match(r"document=\['model'\]: holds no LoRA settings known here\. Give a PEFT adapter_config", message)


@pytest.mark.parametrize(
    ("document", "named"),
    [
        ({"peft_type": "LORA", "target_modules": ["q"], "lora_ga_config": {"x": 1}}, "peft.lora_ga_config={'x': 1}"),
        ({"model": {"lora_config": {"lora_modules": ["q"], "rank": 8, "use_dora": True}}}, "use_dora=True"),
        ({"model": {"lora_rank": 8, "lora_dropout": 0.1}}, "model.lora_dropout=0.1"),
        ({"model": {"lora": {"rank": 8, "rank_pattern": {"q": 1}}}}, "model.lora.rank_pattern={'q': 1}"),
        ({"optimization": {"lora": {"rank": 8, "dropout": 0.1}}}, "optimization.lora.dropout=0.1"),
    ],
)
def test_a_key_that_a_tool_does_not_have_is_refused_by_name(document, named):
    assert named in _message(document)
