"""An adapter and its optimizer moments on disk: the format that every backend writes and stock PEFT reads.

Contract: names are `base_model.model.<Hugging Face module>.lora_A.weight` [dim, in] and `...lora_B.weight`
[out, dim]; every tensor is fp32. The moments of Adam stand beside them as `<name>.exp_avg` and `.exp_avg_sq`,
with the optimizer's step in the file's metadata. Reading is strict: a name too many or too few is an error.

Files of a directory that somebody else may have made are files of that directory: a link out of it is refused.

It does not decide where the directories are, does not write atomically (checkpoints/ and export/ rename
whole directories) and knows nothing of a model.
"""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
PICKLED_FILE = "adapter_model.bin"
README_FILE = "README.md"
ADAPTER_DIRECTORY = "adapter"
REFERENCE_DIRECTORY = "reference_adapter"  # the initial adapter, where it is the reference
MOMENTS_FILE = "adapter.safetensors"
FIRST_MOMENT = ".exp_avg"
SECOND_MOMENT = ".exp_avg_sq"
NUM_NAMES_SHOWN = 5

_CANONICAL = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


def adapter_tensor_name(module: str, side: str) -> str:
    """The canonical name of a module's A or B. `side` is "A" or "B"."""
    return f"base_model.model.{module}.lora_{side}.weight"


