"""From a YAML file and overrides to one frozen, validated configuration.

The order: files with their `defaults:`, overrides, interpolations and resolvers, then the schema. Nothing is read
besides these files, and nothing is judged that depends on a machine or a model (config/support.py).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import get_yaml_loader
from omegaconf.errors import GrammarParseError, OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from nemo_rl_lora.config.errors import ConfigError, is_reference, not_mappings, show, unknown_key, validation_paragraphs
from nemo_rl_lora.config.gives_way import (
    with_importance_correction,
    with_precision,
    without_adamw_choice,
    without_parallel_sizes,
    without_replaced,
)
from nemo_rl_lora.config.layers import SET_BY, Layers, Tracked, layers_from_record, overlaid
from nemo_rl_lora.config.master import MASTERS, Driver, EvalMaster, MasterConfig
from nemo_rl_lora.config.other_runs import (
    algorithm_of_run,
    is_adapter_alone,
    is_own,
    refusal,
    run_of,
    tool_of,
    translate_command,
)
from nemo_rl_lora.config.overrides import overridden
from nemo_rl_lora.config.policy import PolicyConfig
from nemo_rl_lora.config.refused_keys import keys_without_effect, take_out
from nemo_rl_lora.config.run_draft import NoSuchRunError, RunTranslation
from nemo_rl_lora.config.schema import field_at, leaves
from nemo_rl_lora.config.their_keys import Theirs, nested, references_of
from nemo_rl_lora.config.tree import flatten, lookup, plain, with_value, without
from nemo_rl_lora.lora.other_tools import is_of_another_tool
from nemo_rl_lora.scalars import as_number
from nemo_rl_lora.shipped_files import SHIPPED_ROOT, existing

_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_DIGITS = "[0-9]+(?:_[0-9]+)*"

CONFIG_DIR = SHIPPED_ROOT / "examples" / "configs"

_BASE_FILES: dict[Driver, str] = {
    "sft": "sft.yaml",
    "dpo": "dpo.yaml",
    "grpo": "grpo_math_1B.yaml",
    "eval": "quickstart/eval.yaml",
}


def register_resolvers() -> None:
    """Make add, sub, mul, div, max and min known to OmegaConf; may be called any number of times."""
    resolvers = {
        "add": lambda *values: sum(values),
        "sub": lambda first, *others: first - sum(others),
        "mul": lambda *values: math.prod(values),
        "div": lambda first, second: first / second,
        "max": lambda *values: max(values),
        "min": lambda *values: min(values),
    }
    for name, resolver in resolvers.items():
        OmegaConf.register_new_resolver(name, partial(_on_numbers, resolver), replace=True)


def _on_numbers(resolver: Callable[..., Any], *values: Any) -> Any:
    return resolver(*map(as_number, values))


def load_config(path: Path | None, overrides: Sequence[str], driver: Driver, *, precision: str | None = None) -> Any:
    """The configuration of a driver's run, of its class in MASTERS; `path` None is its quick start. `precision` is
    instead of an inherited `policy.precision`.

    Raises ConfigError.
    """
    root = MASTERS[driver]
    file = path if path is not None else CONFIG_DIR / "quickstart" / f"{driver}.yaml"
    _check_driver(file, driver)
    read = _read(file, root)
    tracked = without_parallel_sizes(without_replaced(read, overridden(read, overrides, root)))
    if precision is not None:
        tracked = with_precision(tracked, precision)
    return _validated(root, without_adamw_choice(with_importance_correction(tracked)))


def derived(config: Any, changes: Mapping[str, Any], name: str) -> Any:
    """The configuration with other values at these dotted keys, each replaced whole, which the layer `name` wrote as
    what is inherited. Raises ConfigError."""
    tree = plain(config.model_dump(mode="json", by_alias=True))
    for key, value in changes.items():
        path = key.split(".")
        tree = with_value(without(tree, path) if lookup(tree, path) else tree, path, plain(value))
    written = {key for key in flatten(tree) if any(key == k or key.startswith(f"{k}.") for k in changes)}
    layers = config.layers.without(changes).with_layer(name, sorted(written), is_users=False)
    return _validated(type(config), Tracked(tree, layers))


def load_policy(tree: dict[str, Any]) -> PolicyConfig:
    """The policy of a tree that has no more than a part of one: SFT's base file has the rest. Raises ConfigError."""
    return _validated(MASTERS["sft"], overlaid(_read(CONFIG_DIR / _BASE_FILES["sft"]), Tracked(tree))).policy


