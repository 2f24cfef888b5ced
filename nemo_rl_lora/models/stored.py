"""Whether a directory's weights are those of the model that its config.json describes: names, shapes, finite numbers.

Contract: transformers fills what a file lacks with random numbers and drops what it does not know; here both are
refused by name. `check_weights` reads headers alone and is called before anything is loaded, and again by each loader;
`matched` does the same for tensors that a loader has found. Which tensor of the files is which of the model,
transformers says: its renamings, the tensors it makes from several of the files (experts, which it stacks), what it
ties, and what it lets through. Of quantized weights only the modules are compared.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from nemo_rl_lora.lora.files import ADAPTER_CONFIG_FILE
from nemo_rl_lora.tensors import StoredTensor, absent_tensors, stored_tensors, tensors_digest

NUM_NAMES_SHOWN = 5
MODEL_KEY = "policy.model_name"
PICKLED_FILE, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"

AnyTensor = StoredTensor | Tensor
Shape = tuple[int, ...]
T = TypeVar("T")


class BadWeightsError(ValueError):
    """Weights that the user has to replace. The text is complete."""


def check_weights(
    path: Path,
    reference: PreTrainedModel,
    *,
    label: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    partial: bool = False,
) -> int:
    """The number of a directory's tensors. ValueError unless they are those of this model of the meta device, and no
    adapter lies beside them.

    `label` is how messages name the directory, `overrides` what was changed in its config. `partial`: files that are
    not there are no fault, and what an index says of them is compared.
    """
    label = label or f"{MODEL_KEY}={str(path)!r}"
    try:
        found: dict[str, AnyTensor | None] = dict(
            stored_tensors(path, partial=partial) or pickled_tensors(path, partial=partial)
        )
        if partial:
            found |= dict.fromkeys(absent_tensors(path))
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from error
    if not found and not partial:
        raise ValueError(
            f"{label}: holds no model.safetensors, no {PICKLED_FILE} and no index of such files. Load the model with "
            "transformers and save it again with save_pretrained."
        )
    if found and (path / ADAPTER_CONFIG_FILE).is_file():
        raise ValueError(
            f"{label}: holds an {ADAPTER_CONFIG_FILE} besides whole weights, and where transformers loads them it puts "
            "that adapter in. Move the adapter to another directory; policy.adapter.init_from trains on from one."
        )
    if found and getattr(reference.config, "quantization_config", None) is not None:
        _check_modules(reference, found, label, overrides)
    elif found:
        one_to_one, made_from = _under_model_names(reference, found)
        _compare(reference, one_to_one, made_from, label, overrides)
        refuse_untied(label, reference, one_to_one)
    return len(found)


def one_to_one_tensors(path: Path, reference: PreTrainedModel) -> dict[str, StoredTensor] | None:
    """The tensors of safetensors files under the model's names, or under what comes closest; None where transformers
    makes tensors of the model from several of the files, or in another way."""
    stored = stored_tensors(path)
    if not stored or getattr(reference.config, "quantization_config", None) is not None:
        return None
    one_to_one, made_from = _under_model_names(reference, stored)
    return None if made_from else one_to_one


def matched(path: Path, reference: PreTrainedModel, found: Mapping[str, AnyTensor]) -> dict[str, StoredTensor | Tensor]:
    """Those of the tensors that the model has, a tied one once, under the name of what it is tied to.

    ValueError unless their names and shapes are the model's. Let through: what transformers lets through, and a tied
    head that was written all the same.
    """
    label = f"{MODEL_KEY}={str(path)!r}"
    refuse_untied(label, reference, found)
    _compare(reference, found, {}, label, None)
    found = _tied_once(reference, found)
    return {name: found[name] for name in reference.state_dict() if name in found}


def refuse_other_tensors(
    label: str, architecture: str, kinds: Mapping[str, Collection[str]], overridden: str = ""
) -> None:
    """ValueError where there are tensors of a kind ("missing", "unexpected", ...), with the first names of each."""
    parts = [f"{len(names)} {kind}: {first_names(names)}" for kind, names in kinds.items() if names]
    if parts:
        remedy = f"Remove what {overridden} changes in its shape, or use" if overridden else "Use"
        described = f"config.json with {overridden} describes" if overridden else "config.json describes"
        raise ValueError(
            f"{label}: its tensors are not those of the {architecture} that its {described} ({'; '.join(parts)}). "
            f"{remedy} files that belong together, as transformers' save_pretrained writes."
        )


def first_names(names: Iterable[str]) -> str:
    """The first names of many, in their order."""
    names = sorted(names)
    return ", ".join(names[:NUM_NAMES_SHOWN]) + ", ..." * (len(names) > NUM_NAMES_SHOWN)


def ties(reference: PreTrainedModel) -> dict[str, str]:
    """Each tied tensor of the model, and the one that it is."""
    return dict(reference.all_tied_weights_keys)


def num_not_finite(tensor: Tensor) -> int:
    """How many numbers of a tensor are NaN or infinite; in one pass, and without a copy where there are none."""
    if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.is_meta:
        return 0
    if tensor.element_size() == 1:  # torch compares none of eight bits
        return num_not_finite(tensor.to(torch.bfloat16))
    least, greatest = torch.aminmax(tensor.detach())  # NaN goes through
    if bool(least.isfinite() & greatest.isfinite()):
        return 0
    return int((~tensor.isfinite()).sum())


def refuse_not_finite(label: str, counts: Mapping[str, int]) -> None:
    """BadWeightsError where a tensor has numbers that are not finite."""
    broken = [f"{name}: {count:,}" for name, count in counts.items() if count]
    if broken:
        raise BadWeightsError(
            f"{label}: {len(broken)} of its tensors hold NaN or infinity ({first_names(broken)}). Copy or download the "
            "model again."
        )


def refuse_untied(label: str, reference: PreTrainedModel, found: Mapping[str, AnyTensor | None]) -> None:
    """ValueError where two tensors that the model ties have other bytes."""
    for name, source in ties(reference).items():
        pair = [found.get(each) for each in (name, source)]
        if any(tensor is None or (isinstance(tensor, Tensor) and tensor.is_meta) for tensor in pair):
            continue
        if isinstance(pair[0], Tensor) and isinstance(pair[1], Tensor) and pair[0].data_ptr() == pair[1].data_ptr():
            continue
        first, second = (tensors_digest({"": tensor}, whole=True) for tensor in pair if tensor is not None)
        if first != second:
            raise ValueError(
                f"{label}: its config.json ties {name} to {source}, and its files hold two that differ. Set "
                "tie_word_embeddings to false in config.json, or remove the one that is not meant."
            )


def pickled_tensors(path: Path, *, partial: bool = False) -> dict[str, Tensor]:
    """The tensors of pytorch_model.bin, or of the files of its index, on the meta device; empty where there is none,
    or with `partial` where one is not there. ValueError where one cannot be read.
    """
    files, found = [path / PICKLED_FILE], dict[str, Tensor]()
    file = path / PICKLED_INDEX
    try:
        if not files[0].is_file():
            if not file.is_file():
                return {}
            files = [path / name for name in sorted(set(json.loads(file.read_text())["weight_map"].values()))]
        if partial and not all(each.is_file() for each in files):
            return {}
        for file in files:
            found |= torch.load(file, map_location="meta", weights_only=True)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{file}: cannot be read ({reason}). Copy or download it again.") from error
    return found


# Names


def _under_model_names(
    reference: PreTrainedModel, stored: Mapping[str, T]
) -> tuple[dict[str, T], dict[str, dict[str, T]]]:
    """The tensors of files that are one of the model each, under its names or what comes closest; and for each of the
    model's that is made from others, those, under the names that save_pretrained gives them."""
    mapping, expected = get_model_conversion_mapping(reference), reference.state_dict()
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix = reference.base_model_prefix
    one_to_one: dict[str, T] = {}
    made_from: dict[str, dict[str, T]] = {}
    for name in sorted(stored, key=dot_natural_key):  # their order: a renaming may depend on one before
        own, pattern = rename_source_key(name, renamings, converters, prefix, expected)
        if own not in expected and name in expected:
            own, pattern = rename_source_key(name, [], [], prefix, expected)
        if pattern is None or own not in expected:
            one_to_one[own if own not in one_to_one else name] = stored[name]
            continue
        plain = rename_source_key(name, renamings, [], prefix, expected)[0]
        converter = next(entry for entry in converters if pattern in entry.source_patterns)
        first, *others = converter.target_patterns
        made_from.setdefault(own, {})[plain] = stored[name]
        for other in others:  # of these it cannot be said what each is made from
            made_from.setdefault(own.replace(first, other, 1), {})
    return one_to_one, made_from