def module_of(name: str) -> str:
    """The Hugging Face module that a canonical tensor name belongs to. ValueError for any other name."""
    match = _CANONICAL.fullmatch(name)
    if match is None:
        raise ValueError(
            f"adapter tensor {name!r}: is not of the form base_model.model.<module>.lora_A.weight or "
            "...lora_B.weight. Only plain LoRA adapters are supported (no DoRA, embeddings or modules_to_save)."
        )
    return match["module"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterBase:
    """The model that an adapter was trained on, for whoever uses the adapter."""

    name: str  # by which other programs find it: a directory's absolute path, or a name of the hub
    source: str = ""  # where the weights came from
    digest: str | None = None  # of the weights; None where it is not known

    def readme(self) -> str:
        """What the page beside the adapter says."""
        lines = ["# LoRA adapter", "", f"Trained on `{self.name}`.", ""]
        lines += [f"- Source of those weights: {self.source}"] if self.source else []
        lines += [f"- Digest of those weights: `{self.digest}`"] if self.digest else []
        return "\n".join(
            [
                *lines,
                "- Other weights of a like name, such as a copy that was quantised in between, are another base.",
                "",
                "```python",
                "from peft import PeftModel",
                "from transformers import AutoModelForCausalLM",
                "",
                f"base = AutoModelForCausalLM.from_pretrained({json.dumps(self.name)})",
                'model = PeftModel.from_pretrained(base, "the directory of this file")',
                "```",
                "",
            ]
        )


def refuse_links(root: Path, paths: Iterable[Path]) -> None:
    """ValueError where one of these paths below `root` is there and no file of `root` itself.

    That is a link to elsewhere, or no regular file. Links of the Hugging Face cache into its own blobs are files of it.
    """
    inside = Path(os.path.realpath(root))
    repository = next((p for p in inside.parents if p.name.startswith("models--")), None)
    for path in paths:
        if not os.path.lexists(path):
            continue
        real = Path(os.path.realpath(path))
        in_cache = repository is not None and real.is_relative_to(repository / "blobs")
        if real != inside / path.relative_to(root) and not in_cache:
            raise ValueError(
                f"{path}: is a link to {real}, and no file of {root}. Put a copy in its place, if it belongs there."
            )
        if not path.is_file():
            raise ValueError(f"{path}: is no regular file. Remove it, or put the file in its place.")


def write_adapter(
    directory: Path, tensors: Mapping[str, Tensor], peft_config: Mapping[str, Any], base: AdapterBase | None = None
) -> None:
    """Write adapter_config.json and adapter_model.safetensors into a directory, made where it is missing.

    With `base` a README.md says what the adapter was trained on. Tensors are brought to the CPU and to fp32, each with
    its own storage. ValueError for a name that is not canonical and for an A without its B.
    """
    _check_pairs(tensors, "the adapter to write")
    directory.mkdir(parents=True, exist_ok=True)
    config_text = json.dumps(dict(peft_config), indent=2, sort_keys=True, default=sorted)  # PEFT has sets of names
    (directory / ADAPTER_CONFIG_FILE).write_text(config_text + "\n", encoding="utf-8")
    _write_tensors(directory / ADAPTER_FILE, tensors, {})
    if base is not None:
        (directory / README_FILE).write_text(base.readme(), encoding="utf-8")


def read_adapter(
    directory: Path, *, expected: Collection[str] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (CPU, fp32) and the PEFT config of an adapter directory, of safetensors or of torch's pickle.

    `expected` holds the names that must be there, all of them and no other. ValueError names the file that is
    missing or damaged, or the first names that differ.
    """
    config = _read_json(directory / ADAPTER_CONFIG_FILE)
    path = directory / ADAPTER_FILE
    if not path.is_file() and (directory / PICKLED_FILE).is_file():
        path = directory / PICKLED_FILE
        tensors = _read_pickled(path)
    else:
        tensors, _ = _read_tensors(path)
    _check_pairs(tensors, str(path))
    if expected is not None:
        check_names(str(path), expected=expected, found=tensors)
    return tensors, config


def write_moments(
    directory: Path,
    moments: Mapping[str, tuple[Tensor, Tensor]],
    step: int,
    *,
    aliases: Mapping[str, str] | None = None,
) -> None:
    """Write adapter.safetensors: canonical name -> (exp_avg, exp_avg_sq), and the optimizer's step.

    `aliases` maps a name to the name whose moments it shares (one A under several modules); a shared pair is
    stored once.
    """
    aliases = dict(aliases or {})
    for alias, owner in aliases.items():
        if alias in moments or owner not in moments:
            raise ValueError(f"moments of {alias!r}: must be stored only under {owner!r}, which it shares")
    flat: dict[str, Tensor] = {}
    for name, (first, second) in moments.items():
        flat[name + FIRST_MOMENT] = first
        flat[name + SECOND_MOMENT] = second
    directory.mkdir(parents=True, exist_ok=True)
    metadata = {"step": str(step), "aliases": json.dumps(aliases, sort_keys=True)}
    _write_tensors(directory / MOMENTS_FILE, flat, metadata)


def read_moments(
    directory: Path, *, expected: Collection[str] | None = None, aliases: Mapping[str, str] | None = None
) -> tuple[dict[str, tuple[Tensor, Tensor]], int]:
    """What `write_moments` wrote: name -> (exp_avg, exp_avg_sq), CPU and fp32, and the optimizer's step.

    An alias is returned under its own name with the tensors of its owner. `expected` as in `read_adapter`. `aliases`
    are those of this run: others are refused, since moments of one shared A are not those of an A each.
    """
    path = directory / MOMENTS_FILE
    tensors, metadata = _read_tensors(path)
    try:
        step = int(metadata["step"])
        shared: dict[str, str] = json.loads(metadata.get("aliases", "{}"))
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: has no readable optimizer step. {_WAY_OUT}") from error
    names = [name.removesuffix(FIRST_MOMENT) for name in tensors if name.endswith(FIRST_MOMENT)]
    pairs = [name + suffix for name in names for suffix in (FIRST_MOMENT, SECOND_MOMENT)]
    check_names(str(path), expected=pairs, found=tensors)
    moments = {name: (tensors[name + FIRST_MOMENT], tensors[name + SECOND_MOMENT]) for name in names}
    moments |= {alias: moments[owner] for alias, owner in shared.items()}
    if aliases is not None and dict(aliases) != shared:
        _refuse_other_sharing(path, aliases, shared)
    if expected is not None:
        check_names(str(path), expected=expected, found=moments)
    return moments, step


def _refuse_other_sharing(path: Path, aliases: Mapping[str, str], shared: Mapping[str, str]) -> None:
    first = next(alias for alias in [*shared, *aliases] if shared.get(alias) != aliases.get(alias))
    has, trains = ("one A shared", "an A each") if first in shared else ("an A each", "one A shared")
    modules = f"{module_of({**aliases, **shared}[first])} and {module_of(first)}"
    raise ValueError(
        f"{path}: holds moments of {has} by {modules}, and this run trains {trains}, so they cannot be taken over. "
        "Go on with the targets of that run (linear_qkv and linear_fc1 share one A), or start a new run from "
        "its weights, which are in adapter/ in the same form either way."
    )


def check_names(where: str, *, expected: Collection[str], found: Collection[str]) -> None:
    """ValueError with the first five missing and the first five unexpected names, unless both sets are equal."""
    missing = sorted(set(expected) - set(found))
    unexpected = sorted(set(found) - set(expected))
    if not missing and not unexpected:
        return
    parts = [
        f"{len(names)} {label}: {', '.join(names[:NUM_NAMES_SHOWN])}"
        + (", ..." if len(names) > NUM_NAMES_SHOWN else "")
        for label, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    raise ValueError(
        f"{where}: its tensors are not those of this run ({'; '.join(parts)}). "
        "Use the LoRA targets that it was written with, or another adapter."
    )


def check_shapes(where: Path, *, expected: Mapping[str, Sequence[int]], found: Mapping[str, Tensor]) -> None:
    """ValueError naming the first tensor of `found` whose shape is another than expected."""
    for name, shape in expected.items():
        if tuple(found[name].shape) != tuple(shape):
            raise ValueError(
                f"{where}: {name} has shape {tuple(found[name].shape)}, but this run trains {tuple(shape)}. "
                "Use the dim of the checkpoint or start a new run."
            )


_WAY_OUT = "The file is damaged or not complete: use another checkpoint, or write it again."


def _check_pairs(tensors: Mapping[str, Tensor], where: str) -> None:
    modules = {module_of(name) for name in tensors}
    pairs = [adapter_tensor_name(module, side) for module in modules for side in "AB"]
    check_names(where, expected=pairs, found=tensors)
    for module in sorted(modules):
        a, b = (tensors[adapter_tensor_name(module, side)] for side in "AB")
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise ValueError(
                f"{where}: {module} has lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}, "
                "but they must be [dim, in] and [out, dim]. Use an adapter of linear layers."
            )


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    # Through Python's own write: safetensors' save_file hides "no space left" in an error of its own.
    owned = {name: _on_disk(tensor) for name, tensor in sorted(tensors.items())}
    path.write_bytes(safetensors.torch.save(owned, metadata={"format": "pt", **metadata}))


def _on_disk(tensor: Tensor) -> Tensor:
    # A copy each: one A under several names shares its storage, and safetensors refuses that.
    return tensor.detach().to(device="cpu", dtype=torch.float32, copy=True).contiguous()


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise ValueError(f"{path}: is missing. {_WAY_OUT}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            # A copy each: the mapped file may be removed while the run still holds its tensors.
            tensors = {name: file.get_tensor(name).to(torch.float32, copy=True) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: cannot be read ({error}). {_WAY_OUT}") from error
    return tensors, metadata


def _read_pickled(path: Path) -> dict[str, Tensor]:
    """PEFT's older format, by torch's loader that builds tensors and runs nothing."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        return {str(name): tensor.to(torch.float32, copy=True) for name, tensor in content.items()}
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{path}: holds something other than tensors, or is damaged ({reason}). It was not read further: use an "
            f"adapter saved as {ADAPTER_FILE}."
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: is missing. {_WAY_OUT}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error}). {_WAY_OUT}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds no JSON object. {_WAY_OUT}")
    return content
