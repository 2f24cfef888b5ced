"""Inherited keys that give way, since the user chose something beside which they have no meaning.

A base file and a quick start describe one dataset, one schedule, one learning rate. Where the user names another
dataset or schedule, what was only inherited for the former one is left out before the schema sees it. What the user set
himself is never left out: the schema and the reader of the data refuse it by name where it has no meaning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_rl_lora.config.data import FILE_SUFFIXES, keys_without_use
from nemo_rl_lora.config.layers import Tracked
from nemo_rl_lora.config.optimizer import ShortScheduler
from nemo_rl_lora.config.tree import flatten, lookup, merged, without

_SIZES_OF_SEVERAL = {
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "sequence_parallel",
}
_SHORT_NAMES = ("constant", "linear", "cosine", "wsd")


def without_replaced(below: Tracked, tracked: Tracked) -> Tracked:
    """The tree without inherited keys that have no meaning beside what the user chose. `below` is what the last layer
    was laid over."""
    for block in ("data.train", "data.validation"):
        tracked = _without_inherited(tracked, block, _of_another_source(below, tracked, block))
    tracked = _without_inherited(tracked, "policy.scheduler", _of_another_schedule(tracked))
    if tracked.layers.is_set("policy.optimizer.kwargs.lr"):
        tracked = _without_inherited(tracked, "policy.optimizer", {"full_finetuning_lr"})
    return tracked


def without_parallel_sizes(tracked: Tracked) -> Tracked:
    """The tree without inherited sizes of Megatron's groups where one process trains: a base file has two
    tensor-parallel ranks. For a whole configuration, since a file that inherits another may raise `cluster`.
    """
    cluster = _mapping(tracked, "cluster")
    if cluster.get("num_nodes", 1) != 1 or cluster.get("gpus_per_node", 1) != 1:
        return tracked
    return _without_inherited(tracked, "policy.megatron_cfg", _SIZES_OF_SEVERAL)


def without_adamw_choice(tracked: Tracked) -> Tracked:
    """The tree without inherited ways to run AdamW: base files have NeMo RL's, a loop, and the device decides better.
    For a whole configuration: base files are compared with NeMo RL's."""
    return _without_inherited(tracked, "policy.optimizer.kwargs", {"foreach", "fused"})


def with_precision(tracked: Tracked, precision: str) -> Tracked:
    """The tree with this `policy.precision`, unless the user set one. For a whole configuration: other keys refer to
    it."""
    if tracked.layers.is_set("policy.precision"):
        return tracked
    return Tracked(merged(tracked.tree, {"policy": {"precision": precision}}), tracked.layers)


def with_importance_correction(tracked: Tracked) -> Tracked:
    """The tree with the correction for an earlier policy's samples where rollouts run ahead of training, unless the
    user set it. For a whole configuration: a file that inherits another may switch `grpo.async_grpo` off again."""
    ahead, key = _mapping(tracked, "grpo.async_grpo"), "loss_fn.use_importance_sampling_correction"
    runs_ahead = ahead.get("enabled") is True and ahead.get("max_trajectory_age_steps", 1) != 0
    if not runs_ahead or tracked.layers.is_set(key) or "vespo" in _set_values(tracked, "loss_fn"):
        return tracked
    return Tracked(merged(tracked.tree, {"loss_fn": {"use_importance_sampling_correction": True}}), tracked.layers)


def _set_values(tracked: Tracked, block: str) -> set[str]:
    """The keys of a block that have a value, not null."""
    return {key for key, value in _mapping(tracked, block).items() if value is not None}


def _of_another_source(below: Tracked, tracked: Tracked, block: str) -> set[str]:
    """Keys of a dataset block that describe another dataset, or another kind of source, than the user chose."""
    section, is_set, meaningless = _mapping(tracked, block), tracked.layers.is_set, set[str]()
    if "dataset_name" in section and is_set(f"{block}.dataset_name"):
        name = section["dataset_name"]
        meaningless |= keys_without_use(name)
        if name != _mapping(below, block).get("dataset_name") and "data_path" in section:
            meaningless |= {"data_path", *(() if is_set(f"{block}.data_path") else ("split", "subset"))}
    if is_set(f"{block}.data_path") and str(section.get("data_path")).endswith(FILE_SUFFIXES):
        meaningless |= {"split", "subset"}
    return meaningless


def _of_another_schedule(tracked: Tracked) -> set[str]:
    """Keys of the short form of a scheduler that one of another name has no use for."""
    section = _mapping(tracked, "policy.scheduler")
    name = section.get("name")
    if name is None or not tracked.layers.is_set("policy.scheduler.name"):
        return set()
    if name in _SHORT_NAMES:
        return {"kwargs"} | (ShortScheduler.model_fields.keys() & section.keys() - _keys_of_schedule(name))
    return ShortScheduler.model_fields.keys() - {"name"}


def _keys_of_schedule(name: str) -> set[str]:
    keys = {"name", "warmup_steps"}
    if name != "constant":
        keys |= {"total_steps", "min_lr_ratio"}
    return keys | {"decay_steps"} if name == "wsd" else keys


def _without_inherited(tracked: Tracked, block: str, keys: set[str]) -> Tracked:
    """The tree without those of a block's keys that the user did not set."""
    tree = tracked.tree
    for key in keys & _mapping(tracked, block).keys():
        if not tracked.layers.is_set(f"{block}.{key}"):
            tree = without(tree, (*block.split("."), key))
    return tracked if tree is tracked.tree else Tracked(tree, tracked.layers.restricted_to(flatten(tree)))


def _mapping(tracked: Tracked, block: str) -> Mapping[str, Any]:
    found = lookup(tracked.tree, block.split("."))
    return found[0] if found and isinstance(found[0], Mapping) else {}
