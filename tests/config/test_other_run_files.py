"""Other tools' files as they are read from a disk: whose they are, what they refer to, and what is said of mistakes."""

import json

import pytest
import yaml

from nemo_rl_lora.config.errors import ConfigError
from nemo_rl_lora.config.load import load_config, run_of_another_tool
from nemo_rl_lora.config.translate import translate_file
from nemo_rl_lora.config.tree import flatten, merged
from tests.config.other_files import write_file

SQUAD = {
    "training": {
        "pre_lora_dataset": [[{"name": "squad"}]] * 2,
        "post_lora_dataset": [[{"name": "squad"}]],
    }
}


@pytest.fixture
def changed(tmp_path):
    """A tool's file with other values; theseus's with datasets that are here. `slashes`: as keys with slashes."""

    def of(tool, change=None, *, slashes=False):
        file = write_file(tmp_path, tool)
        document = merged(yaml.safe_load(file.read_text()), SQUAD if tool == "theseus" else {})
        document = merged(document, change or {})
        if slashes:
            document = {key.replace(".", "/"): value for key, value in flatten(document).items()}
        file.write_text(yaml.safe_dump(document))
        return file

    return of


def said_of(file, algorithm="sft"):
    with pytest.raises(ConfigError) as raised:
        load_config(file, [], algorithm)
    return str(raised.value)


def untranslated(file):
    with pytest.raises(ConfigError) as raised:
        translate_file(file)
    return str(raised.value)


@pytest.mark.parametrize("slashes", [False, True])
def test_theseus_own_eval_section_leaves_its_file_its_own(changed, slashes):
    file = changed("theseus", {"eval": {"evaluations": []}}, slashes=slashes)
    run = run_of_another_tool(file)
    assert (run.tool, run.is_whole) == ("theseus", True)
    assert load_config(file, [], "sft").sft.phases[0].tokens == 100


def test_an_evaluation_of_our_own_is_no_other_tools(tmp_path):
    own = tmp_path / "eval.yaml"
    own.write_text("eval: {}\npolicy: {model_name: x}\ntraining: {}\narchitecture: {}\n")
    assert run_of_another_tool(own) is None
    own.write_text("eval: {}\nmodel: {model_path: x}\n")
    assert run_of_another_tool(own) is None


@pytest.mark.parametrize("rank", ["4", 4.0])
def test_theseus_rank_may_be_text_or_have_a_point(changed, rank):
    lora = load_config(changed("theseus", {"optimization": {"lora": {"rank": rank}}}), [], "sft").policy.lora
    assert (lora.dim, lora.A_init) == (4, "normal(0.25)")


def test_theseus_numbers_may_be_text(changed):
    change = {"training": {"pre_lora_tokens": ["1e9", "2"], "post_lora_dataset": [[{"name": "squad", "rate": "0.5"}]]}}
    phases = load_config(changed("theseus", change), [], "sft").sft.phases
    assert [phase.tokens for phase in phases] == [10**9, 2, 120]
    assert phases[2].data[0]["rate"] == 0.5


@pytest.mark.parametrize("lora", [None, {}])
def test_theseus_default_adapter_is_taken_where_the_file_has_none(changed, lora):
    file = changed("theseus")
    document = yaml.safe_load(file.read_text())
    document["optimization"]["lora"] = lora
    file.write_text(yaml.safe_dump(document))
    assert load_config(file, [], "sft").policy.lora.dim == 16
    read = run_of_another_tool(file).tree["policy"]["lora"]
    assert (read["alpha"], read["target_modules"], read["A_init"]) == (16, "all-linear", "normal(0.0625)")


@pytest.mark.parametrize(
    ("other", "tokens", "phase"), [("pre", "1e9", ("full", 10**9)), ("post", "1e8", ("lora", 10**8))]
)
def test_theseus_part_that_is_not_written_is_said_to_have_its_default(changed, other, tokens, phase):
    file = changed("theseus")
    document = yaml.safe_load(file.read_text())
    del document["training"][f"{other}_lora_tokens"], document["training"][f"{other}_lora_dataset"]
    file.write_text(yaml.safe_dump(document))
    run = run_of_another_tool(file)
    assert run.to_decide[0] == (
        f"training.{other}_lora_tokens: the file does not set it, and theseus then trains {tokens} tokens of fineweb. "
        f"Write [] for none"
    )
    assert phase in [(each["train"], each["tokens"]) for each in run.tree["sft"]["phases"]]
    document["training"][f"{other}_lora_tokens"] = []
    file.write_text(yaml.safe_dump(document))
    assert run_of_another_tool(file).is_whole


