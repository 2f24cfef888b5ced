"""Loading a causal language model through nemo-automodel, on CUDA or without it.

Hugging Face's own classes are always used (`force_hf`), so module and tensor names are the canonical ones.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from nemo_rl_lora.lora.targets import LinearModule
from nemo_rl_lora.patches.nemo_automodel import loads_without_cuda
from nemo_rl_lora.tensors import MAX_SHARD_BYTES, entry_of, plan_shards, write_index, write_tensors


def load_model(path: Path, *, dtype: torch.dtype, config_overrides: dict[str, Any]) -> PreTrainedModel:
    """The model of a Hugging Face directory, in evaluation mode, every weight in `dtype`."""
    from nemo_automodel import NeMoAutoModelForCausalLM

    transformers_logging.disable_progress_bar()
    with loads_without_cuda():
        model = NeMoAutoModelForCausalLM.from_pretrained(
            str(path),
            dtype=dtype,
            attn_implementation="sdpa",
            use_liger_kernel=False,
            use_sdpa_patching=False,
            force_hf=True,
            **config_overrides,
        )
    for parameter in model.parameters():  # nemo-automodel leaves a checkpoint in fp32 as it is
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model.eval()


def load_model_config(path: Path, config_overrides: dict[str, Any]) -> Any:
    """The transformers config alone; reads no weight."""
    return AutoConfig.from_pretrained(path, **config_overrides)


def empty_model(config: Any) -> PreTrainedModel:
    """The model of a transformers config on the meta device: its modules and shapes, no weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


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
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):  # rotary frequencies, not in checkpoints
            model.set_submodule(name, type(module)(config))
    model.generation_config = _generation_config(path) or model.generation_config
    return model.requires_grad_(False).eval()


def save_tensors(
    path: Path, config: Any, tensors: Mapping[str, Tensor], target: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """A Hugging Face directory of these tensors, with the configurations of the one that they started from."""
    config = copy.deepcopy(config)
    config.dtype = next(iter(tensors.values())).dtype
    config.save_pretrained(target)
    if (generation := _generation_config(path)) is not None:
        generation.save_pretrained(target)
    entries = [entry_of(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()]
    shards = plan_shards(entries, max_shard_bytes)
    for shard in shards:
        write_tensors(target / shard.file_name, shard.tensors, tensors.__getitem__)
    write_index(target, shards)


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
