"""What tensor parallelism of the DTensor backend cannot split, and what it does not compile, from a model's config.json
and this machine alone."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from nemo_rl_lora.config.dtensor import DTensorConfig
from nemo_rl_lora.config.policy import PolicyConfig
from nemo_rl_lora.models.families import families_for
from nemo_rl_lora.policy.attention import supports_segments
from nemo_rl_lora.policy.dtensor.custom_plan import custom_plan_problems

COMPILE_KEY = "policy.compile"


def tensor_parallel_problems(
    sizes: DTensorConfig, model_config: Any, adapted: Collection[str] | None = None
) -> list[str]:
    """A paragraph for each reason why these ranks cannot share the matrices of a model; its transformers config.

    `adapted`: the modules that have adapters; None: all weights are trained.
    """
    number, key = sizes.tensor_parallel_size, "policy.dtensor_cfg.tensor_parallel_size"
    if number == 1:
        return []
    if sizes.custom_parallel_plan is not None and (found := custom_plan_problems(sizes, model_config, adapted)):
        return found
    known = families_for("tensor_parallel")
    if sizes.custom_parallel_plan is None and model_config.model_type not in known:
        names = ", ".join(family.architecture for family in known.values())
        return [
            f"{key}={number}: there is no plan to split the matrices of {model_config.model_type!r}; there is one for "
            f"{names}. Set {key}=1, where FSDP2 shards any model, or give policy.dtensor_cfg.custom_parallel_plan."
        ]
    text = model_config.get_text_config()
    counts = {
        name: getattr(text, name, None) for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    }
    return [
        f"{key}={number}: must divide {name}, which is {count}. Set a divisor of {count}."
        for name, count in counts.items()
        if count is not None and count % number
    ]


def compile_problems(policy: PolicyConfig, model_config: Any) -> list[str]:
    """A paragraph for each reason why the layers of a model, by its transformers config, cannot be compiled."""
    if policy.compile is not True:
        return []
    problems = [
        f"{COMPILE_KEY}=True: {name}=1 in the environment turns torch.compile off. Unset it, or set "
        f"{COMPILE_KEY}=false."
        for name in ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE")
        if os.environ.get(name) == "1"
    ]
    if not supports_segments(model_config, policy.max_total_sequence_length):
        problems.append(
            f"{COMPILE_KEY}=True: only layers with full causal attention are compiled, which {model_config.model_type} "
            f"does not have at this length (or with attention dropout). Set {COMPILE_KEY}=false."
        )
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        problems.append(
            f"{COMPILE_KEY}=True: torch.compile needs the headers of Python {sys.version_info.major}."
            f"{sys.version_info.minor}, and they are not installed. Install them, or set {COMPILE_KEY}=false."
        )
    if not any(map(shutil.which, _compilers())):
        problems.append(
            f"{COMPILE_KEY}=True: torch.compile needs a compiler, and there is no {' or '.join(_compilers())}. Install "
            f"one, or set {COMPILE_KEY}=false."
        )
    return problems


def _compilers() -> list[str]:
    """Programs of which torch.compile needs one: of C++ for a CPU; Triton compiles its launcher, which is C."""
    if torch.cuda.is_available():
        return [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    return [os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")]
