"""The verbs of a policy: the model that is trained. A driver knows nothing else about it.

`PolicySetup` is what either backend is built from, beside its config.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from nemo_rl_lora.config.optimizer_settings import AdamSettings
from nemo_rl_lora.lora.files import AdapterBase
from nemo_rl_lora.lora.spec import LoraSpec
from nemo_rl_lora.types import Batch, LossFn, StepOutput, SyncMode, WeightsRef

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySetup:
    """What a policy is built from, beside its config."""

    model_path: Path
    base_model_name: str  # as the run names it
    base: AdapterBase  # what a saved adapter says that it was trained on
    spec: LoraSpec | None  # None: full fine-tuning
    seed: int
    temperature: float
    keep_reference: bool  # reference_logprobs will be asked for
    logprob_rows: int  # rows (or pairs) of a pass without gradient, where microbatches are filled by rows
    adam: AdamSettings
    initial_adapter: Path | None = None  # a directory in PEFT's format, known to fit; None: A is drawn, B is zero
    reference: Literal["base", "initial"] = "base"  # initial: the adapter as it was at the run's start

    @property
    def copies_reference(self) -> bool:
        """Whether the reference is a copy of what is trained, and not the base, which is there anyway."""
        return self.keep_reference and (self.spec is None or self.reference == "initial")


class Policy(Protocol):
    def logprobs(self, batch: Batch) -> Tensor:
        """[B, T] fp32, dropout off, at the temperature of generation; 0.0 outside the loss mask."""
        ...

    def reference_logprobs(self, batch: Batch) -> Tensor:
        """The same of the reference, the base or the initial adapter: [B, T] fp32."""
        ...

    def train_step(self, batch: Batch, loss_fn: LossFn) -> StepOutput:
        """All microbatches of the batch, then one optimizer step. Raises FloatingPointError on a non-finite loss
        or gradient, before the optimizer moves."""
        ...

    def publish(self, version: int, mode: SyncMode) -> WeightsRef:
        """Offer the current weights to a generation engine."""
        ...

    def save(self, path: Path) -> None:
        """Write weights and optimizer state into an existing directory."""
        ...

    def load(self, path: Path) -> None:
        """Read what `save` wrote."""
        ...

    def close(self) -> None: ...
