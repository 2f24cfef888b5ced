"""The Megatron backend: megatron-core's model with adapters of our own, trained with AdamW.

The twin of policy/dtensor/policy.py: the same verbs in the same order, and the same numbers. With an adapter, only A
and B are trained, as fp32 masters; the base weights are never written, and the reference policy is the same model with
the adapters switched off, or with a copy of the initial ones. Without one, all weights are trained: fp32 masters beside
weights in `policy.precision`, and a reference, where it is needed, is a copy of the base in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor
from transformers import PreTrainedModel

from nemo_rl_lora.config.lora import lora_block_key
from nemo_rl_lora.config.policy import PolicyConfig
from nemo_rl_lora.models.load import empty_model, load_model_config, model_of_tensors, save_tensors
from nemo_rl_lora.policy.adapter_state import dropout_of
from nemo_rl_lora.policy.attention import AttentionPlan
from nemo_rl_lora.policy.dtensor.sharded_files import refuse_sharded
from nemo_rl_lora.policy.flash_segments import FlashPlan, plan_flash
from nemo_rl_lora.policy.forward import logprob_rows
from nemo_rl_lora.policy.head import Head
from nemo_rl_lora.policy.megatron.context import ContextPlan, length_multiple, own_loss_tokens, plan_context
from nemo_rl_lora.policy.megatron.convert import check_checkpoint, open_checkpoint
from nemo_rl_lora.policy.megatron.families import read_family, refuse_expert_targets
from nemo_rl_lora.policy.megatron.groups import join_processes, ranks_of
from nemo_rl_lora.policy.megatron.layers import Layer, build_model, flat_run, transformer_config
from nemo_rl_lora.policy.megatron.lora import Adapters
from nemo_rl_lora.policy.megatron.schedule import run_microbatches
from nemo_rl_lora.policy.megatron.weights import AllWeights, StageWeights
from nemo_rl_lora.policy.microbatches import Cutting, Microbatch, Portion
from nemo_rl_lora.policy.protocol import PolicySetup
from nemo_rl_lora.policy.step import Share, empty_loss, microbatch_loss, rows_in_order
from nemo_rl_lora.policy.trained import Trained, TrainedPolicy, adapted_modules, load_base
from nemo_rl_lora.policy.upload import upload
from nemo_rl_lora.tensors import torch_dtype
from nemo_rl_lora.types import Batch, LossFn


@dataclass(frozen=True, slots=True)
class _Part:
    """A microbatch where it is computed, and this process's tokens of it where context-parallel ranks share them."""

    micro: Microbatch
    own: Microbatch  # with only those loss tokens that this process's tokens predict, by their place among them
    rows: Batch  # its rows, for the loss
    token_ids: Tensor  # [n]
    position_ids: Tensor  # [n]
    flash: FlashPlan | None
    context: ContextPlan | None


