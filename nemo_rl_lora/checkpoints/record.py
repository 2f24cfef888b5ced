"""What a step directory says of itself: training_info.json, where the run stands, and config.yaml, its configuration.

Contract: a record that was written is read again equal. Two configurations belong to one run where they describe one
adapter, in whichever block, and are equal outside `FREE_KEYS` and `FREE_SECTIONS`: what a step holds depends neither on
the backend nor on how processes shared the model.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import to_jsonable_python

from nemo_rl_lora import __version__
from nemo_rl_lora.checkpoints.durable_files import CHECKSUMS_FILE, DamagedError, read_json_file, replace_text
from nemo_rl_lora.config.differences import ABSENT, differences
from nemo_rl_lora.config.layers import SET_BY, layers_from_record
from nemo_rl_lora.config.lora import (
    LoraCfg,
    PeftCfg,
    UnifiedLora,
    lora_block_key,
    lora_field_key,
    lora_spec_from_policy,
)
from nemo_rl_lora.config.master import GrpoMaster
from nemo_rl_lora.config.optimizer_settings import effective_values
from nemo_rl_lora.config.policy import PolicyConfig
from nemo_rl_lora.config.refused_keys import take_out
from nemo_rl_lora.lora.spec import LoraSpec

INFO_FILE = "training_info.json"
CONFIG_FILE = "config.yaml"
FORMAT_VERSION = 1
PHASE_BASE_PREFIX = "base_of_phase_"  # beside the steps: the weights that earlier phases made
PHASE_WEIGHTS = "weights"  # in it: a Hugging Face model
PHASE_RECORD_FILE = "phase_base.json"  # in it: from which step it was made, and how

SaveReason = Literal["period", "epoch", "end", "phase", "signal", "deadline", "threshold", "failure"]

_PERIODS = (
    "max_num_steps",
    "max_num_epochs",
    "max_num_tokens",
    "val_period",
    "val_at_start",
    "val_at_end",
    "val_batches",
    "val_micro_batch_size",
)
_RETENTION = ("keep_top_k", "save_period", "save_epochs", "save_optimizer", "checkpoint_must_save_by")
_DATA = ("on_bad_row", "on_change")
_PLACES = ("enabled", "checkpoint_dir", "load_path", "on_damage")
_BUDGETS = ("train_mb_tokens", "logprob_mb_tokens")
# How rows are cut into passes, for a run that has to take less memory; a size that the base files compute from one
# below; how AdamW runs.
_POLICY = (
    *("backend", "compile", "deterministic"),
    *("train_micro_batch_size", "logprob_batch_size"),
    *(f"{name}.{key}" for name in ("dynamic_batching", "sequence_packing") for key in _BUDGETS),
    *("make_sequence_length_divisible_by", "optimizer.kwargs.foreach", "optimizer.kwargs.fused"),
)
_BOTH_BACKENDS = ("enabled", "context_parallel_size", "sequence_parallel", "activation_checkpointing", "env_vars")
_DTENSOR = (
    *_BOTH_BACKENDS,
    "tensor_parallel_size",
    "dp_replicate_size",
    "load",
    "cpu_offload",
    "custom_parallel_plan",
)
_MEGATRON = (
    *_BOTH_BACKENDS,
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)
_GENERATION = (
    *("num_engines", "colocated.resources.num_nodes", "colocated.resources.gpus_per_node"),
    *("max_concurrent_sequences", "vllm_cfg.gpu_memory_utilization"),
)
_ENVIRONMENT = ("num_workers", "concurrency", "timeout_seconds", "on_failure")
# What may differ between a run and its continuation: exact dotted keys, where NAME is any, and whole sections.
FREE_KEYS = (
    frozenset(f"{driver}.{key}" for driver in ("sft", "dpo", "grpo") for key in _PERIODS)
    | {"sft.max_phase_loss_shift"}
    | frozenset(f"checkpointing.{key}" for key in (*_RETENTION, *_PLACES))
    | frozenset(f"data.{key}" for key in _DATA)
    | frozenset(f"env.NAME.{key}" for key in _ENVIRONMENT)
    | frozenset(f"policy.{key}" for key in _POLICY)
    | frozenset(f"policy.generation.{key}" for key in _GENERATION)
    | frozenset(f"policy.dtensor_cfg.{key}" for key in _DTENSOR)
    | frozenset(f"policy.megatron_cfg.{key}" for key in _MEGATRON)
)
FREE_SECTIONS = ("logger", "cluster", "evaluate")
# Where nothing is sampled or scored to be trained on: of long rows, SFT cuts the end and DPO leaves pairs out.
_OF_EVALUATIONS = ("policy.generation", "env", "data.on_long_prompt")
# Of a LoraSpec: ways to compute an adapter, which may differ, and `fused`, which follows from the targets.
_NOT_COMPARED = frozenset({"kernels", "a2a", "fused"})

_PACKAGES = ("torch", "transformers", "safetensors", "nemo-automodel", "megatron-core", "vllm")


def package_versions() -> dict[str, str]:
    """Version of Python and of each installed package that decides what a checkpoint means."""
    versions = {"python": ".".join(str(part) for part in sys.version_info[:3]), "nemo-rl-lora": __version__}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseBegin:
    """Which of `sft.phases` a step is part of, and where that phase began. Recorded, and never told from the step."""

    index: int
    name: str
    step: int = 0
    num_tokens: float = 0.0
    schedule_step: int = 0  # where the schedule of its learning rate began
    schedule_tokens: float = 0.0
    base: str | None = None  # a directory beside the steps: what earlier phases made; None: the run's own model


WITHOUT_PHASES = PhaseBegin(index=0, name="")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingInfo:
    """Where a run stands after `step` optimizer (rollout) steps."""

    step: int
    phase: str  # the driver: "grpo", "sft", "dpo"
    epoch: int = 0
    data_position: Mapping[str, Any] = field(default_factory=dict)  # what the loader needs to go on; JSON
    counters: Mapping[str, float] = field(default_factory=dict)  # totals since step 0, such as num_tokens
    metrics: Mapping[str, float | None] = field(default_factory=dict)  # "train:reward", "val:accuracy"
    model_source: str = ""  # where the base weights came from
    base_digest: str | None = None  # models/source.py; None where they are not in safetensors files
    spec: Mapping[str, Any] | None = None  # of the adapter; None where all weights are trained
    initial_adapter: Mapping[str, str] | None = None  # policy.adapter.init_from, as it was found
    data_digests: Mapping[str, str] = field(default_factory=dict)  # of the rows as tokenised, by a dataset's key
    reward_digests: Mapping[str, str] = field(default_factory=dict)  # of the user's files that score, by key
    clock: str | None = None  # at which the chat template's clock stands; None where it reads none
    train_mb_tokens: Mapping[str, Any] | None = None  # what `auto` was found to be, on what; None where it was not
    seeds: Mapping[str, int] = field(default_factory=dict)  # by dotted key; filled in when saved
    phase_begin: PhaseBegin | None = None  # None where the run has no phases
    reason: SaveReason = "period"
    has_optimizer: bool = True
    versions: Mapping[str, str] = field(default_factory=package_versions)
    saved_at: str = ""
    format_version: int = FORMAT_VERSION

    @property
    def begin(self) -> PhaseBegin:
        """Where the phase of the step began; a run without phases is one phase, from step 0."""
        return self.phase_begin or WITHOUT_PHASES


def write_records(directory: Path, info: TrainingInfo, config: Mapping[str, Any], *, has_optimizer: bool) -> None:
    """Write both files. `config` is the resolved configuration as plain data."""
    record = asdict(info)
    record["seeds"] = _seeds(config)
    record["has_optimizer"] = has_optimizer
    record["saved_at"] = info.saved_at or datetime.now(UTC).isoformat(timespec="seconds")
    record["metrics"] = {name: _finite(value) for name, value in info.metrics.items()}
    (directory / INFO_FILE).write_text(_as_text(record), encoding="utf-8")
    config_text = yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True, width=110)
    (directory / CONFIG_FILE).write_text(config_text, encoding="utf-8")


def add_to_metrics(directory: Path, metrics: Mapping[str, float | None]) -> None:
    """Add to the metrics of training_info.json, in a step that is being written."""
    record = read_json_file(directory, INFO_FILE)
    record["metrics"] |= {name: _finite(value) for name, value in metrics.items()}
    replace_text(directory / INFO_FILE, _as_text(record))


def _as_text(record: Mapping[str, Any]) -> str:
    return json.dumps(record, indent=2, allow_nan=False) + "\n"


def read_info(directory: Path) -> TrainingInfo:
    """training_info.json of a step. DamagedError where it is missing or damaged, ValueError for another format."""
    record = read_json_file(directory, INFO_FILE)
    if record.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{directory / INFO_FILE}: has format {record.get('format_version')!r}, and this version reads "
            f"{FORMAT_VERSION}. Use the version that wrote it, or start with checkpointing.load_path=none."
        )
    try:
        if record.get("phase_begin") is not None:
            record["phase_begin"] = PhaseBegin(**record["phase_begin"])
        return TrainingInfo(**record)
    except TypeError as error:
        raise DamagedError(directory, INFO_FILE, f"does not have the fields of a checkpoint ({error})") from error


def records_step(directory: Path, number: int | None = None) -> bool:
    """Whether this product wrote a directory as a step, as this one where a number is given. Either record says so,
    since the other may be damaged."""
    with contextlib.suppress(DamagedError):
        record = read_json_file(directory, INFO_FILE)
        if "format_version" in record:  # NeMo RL has a file of this name too
            return number is None or record.get("step") == number
    with contextlib.suppress(DamagedError):
        return INFO_FILE in read_json_file(directory, CHECKSUMS_FILE)
    return False


def read_config(directory: Path) -> dict[str, Any]:
    """config.yaml of a step or of a log directory."""
    return yaml.safe_load((directory / CONFIG_FILE).read_text(encoding="utf-8"))


def step_of_adapter(directory: Path) -> Path | None:
    """The step that an adapter's directory is part of; None for an adapter that is no checkpoint of ours."""
    step = directory.parent.parent
    return step if (step / INFO_FILE).is_file() else None


