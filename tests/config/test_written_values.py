"""Numbers, switches and sections as people write them: what is read, and what is refused by name."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from nemo_rl_lora.config.errors import ConfigError, not_mappings
from nemo_rl_lora.config.load import CONFIG_DIR, _DecimalLoader, load_config, read_tree
from nemo_rl_lora.config.master import MASTERS
from nemo_rl_lora.config.schema import alternatives, leaves, section_at, types_at
from nemo_rl_lora.config.tree import lookup, with_value

QUICK = CONFIG_DIR / "quickstart"


def read(override: str):
    """The value of the key that the override sets."""
    config = load_config(None, [override], "grpo").model_dump(by_alias=True)
    (value,) = lookup(config, override.split("=")[0].split(".")) or (None,)
    return value


@pytest.mark.parametrize("written", ["8", "8.0", "8e0", "0.8e1", '"8"', '"8.0"', '" 8 "', '"+8"'])
def test_a_whole_number_may_be_written_in_any_of_these_ways(written):
    for key in ("policy.lora.dim", "grpo.seed", "policy.train_micro_batch_size", "cluster.gpus_per_node"):
        value = read(f"{key}={written}")
        assert value == 8
        assert type(value) is int


def read_from_file(tmp_path, key, written):
    (tmp_path / "own.yaml").write_text(f"defaults: {QUICK / 'grpo.yaml'}\n" + nested_text(key.split("."), written))
    (value,) = lookup(load_config(tmp_path / "own.yaml", [], "grpo").model_dump(by_alias=True), key.split("."))
    return value


def nested_text(path, written):
    return "".join("  " * depth + f"{part}:\n" for depth, part in enumerate(path)).rstrip("\n") + f" {written}\n"


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("0100", 100),
        ("010", 10),
        ("08", 8),
        ("-0", 0),
        ("+12", 12),
        ("1_000", 1000),
        ("1e3", 1000),
        ("00", 0),
        ("7.", 7),
    ],
)
def test_a_number_in_a_file_is_decimal_as_on_the_command_line(tmp_path, written, value):
    assert read_from_file(tmp_path, "grpo.seed", written) == read(f"grpo.seed={written}") == value


@pytest.mark.parametrize("written", ["1:30", "0x10", "0b11", "0o17", "1:30.5", "1__0", "0_x"])
def test_what_is_no_decimal_number_is_refused_in_a_file_as_it_is_written(tmp_path, written):
    with pytest.raises(ConfigError, match=rf"^grpo.seed='{written}': must be a whole number"):
        read_from_file(tmp_path, "grpo.seed", written)
    with pytest.raises(ConfigError, match=rf"^policy.optimizer.kwargs.lr='{written}': must be a (finite )?number"):
        read_from_file(tmp_path, "policy.optimizer.kwargs.lr", written)


@pytest.mark.parametrize(
    ("written", "value"),
    [("1e-4", 1e-4), (".5", 0.5), (".5e3", 500), ("1_0.5", 10.5), ("5.e-1", 0.5), ("0.010", 0.01), ("-.5", -0.5)],
)
def test_fractions_in_a_file_are_what_they_were(tmp_path, written, value):
    assert yaml.load(written, Loader=_DecimalLoader) == value


def test_days_and_hours_need_no_quotes(tmp_path):
    key = "checkpointing.checkpoint_must_save_by"
    assert read_from_file(tmp_path, key, "1:03:45:00") == read(f"{key}=1:03:45:00") == "1:03:45:00"


def test_a_number_that_a_tag_wants_of_a_text_is_no_valid_yaml(tmp_path):
    with pytest.raises(ConfigError, match=r"own.yaml: no valid YAML \(line \d+: invalid literal for int"):
        read_from_file(tmp_path, "grpo.seed", "!!int 0x10")


@pytest.mark.parametrize("written", ["true", "false", "8.5", '"8.5"', "eight", '"8 rows"', '"0x8"', '""', "inf", "[8]"])
def test_what_is_no_whole_number_is_refused(written):
    with pytest.raises(ConfigError, match=r"^policy.lora.dim=[^\n]*: must be a (whole|finite) number[^\n]*$"):
        read(f"policy.lora.dim={written}")


def test_numbers_may_be_text_and_switches_are_none():
    assert read('policy.optimizer.kwargs.lr="1e-5"') == 1e-5
    assert read("policy.optimizer.kwargs.betas=['0.8','9e-1']") == (0.8, 0.9)
    assert read("policy.lora.rank_pattern={q_proj: '4', k_proj: 8.0}") == {"q_proj": 4, "k_proj": 8}
    for override, key in (
        ("policy.optimizer.kwargs.lr=true", "policy.optimizer.kwargs.lr"),
        ("policy.optimizer.kwargs.betas=[true,0.9]", "policy.optimizer.kwargs.betas.0"),
        ("policy.lora.rank_pattern={q_proj: true}", "policy.lora.rank_pattern.q_proj"),
        ("policy.lora.alpha_pattern={q_proj: false}", "policy.lora.alpha_pattern.q_proj"),
        ("policy.generation.stop_token_ids=[true]", "policy.generation.stop_token_ids.0"),
        ("policy.scheduler={name: cosine, total_steps: true}", "policy.scheduler.total_steps"),
    ):
        with pytest.raises(ConfigError, match=rf"^{key}=(True|False): must be a (whole )?number\."):
            read(override)


@pytest.mark.parametrize(("written", "value"), [("true", True), ('"true"', True), ('"FALSE"', False), ("False", False)])
def test_a_switch_may_be_text(written, value):
    assert read(f"policy.lora.use_rslora={written}") is value
    assert read(f"policy.shared_prefix.enabled={written}") is value


@pytest.mark.parametrize("written", ["1", "0", "1.0", "yes", "on", "no", "y", "t", '"1"', '""'])
def test_what_is_no_switch_is_refused(written):
    for key in ("policy.lora.use_rslora", "policy.lora.use_triton", "policy.shared_prefix.enabled", "data.shuffle"):
        with pytest.raises(ConfigError, match=rf"^{key}=[^\n]* true or false\."):
            read(f"{key}={written}")


@pytest.mark.parametrize("driver", MASTERS)
def test_no_number_or_switch_of_the_schema_takes_the_other(driver):
    root = MASTERS[driver]
    tree, expected = load_config(None, [], driver).model_dump(by_alias=True), set()
    tree["policy"].pop("scheduler", None)
    for path, field in leaves(root):
        kinds = alternatives(field.annotation)
        wrong = [value for value, kind in ((True, int), (True, float), (1, bool)) if kind in kinds]
        if wrong and path[:2] != ("policy", "scheduler") and not (bool in kinds and len(wrong) > 1):
            tree = with_value(tree, path, wrong[0])
            expected.add(path)
    with pytest.raises(ValidationError) as raised:
        root.model_validate(tree)
    refused = {tuple(str(part) for part in error["loc"] if part != "one") for error in raised.value.errors()}
    assert [path for path in expected if not any(found[: len(path)] == path for found in refused)] == []
    assert len(expected) > 20


def sections(driver):
    """Dotted path of every section of a driver's schema that has keys, and whether null stands for it."""
    root = MASTERS[driver]
    found = {path[:end] for path, _ in leaves(root) for end in range(1, len(path))}
    return [(path, type(None) in types_at(root, path)) for path in sorted(found) if section_at(root, path)]


