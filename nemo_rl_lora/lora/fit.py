"""An adapter from disk, on a base that may not be the one that it was made for.

Contract: finds the files below the directory that a person names, and says which modules of a given base the adapter
changes, or why it does not fit. Raises ValueError without the configuration's key: the caller knows it. Loads no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from nemo_rl_lora.lora.adapter_tensors import SIDES, factor_shape
from nemo_rl_lora.lora.files import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    NUM_NAMES_SHOWN,
    PICKLED_FILE,
    adapter_tensor_name,
    module_of,
    refuse_links,
)
from nemo_rl_lora.lora.names import last_component
from nemo_rl_lora.lora.peft_config import PeftConfig
from nemo_rl_lora.lora.spec import LoraSpec
from nemo_rl_lora.lora.targets import AdaptedModule, LinearModule


def adapter_directory(path: Path) -> Path:
    """The directory with adapter_config.json: this one, or the one in this step's directory.

    Its files are files of `path`: ValueError for links to elsewhere.
    """
    try:
        for directory in (path, path / "policy" / "adapter"):
            if (directory / ADAPTER_CONFIG_FILE).is_file():
                names = (ADAPTER_CONFIG_FILE, ADAPTER_FILE, PICKLED_FILE)
                refuse_links(path, [directory / name for name in names])
                return directory
    except OSError as error:  # a name that is too long, a directory that may not be read
        raise ValueError(f"cannot be looked into ({error.strerror}). Correct the path.") from error
    if not path.is_dir():
        raise ValueError(f"there is no such directory (looked for {path.absolute()}). Correct the path.")
    if (path / "policy" / "weights").is_dir():
        raise ValueError(
            f"holds all weights of a model and no adapter. Evaluate it by itself: "
            f"policy.model_name={path}/policy/weights policy.tokenizer.name={path}/policy/tokenizer."
        )
    if steps := sorted((step.name for step in path.glob("step_*")), key=lambda name: (len(name), name)):
        raise ValueError(f"is the directory of a whole run. Name one of its steps: {', '.join(steps)}.")
    names = ", ".join(sorted(file.name for file in path.iterdir())[:NUM_NAMES_SHOWN])
    raise ValueError(
        f"holds no {ADAPTER_CONFIG_FILE}, only {names or 'nothing'}. Give the directory of a step (step_N), or of an "
        f"adapter that PEFT wrote."
    )


def fit_adapter(
    tensors: Mapping[str, Tensor],
    peft_config: Mapping[str, Any],
    linears: Sequence[LinearModule],
    *,
    tied_head: bool,
    model_name: str,
    model_key: str = "policy.model_name",
) -> tuple[LoraSpec, tuple[AdaptedModule, ...]]:
    """The adapter's spec and the modules that it changes. ValueError where names or shapes are not the base's."""
    read = PeftConfig.read(peft_config)
    adapted = tuple(read.adapted(module) for module in linears if read.reaches(module))
    if not adapted:
        candidates = ", ".join(dict.fromkeys(last_component(module.name) for module in linears))
        raise ValueError(
            f"adapter_config.target_modules={peft_config['target_modules']!r}: matches none of the {len(linears)} "
            f"linear modules of {model_name}. Candidates: {candidates}."
        )
    if tied_head and (head := next((m.name for m in linears if m.is_head and read.reaches(m)), None)):
        raise ValueError(
            f"adapter_config.target_modules={peft_config['target_modules']!r}: matches the output head {head!r}, which "
            "shares its weight with the input embeddings, so an adapter there cannot be merged. Use another adapter."
        )
    mismatch = _mismatch(tensors, adapted)
    if mismatch is not None:
        made_for = peft_config.get("base_model_name_or_path")
        remedy = "Use one whose two files belong together, made for this model."
        if made_for and made_for != model_name:
            remedy = f"It was made for {made_for}: use it on that."
        raise ValueError(f"does not fit {model_key}={model_name!r}: {mismatch}. {remedy}")
    return read.spec(adapted), adapted


def modules_of_tensors(tensors: Mapping[str, Tensor]) -> list[LinearModule]:
    """The linear modules that an adapter's tensors belong to, for where there is no model."""
    return [
        LinearModule(
            name=name,
            in_features=tensors[adapter_tensor_name(name, "A")].shape[1],
            out_features=tensors[adapter_tensor_name(name, "B")].shape[0],
        )
        for name in sorted({module_of(name) for name in tensors})
    ]


def fit_itself(tensors: Mapping[str, Tensor], peft_config: Mapping[str, Any]) -> tuple[AdaptedModule, ...]:
    """The modules that an adapter changes, by its own two files. ValueError where these do not belong together."""
    read = PeftConfig.read(peft_config)
    adapted = tuple(read.adapted(module) for module in modules_of_tensors(tensors) if read.reaches(module))
    if mismatch := _mismatch(tensors, adapted):
        raise ValueError(f"its two files do not belong together: {mismatch}. Use an adapter as it was saved.")
    return adapted


def refuse_not_finite(tensors: Mapping[str, Tensor], remedy: str) -> None:
    """ValueError for the first tensor that holds NaN or infinity."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds values that are not finite. {remedy}")


def _mismatch(tensors: Mapping[str, Tensor], adapted: Sequence[AdaptedModule]) -> str | None:
    """The first thing by which the tensors are not those of the adapted modules, or None."""
    found = {module_of(name) for name in tensors}
    expected = {module.name for module in adapted}
    if unexpected := sorted(found - expected):
        return f"the adapter changes {_some(unexpected)}, which it does not have or adapter_config.json does not target"
    if missing := sorted(expected - found):
        return f"the adapter has no tensors for {_some(missing)}"
    for module in adapted:
        for side in SIDES:
            shape = factor_shape(module, side)
            present = tuple(tensors[adapter_tensor_name(module.name, side)].shape)
            if present != shape:
                return f"lora_{side} of {module.name} is {list(present)}, and {list(shape)} is needed there"
    return None


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} other modules"
