"""How an adapter reaches the engine, where `policy.generation.lora_sync` is `auto`: the rule, and what it measures.

Contract: merging rounds once, to the engine's dtype, and a weight stays where it is until its change is half the
distance of two numbers there. `choose_sync` decides before a weight is loaded:

- no adapter: merged, as all weights are sent;
- an engine that cannot serve the adapter: merged, with a warning;
- a branch that the trainer computes in another dtype than the model (`lora_dtype`): adapter, which does so too;
- an engine in fp32: merged, which keeps an update and is one product a layer;
- an engine in bf16: adapter.

`SyncChoice` decides again when the first update exists: in bf16 it goes over to merged where merging keeps LEAST_SHARE
of that update and the engine takes both. Below that share no speed decides: merged rollouts come from another policy
(NeMo RL measured a gen_kl_error of 0.051 merged and 0.002 as adapter). At it merged is as good, and faster on every
engine that was measured. A checkpoint holds what was decided, so a run that continues serves as it did.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor

from nemo_rl_lora.lora.adapter_tensors import AdapterTensors
from nemo_rl_lora.lora.files import adapter_tensor_name
from nemo_rl_lora.lora.merge import LEAST_SHARE, Survival
from nemo_rl_lora.lora.spec import LoraSpec, init_distribution
from nemo_rl_lora.lora.targets import AdaptedModule
from nemo_rl_lora.tensors import stored_tensors, torch_dtype
from nemo_rl_lora.types import SyncMode

if TYPE_CHECKING:
    from nemo_rl_lora.config.policy import PolicyConfig

logger = logging.getLogger(__name__)

KEY = "policy.generation.lora_sync"
CHOICE_FILE = "lora_sync.json"
MANTISSA_BITS = {"bfloat16": 8, "float16": 11}
TYPICAL_WEIGHT = 0.02  # initializer_range of most configurations
NUM_MEASURED = 16  # modules, evenly spread


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """What a sync moves, and why."""

    mode: SyncMode
    reason: str
    is_open: bool = False  # whether the first update is measured
    warning: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """What the first update decided, as a checkpoint holds it."""

    mode: SyncMode
    surviving_share: float
    step: int


def choose_sync(
    policy: PolicyConfig,
    engine: str,
    spec: LoraSpec | None,
    adapted: Sequence[AdaptedModule],
    problems: Sequence[str],
    *,
    lr: float,
    typical_weight: float | None,
) -> Chosen:
    """By the module's rule. `problems`: why vLLM could not serve the adapter. `lr`: of the first step that moves
    anything; `typical_weight`: the standard deviation of the base's weights as its configuration says it."""
    generation = policy.generation
    assert generation is not None, "asked only where completions are generated"
    if generation.asked_sync != "auto":
        return Chosen(mode=generation.asked_sync, reason="as asked for")
    if spec is None:
        return Chosen(mode="merged", reason="there is no adapter: all weights are sent")
    if engine == "replay":
        return Chosen(mode="merged", reason="a replay serves nothing")
    dtype = generation.vllm_cfg.precision if engine == "vllm" else policy.precision
    expected = ""
    if dtype in MANTISSA_BITS:
        share = expected_share(step_change(spec, adapted) * lr, typical_weight or TYPICAL_WEIGHT, dtype)
        expected = f"merging in {dtype} would keep about {share:.0%} of the first update"
    if engine == "vllm" and problems:
        text = " ".join(problems)
        if not expected:
            return Chosen(mode="merged", reason="vLLM cannot serve this adapter")
        return Chosen(
            mode="merged",
            reason=f"vLLM cannot serve this adapter; {expected}",
            is_open=True,
            warning=f"{KEY}='auto': merged, and {expected}, since vLLM cannot serve this adapter. {text}",
        )
    if spec.dtype not in (None, dtype):
        return Chosen(
            mode="adapter", reason=f"the trainer computes the adapter in {spec.dtype}, and so does the engine"
        )
    if not expected:
        return Chosen(mode="merged", reason=f"merging in {dtype} keeps an update, and is one product a layer")
    return Chosen(mode="adapter", reason=expected, is_open=True)


def step_change(spec: LoraSpec, adapted: Sequence[AdaptedModule]) -> float:
    """How far a step at learning rate 1 moves a typical weight. AdamW moves an element of B, which starts at zero, by
    the learning rate at most; a weight then moves by a sum over the rank."""
    return median(module.scale * math.sqrt(module.dim) * _std_of_a(spec, module) for module in adapted)


