"""From a YAML file and overrides to one frozen, validated configuration.

The order: files with their `defaults:`, overrides, interpolations and resolvers, then the schema. Nothing is read
besides these files, and nothing is judged that depends on a machine or a model (config/runnable.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, reduce
from pathlib import Path
from typing import Any, Literal, overload

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from nemo_rl_lora.config.errors import ConfigError, not_mappings, show, validation_paragraphs
from nemo_rl_lora.config.master import (
    MASTERS,
    Algorithm,
    DpoMaster,
    Driver,
    EvalMaster,
    GrpoMaster,
    MasterConfig,
    SftMaster,
)
from nemo_rl_lora.config.overrides import apply_overrides, merged, stripped
from nemo_rl_lora.config.schema import section_at
from nemo_rl_lora.shipped_files import SHIPPED_ROOT, existing

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
        OmegaConf.register_new_resolver(name, resolver, replace=True)


@overload
def load_config(path: Path | None, overrides: Sequence[str], algorithm: Literal["sft"]) -> SftMaster: ...
@overload
def load_config(path: Path | None, overrides: Sequence[str], algorithm: Literal["dpo"]) -> DpoMaster: ...
@overload
def load_config(path: Path | None, overrides: Sequence[str], algorithm: Literal["grpo"]) -> GrpoMaster: ...
@overload
def load_config(path: Path | None, overrides: Sequence[str], algorithm: Literal["eval"]) -> EvalMaster: ...
@overload
def load_config(path: Path | None, overrides: Sequence[str], algorithm: Algorithm) -> MasterConfig: ...
@overload
def load_config(path: Path | None, overrides: Sequence[str], algorithm: Driver) -> MasterConfig | EvalMaster: ...


def load_config(path: Path | None, overrides: Sequence[str], algorithm: Driver) -> MasterConfig | EvalMaster:
    """The configuration of a run; `path` None is the quick-start file of the driver. Raises ConfigError."""
    root = MASTERS[algorithm]
    file = path if path is not None else CONFIG_DIR / "quickstart" / f"{algorithm}.yaml"
    tree = read_tree(file)
    _check_driver(file, tree, algorithm)
    unresolved = apply_overrides(tree, overrides, root)
    try:
        resolved = _resolved(unresolved)
    except ConfigError as error:
        raise ConfigError("\n".join(not_mappings(root, unresolved)) or str(error)) from error
    try:
        return root.model_validate(resolved)
    except ValidationError as error:
        raise ConfigError("\n".join(validation_paragraphs(error, root, resolved, unresolved))) from error


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
    return stripped(_read_tree(existing(path, str(path)), ()))


def resolved_yaml(config: BaseModel) -> str:
    """The configuration as YAML that loads again to an equal configuration."""
    return OmegaConf.to_yaml(OmegaConf.create(_plain(config.model_dump(by_alias=True))))


def usual_sections(config: MasterConfig, dotted: str) -> list[BaseModel]:
    """A section as the base file and the quick start of the algorithm have it, references resolved in this
    configuration; a file without such a section is left out."""
    files = (_BASE_FILES[config.algorithm], f"quickstart/{config.algorithm}.yaml")
    found = [_section_of(config, dotted, file) for file in files]
    return [section for section in found if section is not None]


def _section_of(config: MasterConfig, dotted: str, file: str) -> BaseModel | None:
    path = dotted.split(".")
    section = _raw(_tree_of(file), dotted)
    kind = section_at(type(config), path)
    if kind is None or not isinstance(section, Mapping):
        return None
    tree = _plain(config.model_dump(by_alias=True))
    _raw(tree, ".".join(path[:-1]))[path[-1]] = section
    return kind.model_validate(_raw(_resolved(tree), dotted))


@cache
def _tree_of(file: str) -> Mapping[str, Any]:
    return read_tree(CONFIG_DIR / file)


def _read_tree(path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    file = path.resolve()
    if file in chain:
        names = " -> ".join(step.name for step in (*chain[chain.index(file) :], file))
        raise ConfigError(
            f"defaults={str(path.name)!r}: the files inherit each other ({names}). Remove one `defaults`."
        )
    tree = _read_file(path, chain[-1] if chain else None)
    parents = tree.pop("defaults", [])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise ConfigError(
            f"defaults={show(parents)}: must be a path or a list of paths, relative to {path}. "
            "Write for example `defaults: ../../sft.yaml`."
        )
    inherited = [_read_tree(existing(path.parent / parent, parent), (*chain, file)) for parent in parents]
    return reduce(merged, [*inherited, tree], {})


def _read_file(path: Path, inherited_by: Path | None) -> dict[str, Any]:
    """One file as a plain tree, `defaults` included."""
    key = f"defaults={path.name!r} in {inherited_by}" if inherited_by else f"--config={str(path)!r}"
    if not path.is_file():
        reason = f"{path} is a directory" if path.is_dir() else f"there is no file {path}"
        raise ConfigError(f"{key}: {reason}. The base files, quick starts and recipes are in {CONFIG_DIR}.")
    try:
        loaded = OmegaConf.load(path)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark is not None else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise ConfigError(f"{path}: no valid YAML ({line}{problem}). Correct the file.") from error
    except GrammarParseError as error:
        raise ConfigError(f"{path}: an interpolation cannot be read ({_first_line(error)}). Correct it.") from error
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


def _check_driver(path: Path, tree: Mapping[str, Any], algorithm: Driver) -> None:
    """A file of another driver is named as such, before its sections are called unknown."""
    others = [other for other in MASTERS if other in tree and other != algorithm]
    if others:
        raise ConfigError(
            f"--config={str(path)!r}: has a section {others[0]!r}, which belongs to examples/run_{others[0]}.py, and "
            f"{algorithm} was started. Start that driver, or give a file that inherits "
            f"examples/configs/{_BASE_FILES[algorithm]}."
        )


def _resolved(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with every interpolation replaced by its value. ConfigError where one fails or a value is missing."""
    register_resolvers()
    missing = list(_missing_keys(tree))
    if missing:
        raise ConfigError("\n".join(_missing_paragraph(key) for key in missing))
    try:
        plain = OmegaConf.to_container(OmegaConf.create(dict(tree)), resolve=True)
    except OmegaConfBaseException as error:
        key = error.full_key or error.key
        present = f"{key}={show(_raw(tree, str(key)))}" if key is not None else "interpolation"
        raise ConfigError(f"{present}: this reference has no value ({_first_line(error)}). Correct it.") from error
    except RecursionError as error:
        raise ConfigError("interpolation: references form a circle. Give one of them a value.") from error
    assert isinstance(plain, dict), type(plain)
    return {str(key): value for key, value in plain.items()}


def _missing_keys(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted keys that hold `???`."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _missing_keys(value, f"{prefix}{key}.")
        elif value == "???":
            yield f"{prefix}{key}"


def _missing_paragraph(key: str) -> str:
    return (
        f"{key}='???': is mandatory, and the file leaves it open. "
        f"Set it in a file that inherits this one, or on the command line: {key}=VALUE."
    )


def _raw(tree: Any, dotted: str) -> Any:
    """What stands at a key of OmegaConf's notation (`a.b[0].c`)."""
    for key in dotted.replace("[", ".").replace("]", "").split("."):
        if isinstance(tree, Mapping):
            tree = tree.get(key)
        elif isinstance(tree, list) and key.isdigit() and int(key) < len(tree):
            tree = tree[int(key)]
    return tree


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _plain(value: Any) -> Any:
    """Tuples as lists, and text that looks like an interpolation kept as text."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        return value.replace("${", "\\${")
    return value