@pytest.mark.parametrize(
    ("tool", "change", "algorithm", "precision"),
    [
        ("verl_sft", {}, "sft", "bfloat16"),
        ("verl_sft", {"engine": {"dtype": "bfloat16", "mixed_precision": {"param_dtype": "bf16"}}}, "sft", "bfloat16"),
        ("verl_sft", {"engine": {"dtype": "float32", "mixed_precision": {"param_dtype": "fp32"}}}, "sft", "float32"),
        (
            "verl_grpo",
            {
                "actor_rollout_ref": {
                    "actor": {"fsdp_config": {"dtype": "fp32", "mixed_precision": {"param_dtype": "fp32"}}}
                }
            },
            "grpo",
            "float32",
        ),
        (
            "verl_grpo",
            {
                "actor_rollout_ref": {"ref": {"fsdp_config": {"dtype": "float32"}}},
                "critic": {"engine": {"dtype": "fp32"}},
            },
            "grpo",
            "bfloat16",
        ),
        (
            "veomni",
            {"train": {"accelerator": {"fsdp_config": {"mixed_precision": {"enable": False}}}}},
            "sft",
            "float32",
        ),
        (
            "veomni",
            {"train": {"accelerator": {"fsdp_config": {"mixed_precision": {"param_dtype": "float32"}}}}},
            "sft",
            "float32",
        ),
        ("theseus", {"architecture": {"dtype": {"activation": "float32"}}}, "sft", "float32"),
        ("theseus", {}, "sft", "bfloat16"),
    ],
)
def test_the_precision_there_is_the_precision_here(changed, tool, change, algorithm, precision):
    file = changed(tool, change)
    assert load_config(file, [], algorithm).policy.precision == precision


@pytest.mark.parametrize(
    "engine",
    [{"dtype": "float16"}, {"dtype": "float32"}, {"mixed_precision": {"param_dtype": "fp32"}}, {"dtype": "float8"}],
)
def test_a_precision_that_is_not_here_is_left_to_the_user(changed, engine):
    (decided,) = run_of_another_tool(changed("verl_sft", {"engine": engine})).to_decide
    assert decided.startswith("policy.precision: float32 or bfloat16. There engine.dtype=")


@pytest.mark.parametrize(
    ("tool", "change", "said"),
    [
        ("theseus", {"training": {"pre_lora_tokens": [1]}}, "training.pre_lora_dataset=[["),
        ("theseus", {"training": {"post_lora_dataset": [[{"name": "squad", "rate": "much"}]]}}, "rate='much': must be"),
        ("veomni", {"train": {"global_batch_size": 0}}, "train.global_batch_size=0: must be a whole number of at"),
        ("verl_sft", {"trainer": {"logger": 3}}, "trainer.logger=3: must be text, or a list of texts. Correct it."),
    ],
)
def test_a_mistake_is_no_adapter_alone_and_no_missing_counterpart(changed, tool, change, said):
    file = changed(tool, change)
    assert untranslated(file).startswith(f"{file}: ")
    assert said in untranslated(file)
    read = said_of(file)
    assert f"is a {tool.split('_')[0].replace('veomni', 'VeOmni')} configuration. " in read
    assert said in read
    assert "counterpart" not in read


@pytest.mark.parametrize(
    ("tool", "change", "algorithm"),
    [
        ("verl_grpo", {"algorithm": {"adv_estimator": "gae"}}, "grpo"),
        ("veomni", {"data": {"data_type": "diffusion"}}, "sft"),
    ],
)
def test_a_run_that_is_not_here_has_its_adapter_translated(changed, tool, change, algorithm):
    file = changed(tool, change)
    text = translate_file(file)
    assert "Its adapter alone, since there is no such run here: " in text
    assert yaml.safe_load(text)["policy"]["lora"]["dim"] == 4
    assert "configuration, and has no counterpart here: " in said_of(file, algorithm)


def test_an_adapter_alone_may_have_keys_with_slashes(tmp_path):
    file = tmp_path / "adapter.yaml"
    file.write_text("optimization/lora/rank: 8\noptimization/lora/alpha: 4\n")
    assert yaml.safe_load(translate_file(file))["policy"]["lora"]["alpha"] == 4
    assert "describes an adapter, and no run." in said_of(file)
    file.write_text("optimization/lora/rank: ${r}\nr: 8\n")
    assert yaml.safe_load(translate_file(file))["policy"]["lora"]["dim"] == 8