def expected_share(change: float, typical_weight: float, dtype: str) -> float:
    """Of changes of this size, the share that rounding keeps: those of weights so small that half the distance to the
    next number, between |w| / 2^bits and half of it, is less. The weights are taken as normal."""
    return math.erf(change * 2.0 ** (MANTISSA_BITS[dtype] + 0.5) / (typical_weight * math.sqrt(2)))


def _std_of_a(spec: LoraSpec, module: AdaptedModule) -> float:
    """Standard deviation of A's elements as they are drawn."""
    kind, width = init_distribution(spec.A_init, module.in_features, module.dim)
    return width if kind == "normal" else width / math.sqrt(3)


@torch.no_grad()
def surviving_share(
    adapter: Mapping[str, Tensor],
    adapted: Sequence[AdaptedModule],
    weight_of: Callable[[str], Tensor],
    dtype: torch.dtype,
) -> float:
    """What merging in a dtype leaves of an update (lora/merge.py), over modules that are spread over the model."""
    every = max(1, len(adapted) // NUM_MEASURED)
    found = Survival()
    for module in adapted[::every]:
        one = AdapterTensors.of(module.name, module.scale, adapter).to(torch.float32)
        base = weight_of(f"{module.name}.weight").detach().to(device=one.a.device, dtype=dtype)
        found.add(one.scale * (one.b @ one.a), one.merged(base).float() - base.float())
    return found.share


def mode_of_finished(
    adapter: Mapping[str, Tensor],
    adapted: Sequence[AdaptedModule],
    weight_of: Callable[[str], Tensor],
    dtype: torch.dtype,
) -> SyncMode:
    """How an adapter that nobody trains on is served by an engine of this dtype."""
    if dtype == torch.float32 or not adapter:
        return "merged"
    return "merged" if surviving_share(adapter, adapted, weight_of, dtype) >= LEAST_SHARE else "adapter"


def stored_weight(model_path: Path, name: str) -> Tensor:
    """A weight of a Hugging Face directory."""
    with safe_open(stored_tensors(model_path)[name].path, framework="pt") as file:
        return file.get_tensor(name)


class SyncChoice:
    """What a sync moves, from the start of a run to its end. `weight_of` has the base's weights, by name; `dtype` is
    the engine's. `takes_both`: whether an engine can change over while it runs."""

    def __init__(
        self,
        chosen: Chosen,
        adapted: Sequence[AdaptedModule] = (),
        weight_of: Callable[[str], Tensor] | None = None,
        dtype: str = "float32",
        *,
        takes_both: bool = False,
    ) -> None:
        self.mode: SyncMode = chosen.mode
        self._chosen, self._adapted, self._weight_of, self._dtype = chosen, adapted, weight_of, dtype
        self._takes_both = takes_both
        self._settled: Settled | None = None
        logger.info(f"{KEY}: {chosen.mode} ({chosen.reason})")
        if chosen.warning is not None:
            logger.warning(chosen.warning)

    @property
    def is_open(self) -> bool:
        """Whether the first update is still to be measured."""
        return self._chosen.is_open and self._settled is None

    def see(self, step: int, adapter: Mapping[str, Tensor]) -> None:
        """Decide again, by the first adapter with a B that is not zero. `step`: complete steps before it."""
        if not any(bool(adapter[adapter_tensor_name(module.name, "B")].any()) for module in self._adapted):
            return
        assert self._weight_of is not None, "where the first update decides there is a base"
        share = surviving_share(adapter, self._adapted, self._weight_of, torch_dtype(self._dtype))
        stays = ""
        if share >= LEAST_SHARE and self._takes_both:
            self.mode = "merged"
        elif share >= LEAST_SHARE and self.mode == "adapter":
            stays = "; the engine was started for adapters"
        self._settled = Settled(mode=self.mode, surviving_share=share, step=step)
        verb = "keeps" if self.mode == "merged" else "would keep"
        logger.info(
            f"{KEY}=auto: {self.mode} (merging in {self._dtype} {verb} {share:.0%} of the update at step {step}{stays})"
        )

    def save(self, directory: Path) -> None:
        """Write what was decided, once it is."""
        if self._settled is not None:
            text = json.dumps(asdict(self._settled), indent=2)
            (directory / CHOICE_FILE).write_text(text + "\n", encoding="utf-8")

    def load(self, directory: Path) -> None:
        """Read what `save` wrote, if it was decided by then."""
        path = directory / CHOICE_FILE
        if not self._chosen.is_open or not path.is_file():
            return
        settled = self._settled = Settled(**json.loads(path.read_text(encoding="utf-8")))
        if self._takes_both:
            self.mode = settled.mode
        logger.info(f"{KEY}=auto: {self.mode}, as decided at step {settled.step}")
