"""Loading a causal language model through nemo-automodel, on CUDA or without it.

Hugging Face's own classes are always used (`force_hf`), so module and tensor names are the canonical ones.
"""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME
from transformers.utils import logging as transformers_logging

from nemo_rl_lora.lora.targets import LinearModule
from nemo_rl_lora.models.stored import (
    MODEL_KEY,
    check_weights,
    num_not_finite,
    refuse_not_finite,
    refuse_untied,
    ties,
)
from nemo_rl_lora.patches.nemo_automodel import loads_without_cuda
from nemo_rl_lora.tensors import MAX_SHARD_BYTES, entry_of, plan_shards, write_index, write_tensors

_OVERRIDES = "policy.hf_config_overrides"


def load_model(path: Path, *, dtype: torch.dtype, config_overrides: dict[str, Any]) -> PreTrainedModel:
    """The model of a Hugging Face directory, in evaluation mode, every weight in `dtype`.

    ValueError unless the directory's weights are those of its config; BadWeightsError where some are not finite.
    """
    from nemo_automodel import NeMoAutoModelForCausalLM

    reference = described_model(path, config_overrides)
    check_weights(path, reference, overrides=config_overrides)
    transformers_logging.disable_progress_bar()
    with loads_without_cuda():
        model = NeMoAutoModelForCausalLM.from_pretrained(
            str(path),
            dtype=dtype,
            attn_implementation="eager",  # the model's own; whoever runs it may choose another that computes the same
            use_liger_kernel=False,
            use_sdpa_patching=False,
            force_hf=True,
            trust_remote_code=False,  # it would be on for names that begin with its own vendor's
            **config_overrides,
        )
    for parameter in model.parameters():  # nemo-automodel leaves a checkpoint in fp32 as it is
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    tensors = dict(model.state_dict())
    refuse_untied(f"{MODEL_KEY}={str(path)!r}", reference, tensors)
    for name in ties(reference):
        tensors.pop(name, None)
    counts = {name: num_not_finite(tensor) for name, tensor in tensors.items()}
    refuse_not_finite(f"{MODEL_KEY}={str(path)!r}", counts)
    return model.eval()


def described_model(path: Path, config_overrides: Mapping[str, Any], label: str | None = None) -> PreTrainedModel:
    """The model that a directory's config.json describes, on the meta device; reads no weight.

    ValueError, with the directory named by `label`, where transformers can build none. No code of the directory runs.
    """
    label = label or f"{MODEL_KEY}={str(path)!r}"
    config = load_model_config(path, config_overrides, label)
    if (text := config.get_text_config()) is not config:
        raise ValueError(
            f"{label}: {config.model_type!r} wraps its text model {text.model_type!r} together with other modalities, "
            f"and text models alone are trained and exported. Save the text model and its head as a checkpoint of "
            f"{text.model_type!r}, and train that."
        )
    try:
        return empty_model(config)
    except Exception as error:  # a model class may fail in any way on a config that does not fit
        raise ValueError(f"{label}: {_why_not_built(config, error)}") from error


def load_model_config(path: Path, config_overrides: Mapping[str, Any], label: str | None = None) -> Any:
    """The transformers config alone; reads no weight. ValueError as in `described_model`."""
    label = label or f"{MODEL_KEY}={str(path)!r}"
    _check_config_file(path / "config.json", label)
    try:
        plain = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        raise ValueError(
            f"{label}: transformers {transformers.__version__} cannot read its config.json ({_reason(error)}). Correct "
            "it, or copy or download the model again."
        ) from error
    for key, value in config_overrides.items():
        if not hasattr(plain, key):
            known = plain.to_dict()
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            if key in (known.get("rope_parameters") or {}):
                hint = " It is part of rope_parameters: give that, whole."
            raise ValueError(
                f"{_OVERRIDES}.{key}={value!r}: the config of {plain.model_type!r} has no such key, so it would change "
                f"nothing.{hint} It has {', '.join(sorted(known))}."
            )
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, **config_overrides)
    except Exception as error:
        raise ValueError(f"{_OVERRIDES}={dict(config_overrides)!r}: {_reason(error)}. Correct it.") from error
    heads, groups = (
        getattr(config.get_text_config(), f"num_{kind}_heads", None) for kind in ("attention", "key_value")
    )
    if isinstance(heads, int) and isinstance(groups, int) and (groups < 1 or heads % groups):
        raise ValueError(
            f"{label}: its config.json has num_key_value_heads={groups}, which must divide num_attention_heads={heads}."
            " Correct it."
        )
    return config