def _validated(root: type[MasterConfig | EvalMaster], tracked: Tracked) -> Any:
    """The tree as a configuration of this class, which knows who set what. Raises ConfigError."""
    resolved, problems = _accepted(root, tracked.tree)
    try:
        config = root.model_validate(resolved)
    except ValidationError as error:
        problems += validation_paragraphs(error, root, resolved, tracked.tree)
        raise ConfigError("\n".join(problems)) from error
    if problems:
        raise ConfigError("\n".join(problems))
    ignored = tuple(key for key in keys_without_effect(root, tracked.tree) if tracked.layers.is_set(key))
    return config.with_layers(replace(tracked.layers.restricted_to(flatten(resolved)), without_effect=ignored))


def _accepted(root: type[BaseModel], tree: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The resolved tree without the keys of refused_keys.tsv, and what is wrong with those."""
    try:
        resolved = _resolved(tree, root)
    except ConfigError as error:
        raise ConfigError("\n".join(not_mappings(root, tree)) or str(error)) from error
    kept, refused, unknown = take_out(root, resolved)
    problems = [
        f"{key}={show(value)}: {rule}"
        for key, (value, rule) in refused.items()
        if not is_reference(lookup(tree, key.split(".")))  # the key that it refers to is refused
    ]
    return kept, problems + [unknown_key(root, key.split("."), show(value)) for key, value in unknown.items()]


def algorithm_of(path: Path) -> Driver:
    """The driver that a file is for, by its sections. Raises ConfigError."""
    tree = read_tree(path)
    found: list[Driver] = [algorithm for algorithm in MASTERS if algorithm in tree]
    if len(found) != 1:
        raise ConfigError(
            f"{path}: a configuration has one section out of {', '.join(MASTERS)}, and this one has "
            f"{' and '.join(found) or 'none'}. Inherit one of the base files in examples/configs."
        )
    return found[0]


def read_tree(path: Path) -> dict[str, Any]:
    """The file merged over what its `defaults:` name, with interpolations unresolved. Raises ConfigError."""
    return _read(path).tree


def run_of_another_tool(path: Path) -> RunTranslation | None:
    """The translation of a whole file of VeOmni, verl or theseus; None for any other file. Raises ConfigError."""
    file = existing(path, str(path))
    return _translated(file, read_file(file))


def theirs_of(path: Path, document: Mapping[str, Any]) -> Theirs:
    """The document of a file as another tool reads it: keys with slashes as keys below keys, and those of its
    references replaced that can be resolved in it. The keys of any other file stay as they are written."""
    tree = nested(document)
    text = path.read_text(encoding="utf-8-sig")
    is_theirs = not is_own(tree) and (tool_of(tree) is not None or is_of_another_tool(tree))
    whole = tree if is_theirs else dict(document)
    return Theirs(_resolved_in_itself(whole) if "${" in text else whole, references_of(text))


def _resolved_in_itself(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document with those of its references replaced that can be resolved in it."""
    register_resolvers()
    whole = OmegaConf.create(dict(document))

    def resolved(node: Any, path: str) -> Any:
        if isinstance(node, Mapping):
            return {key: resolved(value, f"{path}.{key}" if path else str(key)) for key, value in node.items()}
        if not isinstance(node, str) or "${" not in node:
            return node
        try:
            return OmegaConf.select(whole, path)
        except (OmegaConfBaseException, RecursionError):
            return node

    return resolved(document, "")


def resolved_tree(config: MasterConfig | EvalMaster) -> dict[str, Any]:
    """The configuration as plain data for a file, with who set what under `set_by`."""
    return {**config.model_dump(mode="json", by_alias=True), SET_BY: config.layers.as_record()}


def resolved_yaml(config: MasterConfig | EvalMaster) -> str:
    """The configuration as YAML that loads again to an equal configuration, and to the same decisions."""
    return OmegaConf.to_yaml(OmegaConf.create(plain(resolved_tree(config))))


def _read(path: Path, root: type[BaseModel] | None = None) -> Tracked:
    """A file, or the shipped one of this path, with what it inherits. `root` checks that sections are mappings."""
    return _read_tracked(existing(path, str(path)), (), root)


def _read_tracked(path: Path, chain: tuple[Path, ...], root: type[BaseModel] | None) -> Tracked:
    file = path.resolve()
    if file in chain:
        names = " -> ".join(step.name for step in (*chain[chain.index(file) :], file))
        raise ConfigError(
            f"defaults={str(path.name)!r}: the files inherit each other ({names}). Remove one `defaults`."
        )
    tree = read_file(path, chain[-1] if chain else None)
    run = _translated(path, tree)
    if run is not None and not run.is_whole:
        raise ConfigError(refusal(path, run))
    tree = tree if run is None else run.tree
    parents, record = tree.pop("defaults", []), tree.pop(SET_BY, None)
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise ConfigError(
            f"defaults={show(parents)}: must be a path or a list of paths, relative to {path}. "
            "Write for example `defaults: ../../sft.yaml`."
        )
    inherited = [_read_tracked(existing(path.parent / parent, parent), (*chain, file), root) for parent in parents]
    if root is not None and (problems := not_mappings(root, tree)):
        raise ConfigError("\n".join(problems))
    layers = _own_layers(path, tree) if record is None else layers_from_record(record, str(path))
    return reduce(_overlaid, [*inherited, Tracked(tree, layers.restricted_to(flatten(tree)))], Tracked({}))


def _translated(path: Path, document: Mapping[str, Any]) -> RunTranslation | None:
    if is_own(nested(document)):
        return None
    theirs, key = theirs_of(path, document), f"--config={str(path)!r}"
    try:
        run = run_of(theirs)
    except NoSuchRunError as error:
        tool = tool_of(theirs.document)
        raise ConfigError(f"{key}: is a {tool} configuration, and has no counterpart here: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{key}: is a {tool_of(theirs.document)} configuration. {error}") from error
    if run is None and is_adapter_alone(theirs.document):
        raise ConfigError(f"{key}: describes an adapter, and no run. Translate it with: {translate_command(path)}")
    return run


def _overlaid(below: Tracked, above: Tracked) -> Tracked:
    return without_replaced(below, overlaid(below, above))


def _own_layers(path: Path, tree: Mapping[str, Any]) -> Layers:
    """The one layer of a file: none for a base file, whose values are as good as the schema's defaults."""
    file = path.resolve()
    if file in {CONFIG_DIR / name for name in _BASE_FILES.values() if "/" not in name}:
        return Layers()
    is_quick_start = file.parent == CONFIG_DIR / "quickstart"
    name = f"quickstart/{file.name}" if is_quick_start else str(path)
    return Layers().with_layer(name, list(flatten(tree)), is_users=not is_quick_start)


class _DecimalLoader(get_yaml_loader()):
    """OmegaConf's, with the numbers of the command line, which are decimal. YAML 1.1 reads 0100 as 64 and 1:30 as 90;
    here 0100 is 100, and 1:30, 0x8 and 0b1 are texts."""

    yaml_implicit_resolvers = {
        first: [(tag, regexp) for tag, regexp in resolvers if tag not in (_INT, _FLOAT)]
        for first, resolvers in get_yaml_loader().yaml_implicit_resolvers.items()
    }

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        try:
            return int(self.construct_scalar(node))
        except ValueError as error:
            raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from error


_DecimalLoader.add_constructor(_INT, _DecimalLoader.construct_yaml_int)
_DecimalLoader.add_implicit_resolver(_INT, re.compile(rf"[-+]?{_DIGITS}$"), list("-+0123456789"))
_DecimalLoader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        rf"(?:[-+]?{_DIGITS}(?:\.(?:{_DIGITS})?)?(?:[eE][-+]?[0-9]+)?|[-+]?\.{_DIGITS}(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def read_file(path: Path, inherited_by: Path | None = None) -> dict[str, Any]:
    """One file as a plain tree, `defaults` included. Raises ConfigError."""
    key = f"defaults={path.name!r} in {inherited_by}" if inherited_by else f"--config={str(path)!r}"
    if not path.is_file():
        reason = f"{path} is a directory" if path.is_dir() else f"there is no file {path}"
        raise ConfigError(f"{key}: {reason}. The base files, quick starts and recipes are in {CONFIG_DIR}.")
    try:
        with path.open(encoding="utf-8") as file:
            document = yaml.load(file, Loader=_DecimalLoader)  # noqa: S506
        if not isinstance(document, (dict, list, str, type(None))):
            raise OSError
        loaded = OmegaConf.create({} if document is None else document)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark is not None else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise ConfigError(f"{path}: no valid YAML ({line}{problem}). Correct the file.") from error
    except GrammarParseError as error:
        raise ConfigError(f"{path}: an interpolation cannot be read ({_first_line(error)}). Correct it.") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: cannot be read as a configuration ({_first_line(error)}). Correct it.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is no text in UTF-8 ({error.reason}). Give a YAML file.") from error
    except OSError as error:
        reason = error.strerror or "it holds no mapping"
        raise ConfigError(f"{path}: cannot be read as a configuration: {reason}. Give a YAML file.") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path}: holds a list where a mapping of sections is needed. Give a YAML file.")
    tree = OmegaConf.to_container(loaded, resolve=False)
    assert isinstance(tree, dict), type(tree)
    return {str(key): value for key, value in tree.items()}


