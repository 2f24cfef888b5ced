"""What megatron-core 0.16 needs changed to run where there is no CUDA, or no Transformer Engine.

Contract: without CUDA these modules see a `torch` whose current device is the CPU; without Transformer Engine the
router finds that it has none. tests/patches/test_megatron_core.py shows for each spot that it fails without the shim,
and so says when a release no longer needs it.
"""

from __future__ import annotations

import importlib

import torch

from nemo_rl_lora.patches.without_cuda import TorchWithoutCuda

MODULES = (
    "megatron.core.tensor_parallel.mappings",  # gathers and reduce-scatters allocate on the current device
    "megatron.core.tensor_parallel.layers",  # so does the backward pass of a trained weight under sequence parallelism
    "megatron.core.utils",  # its shared buffer is allocated there
    "megatron.core.transformer.moe.router",  # moves its weight there
    "megatron.core.pipeline_parallel.p2p_communication",  # receives there, and waits for it
    "megatron.core.pipeline_parallel.schedules",  # counts tokens on "cuda"
)
_ROUTER_KERNEL = "te_general_gemm"


def install() -> None:
    """Change the spots, once or again."""
    # The name is missing where its import fails, and is compared with None before it is used.
    vars(importlib.import_module("megatron.core.transformer.moe.moe_utils")).setdefault(_ROUTER_KERNEL, None)
    if torch.cuda.is_available():
        return
    proxy = TorchWithoutCuda()
    for name in MODULES:
        vars(importlib.import_module(name))["torch"] = proxy
