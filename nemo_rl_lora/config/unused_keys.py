"""Keys of a backend, an adapter or an engine that this run does not use.

Contract: such a key that the user set is refused by name, whatever its value, so that nothing asked for is ignored
silently; one that was only inherited is not. Switches (`enabled`) choose what is used and are not judged here, unless
one switches an adapter on and no phase has one; nor is a LoRA block that the user himself switched off, unless all of
`policy.megatron_cfg` is unused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pydantic_core import to_jsonable_python

from nemo_rl_lora.config.errors import show
from nemo_rl_lora.config.generation import chosen_engine
from nemo_rl_lora.config.layers import SET_BY
from nemo_rl_lora.config.lora import LoraCfg, PeftCfg, UnifiedLora, lora_block_key, lora_spec_from_policy
from nemo_rl_lora.config.master import MasterConfig, SftMaster
from nemo_rl_lora.config.optimizer_settings import FULL_LR, LR, MEGATRON_LR, MEGATRON_SCHEDULE, SCHEDULE
from nemo_rl_lora.config.phases import PhaseConfig, schedule_begin
from nemo_rl_lora.config.schema import section_at
from nemo_rl_lora.config.tree import lookup

_PROCESS_KEYS = ("max_generation_failures", "timeout_seconds")
_VLLM_KEYS = ("vllm_cfg", "vllm_kwargs", *_PROCESS_KEYS)
_ROLLOUT_KEYS = ("temperature", "top_p", "top_k", "val_temperature", "val_top_p", "val_top_k", "parity")
_WHOLE_FILE = 5  # keys in one unused block: more look like a file that has every key


def unused_key_problems(config: MasterConfig) -> list[str]:
    """One paragraph for each unused block in which the user set a key."""
    return [
        _paragraph(config, keys, reason) for prefixes, reason in _unused(config) if (keys := _set(config, prefixes))
    ]


def _unused(config: MasterConfig) -> Iterator[tuple[list[str], str]]:
    """What is not used: keys or blocks, and why."""
    policy = config.policy
    backend = policy.active_backend
    if backend == "dtensor":
        yield (
            ["policy.megatron_cfg"],
            "policy.backend=dtensor trains. Remove the change: the DTensor backend has policy.dtensor_cfg, "
            "policy.optimizer and policy.scheduler.",
        )
    else:
        yield (
            ["policy.dtensor_cfg"],
            "policy.backend=megatron trains. Remove the change: the Megatron backend has policy.megatron_cfg.",
        )
    native = LoraCfg.KEY if backend == "dtensor" else PeftCfg.KEY
    if _has_adapter_in_a_phase(config):
        of_both = (native, UnifiedLora.KEY) if policy.lora is not None else (UnifiedLora.KEY, native)
        yield [of_both[0]], f"the adapter of each phase is that of {of_both[1]}. Set it there."
    elif _phases_of(config):
        yield [native, UnifiedLora.KEY], "no phase has train=lora. Remove it, or give a phase train=lora."
    elif lora_spec_from_policy(policy) is None:
        yield [native, UnifiedLora.KEY], f"no adapter is trained. Remove it, or set {native}.enabled=true."
    elif lora_block_key(policy) == UnifiedLora.KEY:
        yield [native], f"the adapter is that of {UnifiedLora.KEY}. Set it there."
    else:
        yield [UnifiedLora.KEY], f"the adapter is that of {native}. Set it there."
    yield from _unused_beside_phases(config)
    yield from _unused_without_rollouts(config)
    generation = policy.generation
    engine = None if generation is None else chosen_engine(generation.backend)[0]
    if generation is not None and engine != "in_process":
        yield (
            ["policy.generation.cuda_graphs"],
            f"completions do not come from the in-process engine (policy.generation.backend={generation.backend}). "
            "Remove the change: vLLM has policy.generation.vllm_cfg.enforce_eager.",
        )
    if generation is not None and engine != "vllm":
        yield (
            [f"policy.generation.{key}" for key in _VLLM_KEYS],
            f"completions do not come from vLLM (policy.generation.backend={generation.backend}). Remove the change.",
        )
    elif generation is not None and generation.colocated.enabled:
        yield (
            [f"policy.generation.{key}" for key in _PROCESS_KEYS],
            "the engine runs in the trainer's process (policy.generation.colocated.enabled=true). Remove the change.",
        )


def _unused_beside_phases(config: MasterConfig) -> Iterator[tuple[list[str], str]]:
    """Of the run's own keys, those for which every phase has its own."""
    phases, on_megatron = _phases_of(config), config.policy.active_backend == "megatron"
    if not phases:
        return
    if all(phase.lr is not None for phase in phases):
        yield [LR, FULL_LR, *([MEGATRON_LR] if on_megatron else [])], "every phase has its lr. Remove it, or those."
    if all(phases[schedule_begin(phases, index)].has_shape for index in range(len(phases))):
        yield (
            [SCHEDULE, *(MEGATRON_SCHEDULE if on_megatron else [])],
            "every phase has its warmup_pct and decay_pct. Remove it, or those.",
        )
    own = [to_jsonable_python(phase.data) for phase in phases]
    data = config.data.model_dump(mode="json", by_alias=True, exclude_unset=True)
    if None not in own and data.get("train") not in (*own, data.get("validation")):  # else one refers to it
        yield ["data.train"], "every phase has its data. Remove it, or leave the data of a phase out."


