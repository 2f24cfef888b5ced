"""What a run says that has no memory left: in which phase, at which peak, and which keys take less there.

Contract: an error that is about memory is annotated where it passes, by the phase that it comes from and by the peak of
the process that it comes from; both survive the way out of a process of Ray. The text is made where the configuration
is. Imports no torch.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nemo_rl_lora.config.dtensor import DTensorConfig
from nemo_rl_lora.config.generation import EngineConfig, GenerationConfig, chosen_engine
from nemo_rl_lora.config.lora import lora_spec_from_policy
from nemo_rl_lora.config.master import DpoMaster, EvalMaster, MasterConfig, SftMaster
from nemo_rl_lora.config.megatron import MegatronConfig
from nemo_rl_lora.config.policy import PolicyConfig

GENERAL = (
    "What takes less memory: a lower policy.train_micro_batch_size, policy.logprob_batch_size or "
    "policy.max_total_sequence_length; policy.dtensor_cfg.activation_checkpointing=true, or megatron_cfg's; where "
    "completions are sampled, a lower policy.generation.max_concurrent_sequences or vllm_cfg.gpu_memory_utilization."
)
_CLASSES = {"OutOfMemoryError", "MemoryError"}  # of torch, Ray and Python
_SAID = (
    "DefaultCPUAllocator: can't allocate",
    "CUDA out of memory",  # as a worker of vLLM passes it on
    "CUDA error: out of memory",
    "is less than desired GPU memory utilization",  # vLLM at its start
    "No available memory for the cache blocks",  # likewise
)
_PHASE, _PEAK, _MOVING = "phase", "peak_memory", "weights_were_moving"


def memory_error(error: BaseException | None) -> BaseException | None:
    """The error about memory that this one is or comes from; None where there is none."""
    while error is not None:
        names = {kind.__name__ for kind in type(error).__mro__}
        if names & _CLASSES or any(said in str(error) for said in _SAID):
            return error
        error = error.__cause__
    return None


@contextmanager
def from_phase(name: str) -> Iterator[None]:
    """An error about memory from in here comes from this phase, by its name in the metrics, and from this process,
    unless it says so already."""
    try:
        yield
    except Exception as error:
        if (found := memory_error(error)) is not None:
            vars(found).setdefault(_PHASE, name)
            vars(found).setdefault(_PEAK, peak_memory())
        raise


@contextmanager
def from_process(name: str) -> Iterator[None]:
    """An error about memory from in here comes from this process, which has a name."""
    try:
        yield
    except Exception as error:
        if (found := memory_error(error)) is not None:
            vars(found).setdefault(_PEAK, f"{peak_memory()}, in {name}")
        raise


@contextmanager
def while_weights_move() -> Iterator[None]:
    """An error about memory from in here leaves weights of which some have moved."""
    try:
        yield
    except Exception as error:
        if (found := memory_error(error)) is not None:
            vars(found)[_MOVING] = True
        raise


def lacked_memory_before_weights_moved(error: BaseException) -> bool:
    """Whether a step of the optimizer ended for want of memory and left the weights as they were."""
    found = memory_error(error)
    return found is not None and _MOVING not in vars(found)


def peak_memory() -> str:
    """What this process had in use at most: on its GPU since the last step, else in the machine since it began."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        return f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB of the GPU's {total / 2**30:.2f} GiB"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB of the machine's memory"


def what_takes_less(error: BaseException, config: MasterConfig | EvalMaster | None) -> list[str]:
    """Lines on an error about memory: where it comes from, and a line for each key that takes less there; none for
    another error. Without a configuration, the keys that most often do."""
    found = memory_error(error)
    if found is None:
        return []
    if config is None:
        return [GENERAL]
    name, peak = vars(found).get(_PHASE), vars(found).get(_PEAK, peak_memory())
    words, ways = _PHASES.get(name or "", (None, _ANYWHERE))
    where = "the run" if words is None else words
    lines = dict.fromkeys(line for way in ways for line in way(config))
    return [f"Out of memory in {where}; the peak was {peak}. What takes less there:", *lines]


def _policy(config: MasterConfig | EvalMaster) -> PolicyConfig | None:
    return config.policy if isinstance(config.policy, PolicyConfig) else None


def _training_rows(config: MasterConfig | EvalMaster) -> Iterator[str]:
    policy = _policy(config)
    if policy is not None:
        yield from _rows(policy, "train", "policy.train_micro_batch_size", policy.train_micro_batch_size)


def _logprob_rows(config: MasterConfig | EvalMaster) -> Iterator[str]:
    policy = _policy(config)
    if policy is None:
        return
    key, num_rows = "policy.logprob_batch_size", policy.logprob_rows
    if isinstance(config, SftMaster | DpoMaster):
        loop = config.sft if isinstance(config, SftMaster) else config.dpo
        key, num_rows = f"{config.algorithm}.val_micro_batch_size", loop.val_micro_batch_size
    yield from _rows(policy, "logprob", key, num_rows)