def _check_driver(path: Path, algorithm: Driver) -> None:
    """A file of another driver is named as such, before its sections are called unknown."""
    tree = _read(path).tree
    others = [other for other in MASTERS if other in tree and other != algorithm]
    if not others:
        return
    if (run := run_of_another_tool(path)) is not None:
        raise ConfigError(
            f"--config={str(path)!r}: is a {run.tool} configuration, which belongs to "
            f"examples/run_{algorithm_of_run(run)}.py, and {algorithm} was started. Start that driver."
        )
    raise ConfigError(
        f"--config={str(path)!r}: has a section {others[0]!r}, which belongs to examples/run_{others[0]}.py, and "
        f"{algorithm} was started. Start that driver, or give a file that inherits "
        f"examples/configs/{_BASE_FILES[algorithm]}."
    )


def _resolved(tree: Mapping[str, Any], root: type[BaseModel]) -> dict[str, Any]:
    """The tree with every interpolation replaced by its value. ConfigError where one fails or a value is missing."""
    register_resolvers()
    missing = list(_missing(tree))
    if missing:
        raise ConfigError("\n".join(_missing_paragraph(path, root) for path in missing))
    try:
        plain = OmegaConf.to_container(OmegaConf.create(dict(tree)), resolve=True)
    except OmegaConfBaseException as error:
        key = error.full_key or error.key
        path = re.split(r"[.\[\]]+", str(key).rstrip("]"))
        (written,) = lookup(tree, path) or (None,)
        present = f"{key}={show(written)}" if key is not None else "interpolation"
        raise ConfigError(f"{present}: this reference has no value ({_first_line(error)}). Correct it.") from error
    except RecursionError as error:
        raise ConfigError("interpolation: references form a circle. Give one of them a value.") from error
    assert isinstance(plain, dict), type(plain)
    return {str(key): _at_home(value) for key, value in plain.items()}


def _at_home(value: Any) -> Any:
    """The value with every text that begins with `~/` as a path below the home directory."""
    if isinstance(value, dict):
        return {key: _at_home(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_at_home(item) for item in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


def _missing(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Where a value is left open, within lists too."""
    if isinstance(node, Mapping | list):
        for key, value in node.items() if isinstance(node, Mapping) else enumerate(node):
            yield from _missing(value, (*path, str(key)))
    elif node == "???":
        yield path


def _missing_paragraph(path: tuple[str, ...], root: type[BaseModel]) -> str:
    key = ".".join(path)
    field = field_at(root, path) or next((field for leaf, field in leaves(root) if leaf[-1] == path[-1]), None)
    what = "" if field is None or not field.description else f" It is: {' '.join(field.description.split())}"
    return (
        f"{key}='???': is mandatory, and the file leaves it open. "
        f"Set it in a file that inherits this one, or on the command line: {key}=VALUE.{what}"
    )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
