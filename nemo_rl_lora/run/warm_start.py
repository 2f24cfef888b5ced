"""The adapter that a run starts from, checked before a weight of the base is loaded.

Contract: it has exactly the modules, ranks, scales and shapes of the run's adapter, finite values, and was made for
this base: by the digest that a checkpoint of ours records, else by the name in its adapter_config.json. Whatever it is
refused for is said under `policy.adapter.init_from`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_rl_lora.checkpoints.durable_files import read_json_file, refuse_damaged
from nemo_rl_lora.checkpoints.record import INFO_FILE, step_of_adapter
from nemo_rl_lora.config.lora import lora_block_key
from nemo_rl_lora.config.policy import PolicyConfig
from nemo_rl_lora.lora.files import ADAPTER_CONFIG_FILE, ADAPTER_FILE, adapter_tensor_name, read_adapter
from nemo_rl_lora.lora.fit import adapter_directory, fit_adapter, refuse_not_finite
from nemo_rl_lora.lora.names import last_component, megatron_name
from nemo_rl_lora.lora.spec import LoraSpec
from nemo_rl_lora.lora.targets import AdaptedModule, resolve_trained_targets
from nemo_rl_lora.models.shapes import read_model_shapes
from nemo_rl_lora.models.source import ModelSource
from nemo_rl_lora.tensors import tensors_digest

_KEY = "policy.adapter.init_from"


@dataclass(frozen=True, slots=True, kw_only=True)
class InitialAdapter:
    """An adapter that fits the run. `digest` is that of its tensors."""

    directory: Path
    digest: str
    num_modules: int
    num_zero: int  # of those modules, whose B is zero

    @property
    def record(self) -> dict[str, str]:
        """What a checkpoint says of it."""
        return {"directory": str(self.directory.absolute()), "digest": self.digest}

    def __str__(self) -> str:
        zero = f"; B is zero in {self.num_zero} of them" if self.num_zero else ""
        return f"{self.num_modules} modules of {self.directory} (digest {self.digest[:12]}{zero})"


def check_initial_adapter(
    policy: PolicyConfig, spec: LoraSpec, source: ModelSource, base_digest: str | None
) -> InitialAdapter | None:
    """What `policy.adapter.init_from` names; None where it names nothing. ValueError where it cannot start this run.

    `base_digest` is that of the base's weights; None where they were not read, and then digests are not compared.
    """
    if policy.adapter.init_from is None:
        return None
    try:
        return _checked(Path(policy.adapter.init_from).expanduser(), policy, spec, source, base_digest)
    except ValueError as error:
        raise ValueError(f"{_KEY}={policy.adapter.init_from!r}: {error}") from error


def _checked(
    path: Path, policy: PolicyConfig, spec: LoraSpec, source: ModelSource, base_digest: str | None
) -> InitialAdapter:
    directory = adapter_directory(path)
    step = step_of_adapter(directory)
    if step is not None:
        files = [step / INFO_FILE, directory / ADAPTER_CONFIG_FILE, directory / ADAPTER_FILE]
        refuse_damaged(step, files, "Start from another step.")
    tensors, peft_config = read_adapter(directory)
    shapes = read_model_shapes(source.path, dict(policy.hf_config_overrides))
    fits = {"tied_head": shapes.has_tied_head, "model_name": policy.model_name}
    _, adapted = fit_adapter(tensors, peft_config, shapes.linears, **fits)
    recorded = None if step is None else read_json_file(step, INFO_FILE).get("base_digest")
    _refuse_other_base(policy, source, peft_config, recorded, base_digest)
    key = lora_block_key(policy)
    wanted = resolve_trained_targets(
        spec, shapes.linears, tied_head=shapes.has_tied_head, model_label=policy.model_name, config_key=key
    )
    _refuse_other_modules(adapted, wanted, directory, key)
    refuse_not_finite(tensors, "Start from an earlier step.")
    if spec.fused == "shared":
        _refuse_several_a(tensors, wanted, key)
    zero = [m for m in adapted if not tensors[adapter_tensor_name(m.name, "B")].any()]
    digest = tensors_digest(tensors, whole=True)
    return InitialAdapter(directory=directory, digest=digest, num_modules=len(adapted), num_zero=len(zero))


def _refuse_other_base(
    policy: PolicyConfig,
    source: ModelSource,
    peft_config: Mapping[str, Any],
    recorded: str | None,
    base_digest: str | None,
) -> None:
    if recorded is not None and base_digest is not None:
        if recorded != base_digest:
            raise ValueError(
                f"it was trained on other weights than those of policy.model_name={policy.model_name!r} (digest "
                f"{recorded[:12]}, and those have {base_digest[:12]}). Name the base that it was trained on."
            )
        return
    made_for = peft_config.get("base_model_name_or_path")
    if not made_for or source.is_named(made_for):
        return
    raise ValueError(
        f"its adapter_config.json says that it was made for {made_for!r}, and policy.model_name={policy.model_name!r}. "
        "Train on that base; or, where the two are the same weights, correct base_model_name_or_path there."
    )


def _refuse_other_modules(
    found: Sequence[AdaptedModule], wanted: Sequence[AdaptedModule], directory: Path, key: str
) -> None:
    """The LoRA block says what is trained: ValueError where the adapter has other modules, ranks or scales."""
    there, asked = ({module.name: module for module in modules} for modules in (found, wanted))
    remedy = f"`tools/config_cli.py translate {directory}/adapter_config.json` prints the block that fits it."
    for label, names in (("lacks", asked.keys() - there.keys()), ("has", there.keys() - asked.keys())):
        if names:
            types = ", ".join(sorted({last_component(name) for name in names}))
            other = "trains" if label == "lacks" else "does not train"
            raise ValueError(
                f"it {label} {len(names)} modules ({types}; first {min(names)}) that {key} {other}. {remedy}"
            )
    for name, module in asked.items():
        for field in ("dim", "scale"):
            have, want = getattr(there[name], field), getattr(module, field)
            if have != want:
                raise ValueError(f"it has {field} {have:g} for {name}, and {key} asks for {want:g}. {remedy}")


def _refuse_several_a(tensors: Mapping[str, Tensor], adapted: Sequence[AdaptedModule], key: str) -> None:
    """One A for a fused layer can only start from one A."""
    first: dict[str | None, str] = {}
    for module in adapted:
        other = first.setdefault(megatron_name(module.name), module.name)
        if not torch.equal(*(tensors[adapter_tensor_name(name, "A")] for name in (other, module.name))):
            raise ValueError(
                f"it has an A each for {other} and {module.name}, and {key}.target_modules shares one between them. "
                "Target the Hugging Face names (q_proj, k_proj, v_proj, gate_proj, up_proj)."
            )
