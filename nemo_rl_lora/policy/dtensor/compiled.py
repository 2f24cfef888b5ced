"""torch.compile of a model's decoder layers, for any number of tokens.

What lies between a layer's matrix products (norms, rotary embedding, activation, residuals) becomes a few kernels that
read and write less. Adapted linear layers and attention over segments are operations of our own: compiled code calls
them as they are. Compiling takes up to a minute, in the first passes of a run, and leaves its results in a cache of
torch's for the next one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch._dynamo.exc import TorchDynamoException
from transformers import AttentionInterface, PreTrainedModel

from nemo_rl_lora.policy import attention
from nemo_rl_lora.policy.dtensor.limits import COMPILE_KEY
from nemo_rl_lora.policy.dtensor.linear import AdapterLinear
from nemo_rl_lora.policy.dtensor.sharding import layers_of

logger = logging.getLogger(__name__)

# With and without gradients, of the first layer (whose input has none) and the others, in each phase of a run; above
# its limit, 8 by itself, torch compiles no more, and says so.
_FORMS_OF_A_LAYER = 64


def compile_layers(model: PreTrainedModel) -> None:
    """Have each decoder layer compiled when it is called next; parameters, their names and hooks stay as they are.

    ValueError by the key's name, then, where that fails.
    """
    if not dist.is_initialized() or dist.get_rank() == 0:
        logger.info(f"{COMPILE_KEY}=True: the decoder layers are compiled in the first passes, up to a minute")
    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, _FORMS_OF_A_LAYER)
    functorch: Any = import_module("torch._functorch.config")
    functorch.force_non_lazy_backward_lowering = True  # with the forward pass, where a failure can be named
    if torch.are_deterministic_algorithms_enabled():
        inductor: Any = import_module("torch._inductor.config")
        inductor.deterministic = True  # else it chooses some kernels by timing them
    AttentionInterface.register(attention.NAME, torch.compiler.disable(attention.segment_attention))
    adapted = torch.compiler.disable(AdapterLinear.forward)
    for module in model.modules():
        if isinstance(module, AdapterLinear):
            module.__dict__["forward"] = MethodType(adapted, module)
    for layer in layers_of(model):
        layer.compile(dynamic=True)
        assert layer._compiled_call_impl is not None
        layer._compiled_call_impl = _named(layer._compiled_call_impl)


def _named(compiled: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(compiled)
    def call(*arguments: Any, **more: Any) -> Any:
        try:
            return compiled(*arguments, **more)
        except TorchDynamoException as error:
            cause = getattr(error, "inner_exception", error)
            reason = " ".join([f"{type(cause).__name__}:", *str(cause).strip().splitlines()[:1]])
            raise ValueError(
                f"{COMPILE_KEY}=True: torch.compile failed ({reason}). Set {COMPILE_KEY}=false."
            ) from error

    return call
