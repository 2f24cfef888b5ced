"""What nemo-automodel 0.7 needs changed: to load a model without CUDA, to take a LoRA layer of another class, and to
save without its checkpointer. tests/patches/test_nemo_automodel.py shows for each that it is still needed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nemo_rl_lora.patches.without_cuda import TorchWithoutCuda

Layer = TypeVar("Layer", bound=nn.Module)


@contextlib.contextmanager
def loads_without_cuda() -> Iterator[None]:
    """Its loader asks for the current CUDA device: within, and where there is none, it is told the CPU."""
    if torch.cuda.is_available():
        yield
        return
    auto_model: Any = import_module("nemo_automodel._transformers.auto_model")
    original, auto_model.torch = auto_model.torch, TorchWithoutCuda()
    try:
        yield
    finally:
        auto_model.torch = original


def multiply_in_ieee() -> None:
    """Its kernels leave the precision of an fp32 product to Triton, whose default on a GPU is TF32 (3e-4). Before the
    first of them is compiled; what the user has set stays."""
    os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")


def adapt(linear: nn.Module, layer: type[Layer], *, dim: int, dropout: float, dropout_position: str) -> Layer:
    """Make a linear module of the model a `layer` (a subclass of LinearLoRA), in place, with A and B in fp32.

    The vendor's function adds the parameters, under its names, but makes a class of its own and takes none. The scale
    is alpha / dim there, which need not be so here: the caller sets it.
    """
    from nemo_automodel.components._peft.lora import patch_linear_module

    patched: Any = patch_linear_module(
        linear,
        dim=dim,
        alpha=dim,
        dropout=dropout,
        dropout_position=dropout_position,
        lora_dtype=torch.float32,
        use_triton=False,
    )
    patched.__class__ = layer
    return patched


def save_pretrained(model: PreTrainedModel, directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """transformers' own way to save: the vendor's override of it works only with its checkpointer."""
    PreTrainedModel.save_pretrained(model, directory, state_dict=dict(tensors))