def _check_config_file(file: Path, label: str) -> None:
    """ValueError for a config.json that is no JSON, or of an architecture that transformers does not have."""
    try:
        text = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{label}: its config.json cannot be read ({error}). Copy or download it again.") from error
    model_type = text.get("model_type") if isinstance(text, dict) else None
    if not isinstance(model_type, str):
        raise ValueError(f"{label}: its config.json names no model_type. Copy or download it again.")
    if model_type in CONFIG_MAPPING:
        return
    unknown = (
        f"{label}: its config.json has model_type={model_type!r}, which transformers {transformers.__version__} lacks"
    )
    if "auto_map" in text:
        raise ValueError(
            f"{unknown}, and names code that comes with the model (auto_map). Such code is not run here "
            "(trust_remote_code). Use a model whose architecture transformers has."
        )
    near = difflib.get_close_matches(model_type, list(CONFIG_MAPPING), n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{unknown}.{hint} Correct it, or use a model whose architecture transformers has.")


def _why_not_built(config: Any, error: Exception) -> str:
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        what = f"its config.json describes a {config.model_type!r}, which is no causal language model in transformers"
        return f"{what}. Use a model that completes text."
    return f"transformers cannot build the {config.model_type!r} of its config.json ({_reason(error)}). Correct it."


def _reason(error: Exception) -> str:
    """An exception's text on one line; its type where that says more."""
    text = " ".join(str(error).split()).removesuffix(".")
    return text if isinstance(error, (OSError, ValueError)) and text else f"{type(error).__name__}: {text}"


def empty_model(config: Any) -> PreTrainedModel:
    """The model of a transformers config on the meta device: its modules and shapes, no weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager", trust_remote_code=False)


def model_of_tensors(path: Path, config: Any, tensors: Mapping[str, Tensor]) -> PreTrainedModel:
    """The model of a Hugging Face directory over these tensors, by parameter name; a tied head needs none.

    Nothing is copied, and no weight of the directory is read.
    """
    model = empty_model(config)
    # a tied head is missing and tied below; any other missing tensor is found by the assertion
    unexpected = model.load_state_dict(dict(tensors), strict=False, assign=True).unexpected_keys
    model.tie_weights()
    absent = [name for name, p in model.named_parameters() if p.is_meta]
    assert not absent + unexpected, (absent, unexpected)
    device = next(model.parameters()).device
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):  # rotary frequencies, not in checkpoints
            model.set_submodule(name, nn.Module.to(type(module)(config), device))
    model.generation_config = _generation_config(path) or model.generation_config
    return model.requires_grad_(False).eval()


def save_tensors(
    path: Path, config: Any, tensors: Mapping[str, Tensor], target: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """A Hugging Face directory of these tensors, with the configurations of the one that they started from."""
    save_configs(path, config, next(iter(tensors.values())).dtype, target)
    entries = [entry_of(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()]
    shards = plan_shards(entries, max_shard_bytes)
    for shard in shards:
        write_tensors(target / shard.file_name, shard.tensors, tensors.__getitem__)
    write_index(target, shards)


def save_configs(path: Path, config: Any, dtype: torch.dtype, target: Path) -> None:
    """The configuration of a model of this dtype, and the generation configuration of the directory it came from."""
    config = copy.deepcopy(config)
    config.dtype = dtype
    config.save_pretrained(target)
    if (generation := _generation_config(path)) is not None:
        generation.save_pretrained(target)


def dry_save_configs(path: Path, model: PreTrainedModel, target: Path, label: str) -> None:
    """`save_configs` as every save of all weights does it. ValueError, by the directory's `label`, where it fails."""
    for name, save in (
        (GENERATION_CONFIG_NAME, lambda: (_generation_config(path) or model.generation_config).save_pretrained(target)),
        (CONFIG_NAME, lambda: save_configs(path, model.config, torch.float32, target)),
    ):
        try:
            save()
        except Exception as error:
            raise ValueError(
                f"{label}: every checkpoint of all weights holds its {name}, and transformers does not save that as it "
                f"is ({_reason(error)}). Correct {path / name}."
            ) from error


def _generation_config(path: Path) -> GenerationConfig | None:
    try:
        return GenerationConfig.from_pretrained(path)
    except OSError:  # not every directory has one
        return None


def linear_modules(model: nn.Module) -> list[LinearModule]:
    """Every linear module in module order, by its full Hugging Face name."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return [
        LinearModule(
            name=name,
            in_features=module.in_features,
            out_features=module.out_features,
            is_output_head=module is head,
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]


def share_structure(model: PreTrainedModel) -> PreTrainedModel:
    """A second module tree over the same parameters and buffers, with its own config."""
    memo = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, memo)
