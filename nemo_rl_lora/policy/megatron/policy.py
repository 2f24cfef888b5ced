"""The Megatron backend: megatron-core's model with adapters of our own, trained with AdamW. One process so far.

The twin of policy/dtensor.py: the same verbs in the same order, and the same numbers. With an adapter, only A and B
are trained, as fp32 masters; the base weights are never written, and the reference policy is the same model with the
adapters switched off. Without one, all weights are trained: fp32 masters beside weights in `policy.precision`, and a
reference, where it is needed, is a copy of the base in memory.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nemo_rl_lora.config.lora import lora_block_key
from nemo_rl_lora.config.policy import PolicyConfig
from nemo_rl_lora.lora.dialects import spec_to_peft_config
from nemo_rl_lora.lora.files import (
    check_shapes,
    read_adapter,
    read_moments,
    write_adapter,
    write_moments,
)
from nemo_rl_lora.lora.spec import LoraSpec
from nemo_rl_lora.lora.targets import AdaptedModule, resolve_trained_targets
from nemo_rl_lora.policy.adapter import DTYPES, AdapterSwitch, dropout_of
from nemo_rl_lora.policy.forward import logprob_rows
from nemo_rl_lora.policy.masters import MasterAdam
from nemo_rl_lora.policy.megatron.convert import check_checkpoint, open_checkpoint
from nemo_rl_lora.policy.megatron.families import read_family, refuse_expert_targets
from nemo_rl_lora.policy.megatron.layers import Layer, build_model, flat_run, transformer_config
from nemo_rl_lora.policy.megatron.lora import Adapters
from nemo_rl_lora.policy.megatron.processes import join_processes
from nemo_rl_lora.policy.megatron.weights import AllWeights, StageWeights
from nemo_rl_lora.policy.microbatches import Microbatch, MicrobatchPlan, plan_from_config
from nemo_rl_lora.policy.model import (
    empty_model,
    linear_modules,
    load_model,
    load_model_config,
    model_of_tensors,
    save_tensors,
)
from nemo_rl_lora.policy.passes import copies_on_cpu, holding, logprob_pass, optimizer_step
from nemo_rl_lora.policy.protocol import PolicySetup
from nemo_rl_lora.policy.weights import offer
from nemo_rl_lora.types import Batch, LossFn, StepOutput, SyncMode, WeightsRef


class MegatronPolicy:
    """A Policy (policy/protocol.py) on one device."""

    def __init__(self, config: PolicyConfig, setup: PolicySetup) -> None:
        self._config = config
        self._setup = setup
        self._hf_config = load_model_config(setup.model_path, dict(config.hf_config_overrides))
        family = read_family(self._hf_config, config.model_name, config.max_total_sequence_length)
        layout = join_processes(family, config.megatron_cfg)
        self._family = family
        self._compute_dtype = DTYPES[config.precision]
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        core = transformer_config(family, config.megatron_cfg, self._compute_dtype)
        self._model = build_model(family, layout, core).to(self._device)
        self._weights = StageWeights(self._model, family, layout)
        with open_checkpoint(setup.model_path) as slices:
            check_checkpoint(family, {name: tuple(s.get_shape()) for name, s in slices.items()}, str(config.model_name))
            self._weights.load(slices.__getitem__)
        for layer in self._model.modules():
            if isinstance(layer, Layer):
                layer.recompute = config.megatron_cfg.activation_checkpointing
        self.adapted: tuple[AdaptedModule, ...] = ()
        self._switch: AdapterSwitch | None = None
        self._trained: Adapters | AllWeights
        if setup.spec is None:
            self._trained = AllWeights(self._weights, freeze_router=config.megatron_cfg.freeze_moe_router)
        else:
            self.adapted = self._resolve(setup.spec)
            self._trained = Adapters(
                self._model, self.adapted, setup.spec, family=family, layout=layout, seed=setup.seed
            )
            self._switch = self._trained.switch
        needs_copy = setup.spec is None and setup.keep_reference
        self._reference = copies_on_cpu(self._weights.parameters) if needs_copy else None
        self._optimizer = MasterAdam(self._trained.masters(), setup.adam)

    def logprobs(self, batch: Batch) -> Tensor:
        """[B, T] fp32, dropout off; 0.0 outside the loss mask."""
        return logprob_pass(batch, self._microbatch_plan("logprob"), self._forward)

    def reference_logprobs(self, batch: Batch) -> Tensor:
        """The same with the adapter switched off; in full fine-tuning, with the base weights in place."""
        with self._as_reference():
            return self.logprobs(batch)

    def train_step(self, batch: Batch, loss_fn: LossFn) -> StepOutput:
        """All microbatches, then one optimizer step. FloatingPointError before the optimizer moves on bad numbers."""
        dropout = partial(dropout_of, self._switch, self._setup.seed, self._optimizer.num_steps)
        plan = self._microbatch_plan("train")
        output = optimizer_step(batch, plan, self._forward, loss_fn, self._optimizer, dropout)
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
        """adapter/ (PEFT files) or weights/ (a Hugging Face model), and optimizer/."""
        tensors = self._trained.canonical(_itself)
        if self._setup.spec is None:
            save_tensors(self._setup.model_path, self._hf_config, tensors, path / "weights")
        else:
            peft = spec_to_peft_config(self._setup.spec, self._setup.base_model_name, self.adapted)
            write_adapter(path / "adapter", tensors, peft)
        first, second = (self._trained.canonical(partial(self._moment, index=index)) for index in (0, 1))
        aliases = self._trained.aliases
        moments = {name: (first[name], second[name]) for name in first if name not in aliases}
        write_moments(path / "optimizer", moments, self._optimizer.num_steps, aliases=aliases)

    def load(self, path: Path) -> None:
        """Strictly what `save` of either backend wrote. Without moments the optimizer starts anew."""
        present = self._trained.canonical(_itself)
        if self._setup.spec is None:
            with open_checkpoint(path / "weights") as slices:
                saved = {name: slices[name][:].float() for name in present}
        else:
            saved, _ = read_adapter(path / "adapter", expected=present.keys())
        check_shapes(path, expected=present, found=saved)
        with torch.no_grad():
            for master, tensor in self._trained.masters_from(saved):
                master.copy_(tensor)
        self._trained.apply()
        if (path / "optimizer").is_dir():
            moments, self._optimizer.num_steps = read_moments(
                path / "optimizer", expected=present.keys(), aliases=self._trained.aliases
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
        layer. ValueError where such a mixture is trained without an adapter: its weights could not be sent there.
        """
        if self._family.experts is None:
            tensors = dict(self._weights.hf_tensors(lambda name: self._weights.parameters[name].detach()))
            return model_of_tensors(self._setup.model_path, self._hf_config, tensors)
        if self._setup.spec is None:
            raise ValueError(
                f"policy.model_name={self._config.model_name!r}: the engine in this process takes no trained experts "
                f"from the Megatron backend. Train an adapter, or set policy.backend=dtensor."
            )
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

    def _microbatch_plan(self, kind: Literal["train", "logprob"]) -> MicrobatchPlan:
        max_rows = self._config.train_micro_batch_size if kind == "train" else self._setup.logprob_rows
        return plan_from_config(self._config, kind, max_rows=max_rows, flat=True)

    def _forward(self, micro: Microbatch, width: int) -> Tensor:
        """[b, width] fp32, in the order of the microbatch's rows; 0.0 where there is no loss token."""
        run = flat_run(micro, self._family, self._compute_dtype, self._device)
        token_ids, positions = (ids[None].to(self._device) for ids in (micro.token_ids, micro.position_ids))
        hidden = self._model(token_ids, positions, None, packed_seq_params=run)[:, 0]
        return logprob_rows(
            hidden.index_select(0, micro.predictor.to(self._device)),
            self._model.head_weight,
            micro,
            width,
            temperature=self._setup.temperature,
            chunk_tokens=self._config.logprob_chunk_size or self._config.megatron_cfg.fused_linear_logprobs_chunk_size,
        )

    def _as_reference(self) -> AbstractContextManager[None]:
        if self._switch is not None:
            return self._switch.off()
        assert self._reference is not None, "a full fine-tuning policy was built without a reference"
        return holding(self._weights.parameters, self._reference)

    def _moment(self, master: nn.Parameter, index: int) -> Tensor:
        return self._optimizer.moments_of(master)[index]


def _itself(master: nn.Parameter) -> Tensor:
    return master
