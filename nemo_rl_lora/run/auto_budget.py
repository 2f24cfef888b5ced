"""`train_mb_tokens: auto` at the start of a run: the budget that its checkpoint holds, or a search for one.

Contract: what was found belongs to a device, to a way to share the model, and to what an engine keeps beside it. A run
that continues where all of that is the same, or the engine keeps less, takes the budget of its checkpoint, so that it
cuts batches as it did; elsewhere it is searched for again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nemo_rl_lora.config.differences import ABSENT, differences
from nemo_rl_lora.config.generation import chosen_engine
from nemo_rl_lora.config.master import MasterConfig
from nemo_rl_lora.generation.sync_mode import SyncChoice
from nemo_rl_lora.run.memory import from_phase
from nemo_rl_lora.run.preflight import Start
from nemo_rl_lora.types import SyncMode

if TYPE_CHECKING:
    from nemo_rl_lora.generation.protocol import Generation
    from nemo_rl_lora.run.start import RunPolicy

logger = logging.getLogger(__name__)

# What decides how much memory a token takes in a process, of either backend's section, beside the backend itself.
_SHARING = (
    *("tensor_parallel_size", "dp_replicate_size", "context_parallel_size", "sequence_parallel", "cpu_offload"),
    *("activation_checkpointing", "tensor_model_parallel_size", "pipeline_model_parallel_size"),
    *("expert_model_parallel_size", "expert_tensor_parallel_size"),
)


def settle_train_tokens(
    start: Start, policy: RunPolicy, generation: Generation | None, sync: SyncChoice | None
) -> Mapping[str, Any] | None:
    """Give the policy its budget, where that is `auto`, and return what a checkpoint says of it; None where it is not.

    ConfigError where the device has no memory for one longest row.
    """
    key = start.config.policy.searched_key
    if key is None:
        return None
    kept_bytes = _kept_bytes(generation, sync)
    found_for = {**_found_for(start.config, policy.device), **_beside(start.config, generation, kept_bytes)}
    if (recorded := _recorded(start)) is not None:
        tokens = recorded["tokens"]
        both = differences(recorded, {**found_for, "tokens": tokens})
        changed = {name: values for name, values in both.items() if not _takes_no_more(name, *values)}
        if not changed:
            policy.use_train_tokens(tokens)
            logger.info(f"{key}=auto: {tokens} tokens, as found when the run began")
            return recorded
        named = ", ".join(f"{name} was {_shown(old)} and is {_shown(new)}" for name, (old, new) in changed.items())
        logger.info(f"{key}=auto: searched for again, since {named}")
    vocabulary = int(start.model.config.get_text_config().vocab_size)
    with from_phase("policy_training"):
        found = policy.find_train_tokens(start.algorithm.longest_batch(vocabulary), kept_bytes)
    logger.info(
        f"{key}=auto: {found.tokens} tokens, by {found.num_trials} trial(s) of the longest rows on {policy.device}: "
        f"{found.reason}"
    )
    return {"tokens": found.tokens, **found_for}


def _recorded(start: Start) -> Mapping[str, Any] | None:
    return None if start.resume is None else start.resume.info.train_mb_tokens


def _found_for(config: MasterConfig, device: str) -> dict[str, Any]:
    """What a budget belongs to, as plain JSON."""
    backend = config.policy.active_backend
    block = config.policy.dtensor_cfg if backend == "dtensor" else config.policy.megatron_cfg
    shared = {name: value for name, value in block.model_dump(mode="json").items() if name in _SHARING}
    return {"device": device, "processes": config.cluster.num_processes, "backend": backend, **shared}


def _beside(config: MasterConfig, generation: Generation | None, kept_bytes: int) -> dict[str, Any]:
    """What a budget leaves room for, as plain JSON: the engine, and what it comes to hold in this process."""
    settings = config.policy.generation
    engine = None if generation is None or settings is None else chosen_engine(settings.backend)[0]
    return {"engine": engine, "kept_bytes": kept_bytes}


def _takes_no_more(name: str, old: Any, new: Any) -> bool:
    """Whether what is beside the policy now leaves the memory that it left when the budget was found."""
    if old == ABSENT:
        return False
    return (name == "engine" and new is None) or (name == "kept_bytes" and new < old)


def _kept_bytes(generation: Generation | None, sync: SyncChoice | None) -> int:
    """What an engine in this process comes to hold beside the policy. One of vLLM has its memory already, and on a GPU
    sleeps."""
    from nemo_rl_lora.generation.in_process.engine import InProcessGeneration

    if not isinstance(generation, InProcessGeneration) or sync is None:
        return 0
    modes: list[SyncMode] = [sync.mode, "merged"] if sync.is_open else [sync.mode]
    return max(map(generation.kept_bytes, modes))


def _shown(value: Any) -> str:
    return "absent" if value is ABSENT else repr(value)
