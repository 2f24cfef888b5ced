"""What an export starts from, checked before anything is written: adapters, and the base that they belong to.

Contract: finding and checking an adapter reads no weight of a base; opening a base reads headers and the samples of its
digest. Every ValueError names the flag. Loads no model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from nemo_rl_lora.checkpoints.durable_files import CHECKSUMS_FILE, read_json_file, refuse_damaged
from nemo_rl_lora.checkpoints.record import CONFIG_FILE, INFO_FILE, PHASE_WEIGHTS, read_config, step_of_adapter
from nemo_rl_lora.checkpoints.retention import base_beside
from nemo_rl_lora.export.surroundings import BASE_FILES, CODE, known_files
from nemo_rl_lora.lora.files import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    PICKLED_FILE,
    AdapterBase,
    module_of,
    read_adapter,
    refuse_links,
)
from nemo_rl_lora.lora.fit import adapter_directory, fit_adapter, fit_itself, refuse_not_finite
from nemo_rl_lora.lora.names import OUTPUT_HEAD_NAMES, last_component
from nemo_rl_lora.lora.targets import ALL_LINEAR, AdaptedModule, LinearModule
from nemo_rl_lora.models.families import has_tied_head
from nemo_rl_lora.models.source import resolve_model
from nemo_rl_lora.tensors import MERGEABLE, StoredTensor, file_digest, stored_tensors, tensors_digest

ADAPTER_FLAG = "--adapter-ckpt"
MODEL_FLAG = "--hf-model-name"
BASE_FLAG = "--base-ckpt"
_EXPERT = re.compile(r"(?P<experts>.+\.experts)\.\d+\..+")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterInput:
    """An adapter on disk that is whole, and what its step says of the run it is from."""

    weights_file: Path
    step: Path | None  # the step's directory; None for an adapter that is no checkpoint of ours
    tensors: Mapping[str, Tensor]  # shapes alone, on the meta device
    peft_config: Mapping[str, Any]
    sha256: str
    base_digest: str | None  # of the base that it was trained on, where that is recorded
    model_source: str
    run_policy: Mapping[str, Any]  # `policy` of the run's configuration; empty for an adapter that is no checkpoint
    phase_base: Path | None = None  # the directory beside its step that the step's phase builds on

    @property
    def directory(self) -> Path:
        return self.weights_file.parent

    @property
    def base_name(self) -> str | None:
        return self.peft_config.get("base_model_name_or_path")

    @property
    def config_overrides(self) -> Mapping[str, Any]:
        return self.run_policy.get("hf_config_overrides") or {}

    @property
    def tokenizer(self) -> Path | None:
        directory = None if self.step is None else self.step / "policy" / "tokenizer"
        return directory if directory is not None and directory.is_dir() else None

    @property
    def not_of_a_tokenizer(self) -> list[str]:
        """What else lies in that directory."""
        if self.tokenizer is None:
            return []
        return sorted({path.name for path in self.tokenizer.iterdir() if path.is_file()} - _names(self.tokenizer))

    def base(self, name: str | None) -> AdapterBase | None:
        """What a copy of the adapter says that it was trained on, under another name where one is given."""
        name = name or self.base_name
        if not name:
            return None
        found_by = str(Path(name).expanduser().absolute()) if is_directory(name) else name
        return AdapterBase(name=found_by, source=self.model_source, digest=self.base_digest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The base's files, opened by their headers."""

    name: str
    directory: Path
    description: str
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    digest: str