def _unused_without_rollouts(config: MasterConfig) -> Iterator[tuple[list[str], str]]:
    """Of an algorithm that samples only to evaluate, or not at all."""
    name = config.algorithm.upper()
    if config.algorithm == "grpo":
        return
    if not config.evaluate:
        yield ["env"], f"{name} scores nothing without `evaluate`. Remove it."
    yield (
        [f"policy.generation.{key}" for key in _ROLLOUT_KEYS],
        f"{name} samples for `evaluate` alone, whose entries have temperature, top_p and top_k of their own. Remove "
        "the change.",
    )


def _phases_of(config: MasterConfig) -> Sequence[PhaseConfig]:
    return config.sft.phases if isinstance(config, SftMaster) else ()


def _has_adapter_in_a_phase(config: MasterConfig) -> bool:
    return any(phase.train == "lora" for phase in _phases_of(config))


def _set(config: MasterConfig, prefixes: list[str]) -> list[str]:
    """The keys of the schema at or under the prefixes that the user set."""
    blocks = [LoraCfg.KEY, UnifiedLora.KEY, *([PeftCfg.KEY] if config.policy.active_backend == "megatron" else [])]
    on = set[str]()
    if _phases_of(config) and not _has_adapter_in_a_phase(config):
        on = {
            f"{b}.enabled"
            for b in blocks
            if lookup(config.model_dump(by_alias=True), f"{b}.enabled".split(".")) == (True,)
        }
    switched_off = tuple(f"{b}." for b in blocks if config.is_set(f"{b}.enabled") and f"{b}.enabled" not in on)
    written = [_schema_key(config, key) for prefix in prefixes for key in config.layers.set_keys(prefix)]
    values = [key for key in written if key == "data.train" or section_at(type(config), key.split(".")) is None]
    left = [key for key in dict.fromkeys(values) if key in on or not key.endswith(".enabled")]
    return [key for key in left if not key.startswith(switched_off)]


def _schema_key(config: MasterConfig, key: str) -> str:
    """The key without what stands in a free mapping (`vllm_kwargs.seed`)."""
    parts = key.split(".")
    for length in range(1, len(parts)):
        if section_at(type(config), parts[:length]) is None:
            return ".".join(parts[:length])
    return key


def _paragraph(config: MasterConfig, keys: list[str], reason: str) -> str:
    key, *others = keys
    (value,) = lookup(config.model_dump(by_alias=True), key.split(".")) or (None,)
    also = f" (nor are {', '.join(others)})" if others else ""
    whole = (
        f" A file that holds every key, such as the config.yaml of an earlier version, says with `{SET_BY}: []` that "
        "nothing in it was chosen."
    )
    return f"{key}={show(value)}: is read by nothing{also}, since {reason}{whole if len(keys) > _WHOLE_FILE else ''}"