class MegatronPolicy(TrainedPolicy):
    """A Policy (policy/protocol.py) on one device, or one device's part of it."""

    def __init__(self, config: PolicyConfig, setup: PolicySetup) -> None:
        megatron, spec = config.megatron_cfg, setup.spec
        self._hf_config = load_model_config(setup.model_path, dict(config.hf_config_overrides))
        self._family = family = read_family(self._hf_config, config.model_name, config.max_total_sequence_length)
        join_processes(megatron)
        self._groups = groups = ranks_of(family, megatron)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._frequencies = torch.tensor(family.inverse_frequencies, device=self._device)
        core = transformer_config(family, megatron, torch_dtype(config.precision))
        self._model = build_model(family, groups.layout, core).to(self._device)
        self._weights = StageWeights(self._model, family, groups)
        with open_checkpoint(setup.model_path) as slices:
            check_checkpoint(family, {name: tuple(s.get_shape()) for name, s in slices.items()}, str(config.model_name))
            self._weights.load(slices.__getitem__, f"policy.model_name={str(config.model_name)!r}")
        trained: Trained
        if spec is None:
            trained = AllWeights(self._weights, freeze_router=megatron.freeze_moe_router)
        else:
            refuse_expert_targets(spec, family, lora_block_key(config))
            adapted = adapted_modules(config, setup, spec, empty_model(self._hf_config))
            trained = Adapters(self._model, adapted, spec, family=family, ranks=groups, seed=setup.seed)
        for layer in self._model.modules():
            if isinstance(layer, Layer):
                layer.recompute, layer.switch = megatron.activation_checkpointing, trained.switch
        super().__init__(config, setup, groups, trained)

    @property
    def cutting(self) -> Cutting:
        megatron = self._config.megatron_cfg
        cp = megatron.context_parallel_size
        round_to = length_multiple(megatron.tensor_model_parallel_size, cp, megatron.sequence_parallel)
        return self._cutting(flat=True, can_share=cp == 1, round_to=round_to)

    def logprobs_of(self, portion: Portion) -> Tensor:
        """[b, T] fp32 of the portion's rows, in a process that reports; elsewhere zeros."""
        shape, micros = portion.batch.token_ids.shape, portion.microbatches()

        def rows_of(part: _Part, hidden: Tensor) -> tuple[Tensor, Tensor]:
            return hidden, self._logprob_rows(hidden, part, shape[1])

        parts = self._placed(micros, portion.batch)
        found = run_microbatches(
            self._model, parts, len(micros), lambda _place, part: self._stage(part), rows_of, backward=False
        )
        return rows_in_order(shape, micros, found)  # none are found before the last stage

    @property
    def _num_in_flight(self) -> int:
        """Of the first stage."""
        return self._config.megatron_cfg.pipeline_model_parallel_size

    def _gradients_of(self, portion: Portion, loss_fn: LossFn) -> list[Share]:
        batch, data, context = portion.batch, self._groups.data_share, self._groups.context_group
        width = batch.token_ids.shape[1]

        def stage(place: int, part: _Part) -> Tensor:
            # A number of its own for what each rank drops: of data shares, and of the tokens of a sequence.
            index = (place * data.number + data.index) * context.size() + context.rank()
            with dropout_of(self._trained.switch, self._setup.seed, self._optimizer.num_steps, index):
                return self._stage(part)

        def loss_of(part: _Part, hidden: Tensor) -> tuple[Tensor, Share]:
            micro = part.micro
            if len(micro.rows) == 0:
                return empty_loss(hidden, micro)
            return microbatch_loss(part.rows, micro, self._logprob_rows(hidden, part, width), loss_fn)

        micros = portion.microbatches()
        parts = self._placed(micros, batch)
        return run_microbatches(self._model, parts, len(micros), stage, loss_of, backward=True)

    def base_model(self) -> PreTrainedModel:
        """A Hugging Face model over the base parameters, which nobody may write; only its q, k and v are copies.

        Of a mixture of experts it is a second copy of the whole base, since transformers holds experts in one tensor a
        layer.
        """
        if self._family.experts is None:
            tensors = dict(self._weights.hf_tensors(lambda name: self._weights.parameters[name].detach()))
            return model_of_tensors(self._setup.model_path, self._hf_config, tensors)
        return load_base(self._config, self._setup)

    def _base_weight(self, name: str) -> Tensor:
        return self._weights.hf_tensor(name)

    def _load_all(self, path: Path) -> None:
        refuse_sharded(path, "megatron")
        super()._load_all(path)

    def _write_weights(self, directory: Path, tensors: Mapping[str, Tensor]) -> None:
        save_tensors(self._setup.model_path, self._hf_config, tensors, directory)

    def _read_weights(self, directory: Path) -> Mapping[str, Tensor]:
        with open_checkpoint(directory) as slices:
            return {name: slices[name][:].float() for name in self._trained.shapes()}

    def _placed(self, micros: Sequence[Microbatch], batch: Batch) -> Iterator[_Part]:
        """Bring each microbatch to the device when its turn comes: one copy, which nothing waits for.

        So the host lays out the next microbatch while the device computes this one, as long as it reads nothing back.
        """
        cp, group = self._config.megatron_cfg.context_parallel_size, self._groups.context_group
        for micro in micros:
            context = None if cp == 1 else plan_context(micro.segments, micro.num_tokens, group)
            places = slice(None) if context is None else context.own
            part = _Part(
                micro=micro,
                own=micro if context is None else own_loss_tokens(micro, context),
                rows=batch.of_rows(micro.rows),
                token_ids=micro.token_ids[places],
                position_ids=micro.position_ids[places],
                flash=plan_flash(micro.segments) if context is None and self._device.type == "cuda" else None,
                context=context,
            )
            yield upload(part, self._device)

    def _stage(self, part: _Part) -> Tensor:
        """What this process's layers make of a microbatch, [N, 1, H] or its share of N."""
        attention = part.context or AttentionPlan(part.micro.segments, self._device, part.flash)
        run = flat_run(part.position_ids, attention, self._frequencies, self.compute_dtype)
        return self._model(part.token_ids[None], part.position_ids[None], None, packed_seq_params=run)

    def _logprob_rows(self, hidden: Tensor, part: _Part, width: int) -> Tensor:
        """[b, width] fp32 of the last stage's [N, 1, H], in the order of the microbatch's rows; 0.0 where there is no
        loss token. Ranks that share a sequence, or the vocabulary, all get all of it."""
        ranks = self._groups
        if ranks.sequence_parallel:
            # The head gives every rank the whole gradient, of which each sends back that of its own tokens.
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=ranks.tensor_group
            )
        own, context = part.own, part.context
        head = Head(
            weight=self._model.head_weight,
            temperature=self._setup.temperature,
            chunk_tokens=self._config.logprob_chunk_size or self._config.megatron_cfg.fused_linear_logprobs_chunk_size,
            group=ranks.tensor_group if ranks.layout.tp > 1 else None,
            first_row=ranks.layout.tp_rank * self._model.head_weight.shape[0],
        )
        rows = logprob_rows(hidden[:, 0].index_select(0, own.predictor), head, own, width)
        return rows if context is None else reduce_from_tensor_model_parallel_region(rows, group=context.group)