def find_adapter(path: Path) -> AdapterInput:
    """The adapter of a step's directory, of its policy/adapter, or of any PEFT directory, read once and checked."""
    flag = f"{ADAPTER_FLAG}={str(path)!r}"
    if is_directory(path / "policy" / "weights"):
        raise ValueError(
            f"{flag}: is a step of full fine-tuning and has no adapter. {path}/policy/weights is a Hugging Face model: "
            "use it as it is."
        )
    try:
        directory = adapter_directory(path)
    except ValueError as error:
        several = " --all converts every one." if "whole run" in str(error) else ""
        raise ValueError(f"{flag}: {error}{several}") from None
    step = step_of_adapter(directory)
    try:
        if step is not None:
            records = [step / name for name in (INFO_FILE, CONFIG_FILE, CHECKSUMS_FILE)]
            refuse_links(step, [*records, *known_files(step / "policy" / "tokenizer")])
        if step is not None and (step / CHECKSUMS_FILE).is_file():
            files = [directory / ADAPTER_CONFIG_FILE, directory / ADAPTER_FILE]
            refuse_damaged(step, files, "Use another step.")
        run_policy = {} if step is None else _run_policy(step)
        tensors, peft_config = read_adapter(directory)
        refuse_not_finite(tensors, "Use an earlier step.")
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from error
    info = {} if step is None else read_json_file(step, INFO_FILE)
    weights_file = ADAPTER_FILE if (directory / ADAPTER_FILE).is_file() else PICKLED_FILE
    return AdapterInput(
        weights_file=directory / weights_file,
        step=step,
        tensors={name: torch.empty(tensor.shape, device="meta") for name, tensor in tensors.items()},
        peft_config=peft_config,
        sha256=file_digest(directory / ADAPTER_CONFIG_FILE, directory / weights_file),
        base_digest=info.get("base_digest"),
        model_source=info.get("model_source", ""),
        run_policy=run_policy,
        phase_base=None if step is None else _phase_base(step, info),
    )


def _phase_base(step: Path, info: Mapping[str, Any]) -> Path | None:
    """What earlier phases of a step's run made, where that lies beside it."""
    name = (info.get("phase_begin") or {}).get("base")
    base = None if name is None else base_beside(step, name)
    return None if base is None else base / PHASE_WEIGHTS


def open_base(model_name: str | None, base_directory: Path | None, adapter: AdapterInput) -> Base:
    """The base by its name or the adapter's own record of it, its weights from `base_directory` where that is given."""
    name = model_name or (None if adapter.phase_base is None else str(adapter.phase_base)) or adapter.base_name
    if model_name is None and name and Path(name).is_absolute() and not is_directory(name):
        name = adapter.run_policy.get("model_name") or name  # the run was elsewhere; its digest says whether it is that
    if base_directory is None and not name:
        raise ValueError(
            f"{MODEL_FLAG}=None: {adapter.directory / ADAPTER_CONFIG_FILE} does not say which model it was made for. "
            f"Name the base with {MODEL_FLAG}."
        )
    flag = MODEL_FLAG if base_directory is None else BASE_FLAG
    source = resolve_model(str(base_directory or name), flag)
    tensors, flag = stored_tensors(source.path), f"{flag}={str(base_directory or name)!r}"
    if not tensors:
        raise ValueError(
            f"{flag}: {source.path} holds no model.safetensors and no index of shards. Load the model with "
            "transformers and save it again with save_pretrained."
        )
    try:
        refuse_links(source.path, known_files(source.path, *BASE_FILES))
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from error
    config = _read_config(source.path / "config.json", flag)
    if quantization := config.get("quantization_config"):
        raise ValueError(
            f"{flag}: its weights are quantized ({quantization.get('quant_method')}), and a sum of them and an update "
            "would be rounded again. Name the unquantized base."
        )
    from nemo_rl_lora.models.load import described_model
    from nemo_rl_lora.models.stored import check_weights

    overrides = {key: value for key, value in adapter.config_overrides.items() if key != CODE}
    check_weights(source.path, described_model(source.path, overrides, flag), label=flag, overrides=overrides)
    return Base(
        name=name or str(base_directory),
        directory=source.path,
        description=source.description,
        config=config,
        tensors=tensors,
        digest=tensors_digest(tensors),
    )


def check_alone(adapter: AdapterInput) -> None:
    """ValueError where the adapter's configuration is not what is exported here, or not that of its tensors."""
    try:
        fit_itself(adapter.tensors, adapter.peft_config)
    except ValueError as error:
        raise ValueError(f"{ADAPTER_FLAG}={str(adapter.directory)!r}: {error}") from error


