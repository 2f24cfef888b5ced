"""What an algorithm is to the loop, and the record of a run that both work with.

An algorithm is one object from the configuration to the last step: it reads its data, then `attach` gives it the run,
then it trains. It knows no backend and no engine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from nemo_rl_lora.algorithms.phase import Phase
from nemo_rl_lora.algorithms.served import ServedPolicy
from nemo_rl_lora.checkpoints.record import TrainingInfo
from nemo_rl_lora.checkpoints.steps import Checkpointer, ResumePoint
from nemo_rl_lora.config.loop import LoopConfig
from nemo_rl_lora.config.master import MasterConfig
from nemo_rl_lora.data.loader import RowLoader
from nemo_rl_lora.evaluation.during_run import Evaluations
from nemo_rl_lora.generation.protocol import Generation
from nemo_rl_lora.policy.protocol import Policy
from nemo_rl_lora.run.console import KeyMetric, TrainingConsole
from nemo_rl_lora.run.memory import from_phase, lacked_memory_before_weights_moved
from nemo_rl_lora.run.metrics import RolloutSample, RunLog, Stopwatch
from nemo_rl_lora.run.utilization import Utilization
from nemo_rl_lora.types import Batch, LossFn, StepOutput

M = TypeVar("M", bound=MasterConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run with its weights loaded: what the loop and the algorithm work with."""

    config: MasterConfig
    policy: Policy
    served: ServedPolicy | None  # the engine, where the algorithm samples or evaluations do
    evaluations: Evaluations
    loader: RowLoader[Any]
    tokenizer: Any
    num_steps: int  # of the phase, where the run has some
    phase: Phase | None  # None: the run has no phases
    lr_at: Callable[[int], float]  # the learning rate of a step of the run, from 0, where it has no phases
    resume: ResumePoint | None  # where it continues; None for a new run
    origin: TrainingInfo  # before the first step: what every checkpoint says of the base and of the adapter's start
    checkpointer: Checkpointer
    log: RunLog
    console: TrainingConsole
    utilization: Utilization


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDone:
    """What a step did. `counts` are added to the run's totals; `num_tokens` is one of them. `token_ids` are the rows
    that were drawn, read only where their digest is recorded. Its optimizer steps are timed as "policy_training"."""

    metrics: Mapping[str, float]
    counts: Mapping[str, float]
    token_ids: Iterable[Sequence[int]]
    outputs: Sequence[StepOutput]  # of its optimizer steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Validated:
    """What a validation found. `reached` says why the run is complete here, where it is."""

    metrics: Mapping[str, float]
    samples: Sequence[RolloutSample] = field(default=())
    reached: str | None = None


class Algorithm(ABC, Generic[M]):
    """Its data, a step of it, and a validation. `step` is the number of complete steps before it."""

    key_metrics: ClassVar[tuple[KeyMetric, ...]]  # what the console shows, the headline first
    run: Run  # from `attach` on
    num_tokens = 0.0  # of the run, before the step that begins
    has_moved = False  # whether the step that has begun has changed the weights, or what `save` writes

    def __init__(self, config: M) -> None:
        self.config = config

    @property
    @abstractmethod
    def loop(self) -> LoopConfig:
        """The section of the configuration that is named like the algorithm."""

    @property
    @abstractmethod
    def logprob_rows(self) -> int:
        """Rows (or pairs) of a pass without gradient, where microbatches are filled by rows."""

    @property
    def temperature(self) -> float:
        """At which log-probabilities are taken."""
        return 1.0

    @abstractmethod
    def load_data(self, tokenizer: Any) -> RowLoader[Any]:
        """Read and check every row. ValueError names the first thing that is wrong."""

    @abstractmethod
    def tokens_of(self, row: Any) -> tuple[int, int]:
        """What a row of the loader adds to the run's tokens, at least and at most."""

    @abstractmethod
    def longest_batch(self, vocabulary: int) -> Batch:
        """The rows of an optimizer step, each as long as the limits allow, of made-up tokens below `vocabulary`: what a
        step may need memory for."""

    @abstractmethod
    def data_digests(self) -> dict[str, str]:
        """Of the rows that `load_data` read, as tokenised: a digest for the key of each dataset."""

    def reward_digests(self) -> dict[str, str]:
        """Of the code that scores completions, by the key that names it; most have none."""
        return {}

    @abstractmethod
    def describe_data(self) -> str:
        """What `load_data` read, for `--plan`."""

    @property
    @abstractmethod
    def validation_metrics(self) -> tuple[str, ...]:
        """What `validate` finds, by name; empty where there is nothing to measure on. `load_data` comes first."""

    def attach(self, run: Run) -> None:
        """The run to train in; `load_data` comes first."""
        self.run = run

    def leave(self) -> None:
        """Hold the run no longer, and with it the weights; its data stay."""
        del self.run

    @abstractmethod
    def train(self, step: int, watch: Stopwatch) -> StepDone:
        """Draw the next batch and train on it. Raises StopIteration where the data has ended."""

    def optimizer_step(self, batch: Batch, loss_fn: LossFn) -> StepOutput:
        """The policy's, for `train`."""
        had_moved, self.has_moved = self.has_moved, True
        try:
            return self.run.policy.train_step(batch, loss_fn)
        except Exception as error:  # of whatever kind: it is raised again
            if isinstance(error, FloatingPointError) or lacked_memory_before_weights_moved(error):
                self.has_moved = had_moved
            raise

    @abstractmethod
    def validate(self, step: int, watch: Stopwatch) -> Validated | None:
        """Measure the policy as it is; None where there is nothing to measure it on. `watch` is the next step's, for
        what is done here in its place."""

    def serve(self, step: int, watch: Stopwatch) -> Generation:
        """The run's engine, free and with the weights after `step` complete steps. `watch` is the next step's, for what
        is done here in its place."""
        assert self.run.served is not None, "there are evaluations"
        self.run.console.stage("syncing weights")
        with from_phase("weight_sync"):
            self.run.served.sync(step)
        return self.run.served.generation

    def save(self, directory: Path, step: int, *, urgent: bool) -> None:  # noqa: B027
        """Write what the algorithm itself has to keep after `step` complete steps into the step's directory: beside
        the position in the data, most have nothing. Urgent: wait for nothing."""

    def load(self, directory: Path) -> None:  # noqa: B027
        """Read what `save` wrote."""

    def detach(self) -> None:  # noqa: B027
        """End what goes on beside the steps, while the policy and the engine are still there."""

    def close(self) -> None:  # noqa: B027
        """End what `load_data` opened."""


def mean_outputs(outputs: Sequence[StepOutput]) -> dict[str, float]:
    """Metrics of a step's optimizer steps: means; min and max where a name says so; the last learning rate."""
    metrics: dict[str, float] = {}
    for name in outputs[0].metrics:
        values = [output.metrics[name] for output in outputs]
        reduce = min if name.endswith("_min") else max if name.endswith("_max") else lambda x: sum(x) / len(x)
        metrics[name] = reduce(values)
    num_forward = sum(output.num_forward_tokens for output in outputs)
    return metrics | {
        "loss": sum(output.loss for output in outputs) / len(outputs),
        "grad_norm": sum(output.grad_norm for output in outputs) / len(outputs),
        "lr": outputs[-1].lr,
        "num_forward_tokens": float(num_forward),
        "padding_share": sum(output.num_padding_tokens for output in outputs) / max(num_forward, 1),
    }
