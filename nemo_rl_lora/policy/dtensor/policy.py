"""The DTensor backend: Hugging Face's model with nemo-automodel's LoRA layers, sharded by FSDP2 and split by TP.

With an adapter, only A and B are trained, as fp32 masters; the base weights are never written, and the reference
policy is the same model with the adapters switched off, or with a copy of the initial ones. Without one, all weights
are trained as fp32 masters with the computation in `policy.precision`, and a reference, where it is needed, is a copy
of the base in memory. One process holds plain tensors and needs no process group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from nemo_rl_lora.config.dtensor import DTensorConfig
from nemo_rl_lora.config.lora import kernels_in_force, lora_block_key
from nemo_rl_lora.config.policy import PolicyConfig
from nemo_rl_lora.distributed.ranks import Ranks
from nemo_rl_lora.kernels import machine
from nemo_rl_lora.lora.adapter_tensors import SIDES, canonical_tensors
from nemo_rl_lora.lora.files import adapter_tensor_name
from nemo_rl_lora.lora.spec import LoraSpec
from nemo_rl_lora.lora.targets import AdaptedModule
from nemo_rl_lora.models.load import empty_model, load_model, load_model_config, share_structure
from nemo_rl_lora.patches.nemo_automodel import save_pretrained
from nemo_rl_lora.patches.transformers import checkpoint_activations
from nemo_rl_lora.policy.adapter_state import AdapterSwitch, draw_a, dropout_of
from nemo_rl_lora.policy.attention import layout_problems, supports_segments
from nemo_rl_lora.policy.dtensor.compiled import compile_layers
from nemo_rl_lora.policy.dtensor.linear import copy_masters, install_adapters, named_adapters
from nemo_rl_lora.policy.dtensor.loading import load_weights, reads_by_slices, refill_weights
from nemo_rl_lora.policy.dtensor.own_part import own_part
from nemo_rl_lora.policy.dtensor.sharded_files import (
    is_sharded,
    kept_buffers,
    read_sharded,
    write_hf_directory,
    write_sharded,
)
from nemo_rl_lora.policy.dtensor.sharding import (
    join_processes,
    shard_layers,
    split_as,
    split_matrices,
    whole_on_first,
)
from nemo_rl_lora.policy.forward import ForwardPass, Placed, default_chunk_tokens, refuse_unreached
from nemo_rl_lora.policy.microbatches import Cutting, Portion
from nemo_rl_lora.policy.protocol import PolicySetup
from nemo_rl_lora.policy.step import Share, empty_loss, microbatch_loss, rows_in_order
from nemo_rl_lora.policy.trained import Trained, TrainedPolicy, adapted_modules, load_base
from nemo_rl_lora.tensors import LazyTensors, torch_dtype
from nemo_rl_lora.types import LossFn


class DTensorPolicy(TrainedPolicy):
    """A Policy (policy/protocol.py) on one device, or one device's part of it."""

    def __init__(self, config: PolicyConfig, setup: PolicySetup) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._sharing = join_processes(config.dtensor_cfg)
        self._model = self._load_base(config, setup)
        self._base_structure = share_structure(self._model) if self._sharing is None else None
        adapted, switch = self._install(config, setup)
        self._flat = supports_segments(self._model.config, config.max_total_sequence_length)
        if problems := layout_problems(config, self._model.config):
            raise ValueError("\n".join(problems))
        if config.dtensor_cfg.activation_checkpointing:
            checkpoint_activations(self._model)
        self._forward = self._forward_pass(config, setup)
        partial_names = self._shard(config, setup)
        reached = self._forward.verify(
            torch_dtype(config.precision), compile_layers if config.compile is True else None
        )
        if setup.spec is not None:
            refuse_unreached(adapted, reached, lora_block_key(config))
        self._forget_gathered()
        trained = ModuleParameters(self._model, adapted, switch)  # FSDP2 lays memory out anew in its first pass
        ranks = Ranks()
        if (sharing := self._sharing) is not None:
            ranks = sharing.ranks(partial_names.__contains__, lambda name: sharing.answers_for(trained.held[name]))
        if setup.spec is not None:
            trained.draw(setup.spec, setup.seed)
            if self._sharing is None:
                trained.copies = copy_masters(self._model, adapted)
        self._parameters = trained
        super().__init__(config, setup, ranks, trained)

    @property
    def cutting(self) -> Cutting:
        mesh = self._forward.sequence_mesh
        return self._cutting(flat=self._flat, round_to=1 if mesh is None else mesh.size())

    def logprobs_of(self, portion: Portion) -> Tensor:
        """[b, T] fp32 of the portion's rows, in a process that reports; elsewhere zeros."""
        shape = portion.batch.token_ids.shape
        micros = portion.microbatches()
        self._trained.forget_pass()
        with torch.no_grad():
            found = [self._forward(micro, shape[1]) for micro in micros]
        self._forget_gathered()
        return rows_in_order(shape, micros, found)

    def _gradients_of(self, portion: Portion, loss_fn: LossFn) -> list[Share]:
        batch, data = portion.batch, self._ranks.data_share
        width, shares = batch.token_ids.shape[1], []
        self._trained.forget_pass()
        for place, micro in enumerate(portion.microbatches()):
            index = place * data.number + data.index  # a number of its own for what each rank drops
            with dropout_of(self._trained.switch, self._setup.seed, self._optimizer.num_steps, index):
                loss, share = self._loss_of(self._forward.place(micro, batch), width, loss_fn)
                loss.backward()
            shares.append(share)
        return shares

    def base_model(self) -> PreTrainedModel:
        """A module tree without adapters over the same base parameters, which nobody may write; where those are
        sharded, the base loaded once more."""
        if self._base_structure is not None:
            return self._base_structure
        return load_base(self._config, self._setup)

    def _load_base(self, config: PolicyConfig, setup: PolicySetup) -> PreTrainedModel:
        """The model: with its weights in a process that holds them all, else on the meta device."""
        overrides = dict(config.hf_config_overrides)
        dtype = torch.float32 if setup.spec is None else torch_dtype(config.precision)
        if self._sharing is not None:
            model = empty_model(load_model_config(setup.model_path, overrides))
            nn.Module.to(model, dtype)
            model.config.dtype = dtype
            return model.eval()
        model = load_model(setup.model_path, dtype=dtype, config_overrides=overrides)
        nn.Module.to(model, self._device)
        return model

    def _install(
        self, config: PolicyConfig, setup: PolicySetup
    ) -> tuple[tuple[AdaptedModule, ...], AdapterSwitch | None]:
        """Put adapters into the model, if there are any, and let what is trained have gradients."""
        if (spec := setup.spec) is None:
            self._model.requires_grad_(True)
            return (), None
        adapted = adapted_modules(config, setup, spec, self._model)
        kernels = kernels_in_force(config, spec, lacks=machine.kernel_problem())
        return adapted, install_adapters(self._model, adapted, spec, kernels=kernels)

    def _forward_pass(self, config: PolicyConfig, setup: PolicySetup) -> ForwardPass:
        return ForwardPass(
            self._model,
            flat=self._flat,
            temperature=setup.temperature,
            chunk_tokens=config.logprob_chunk_size or default_chunk_tokens(self._device),
            autocast_dtype=_trained_dtype(config, setup) if self._sharing is None else None,
            device=self._device,
            sequence_mesh=None if self._sharing is None else self._sharing.sequence_mesh,
        )

    def _shard(self, config: PolicyConfig, setup: PolicySetup) -> frozenset[str]:
        """Split the model among the processes and load its weights; the names that `split_matrices` gives."""
        if self._sharing is None:
            return frozenset()
        dtensor = config.dtensor_cfg
        partial_names = split_matrices(self._model, self._sharing, dtensor.custom_parallel_plan)
        shard_layers(
            self._forward,
            self._model,
            self._sharing,
            compute_dtype=_trained_dtype(config, setup),
            cpu_offload=dtensor.cpu_offload,
        )
        load_weights(
            self._model,
            setup.model_path,
            how=self._way_to_load(dtensor, setup.model_path),
            dtype=torch_dtype(config.precision) if setup.spec is not None else torch.float32,
            device=torch.device("cpu") if dtensor.cpu_offload else self._device,
        )
        for buffer in self._model.buffers():
            buffer.data = buffer.to(self._device)
        return partial_names

    def _way_to_load(self, dtensor: DTensorConfig, path: Path) -> Literal["all_ranks", "broadcast"]:
        return dtensor.load or ("all_ranks" if reads_by_slices(self._model, path) else "broadcast")

    def _save_all(self, path: Path) -> None:
        """Every process writes its part of what is trained; the Hugging Face model beside it has fp32 weights."""
        if self._sharing is None:
            super()._save_all(path)
            return
        parameters, optimizer = self._parameters, self._optimizer
        write_hf_directory(path / "weights", self._model, parameters.held, source=self._setup.model_path)
        moments = {name: optimizer.moments_of(master) for name, master in parameters.masters().items()}
        write_sharded(path / "optimizer", parameters.held, parameters.shared(moments), optimizer.num_steps)

    def _load_all(self, path: Path) -> None:
        parameters, optimizer = self._parameters, self._optimizer
        if is_sharded(path / "optimizer"):
            masters = parameters.masters()
            moments = {name: (torch.zeros_like(master), torch.zeros_like(master)) for name, master in masters.items()}
            optimizer.num_steps = read_sharded(path / "optimizer", parameters.held, parameters.shared(moments))
            for name, master in masters.items():
                optimizer.set_moments(master, *moments[name])
        elif self._sharing is None:
            super()._load_all(path)
        else:
            way = self._way_to_load(self._config.dtensor_cfg, path / "weights")
            refill_weights(self._model, path / "weights", how=way)
            self._load_moments(path / "optimizer")

    def _loss_of(self, placed: Placed, width: int, loss_fn: LossFn) -> tuple[Tensor, Share]:
        found = self._forward(placed, width)
        if len(placed.micro.rows) == 0:
            return empty_loss(found, placed.micro)
        assert placed.rows is not None
        return microbatch_loss(placed.rows, placed.micro, found, loss_fn)

    def _forget_gathered(self) -> None:
        """FSDP keeps what a pass without gradients gathered last; the next pass would read it after a change."""
        if isinstance(self._forward, FSDPModule):
            self._forward.reshard()

    def _base_weight(self, name: str) -> Tensor:
        return whole_on_first(self._model.get_parameter(name))

    def _write_weights(self, directory: Path, tensors: Mapping[str, Tensor]) -> None:
        kept = kept_buffers(self._model, self._model, tensors)
        save_pretrained(self._model, directory, {**tensors, **kept})

    def _read_weights(self, directory: Path) -> Mapping[str, Tensor]:
        return load_model(directory, dtype=torch.float32, config_overrides={}).state_dict()