def fit_to_base(adapter: AdapterInput, base: Base) -> dict[str, AdaptedModule]:
    """Weight name -> the module whose adapter changes it. ValueError where adapter and base do not belong together."""
    if adapter.base_digest is not None and adapter.base_digest != base.digest:
        trained_on = f" on {adapter.model_source}" if adapter.model_source else ""
        raise ValueError(
            f"{MODEL_FLAG}={base.name!r}: {base.directory} has other weights than those that {adapter.directory} was "
            f"trained{trained_on}: their digest is {base.digest[:12]}, that of the base {adapter.base_digest[:12]}. "
            f"Name the base with {MODEL_FLAG}, or the directory of its files with {BASE_FLAG}."
        )
    flag = f"{ADAPTER_FLAG}={str(adapter.directory)!r}"
    modules = {module_of(name) for name in adapter.tensors}
    heads = sorted(module for module in modules if last_component(module) in OUTPUT_HEAD_NAMES)
    if heads and _has_tied_head(base):
        raise ValueError(
            f"{flag}: has an adapter on the output head {heads[0]}, which in {base.name} shares its weight with the "
            "input embeddings: merged, it would change those too. Keep the two apart with --adapter-only."
        )
    _refuse_stacked_experts(modules, base, flag)
    linears = _linears(modules, adapter, base)
    try:
        _, adapted = fit_adapter(
            adapter.tensors,
            adapter.peft_config,
            linears,
            tied_head=False,  # one is refused above
            model_name=base.name,
            model_key=MODEL_FLAG,
        )
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from error
    for module in adapted:
        if (dtype := base.tensors[f"{module.name}.weight"].dtype) not in MERGEABLE:
            raise ValueError(
                f"{MODEL_FLAG}={base.name!r}: {module.name}.weight is stored as {dtype}, which cannot be merged. Name "
                f"a base in {', '.join(MERGEABLE)}."
            )
    return {f"{module.name}.weight": module for module in adapted}


def _has_tied_head(base: Base) -> bool:
    from transformers import AutoConfig  # a config.json leaves out what is its class's default

    return has_tied_head(AutoConfig.from_pretrained(base.directory))


def _linears(modules: set[str], adapter: AdapterInput, base: Base) -> list[LinearModule]:
    """The matrices of the base that the adapter's targets may mean.

    "all-linear" means those that have tensors: files do not tell an embedding from a linear layer. A single expert is
    one only for an adapter of experts: transformers holds them stacked, so that targets pass them by.
    """
    named = {name.removesuffix(".weight"): t for name, t in base.tensors.items() if len(t.shape) == 2}
    everything = str(adapter.peft_config.get("target_modules")).lower() == ALL_LINEAR
    has_experts = any(_EXPERT.fullmatch(module) for module in modules)
    return [
        LinearModule(name=name, in_features=tensor.shape[1], out_features=tensor.shape[0])
        for name, tensor in named.items()
        if name in modules or not (everything or (_EXPERT.fullmatch(name) and not has_experts))
    ]


def _refuse_stacked_experts(modules: set[str], base: Base, flag: str) -> None:
    for module in sorted(modules):
        expert = _EXPERT.fullmatch(module)
        stem = f"{expert['experts']}." if expert else f"{module}."
        stacked = [name for name, t in base.tensors.items() if len(t.shape) == 3 and f"{name}.".startswith(stem)]
        if stacked and f"{module}.weight" not in base.tensors:
            raise ValueError(
                f"{flag}: has an adapter on {module}, and the base holds those experts stacked in "
                f"{stacked[0]} {list(base.tensors[stacked[0]].shape)}. An adapter of experts can only be merged into a "
                "base that stores every expert's weight by itself: name such a copy with --base-ckpt."
            )


def _run_policy(step: Path) -> Mapping[str, Any]:
    """`policy` of a step's configuration, of which hf_config_overrides are taken over."""
    try:
        config = read_config(step) if (step / CONFIG_FILE).is_file() else {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{step / CONFIG_FILE}: cannot be read ({error}). Use another step.") from error
    policy = config.get("policy") if isinstance(config, dict) else config
    if not isinstance(policy, dict | None) or not isinstance((policy or {}).get("hf_config_overrides"), dict | None):
        raise ValueError(f"{step / CONFIG_FILE}: holds no configuration of a run. Use another step.")
    return policy or {}


def _names(directory: Path) -> set[str]:
    return {path.name for path in known_files(directory)}


def is_directory(name: str | Path) -> bool:
    """Whether a name, of any length, is that of a directory."""
    try:
        return Path(name).expanduser().is_dir()
    except OSError:
        return False


def _read_config(path: Path, flag: str) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{flag}: {path} cannot be read ({error}). Copy or download the model again.") from error
