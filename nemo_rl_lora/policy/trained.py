"""What is trained, and the verbs of a policy that follow from it: written once, for both backends.

Contract: a backend says what it trains as a `Trained`: fp32 masters, of which each process holds its part, and the way
between them and canonical tensors, which are whole and have the names of Hugging Face's files. From that, and from how
it computes log-probabilities, `TrainedPolicy` makes the optimizer, the reference, what is published, and checkpoints.
A checkpoint is thus the same whatever the backend and however the masters are sharded.

Of the processes that share a model, each makes the same calls, with its own portion of a batch or with the whole one;
the first one has the weights that are published, and writes files, but for those of which each writes its own.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nemo_rl_lora.algorithms.losses.likelihood import SftLoss
from nemo_rl_lora.config.errors import ConfigError
from nemo_rl_lora.config.lora import lora_block_key
from nemo_rl_lora.config.policy import PolicyConfig
from nemo_rl_lora.distributed.ranks import Ranks
from nemo_rl_lora.lora.files import (
    ADAPTER_DIRECTORY,
    REFERENCE_DIRECTORY,
    check_shapes,
    read_adapter,
    read_moments,
    write_adapter,
    write_moments,
)
from nemo_rl_lora.lora.peft_config import spec_to_peft_config
from nemo_rl_lora.lora.spec import LoraSpec
from nemo_rl_lora.lora.targets import AdaptedModule, resolve_trained_targets
from nemo_rl_lora.models.families import has_tied_head
from nemo_rl_lora.models.load import linear_modules, load_model
from nemo_rl_lora.policy import device_memory
from nemo_rl_lora.policy.adapter_state import AdapterSwitch
from nemo_rl_lora.policy.master_copies import MasterCopies
from nemo_rl_lora.policy.microbatches import Cutting, Kind, Portion, plan_from_config
from nemo_rl_lora.policy.offer import offer
from nemo_rl_lora.policy.optimizer import MasterAdam
from nemo_rl_lora.policy.protocol import PolicySetup
from nemo_rl_lora.policy.step import Share, copies_on_cpu, holding, peak_gpu_gib, read_shares, step_output
from nemo_rl_lora.policy.token_budget import FoundTokens, LongestRowTooLongError, Sizes, find_tokens
from nemo_rl_lora.tensors import torch_dtype
from nemo_rl_lora.types import Batch, LossFn, StepOutput, SyncMode, WeightsRef


class Trained(ABC):
    """The fp32 masters of this process, and the way between them and canonical tensors."""

    adapted: tuple[AdaptedModule, ...] = ()  # in module order; none where all weights are trained
    switch: AdapterSwitch | None = None
    aliases: Mapping[str, str] = {}  # of a master with several canonical names: each further name -> the first
    copies: MasterCopies | None = None  # what the layers read in place of the parameters

    @abstractmethod
    def masters(self) -> dict[str, nn.Parameter]:
        """What the optimizer holds, by a name that is the same in every process that holds a part of it."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """What the layers read, and a copied reference takes the place of: by default, the masters."""
        return self.masters()

    @abstractmethod
    def canonical(self, of: Callable[[nn.Parameter], Tensor]) -> Mapping[str, Tensor]:
        """`of` every master (itself, its gradient, a moment), gathered under canonical names on the first process; on
        others of the meta device. Each may be gathered when it is read, so that all processes read in one order."""

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor of `canonical`."""

    @abstractmethod
    def masters_from(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Every master of this process with its part of canonical tensors. ValueError where they do not fit."""

    def take_gradients(self) -> None:  # noqa: B027 (nothing to do where they are the masters' own)
        """Bring the gradients of a backward pass to the masters."""

    def forget_pass(self) -> None:  # noqa: B027 (nothing to do where layers keep nothing from one call to the next)
        """Let go of what layers keep of a forward pass that broke off."""

    def apply(self) -> None:  # noqa: B027 (nothing to do where the layers read the masters)
        """Bring the masters, which have moved, into the parameters."""

    def refresh(self) -> None:
        """Bring the parameters, which have changed, to the layers."""
        if self.copies is not None:
            self.copies.refresh()


def adapted_modules(
    config: PolicyConfig, setup: PolicySetup, spec: LoraSpec, model: PreTrainedModel
) -> tuple[AdaptedModule, ...]:
    """The modules of a Hugging Face model that get an adapter, in module order."""
    return resolve_trained_targets(
        spec,
        linear_modules(model),
        tied_head=has_tied_head(model.config),
        model_label=setup.base_model_name,
        config_key=lora_block_key(config),
    )


def load_base(config: PolicyConfig, setup: PolicySetup) -> PreTrainedModel:
    """The base model without adapters, loaded once more in this process, for an engine that decodes from it."""
    overrides = dict(config.hf_config_overrides)
    return load_model(setup.model_path, dtype=torch_dtype(config.precision), config_overrides=overrides)


class TrainedPolicy(ABC):
    """A Policy (policy/protocol.py) without the computation of log-probabilities and of a step."""

    def __init__(self, config: PolicyConfig, setup: PolicySetup, ranks: Ranks, trained: Trained) -> None:
        self._config, self._setup, self._ranks, self._trained = config, setup, ranks, trained
        if setup.initial_adapter is not None:
            self._read_adapter(setup.initial_adapter)
        self._reference = copies_on_cpu(trained.parameters()) if setup.copies_reference else None
        self._optimizer = MasterAdam(list(trained.masters().values()), setup.adam)
        self._train_tokens: int | None = None  # of a microbatch, in place of what the configuration says

    # A batch, of which this process has all rows or its own portion.

    @property
    @abstractmethod
    def cutting(self) -> Cutting:
        """How this process shares batches with the others."""

    @property
    def reports(self) -> bool:
        """Whether what this process finds of its portion counts: of those that have the same, one reports."""
        return self._ranks.reports

    def logprobs(self, batch: Batch) -> Tensor:
        """[B, T] fp32, dropout off; 0.0 outside the loss mask."""
        portion = self._portion(batch, "logprob")
        out = torch.zeros(batch.token_ids.shape, dtype=torch.float32)
        out[portion.rows] = self.logprobs_of(portion)
        return self._ranks.total(out)

    @abstractmethod
    def logprobs_of(self, portion: Portion) -> Tensor:
        """[b, T] fp32 of the portion's rows, in a process that reports; elsewhere zeros."""

    def reference_logprobs(self, batch: Batch) -> Tensor:
        """The same with the adapter switched off, or with the copied reference in place."""
        with self._as_reference():
            return self.logprobs(batch)

    def reference_logprobs_of(self, portion: Portion) -> Tensor:
        with self._as_reference():
            return self.logprobs_of(portion)

    def train_step(self, batch: Batch, loss_fn: LossFn) -> StepOutput:
        """All microbatches, then one optimizer step. FloatingPointError before the optimizer moves on bad numbers."""
        return self.train_on(self._portion(batch, "train"), loss_fn)

    def train_on(self, portion: Portion, loss_fn: LossFn) -> StepOutput:
        """`train_step` with this process's portion of the batch; every process gives what the whole step did."""
        self._optimizer.zero_grad(set_to_none=True)
        return self._optimizer_step(self._gradients_of(portion, loss_fn), portion.batch.lr)

    @abstractmethod
    def _gradients_of(self, portion: Portion, loss_fn: LossFn) -> list[Share]:
        """Forward and backward on every microbatch: gradients are added to those that are there."""

    # How many tokens a training microbatch may have, where policy.searched_key says that it is to be found.

    def use_train_tokens(self, tokens: int) -> None:
        """Cut batches to train on by this budget from now on."""
        self._train_tokens = tokens

    def find_train_tokens(self, longest: Batch, kept_bytes: int = 0) -> FoundTokens:
        """The largest budget that this device has memory for, which is used from now on; the same on every process.

        `longest`: a step's rows, each as long as any may be. `kept_bytes` are left to others on this device.
        ConfigError where not even one row fits.
        """
        device = self._ranks.device
        masters = [m for m in self._trained.masters().values() if m.device.type == device.type]
        moments = sum(2 * master.nbytes for master in masters if not self._optimizer.state.get(master))
        sizes, attempt = self._sizes(longest), partial(self._attempt, longest)
        try:
            found = find_tokens(attempt, sizes, device=device, ranks=self._ranks, reserve_bytes=kept_bytes + moments)
        except LongestRowTooLongError as error:
            name = "dtensor_cfg" if self._config.active_backend == "dtensor" else "megatron_cfg"
            recompute = f"policy.{name}.activation_checkpointing"
            is_on = getattr(self._config, name).activation_checkpointing
            raise ConfigError(
                f"{self._config.searched_key}='auto': a microbatch of the longest row, {error.tokens} tokens, does not "
                f"fit into the memory of {self.device}. Lower policy.max_total_sequence_length"
                f"{'' if is_on else f', set {recompute}=true'}, or share the model among more processes."
            ) from error
        self.use_train_tokens(found.tokens)
        return found

    def _sizes(self, longest: Batch) -> Sizes:
        least, largest = (
            max(portion.most_tokens for portion in self.cutting.with_train_tokens(tokens).portions(longest, "train"))
            for tokens in (1, int(longest.sequence_length.sum()))
        )
        return Sizes(least=least, largest=largest, round_to=self.cutting.train.round_to)

    def _attempt(self, longest: Batch, tokens: int) -> int:
        """Forward and backward on the microbatches with which a step of this budget begins: as many as are in memory at
        a time, and one that finds gradients there. Returns the tokens of the largest; leaves no gradient."""
        portions = self.cutting.with_train_tokens(tokens).portions(longest, "train")
        portion = portions[self._ranks.data_share.index].first(self._num_in_flight + 1)
        try:
            read_shares(self._gradients_of(portion, SftLoss()))
        finally:
            self._trained.forget_pass()
            self._trained.take_gradients()
            self._optimizer.zero_grad(set_to_none=True)
            for parameter in self._trained.parameters().values():
                parameter.grad = None
        return portion.most_tokens

    @property
    def _num_in_flight(self) -> int:
        """Microbatches whose activations are in memory at a time."""
        return 1

    def _portion(self, batch: Batch, kind: Kind) -> Portion:
        return self.cutting.portions(batch, kind)[self._ranks.data_share.index]

    def publish(self, version: int, mode: SyncMode) -> WeightsRef:
        """merged: `<module>.weight` in the compute dtype, merged when read; adapter: A and B in fp32.

        Without an adapter every weight is published as merged.
        """
        return offer(
            version,
            mode,
            self._trained.canonical(_itself),
            shapes=self._trained.shapes(),
            adapted=None if self._setup.spec is None else self.adapted,
            weight_of=self._base_weight,
            dtype=self.compute_dtype,
        )

    def save(self, path: Path) -> None:
        """adapter/ (PEFT files) or weights/ (a Hugging Face model), reference_adapter/ if copied, and optimizer/."""
        if self._setup.spec is None:
            self._save_all(path)
            return
        self._write_adapter(path / ADAPTER_DIRECTORY, self._setup.spec)
        if self._reference is not None:
            with self._as_reference():
                self._write_adapter(path / REFERENCE_DIRECTORY, self._setup.spec)
        self._save_moments(path / "optimizer")

    def load(self, path: Path) -> None:
        """Strictly what `save` of either backend wrote. Without moments the optimizer starts anew."""
        if self._setup.spec is None:
            self._load_all(path)
            return
        if self._reference is not None:
            self._read_adapter(path / REFERENCE_DIRECTORY)
            self._reference = copies_on_cpu(self._trained.parameters())
        self._read_adapter(path / ADAPTER_DIRECTORY)
        self._load_moments(path / "optimizer")

    def _save_all(self, path: Path) -> None:
        """Every weight, and what the optimizer has of it."""
        tensors = dict(self._trained.canonical(_itself))
        if self._ranks.is_first:
            self._write_weights(path / "weights", tensors)
        del tensors
        self._save_moments(path / "optimizer")

    def _load_all(self, path: Path) -> None:
        self._set_masters(path, self._read_weights(path / "weights"))
        self._load_moments(path / "optimizer")

    def _save_moments(self, directory: Path) -> None:
        first, second = (dict(self._trained.canonical(partial(self._moment, index=index))) for index in (0, 1))
        if self._ranks.is_first:
            aliases = self._trained.aliases
            moments = {name: (first[name], second[name]) for name in first if name not in aliases}
            write_moments(directory, moments, self._optimizer.num_steps, aliases=aliases)

    def _load_moments(self, directory: Path) -> None:
        if not directory.is_dir():
            return
        moments, self._optimizer.num_steps = read_moments(
            directory, expected=self._trained.shapes().keys(), aliases=self._trained.aliases
        )
        first, second = ({name: pair[index] for name, pair in moments.items()} for index in (0, 1))
        pairs = zip(self._trained.masters_from(first), self._trained.masters_from(second), strict=True)
        for (master, one), (_, two) in pairs:
            self._optimizer.set_moments(master, one, two)

    def close(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    # Beyond the protocol: what the composition root wires into an engine of the same process.

    @abstractmethod
    def base_model(self) -> PreTrainedModel:
        """A Hugging Face model without adapters over the base parameters, which nobody may write."""

    @property
    def adapted(self) -> tuple[AdaptedModule, ...]:
        return self._trained.adapted

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch_dtype(self._config.precision)

    @property
    def device(self) -> str:
        """This process's device and its memory, by name."""
        return device_memory.describe(self._ranks.device)

    @property
    def gpu_name(self) -> str | None:
        """torch's name of this process's GPU; None without one."""
        return torch.cuda.get_device_name() if torch.cuda.is_available() else None

    @abstractmethod
    def _base_weight(self, name: str) -> Tensor:
        """A weight of the base by its Hugging Face name, on the first process."""

    @abstractmethod
    def _write_weights(self, directory: Path, tensors: Mapping[str, Tensor]) -> None:
        """A Hugging Face directory of these canonical tensors, which are all weights."""

    @abstractmethod
    def _read_weights(self, directory: Path) -> Mapping[str, Tensor]:
        """The canonical tensors of such a directory, in fp32."""

    def _cutting(self, *, flat: bool, can_share: bool = True, round_to: int = 1) -> Cutting:
        """Layouts as in `plan_from_config`."""
        plan = partial(plan_from_config, self._config, flat=flat, can_share=can_share, round_to=round_to)
        cutting = Cutting(
            train=plan("train", max_rows=self._config.train_micro_batch_size),
            logprob=plan("logprob", max_rows=self._setup.logprob_rows),
            share=self._ranks.data_share,
        )
        return cutting if self._train_tokens is None else cutting.with_train_tokens(self._train_tokens)

    def _optimizer_step(self, shares: Sequence[Share], lr: float | None) -> StepOutput:
        """One step from the gradients and losses of this process's microbatches and those of the others, with this
        learning rate or, where it is None, that of the schedule."""
        everybodys = [share for of_rank in self._ranks.reported(read_shares(shares)) for share in of_rank]
        self._trained.take_gradients()
        masters = self._trained.masters()
        self._ranks.sum_gradients(masters)
        output = step_output(everybodys, lambda loss: self._optimizer.move(loss, self._ranks.total_norm(masters), lr))
        self._trained.apply()
        self._trained.refresh()
        return replace(output, peak_gpu_gib=peak_gpu_gib(self._ranks))

    @contextlib.contextmanager
    def _as_reference(self) -> Iterator[None]:
        if self._reference is None:
            assert self._trained.switch is not None, "a full fine-tuning policy was built without a reference"
            with self._trained.switch.off():
                yield
            return
        try:
            with holding(self._trained.parameters(), self._reference):
                self._trained.refresh()
                yield
        finally:
            self._trained.refresh()

    def _write_adapter(self, directory: Path, spec: LoraSpec) -> None:
        tensors = self._trained.canonical(_itself)
        if self._ranks.is_first:
            base = self._setup.base
            write_adapter(directory, dict(tensors), spec_to_peft_config(spec, base.name, self.adapted), base)

    def _read_adapter(self, directory: Path) -> None:
        self._set_masters(directory, read_adapter(directory, expected=self._trained.shapes().keys())[0])

    @torch.no_grad()
    def _set_masters(self, source: Path, tensors: Mapping[str, Tensor]) -> None:
        check_shapes(source, expected=self._trained.shapes(), found=tensors)
        for master, tensor in self._trained.masters_from(tensors):
            master.copy_(tensor)
        self._trained.apply()
        self._trained.refresh()

    def _moment(self, master: nn.Parameter, index: int) -> Tensor:
        return self._optimizer.moments_of(master)[index]


def _itself(master: nn.Parameter) -> Tensor:
    return master
