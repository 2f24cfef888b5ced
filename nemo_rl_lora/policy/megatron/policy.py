"""The Megatron backend: megatron-core's model with adapters of our own, trained with AdamW.

The twin of policy/dtensor.py: the same verbs in the same order, and the same numbers. With an adapter, only A and B
are trained, as fp32 masters; the base weights are never written, and the reference policy is the same model with the
adapters switched off, or with a copy of the initial ones. Without one, all weights are trained: fp32 masters beside
weights in `policy.precision`, and a reference, where it is needed, is a copy of the base in memory.

Of the processes that share a model, each makes the same calls with the same whole batch; the first one writes files
and has the weights that are published.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor, nn
from transformers import PreTrainedModel

from nemo_rl_lora.config.lora import lora_block_key
from nemo_rl_lora.config.policy import PolicyConfig
from nemo_rl_lora.lora.dialects import spec_to_peft_config
from nemo_rl_lora.lora.files import (
    ADAPTER_DIRECTORY,
    REFERENCE_DIRECTORY,
    check_shapes,
    read_adapter,
    read_moments,
    write_adapter,
    write_moments,
)
from nemo_rl_lora.lora.spec import LoraSpec
from nemo_rl_lora.lora.targets import AdaptedModule, resolve_trained_targets
from nemo_rl_lora.policy.adapter import AdapterSwitch, dropout_of
from nemo_rl_lora.policy.forward import logprob_rows
from nemo_rl_lora.policy.head import Head
from nemo_rl_lora.policy.masters import MasterAdam
from nemo_rl_lora.policy.megatron.context import ContextPlan, length_multiple, own_loss_tokens, plan_context
from nemo_rl_lora.policy.megatron.convert import check_checkpoint, open_checkpoint
from nemo_rl_lora.policy.megatron.families import read_family, refuse_expert_targets
from nemo_rl_lora.policy.megatron.layers import Layer, build_model, flat_run, transformer_config
from nemo_rl_lora.policy.megatron.lora import Adapters
from nemo_rl_lora.policy.megatron.processes import join_processes, ranks_of
from nemo_rl_lora.policy.megatron.schedule import run_microbatches
from nemo_rl_lora.policy.megatron.weights import AllWeights, StageWeights
from nemo_rl_lora.policy.microbatches import Microbatch, plan_from_config, plan_microbatches
from nemo_rl_lora.policy.model import (
    empty_model,
    linear_modules,
    load_model,
    load_model_config,
    model_of_tensors,
    save_tensors,
)
from nemo_rl_lora.policy.passes import Share, copies_on_cpu, holding, microbatch_loss, step_output
from nemo_rl_lora.policy.protocol import PolicySetup
from nemo_rl_lora.policy.weights import offer
from nemo_rl_lora.tensors import torch_dtype
from nemo_rl_lora.types import Batch, LossFn, StepOutput, SyncMode, WeightsRef


@dataclass(frozen=True, slots=True)
class _Part:
    """A microbatch, and this process's tokens of it where context-parallel ranks share them."""

    micro: Microbatch
    context: ContextPlan | None


