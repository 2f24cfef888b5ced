"""Any file that describes an adapter, as the `policy.lora` block that means the same.

Contract: NeMo RL's files are loaded with everything they inherit; PEFT's, VeOmni's, verl's and theseus's are read as
they stand (lora/other_tools.py). Raises ConfigError where the file holds no adapter, or one that cannot be translated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from nemo_rl_lora.config.errors import ConfigError
from nemo_rl_lora.config.load import algorithm_of, load_config
from nemo_rl_lora.config.lora import lora_block_key, lora_spec_from_policy, unified_from_spec
from nemo_rl_lora.config.master import EvalMaster
from nemo_rl_lora.lora.other_tools import Translation, translate


def translate_file(file: Path) -> str:
    """The adapter of the file as YAML, under a comment that says where it stood."""
    found = read_adapter_description(file)
    heading = f"# {file}: {found.dialect}{', ' + found.key if found.key else ''}\n"
    if found.spec.fused == "shared":
        heading += "# One A for each fused layer: Megatron backend only.\n"
    policy: dict[str, Any] = {"lora": unified_from_spec(found.spec)}
    if found.init_from is not None:
        policy["adapter"] = {"init_from": found.init_from}
    return heading + yaml.safe_dump({"policy": policy}, sort_keys=False)


def read_adapter_description(file: Path) -> Translation:
    """The one adapter that the file describes. Raises ConfigError."""
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: cannot be read as YAML or JSON ({error}). Give another file.") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{file}: holds no mapping. Give a configuration or an adapter_config.json.")
    if "policy" in document or "defaults" in document:
        return _of_nemo_rl(file)
    try:
        return translate(document)
    except ValueError as error:
        raise ConfigError(f"{file}: {error}") from error


def _of_nemo_rl(file: Path) -> Translation:
    config = load_config(file, [], algorithm_of(file))
    if isinstance(config, EvalMaster):
        raise ConfigError(f"{file}: evaluates adapters and describes none. Give the adapter_config.json of one.")
    spec = lora_spec_from_policy(config.policy)
    if spec is None:
        raise ConfigError(f"{file}: enables no adapter. Set enabled: true in its LoRA block.")
    start = config.policy.adapter.init_from
    return Translation(dialect="NeMo RL", key=lora_block_key(config.policy), spec=spec, init_from=start)
