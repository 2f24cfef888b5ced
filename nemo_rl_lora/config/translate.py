"""Any tool's file as a configuration: a run of VeOmni, verl or theseus, and else the adapter that the file describes.

Contract: what becomes of a run is in config/other_runs.py. Of NeMo RL's files, whole ones with everything they inherit
or a LoRA block alone, the block is validated and nothing beside it; PEFT's and the other tools' adapters are read as
they stand (lora/other_tools.py). Raises ConfigError where the file holds no adapter, or one that cannot be translated.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from nemo_rl_lora.config.errors import ConfigError
from nemo_rl_lora.config.load import algorithm_of, load_policy, read_file, read_tree, theirs_of
from nemo_rl_lora.config.lora import LoraCfg, PeftCfg, UnifiedLora, lora_spec_from_policy, unified_from_spec
from nemo_rl_lora.config.master import MASTERS
from nemo_rl_lora.config.other_runs import as_yaml, run_of
from nemo_rl_lora.config.run_draft import NoSuchRunError
from nemo_rl_lora.config.their_keys import Theirs
from nemo_rl_lora.config.tree import lookup, with_value
from nemo_rl_lora.lora.names import names_fused_layer
from nemo_rl_lora.lora.other_tools import Translation, is_of_another_tool, translate
from nemo_rl_lora.lora.targets import LinearModule

_BLOCKS = (LoraCfg, PeftCfg, UnifiedLora)


def translate_file(file: Path) -> str:
    """The run of the file as YAML, or else its adapter, under comments that say what it was and what it left out."""
    theirs, reason = _theirs(file), ""
    try:
        if (run := run_of(theirs)) is not None:
            return as_yaml(file, run)
    except ValueError as error:
        if not isinstance(error, NoSuchRunError) or not is_of_another_tool(theirs.document):
            raise ConfigError(f"{file}: {error}") from error
        reason = f"# Its adapter alone, since there is no such run here: {error}\n"
    found = read_adapter_description(file)
    heading = f"# {file}: {found.dialect}{', ' + found.key if found.key else ''}\n{reason}"
    if found.spec.fused == "shared":
        heading += "# One A for each fused layer: Megatron backend only.\n"
    block = unified_from_spec(found.spec)
    if not found.enabled:
        heading += "# It is switched off there. Set enabled: true to train it.\n"
        block["enabled"] = False
    policy: dict[str, Any] = {"lora": block}
    if found.init_from is not None:
        policy["adapter"] = {"init_from": found.init_from}
    return heading + yaml.safe_dump({"policy": policy}, sort_keys=False)


def read_adapter_description(file: Path) -> Translation:
    """The one adapter that the file describes. Raises ConfigError."""
    document = _theirs(file).document
    if is_of_another_tool(document):
        try:
            return translate(document, _modules_beside(file))
        except ValueError as error:
            raise ConfigError(f"{file}: {error}") from error
    inherits = document.get("defaults")  # Hydra's list names groups, and NeMo RL's files
    names = [inherits] if isinstance(inherits, str) else inherits if isinstance(inherits, list) else []
    inherits_files = bool(names) and all(str(name).endswith((".yaml", ".yml")) for name in names)
    is_whole = inherits_files or any(algorithm in document for algorithm in MASTERS)
    if is_whole and algorithm_of(file) == "eval":
        raise ConfigError(f"{file}: evaluates adapters and describes none. Give the adapter_config.json of one.")
    return _of_nemo_rl(file, read_tree(file) if is_whole else document, is_whole=is_whole)


def _modules_beside(file: Path) -> Sequence[LinearModule]:
    """The modules of the tensors beside PEFT's file, where they are there."""
    from nemo_rl_lora.lora.files import ADAPTER_CONFIG_FILE, ADAPTER_FILE, read_adapter
    from nemo_rl_lora.lora.fit import modules_of_tensors

    if file.name != ADAPTER_CONFIG_FILE or not (file.parent / ADAPTER_FILE).is_file():
        return ()
    return modules_of_tensors(read_adapter(file.parent)[0])


def _theirs(file: Path) -> Theirs:
    """The file's mapping, as another tool reads it."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read as YAML or JSON ({error}). Give another file.") from error
    try:
        document = json.loads(text)
    except json.JSONDecodeError:
        document = read_file(file)
    if not isinstance(document, dict) or not document:
        raise ConfigError(f"{file}: holds no mapping. Give a configuration or an adapter_config.json.")
    return theirs_of(file, document)


def _of_nemo_rl(file: Path, tree: Mapping[str, Any], *, is_whole: bool) -> Translation:
    """The enabled block of a configuration, or the only one of a file that is no more than a block."""
    blocks = dict(_blocks(tree))
    if not blocks and not is_whole:
        try:
            translate(tree)
        except ValueError as error:
            raise ConfigError(f"{file}: {error}") from error
    enabled = [kind for kind, block in blocks.items() if block.get("enabled", kind is UnifiedLora) is True]
    chosen = enabled or ([] if is_whole else list(blocks))
    if len(chosen) != 1:
        names = " and ".join(kind.KEY for kind in chosen)
        two = f"{names} describe an adapter each, and one is translated. Leave the other out."
        raise ConfigError(f"{file}: {two if chosen else 'enables no adapter. Set enabled: true in its LoRA block.'}")
    kind = chosen[0]
    block = {**blocks[kind], "enabled": True}
    init_from = block.pop("restore_from", None) if kind is LoraCfg else None
    backend = "dtensor" if kind is LoraCfg or (kind is UnifiedLora and not _needs_megatron(block)) else "megatron"
    policy = load_policy(with_value({"policy": {"backend": backend}}, kind.KEY.split("."), block))
    spec = lora_spec_from_policy(policy)
    assert spec is not None, "its block is enabled"
    (start,) = lookup(tree, ("policy", "adapter", "init_from")) or (None,)
    return Translation(dialect="NeMo RL", key=kind.KEY, spec=spec, init_from=start or init_from, enabled=bool(enabled))


def _blocks(tree: Mapping[str, Any]) -> Iterator[tuple[type[LoraCfg | PeftCfg | UnifiedLora], Mapping[str, Any]]]:
    """The LoRA blocks of a file. One that stands alone may leave out the sections around it."""
    for kind in _BLOCKS:
        parts = kind.KEY.split(".")
        for start in range(len(parts)):
            found = lookup(tree, parts[start:])
            if found is not None and isinstance(found[0], Mapping):
                yield kind, found[0]
                break


def _needs_megatron(block: Mapping[str, Any]) -> bool:
    targets = block.get("target_modules")
    fused = isinstance(targets, list) and any(names_fused_layer(str(target)) for target in targets)
    return fused or bool(block.get("a2a"))