def _compare(
    reference: PreTrainedModel,
    found: Mapping[str, AnyTensor | None],
    made_from: Mapping[str, Mapping[str, AnyTensor | None]],
    label: str,
    overrides: Mapping[str, Any] | None,
) -> None:
    """ValueError unless names and shapes are the model's. None is a tensor of which only the name is known."""
    expected = {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()}
    present = _tied_once(reference, found)
    forms = _forms_in_files(reference, [name for name, parts in made_from.items() if parts]) if made_from else {}
    for name, parts in made_from.items():
        expected.pop(name, None)
        if name in forms:
            expected |= forms[name]
            present |= parts
    computed = {name for name, _ in reference.named_buffers()}  # rotary frequencies, causal masks: whatever files hold
    unexpected = _without(set(present) - set(expected) - computed, _may_be_unexpected(reference))
    missing = _without(
        set(expected) - set(present) - set(ties(reference)), reference._keys_to_ignore_on_load_missing or ()
    )
    shapes = {
        f"{name} {tuple(tensor.shape)} instead of {expected[name]}"
        for name, tensor in present.items()
        if tensor is not None and name in expected and tuple(tensor.shape) != expected[name]
    }
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    overridden = f"policy.hf_config_overrides={dict(overrides)!r}" if overrides else ""
    refuse_other_tensors(label, type(reference).__name__, kinds, overridden)


