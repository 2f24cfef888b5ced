"""torch.compile of a model's decoder layers, for any number of tokens.

What lies between a layer's matrix products (norms, rotary embedding, activation, residuals) becomes a few kernels that
read and write less. Adapted linear layers and attention over segments are operations of our own: compiled code calls
them as they are. Compiling takes up to a minute, in the first passes of a run, and leaves its results in a cache of
torch's for the next one.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel

from nemo_rl_lora.config.policy import PolicyConfig
from nemo_rl_lora.policy import attention
from nemo_rl_lora.policy.attention import supports_segments
from nemo_rl_lora.policy.dtensor.linear import AdapterLinear

logger = logging.getLogger(__name__)

KEY = "policy.compile"
# With and without gradients, of the first layer (whose input has none) and the others, in each phase of a run; above
# its limit, 8 by itself, torch compiles no more, and says so.
_FORMS_OF_A_LAYER = 64


def compile_layers(model: PreTrainedModel) -> None:
    """Have each decoder layer compiled when it is called next; parameters, their names and hooks stay as they are."""
    logger.info(f"{KEY}=True: the decoder layers are compiled in the first passes, which takes up to a minute")
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, _FORMS_OF_A_LAYER)  # pyright: ignore
    AttentionInterface.register(attention.NAME, torch.compiler.disable(attention.segment_attention))
    layer_names = set(model._no_split_modules or ())
    for module in model.modules():
        if isinstance(module, AdapterLinear):
            module.__dict__["forward"] = torch.compiler.disable(module.forward)
        elif type(module).__name__ in layer_names:
            module.compile(dynamic=True)


def compile_problems(policy: PolicyConfig, model_config: Any) -> list[str]:
    """A paragraph for each reason why the layers of a model, by its transformers config, cannot be compiled."""
    if policy.compile is not True:
        return []
    problems, instead = [], f"Set {KEY}=false"
    if (number := policy.dtensor_cfg.tensor_parallel_size) > 1:
        problems.append(
            f"{KEY}=True: layers are not compiled where tensor-parallel ranks share them, and "
            f"policy.dtensor_cfg.tensor_parallel_size is {number}. {instead}, or tensor_parallel_size to 1."
        )
    if not supports_segments(model_config, policy.max_total_sequence_length):
        problems.append(
            f"{KEY}=True: only layers with full causal attention are compiled, which {model_config.model_type} does "
            f"not have at this length (or with attention dropout). {instead}."
        )
    if not any(map(shutil.which, _compilers())):
        problems.append(
            f"{KEY}=True: torch.compile needs a compiler, and there is no {' or '.join(_compilers())}. Install one, or "
            f"set {KEY}=false."
        )
    return problems


def _compilers() -> list[str]:
    """Programs of which torch.compile needs one: of C++ for a CPU; Triton compiles its launcher, which is C."""
    if torch.cuda.is_available():
        return [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    return [os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")]