def test_keys_of_our_own_files_are_not_parted_at_slashes(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("lora: {dim: 8, alpha: 8, rank_pattern: {'*a/b': 4}}\n")
    assert yaml.safe_load(translate_file(file))["policy"]["lora"]["rank_pattern"] == {"*a/b": 4}
    file.write_text("policy: {lora: {enabled: true, dim: 8, alpha: 8, rank_pattern: {'*a/b': 4}}}\n")
    assert yaml.safe_load(translate_file(file))["policy"]["lora"]["rank_pattern"] == {"*a/b": 4}


def test_veomnis_adapter_without_modules_is_refused_by_its_key(changed):
    file = changed("veomni")
    document = yaml.safe_load(file.read_text())
    document["model"]["lora_config"] = {"rank": 8, "alpha": 16}
    for kept in (document, {"model": {"lora_config": {"rank": 8, "alpha": 16}}}):
        file.write_text(yaml.safe_dump(kept))
        assert untranslated(file).endswith(
            "model.lora_config.lora_modules=<absent>: adapts no module. List the modules."
        )


def test_what_is_only_referred_to_does_not_count(tmp_path, changed):
    plain = run_of_another_tool(changed("theseus"))
    file = tmp_path / "theseus.yaml"
    document = yaml.safe_load(file.read_text())
    ds = document["training"]["post_lora_dataset"]
    document["training"]["post_lora_dataset"] = "DS"
    document["optimization"]["lora"]["rank"] = "${sizes.rank}"
    rest = yaml.safe_dump(document).replace("post_lora_dataset: DS", "post_lora_dataset: *ds")
    assert "*ds" in rest
    holders = f"ds: &ds {json.dumps(ds)}\nsizes: {{rank: 4}}\n"
    file.write_text(holders + rest)
    run = run_of_another_tool(file)
    assert (run.tree, run.left_out) == (plain.tree, {})
    file.write_text(holders.replace("rank: 4", "rank: 4, width: 2") + "other: [1]\n" + rest)
    assert run_of_another_tool(file).left_out == {"sizes.width": 2, "other": [1]}
    file.write_text(rest.replace("*ds", json.dumps(ds)) + "sizes: {rank: 4}\ntraining2: &t {a: 1}\n")
    assert run_of_another_tool(file).left_out == {"training2.a": 1}


def test_an_anchor_in_a_section_of_the_tool_still_counts(tmp_path, changed):
    changed("theseus")
    file = tmp_path / "theseus.yaml"
    document = yaml.safe_load(file.read_text())
    document["training"]["unknown"] = "UNKNOWN"
    document["logging"]["copy"] = "COPY"
    text = yaml.safe_dump(document, sort_keys=False).replace("UNKNOWN", "&u 3").replace("COPY", "*u")
    file.write_text(text.replace("copy: *u", "copy: 3") if text.index("*u") < text.index("&u") else text)
    assert run_of_another_tool(file).left_out == {"training.unknown": 3}


def test_the_tool_and_its_driver_are_named_to_another_driver(changed):
    read = said_of(changed("veomni"), "grpo")
    assert "is a VeOmni configuration, which belongs to examples/run_sft.py, and grpo was started." in read
    assert "section" not in read


def test_a_warm_up_of_no_steps_beside_a_share_is_said_to_differ_by_version(changed):
    change = {"optim": {"lr_warmup_steps": 0, "lr_warmup_steps_ratio": 0.5}}
    said = [text for text in run_of_another_tool(changed("verl_sft", change)).differences if "lr_warmup_steps" in text]
    assert said == [
        "optim.lr_warmup_steps=0: optim.lr_warmup_steps_ratio=0.5 counts here, as in verl's newer engine; in the older "
        "trainer 0 is no warm-up."
    ]
    for steps in (-1, 3):
        change["optim"]["lr_warmup_steps"] = steps
        assert "lr_warmup_steps" not in " ".join(run_of_another_tool(changed("verl_sft", change)).differences)


def test_veomnis_learning_rate_of_zero_has_a_schedule(changed):
    change = {"model": {"optimizer": {"lr": 0, "lr_min": 0}}}
    scheduler = load_config(changed("veomni", change), [], "sft").policy.scheduler
    assert (scheduler.name, scheduler.min_lr_ratio) == ("cosine", 0)
    low = {"model": {"optimizer": {"lr": 1e-5, "lr_min": 1e-4}}}
    assert "model.optimizer.lr_min=0.0001: is above the learning rate, 1e-05. Correct one" in said_of(
        changed("veomni", low)
    )