@pytest.mark.parametrize("driver", MASTERS)
def test_a_section_left_empty_or_as_text_is_refused_by_name(driver):
    root, tree = MASTERS[driver], read_tree(QUICK / f"{driver}.yaml")
    found = sections(driver)
    assert len(found) >= 10
    for path, may_be_null in found:
        key = ".".join(path)
        for value in (None, "some text", 3):
            said = not_mappings(root, with_value(tree, path, value))
            if value is None and may_be_null:
                assert said == []
            else:
                assert [line.split(":")[0] for line in said] == [f"{key}={value!r}"]


@pytest.mark.parametrize("value", ["", " some text", " 3", " [1]"])
@pytest.mark.parametrize("path", ["policy", "grpo", "policy.tokenizer", "policy.dtensor_cfg.lora_cfg", "data.default"])
def test_a_file_with_such_a_section_is_refused_whatever_follows(path, value, tmp_path: Path):
    if path == "data.default" and not value:
        return
    *parents, name = path.split(".")
    lines = [f"{'  ' * depth}{parent}:" for depth, parent in enumerate(parents)]
    lines.append(f"{'  ' * len(parents)}{name}:{value}")
    file = tmp_path / "x.yaml"
    file.write_text("\n".join([f"defaults: {QUICK}/grpo.yaml", *lines, ""]))
    with pytest.raises(ConfigError, match=rf"^{path}=[^\n]*: must be a mapping\."):
        load_config(file, [f"++{path}.some_key=1"], "grpo")