def config_differences(
    saved: Mapping[str, Any], current: Mapping[str, Any], schema: type[BaseModel] | None = None
) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (saved value, current value), for each key that a continued run must not change.

    With `schema`, a key that is newer than the saved configuration has its default there. Adapters are compared as
    LoraSpecs, and a difference has the key of the block in force; where a policy cannot be read, as plain keys.
    """
    old, new = plain(saved), plain(current)
    if schema is not None:
        # where it has a key or a value that this version refuses, that is the difference to show
        with contextlib.suppress(ValidationError):
            known, _, _ = take_out(schema, {key: value for key, value in old.items() if key != SET_BY})
            values = schema.model_validate(known)
            old |= values.model_dump(mode="json", by_alias=True)
    written_now = layers_from_record(new.get(SET_BY, []), "the configuration")
    found = differences(effective_values(old, written_now), effective_values(new, written_now))
    is_for_evaluations = _for_evaluations(old, new)
    kept = {
        key: values
        for key, values in found.items()
        if not is_for_evaluations(key) and not all(_is_free(key, value) for value in values)
    }
    before, now = _policy_of(old), _policy_of(new)
    if before is None or now is None:
        return kept
    return {key: values for key, values in kept.items() if not _is_adapters(key)} | _adapter_differences(before, now)


def _for_evaluations(old: Mapping[str, Any], new: Mapping[str, Any]) -> Callable[[str], bool]:
    """Whether a key has to do with evaluations alone: what the trained algorithm neither samples nor scores by."""
    evaluated, trained = set[str](), set[str]()
    for tree in (old, new):
        data = tree.get("data") or {}
        evaluated |= _environments([entry["data"] for entry in tree.get("evaluate") or []])
        trained |= _environments([data.get("train"), data.get("validation")])
    free = {f"env.{name}" for name in evaluated - trained}
    if "sft" in new or "dpo" in new:
        free |= {*_OF_EVALUATIONS}
    return lambda key: any(f"{key}.".startswith(f"{prefix}.") for prefix in free)


def _environments(datasets: Sequence[Any]) -> set[str]:
    """Those that score the rows of blocks under `data`, each a dataset, a list of them or None."""
    sections = [section for block in datasets for section in (block if isinstance(block, list) else [block or {}])]
    return {section["env_name"] for section in sections if section.get("env_name")}


def _policy_of(tree: Mapping[str, Any]) -> PolicyConfig | None:
    """`policy` of plain data; None where there is none, or this version refuses it."""
    known, _, _ = take_out(GrpoMaster, {"policy": tree.get("policy")})
    try:
        return PolicyConfig.model_validate(known["policy"])
    except ValidationError:
        return None


def _is_adapters(key: str) -> bool:
    """Whether a dotted key is a LoRA block, or one of its keys."""
    return any(f"{key}.".startswith(f"{block.KEY}.") for block in (UnifiedLora, LoraCfg, PeftCfg))


def _adapter_differences(before: PolicyConfig, now: PolicyConfig) -> dict[str, tuple[Any, Any]]:
    """In what the adapters of two policies differ, by the keys of the block that describes the later one."""
    old, new = lora_spec_from_policy(before), lora_spec_from_policy(now)
    if old is None or new is None:
        key = f"{lora_block_key(before if new is None else now)}.enabled"
        return {} if old is new else {key: (old is not None, new is not None)}
    return {
        lora_field_key(now, name): (plain(getattr(old, name)), plain(getattr(new, name)))
        for name in (item.name for item in fields(LoraSpec))
        if name not in _NOT_COMPARED and getattr(old, name) != getattr(new, name)
    }


def _is_free(key: str, value: Any) -> bool:
    """Whether a key may differ in this value; a section may where all of its keys may."""
    if value is ABSENT or re.sub(r"^env\.[^.]+", "env.NAME", key) in FREE_KEYS or key.split(".", 1)[0] in FREE_SECTIONS:
        return True
    return isinstance(value, dict) and all(_is_free(f"{key}.{name}", item) for name, item in value.items())


def plain(value: Any) -> Any:
    """JSON's own types, so that a configuration equals what was written and read again."""
    return to_jsonable_python(value, fallback=str)


def _seeds(value: Any, prefix: str = "") -> dict[str, int]:
    """Dotted key -> value, of every key called seed."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found: dict[str, int] = {}
    for key, item in items:
        found |= {f"{prefix}seed": item} if key == "seed" else _seeds(item, f"{prefix}{key}.")
    return found


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