def _trained_dtype(config: PolicyConfig, setup: PolicySetup) -> torch.dtype | None:
    """The dtype that trained weights are cast to in the forward pass; None where they are as they are, or frozen."""
    dtype = torch_dtype(config.precision)
    return dtype if setup.spec is None and dtype != torch.float32 else None


class ModuleParameters(Trained):
    """The parameters of a Hugging Face model that are trained, under canonical adapter names or the model's own.

    A parameter that is sharded has this process's part as its master: a plain tensor over the same memory.
    """

    def __init__(
        self, model: nn.Module, adapted: tuple[AdaptedModule, ...] = (), switch: AdapterSwitch | None = None
    ) -> None:
        self.adapted, self.switch = adapted, switch
        self._linears = [linear for _, linear in named_adapters(model, adapted)]
        self.held: dict[str, nn.Parameter] = dict(model.named_parameters())
        if switch is not None:
            tensors = canonical_tensors({name: linear.tensors for name, linear in named_adapters(model, adapted)})
            self.held = cast(dict[str, nn.Parameter], tensors)
        self._masters = {name: _own_memory(parameter) for name, parameter in self.held.items()}

    def masters(self) -> dict[str, nn.Parameter]:
        return self._masters

    def canonical(self, of: Callable[[nn.Parameter], Tensor]) -> Mapping[str, Tensor]:
        """As in `Trained`; the tensors of a whole model are gathered when they are read."""
        reads = {name: partial(self._whole, name, of) for name in self.held}
        return {name: read() for name, read in reads.items()} if self.switch is not None else LazyTensors(reads)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(parameter.shape) for name, parameter in self.held.items()}

    def masters_from(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[nn.Parameter, Tensor]]:
        return ((master, self._part_of(name, tensors[name])) for name, master in self._masters.items())

    def take_gradients(self) -> None:
        for name, parameter in self.held.items():
            if isinstance(gradient := parameter.grad, DTensor):
                self._masters[name].grad, parameter.grad = gradient.to_local(), None

    def forget_pass(self) -> None:
        for linear in self._linears:
            if linear.together is not None:
                linear.together.forget()

    @torch.no_grad()
    def draw(self, spec: LoraSpec, seed: int) -> None:
        """Start every adapter: A as a function of the seed and its name, B at zero."""
        for module in self.adapted:
            a, b = (adapter_tensor_name(module.name, side) for side in SIDES)
            drawn = draw_a(spec, name=module.name, in_features=module.in_features, dim=module.dim, seed=seed)
            self._masters[a].copy_(self._part_of(a, drawn))
            self._masters[b].zero_()

    def shared(self, moments: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
        """Moments of the masters, as tensors that are split as the parameters are, over the same memory."""
        held = self.held
        return {name: (split_as(held[name], one), split_as(held[name], two)) for name, (one, two) in moments.items()}

    def _part_of(self, name: str, tensor: Tensor) -> Tensor:
        return tensor[own_part(self.held[name]).ranges]

    def _whole(self, name: str, of: Callable[[nn.Parameter], Tensor]) -> Tensor:
        return whole_on_first(self.held[name], of(self._masters[name]).detach())


def _own_memory(parameter: nn.Parameter) -> nn.Parameter:
    if not isinstance(parameter, DTensor):
        return parameter
    detached = parameter.detach()
    assert isinstance(detached, DTensor)
    return nn.Parameter(detached.to_local(), requires_grad=parameter.requires_grad)