def test_an_empty_section_says_what_it_would_drop(tmp_path: Path):
    file = tmp_path / "x.yaml"
    file.write_text(f"defaults: {QUICK}/grpo.yaml\ncluster:\n")
    with pytest.raises(ConfigError) as raised:
        load_config(file, ["cluster.num_nodes=1"], "grpo")
    assert str(raised.value).startswith(
        "cluster=None: must be a mapping. null would drop all that it inherits: remove the line to keep it. Its keys: "
    )
    child = tmp_path / "child.yaml"
    child.write_text("defaults: x.yaml\ncluster: {num_nodes: 1}\n")
    with pytest.raises(ConfigError, match=r"^cluster=None: must be a mapping"):
        load_config(child, [], "grpo")


@pytest.mark.parametrize(
    "overrides", [["policy.optimizer.kwargs=null", "policy.optimizer.kwargs.lr=1"], ["cluster=[]"]]
)
def test_an_override_cannot_empty_a_section_either(overrides):
    with pytest.raises(ConfigError, match=r"^[\w.]+=(None|\[\]): must be a mapping\."):
        load_config(None, overrides, "grpo")


def test_null_stands_where_the_schema_says_so(tmp_path: Path):
    file = tmp_path / "x.yaml"
    file.write_text(
        f"defaults: {QUICK}/grpo.yaml\nenv: {{last_number: }}\ndata: {{default: , validation: }}\n"
        "policy: {lora: , scheduler: }\n"
    )
    config = load_config(file, ["data.train.env_name=last_number"], "grpo")
    assert config.policy.lora is None
    assert config.data.default is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"grpo:\n  seed: 1\n  seed: 2\n", r"no valid YAML \(line 3: found duplicate key seed\)"),
        (b"grpo:\n\tseed: 1\n", r"no valid YAML \(line 2: found character '\\t' that cannot start"),
        (b"grpo: {null: 2}\n", "cannot be read as a configuration"),
        (b"grpo: \xe9\n", r"is no text in UTF-8"),
        (b"\xff\xfed\x00", r"is no text in UTF-8"),
        (b"8", "it holds no mapping"),
        (b"", "policy=<absent>: this key is required"),
        (b"1: 2\n", "1=2: unknown key. Keys of the top level: checkpointing"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, content, message):
    file = tmp_path / "x.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_config(file, [], "grpo")


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path):
    file = tmp_path / "x.yaml"
    file.write_bytes(b"\xef\xbb\xbfdefaults: " + str(QUICK).encode() + b"/grpo.yaml\ngrpo: {seed: 7}\n")
    assert load_config(file, [], "grpo").grpo.seed == 7


def test_an_unknown_section_is_reported_though_it_holds_a_reference(tmp_path: Path):
    file = tmp_path / "x.yaml"
    file.write_text(
        f"defaults: {QUICK}/grpo.yaml\nunheard_of: {{model: '${{policy.model_name}}'}}\n"
        "policy: {drafts: {model: '${policy.model_name}'}, precision: int8}\n"
    )
    with pytest.raises(ConfigError) as raised:
        load_config(file, [], "grpo")
    assert {line.split("=")[0] for line in str(raised.value).splitlines()} == {
        "unheard_of",
        "policy.drafts",
        "policy.precision",
    }