def _rows(policy: PolicyConfig, kind: str, key: str, num_rows: int) -> Iterator[str]:
    """What bounds a pass of this kind; where it holds one sequence, that sequence."""
    assert kind in ("train", "logprob")
    longest = policy.max_total_sequence_length
    if kind == "train" and policy.searched_key is not None:
        yield (
            f"{policy.searched_key}='auto': tokens of a pass, of which the log says how many were found at the start. "
            f"Set it to fewer, to {longest} at the least."
        )
        return
    for name in ("dynamic_batching", "sequence_packing"):
        if getattr(policy, name).enabled and (tokens := policy.microbatch_tokens(kind, num_rows)) > longest:
            yield f"policy.{name}.{kind}_mb_tokens={tokens}: tokens of a pass. Lower it, to {longest} at the least."
            return
    if num_rows > 1 and not (policy.dynamic_batching.enabled or policy.sequence_packing.enabled):
        yield f"{key}={num_rows}: rows of a pass. Lower it."
        return
    yield f"policy.max_total_sequence_length={longest}: a pass holds a sequence of this length. Lower it."


def _activations(config: MasterConfig | EvalMaster) -> Iterator[str]:
    policy = _policy(config)
    if policy is None:
        return
    name, block = _backend(policy)
    if not block.activation_checkpointing:
        yield (
            f"policy.{name}.activation_checkpointing=False: each layer keeps its activations for the backward pass. "
            f"Set it to true."
        )


def _weights(config: MasterConfig | EvalMaster) -> Iterator[str]:
    policy = _policy(config)
    if policy is None:
        if config.policy.precision == "float32":
            yield "policy.precision='float32': four bytes a weight. Set it to bfloat16."
        return
    name, block = _backend(policy)
    key = "tensor_parallel_size" if name == "dtensor_cfg" else "tensor_model_parallel_size"
    yield (
        f"policy.{name}.{key}={getattr(block, key)}: processes that share each weight and its activations. Raise it, "
        f"and cluster.gpus_per_node with it."
    )


def _backend(policy: PolicyConfig) -> tuple[str, DTensorConfig | MegatronConfig]:
    if policy.active_backend == "dtensor":
        return "dtensor_cfg", policy.dtensor_cfg
    return "megatron_cfg", policy.megatron_cfg


def _engine(config: MasterConfig | EvalMaster) -> Iterator[str]:
    engine = _engine_config(config)
    if engine is None:
        return
    yield (
        f"policy.generation.max_concurrent_sequences={engine.max_concurrent_sequences}: completions that are decoded "
        f"at once, each with its keys and values. Lower it."
    )
    if isinstance(engine, GenerationConfig) and chosen_engine(engine.backend)[0] == "vllm":
        yield (
            f"policy.generation.vllm_cfg.gpu_memory_utilization={engine.vllm_cfg.gpu_memory_utilization:g}: share of a "
            f"GPU that vLLM takes. Lower it; where vLLM finds no room for its cache, raise it."
        )


def _merged_copies(config: MasterConfig | EvalMaster) -> Iterator[str]:
    engine, policy = _engine_config(config), _policy(config)
    if engine is None or (policy is not None and lora_spec_from_policy(policy) is None):
        return
    key, asked, value = "lora_sync", engine.lora_sync, "adapter"
    if isinstance(engine, GenerationConfig) and engine.lora_refit_mode is not None:
        key, asked, value = "lora_refit_mode", engine.lora_refit_mode, "native"
    if asked != value:
        yield (
            f"policy.generation.{key}={asked!r}: the engine may hold merged weights beside the base's. Set it to "
            f"{value}."
        )


def _engine_config(config: MasterConfig | EvalMaster) -> EngineConfig | None:
    return config.policy.generation


_ANYWHERE: tuple[Callable[[MasterConfig | EvalMaster], Iterator[str]], ...] = (
    _training_rows,
    _logprob_rows,
    _activations,
    _engine,
    _merged_copies,
    _weights,
)
_SAMPLING = ("sampling", (_engine, _merged_copies, _weights))
_PHASES = {
    "start": ("the start, where weights are loaded", (_weights, _engine)),
    "policy_training": ("training", (_training_rows, _activations, _weights)),
    "policy_and_reference_logprobs": ("the pass for log-probabilities", (_logprob_rows, _weights)),
    "generation": _SAMPLING,
    "exposed_generation": _SAMPLING,
    "weight_sync": ("the sync of weights to the engine", (_merged_copies, _engine, _weights)),
    "total_validation_time": ("validation", (_logprob_rows, _weights)),
}
