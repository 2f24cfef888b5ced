"""What experience says of a run's settings: a line each, with its source. Nothing here stops a run.

Contract: reads the configuration and the model's shapes. Orders of magnitude, not measurements: no weight is read.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from nemo_rl_lora.config.lora import lora_block_key
from nemo_rl_lora.config.optimizer_settings import adam_settings, megatron_adam_settings
from nemo_rl_lora.generation.sync_mode import MANTISSA_BITS, TYPICAL_WEIGHT, step_change
from nemo_rl_lora.generation.vllm.generation import MAX_RANKS
from nemo_rl_lora.lora.spec import LoraSpec
from nemo_rl_lora.lora.targets import AdaptedModule
from nemo_rl_lora.models.shapes import ModelShapes

if TYPE_CHECKING:
    from nemo_rl_lora.config.loop import LoopConfig
    from nemo_rl_lora.config.master import MasterConfig

_SMALL_LR, _LARGE_FULL_LR = 1e-5, 1e-4
_USUAL_RANKS, _USUAL_SCALES = (4, 256), (0.25, 8.0)
_LOW_REACH = 0.5
_WITHOUT_REGRET = "Schulman et al., LoRA Without Regret, 2025"
_MAX_STEPS_SUMMED = 100_000


def advice(
    config: MasterConfig, spec: LoraSpec | None, shapes: ModelShapes, adapted: Sequence[AdaptedModule]
) -> tuple[str, ...]:
    """Settings far from what works for most, and what a merge will lose; empty where there is nothing to say."""
    on_megatron, lora = config.policy.active_backend == "megatron", spec is not None
    settings = megatron_adam_settings(config, lora=lora) if on_megatron else adam_settings(config.policy, lora=lora)
    rates = [settings.lr_at(step) for step in range(min(_loop(config).max_num_steps, _MAX_STEPS_SUMMED))]
    if spec is None:
        return tuple(_full_learning_rate(max(rates)))
    return (
        *_learning_rate(max(rates)),
        *_rank_and_scale(config, spec, adapted),
        *_reach(config, shapes, adapted),
        *_merging(config, spec, shapes, adapted, rates),
    )


def _loop(config: MasterConfig) -> LoopConfig:
    return getattr(config, config.algorithm)


def _learning_rate(peak: float) -> Iterator[str]:
    if peak <= _SMALL_LR:
        yield (
            f"learning rate {peak:g}: that of full fine-tuning; an adapter's best is about ten times as high "
            f"({_WITHOUT_REGRET})"
        )


def _full_learning_rate(peak: float) -> Iterator[str]:
    if peak >= _LARGE_FULL_LR:
        yield (f"learning rate {peak:g}: that of an adapter; all weights want about a tenth of it ({_WITHOUT_REGRET})")


def _rank_and_scale(config: MasterConfig, spec: LoraSpec, adapted: Sequence[AdaptedModule]) -> Iterator[str]:
    key = lora_block_key(config.policy)
    low, high = _USUAL_RANKS
    if not low <= spec.dim <= high:
        yield f"{key}.dim={spec.dim}: ranks in use are {low} to {high} (Hu et al., LoRA, 2021, section 7.2)"
    scales = {module.scale for module in adapted}
    low, high = _USUAL_SCALES
    if not all(low <= scale <= high for scale in scales):
        yield (
            f"{key}.alpha={spec.alpha:g}: B A is multiplied by {', '.join(f'{s:g}' for s in sorted(scales))}; scales "
            f"in use are {low:g} to {high:g} (PEFT's default is 1, NeMo RL's 4)"
        )
    rank = max(module.dim for module in adapted)
    if rank not in MAX_RANKS:
        served = [size for size in MAX_RANKS if size > rank]
        what = f"as one of rank {served[0]}" if served else "not at all"
        yield f"{key}.dim={rank}: vLLM serves such an adapter {what} (its ranks: {', '.join(map(str, MAX_RANKS))})"


def _reach(config: MasterConfig, shapes: ModelShapes, adapted: Sequence[AdaptedModule]) -> Iterator[str]:
    embedded = (getattr(shapes.config, "vocab_size", 0) or 0) * (getattr(shapes.config, "hidden_size", 0) or 0)
    head = 0 if shapes.has_tied_head else embedded
    reached = sum(module.in_features * module.out_features for module in adapted)
    share = reached / max(shapes.num_params - embedded - head, reached)
    if share < _LOW_REACH:
        yield (
            f"{lora_block_key(config.policy)}: the adapter reaches {share:.0%} of the weights between embedding and "
            f"head; adapters on all layers, MLP and experts included, learn more ({_WITHOUT_REGRET})"
        )


def _merging(
    config: MasterConfig,
    spec: LoraSpec,
    shapes: ModelShapes,
    adapted: Sequence[AdaptedModule],
    rates: Sequence[float],
) -> Iterator[str]:
    """How many steps pass before a merged weight moves: it stays where it is until its change is half the distance of
    two numbers there."""
    dtype = config.policy.precision
    if dtype not in MANTISSA_BITS:
        return
    weight = getattr(shapes.config, "initializer_range", None) or TYPICAL_WEIGHT
    half_spacing = weight * 2.0 ** -(MANTISSA_BITS[dtype])
    change = step_change(spec, adapted)
    moved = [total * change for total in itertools.accumulate(rates)]
    num_lost = sum(total < half_spacing for total in moved)
    if num_lost <= 1:
        return
    generation = config.policy.generation
    if generation is not None and generation.asked_sync == "merged":
        where, remedy = "policy.generation.lora_sync=merged", "lora_sync=adapter loses nothing"
    else:
        where, remedy = "a merged export", "an adapter-only one, or --dtype float32, loses nothing"
    which = f"all {num_lost} steps" if num_lost == len(moved) else f"about {num_lost} steps"
    yield (
        f"{where} in {dtype}: {which} change a typical weight ({weight:g}) by less than its rounding "
        f"({half_spacing:.1e}); "
        f"{remedy} (`tools/parity.py` measures it on a checkpoint)"
    )