class MegatronPolicy:
    """A Policy (policy/protocol.py) on one device, or one device's part of it."""

    def __init__(self, config: PolicyConfig, setup: PolicySetup) -> None:
        self._config = config
        self._setup = setup
        self._hf_config = load_model_config(setup.model_path, dict(config.hf_config_overrides))
        family = read_family(self._hf_config, config.model_name, config.max_total_sequence_length)
        join_processes(config.megatron_cfg)
        self._ranks = ranks_of(family, config.megatron_cfg)
        self._family = family
        self._compute_dtype = torch_dtype(config.precision)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        core = transformer_config(family, config.megatron_cfg, self._compute_dtype)
        self._model = build_model(family, self._ranks.layout, core).to(self._device)
        self._weights = StageWeights(self._model, family, self._ranks)
        with open_checkpoint(setup.model_path) as slices:
            check_checkpoint(family, {name: tuple(s.get_shape()) for name, s in slices.items()}, str(config.model_name))
            self._weights.load(slices.__getitem__)
        self.adapted: tuple[AdaptedModule, ...] = ()
        self._switch: AdapterSwitch | None = None
        self._trained: Adapters | AllWeights
        if setup.spec is None:
            self._trained = AllWeights(self._weights, freeze_router=config.megatron_cfg.freeze_moe_router)
        else:
            self.adapted = self._resolve(setup.spec)
            self._trained = Adapters(
                self._model, self.adapted, setup.spec, family=family, ranks=self._ranks, seed=setup.seed
            )
            self._switch = self._trained.switch
        for layer in self._model.modules():
            if isinstance(layer, Layer):
                layer.recompute, layer.switch = config.megatron_cfg.activation_checkpointing, self._switch
        if setup.initial_adapter is not None:
            self._read_adapter(setup.initial_adapter)
        self._reference = copies_on_cpu(self._compared()) if setup.copies_reference else None
        self._optimizer = MasterAdam(list(self._trained.masters().values()), setup.adam)

    def logprobs(self, batch: Batch) -> Tensor:
        """[B, T] fp32, dropout off; 0.0 outside the loss mask."""
        width, parts = batch.token_ids.shape[1], self._parts(batch, "logprob")

        def rows_of(part: _Part, hidden: Tensor) -> tuple[Tensor, Tensor]:
            return hidden, self._logprob_rows(hidden, part, width).cpu()

        out = torch.zeros(batch.token_ids.shape, dtype=torch.float32)
        found = run_microbatches(self._model, parts, lambda _place, part: self._stage(part), rows_of, backward=False)
        for part, rows in zip(parts, found, strict=False):  # none are found before the last stage
            out[part.micro.rows] = rows
        return self._ranks.total(out)

    def reference_logprobs(self, batch: Batch) -> Tensor:
        """The same with the adapter switched off, or with the copied reference in place."""
        with self._as_reference():
            return self.logprobs(batch)

    def train_step(self, batch: Batch, loss_fn: LossFn) -> StepOutput:
        """All microbatches, then one optimizer step. FloatingPointError before the optimizer moves on bad numbers."""
        self._optimizer.zero_grad(set_to_none=True)
        width, data = batch.token_ids.shape[1], self._ranks.data_share

        def stage(place: int, part: _Part) -> Tensor:
            # A number of its own for what each rank drops: of data shares, and of the tokens of a sequence.
            index = (place * data.number + data.index) * self._ranks.context_group.size()
            index += self._ranks.context_group.rank()
            with dropout_of(self._switch, self._setup.seed, self._optimizer.num_steps, index):
                return self._stage(part)

        def loss_of(part: _Part, hidden: Tensor) -> tuple[Tensor, Share]:
            micro = part.micro
            if len(micro.rows) == 0:  # there to keep step with other ranks
                return hidden.float().sum() * 0.0, Share(0.0, {}, micro.num_tokens, micro.num_padding_tokens)
            return microbatch_loss(batch, micro, self._logprob_rows(hidden, part, width), loss_fn)

        found = run_microbatches(self._model, self._parts(batch, "train"), stage, loss_of, backward=True)
        shares = [share for of_rank in self._ranks.reported(found) for share in of_rank]
        masters = self._trained.masters()
        self._ranks.sum_gradients(masters)
        output = step_output(shares, lambda loss: self._optimizer.move(loss, self._ranks.total_norm(masters)))
        self._trained.apply()
        return output

    def publish(self, version: int, mode: SyncMode) -> WeightsRef:
        """merged: `<module>.weight` in the compute dtype, merged when read; adapter: A and B in fp32.

        Without an adapter every weight is published as merged.
        """
        return offer(
            version,
            mode,
            self._trained.canonical(_itself),
            adapted=None if self._setup.spec is None else self.adapted,
            weight_of=self._weights.hf_tensor,
            dtype=self._compute_dtype,
        )

    def save(self, path: Path) -> None:
        """adapter/ (PEFT files) or weights/ (a Hugging Face model), reference_adapter/ if copied, and optimizer/."""
        tensors, is_first = self._trained.canonical(_itself), self._ranks.is_first
        if self._setup.spec is None:
            if is_first:
                save_tensors(self._setup.model_path, self._hf_config, tensors, path / "weights")
        else:
            peft = spec_to_peft_config(self._setup.spec, self._setup.base_model_name, self.adapted)
            if is_first:
                write_adapter(path / ADAPTER_DIRECTORY, tensors, peft)
            if self._reference is not None:
                with self._as_reference():
                    tensors = self._trained.canonical(_itself)
                if is_first:
                    write_adapter(path / REFERENCE_DIRECTORY, tensors, peft)
        del tensors
        first, second = (self._trained.canonical(partial(self._moment, index=index)) for index in (0, 1))
        if is_first:
            aliases = self._trained.aliases
            moments = {name: (first[name], second[name]) for name in first if name not in aliases}
            write_moments(path / "optimizer", moments, self._optimizer.num_steps, aliases=aliases)

    def load(self, path: Path) -> None:
        """Strictly what `save` of either backend wrote. Without moments the optimizer starts anew."""
        names = self._trained.shapes().keys()
        if self._setup.spec is None:
            with open_checkpoint(path / "weights") as slices:
                self._copy(path, {name: slices[name][:].float() for name in names})
        else:
            if self._reference is not None:
                self._read_adapter(path / REFERENCE_DIRECTORY)
                self._reference = copies_on_cpu(self._compared())
            self._read_adapter(path / ADAPTER_DIRECTORY)
        if (path / "optimizer").is_dir():
            moments, self._optimizer.num_steps = read_moments(
                path / "optimizer", expected=names, aliases=self._trained.aliases
            )
            first, second = ({name: pair[index] for name, pair in moments.items()} for index in (0, 1))
            pairs = zip(self._trained.masters_from(first), self._trained.masters_from(second), strict=True)
            for (master, one), (_, two) in pairs:
                self._optimizer.set_moments(master, one, two)

    def close(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    # Beyond the protocol: what the composition root wires into an engine of the same process.

    def base_model(self) -> PreTrainedModel:
        """A Hugging Face model over the base parameters, which nobody may write; only its q, k and v are copies.

        Of a mixture of experts it is a second copy of the whole base, since transformers holds experts in one tensor a
        layer.
        """
        if self._family.experts is None:
            tensors = dict(self._weights.hf_tensors(lambda name: self._weights.parameters[name].detach()))
            return model_of_tensors(self._setup.model_path, self._hf_config, tensors)
        return load_model(
            self._setup.model_path,
            dtype=self._compute_dtype,
            config_overrides=dict(self._config.hf_config_overrides),
        )

    @property
    def compute_dtype(self) -> torch.dtype:
        return self._compute_dtype

    def _resolve(self, spec: LoraSpec) -> tuple[AdaptedModule, ...]:
        key = lora_block_key(self._config)
        refuse_expert_targets(spec, self._family, key)
        return resolve_trained_targets(
            spec,
            linear_modules(empty_model(self._hf_config)),
            tied_head=self._family.has_tied_head,
            model_label=self._setup.base_model_name,
            config_key=key,
        )

    def _parts(self, batch: Batch, kind: Literal["train", "logprob"]) -> list[_Part]:
        """This process's share of a batch."""
        megatron = self._config.megatron_cfg
        cp = megatron.context_parallel_size
        plan = plan_from_config(
            self._config,
            kind,
            max_rows=self._config.train_micro_batch_size if kind == "train" else self._setup.logprob_rows,
            flat=True,
            can_share=cp == 1,
            round_to=length_multiple(megatron.tensor_model_parallel_size, cp, megatron.sequence_parallel),
        )
        group = self._ranks.context_group
        return [
            _Part(micro, None if cp == 1 else plan_context(micro.segments, micro.num_tokens, group))
            for micro in plan_microbatches(batch, plan, self._ranks.data_share)
        ]

    def _stage(self, part: _Part) -> Tensor:
        """What this process's layers make of a microbatch, [N, 1, H] or its share of N."""
        micro, context = part.micro, part.context
        run = flat_run(micro, self._family, self._compute_dtype, self._device, context)
        own = slice(None) if context is None else context.own
        token_ids, positions = (ids[own][None].to(self._device) for ids in (micro.token_ids, micro.position_ids))
        return self._model(token_ids, positions, None, packed_seq_params=run)

    def _logprob_rows(self, hidden: Tensor, part: _Part, width: int) -> Tensor:
        """[b, width] fp32 of the last stage's [N, 1, H], in the order of the microbatch's rows; 0.0 where there is no
        loss token. Ranks that share a sequence, or the vocabulary, all get all of it."""
        ranks = self._ranks
        if ranks.sequence_parallel:
            # The head gives every rank the whole gradient, of which each sends back that of its own tokens.
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=ranks.tensor_group
            )
        context = part.context
        own = part.micro if context is None else own_loss_tokens(part.micro, context)
        head = Head(
            weight=self._model.head_weight,
            temperature=self._setup.temperature,
            chunk_tokens=self._config.logprob_chunk_size or self._config.megatron_cfg.fused_linear_logprobs_chunk_size,
            group=ranks.tensor_group if ranks.layout.tp > 1 else None,
        )
        rows = logprob_rows(hidden[:, 0].index_select(0, own.predictor.to(self._device)), head, own, width)
        return rows if context is None else reduce_from_tensor_model_parallel_region(rows, group=context.group)

    def _as_reference(self) -> AbstractContextManager[None]:
        if self._reference is not None:
            return holding(self._compared(), self._reference)
        assert self._switch is not None, "a full fine-tuning policy was built without a reference"
        return self._switch.off()

    def _compared(self) -> dict[str, nn.Parameter]:
        """What a copied reference replaces: the weights that the layers read."""
        return self._weights.parameters if self._setup.spec is None else self._trained.masters()

    def _read_adapter(self, directory: Path) -> None:
        self._copy(directory, read_adapter(directory, expected=self._trained.shapes().keys())[0])

    @torch.no_grad()
    def _copy(self, source: Path, tensors: Mapping[str, Tensor]) -> None:
        check_shapes(source, expected=self._trained.shapes(), found=tensors)
        for master, tensor in self._trained.masters_from(tensors):
            master.copy_(tensor)
        self._trained.apply()

    def _moment(self, master: nn.Parameter, index: int) -> Tensor:
        return self._optimizer.moments_of(master)[index]


def _itself(master: nn.Parameter) -> Tensor:
    return master