def _tied_once(reference: PreTrainedModel, found: Mapping[str, T]) -> dict[str, T]:
    """The tensors with a tied one once, under the name of what it is tied to."""
    found = dict(found)
    for name, source in ties(reference).items():
        if name in found:
            found.setdefault(source, found.pop(name))
    return found


def _forms_in_files(reference: PreTrainedModel, names: Collection[str]) -> dict[str, dict[str, Shape]]:
    """For each tensor that is made from several: those that save_pretrained writes for it, by name and shape. Without
    those that it makes from several of the model's too, or cannot make."""
    mapping = get_model_conversion_mapping(reference, add_legacy=False)
    mapping = [entry for entry in mapping if not isinstance(entry, PrefixChange)]  # as save_pretrained has it
    several = [
        target
        for entry in mapping
        if isinstance(entry, WeightConverter) and len(entry.target_patterns) > 1
        for target in entry.target_patterns
    ]
    renamings = [entry for entry in get_model_conversion_mapping(reference) if isinstance(entry, WeightRenaming)]
    prefix, expected = reference.base_model_prefix, reference.state_dict()
    vars(reference)["_weight_conversions"] = mapping or None
    forms: dict[str, dict[str, Shape]] = {}
    for name in names:
        if any(target in name for target in several):
            continue
        with contextlib.suppress(NotImplementedError):
            written = revert_weight_conversion(reference, {name: expected[name]})
            forms[name] = {
                rename_source_key(each, renamings, [], prefix, expected)[0]: tuple(tensor.shape)
                for each, tensor in written.items()
            }
    return forms


def _check_modules(
    reference: PreTrainedModel, found: Collection[str], label: str, overrides: Mapping[str, Any] | None
) -> None:
    """ValueError unless each module with weights has some in the files, and each of theirs is of such a module."""
    tied = ties(reference)
    renamings = [entry for entry in get_model_conversion_mapping(reference) if isinstance(entry, WeightRenaming)]
    expected = reference.state_dict()
    names = [rename_source_key(name, renamings, [], reference.base_model_prefix, expected)[0] for name in found]
    owners = {name.rpartition(".")[0] for name in expected}
    prefixes = {name[:stop] for name in names for stop in _dots(name)}
    missing = {name for name in expected if name not in tied and name.rpartition(".")[0] not in prefixes}
    unexpected = {name for name in names if owners.isdisjoint(name[:stop] for stop in _dots(name))}
    unexpected = _without(unexpected, _may_be_unexpected(reference))
    overridden = f"policy.hf_config_overrides={dict(overrides)!r}" if overrides else ""
    kinds = {"missing": missing, "unexpected": unexpected}
    refuse_other_tensors(label, type(reference).__name__, kinds, overridden)


def _dots(name: str) -> Iterator[int]:
    return (match.start() for match in re.finditer(r"\.", name))


def _may_be_unexpected(reference: PreTrainedModel) -> list[str]:
    """Patterns of names that files may have and the model has not, as transformers lets them through."""
    patterns = list(reference._keys_to_ignore_on_load_unexpected or ())
    buffers = [name for name, _ in reference.named_buffers()]
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.append(r"rotary_emb\.inv_freq")  # of each layer, in old files
    if any(name.endswith("position_ids") for name in buffers):
        patterns.append(r"(^|\.)position_ids$")
    return patterns


def _without(names: Collection[str], patterns: Collection[str]) -> set[str]:
    return {name for name in names if not any(re.search(pattern, name) for pattern in patterns)}
