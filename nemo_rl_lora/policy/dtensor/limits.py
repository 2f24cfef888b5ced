"""What tensor parallelism of the DTensor backend cannot split, and what it does not compile, from a model's config.json
and this machine alone."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from nemo_rl_lora.config.dtensor import DTensorConfig
from nemo_rl_lora.config.policy import PolicyConfig
from nemo_rl_lora.kernels.machine import c_compilers, has_python_headers
from nemo_rl_lora.lora.targets import AdaptedModule
from nemo_rl_lora.models.families import families_for
from nemo_rl_lora.models.load import empty_model
from nemo_rl_lora.models.shapes import type_name
from nemo_rl_lora.policy.attention import supports_segments
from nemo_rl_lora.policy.dtensor.tensor_plan import custom_plan_problems, modules_split_by_rows, tensor_plan

COMPILE_KEY = "policy.compile"


def tensor_parallel_problems(
    sizes: DTensorConfig, model_config: Any, adapted: Sequence[AdaptedModule] | None = None, *, num_shards: int = 1
) -> list[str]:
    """A paragraph for each reason why these ranks cannot share the matrices of a model; its transformers config.

    `adapted`: the modules that have adapters; None: all weights are trained. `num_shards`: data-parallel ones.
    """
    number, key = sizes.tensor_parallel_size, "policy.dtensor_cfg.tensor_parallel_size"
    if number == 1:
        return []
    known = families_for("tensor_parallel")
    if sizes.custom_parallel_plan is None and model_config.model_type not in known:
        names = ", ".join(family.architecture for family in known.values())
        return [
            f"{key}={number}: there is no plan to split the matrices of {model_config.model_type!r}; there is one for "
            f"{names}. Set {key}=1, where FSDP2 shards any model, or give policy.dtensor_cfg.custom_parallel_plan."
        ]
    model = empty_model(model_config)
    names_adapted = None if adapted is None else [module.name for module in adapted]
    if sizes.custom_parallel_plan is not None and (found := custom_plan_problems(sizes, model, names_adapted)):
        return found
    text = model_config.get_text_config()
    counts = {
        name: getattr(text, name, None) for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    }
    problems = [
        f"{key}={number}: must divide {name}, which is {count}. Set a divisor of {count}."
        for name, count in counts.items()
        if count is not None and count % number
    ]
    uneven = {} if problems else _uneven_rows(sizes, model, adapted or (), num_shards)
    return problems + [
        f"{key}={number}: does not divide the {rows} rows of {name}, and FSDP2, which splits each rank's rows again "
        f"among {num_shards} shards, does not split these as DTensor counts them. Set {key} to a divisor of {rows}, or "
        f"another number of shards (by policy.dtensor_cfg.dp_replicate_size or the processes of `cluster`)."
        for name, rows in uneven.items()
    ]


def _uneven_rows(
    sizes: DTensorConfig, model: PreTrainedModel, adapted: Sequence[AdaptedModule], num_shards: int
) -> dict[str, int]:
    """Of the weights and adapters whose rows both kinds of ranks split, those that they split differently."""

    def differs(rows: int) -> bool:
        return shares_differ(rows, sizes.tensor_parallel_size, num_shards)

    if not any(map(differs, [*(len(p) for p in model.parameters() if p.dim()), *(module.dim for module in adapted)])):
        return {}  # without the plan, which takes seconds to import
    split = modules_split_by_rows(model, tensor_plan(model, sizes.sequence_parallel, sizes.custom_parallel_plan))
    of_weights = {type_name(name): len(model.get_submodule(name).get_parameter("weight")) for name in split}
    of_adapters = {f"the A of {type_name(m.name)} (its dim)": m.dim for m in adapted if m.name in set(split)}
    return {name: rows for name, rows in (of_weights | of_adapters).items() if differs(rows)}


def shares_differ(rows: int, ranks: int, shards: int) -> bool:
    """Whether rows that FSDP2 splits among shards after tensor-parallel ranks have split them are not those that
    DTensor, which reckons with the shards first, takes for a process's."""
    of_ranks = [_chunks(of_rank, shards) for of_rank in _chunks(rows, ranks)]
    return any(_chunks(sum(of_shard), ranks) != list(of_shard) for of_shard in zip(*of_ranks, strict=True))


def _chunks(size: int, number: int) -> list[int]:
    """The sizes of torch.chunk's parts, and zeros where there are fewer."""
    largest = -(-size // number)
    return [max(0, min(largest, size - place * largest)) for place in range(number)]


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
    if not has_python_headers():
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
        return c_compilers()
    return [os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")]
