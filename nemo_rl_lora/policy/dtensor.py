"""The DTensor backend: nemo-automodel's model and LoRA layers, trained with AdamW. One process in this version.

With an adapter, only A and B are trained, as fp32 masters; the base weights are never written, and the reference
policy is the same model with the adapters switched off, or with a copy of the initial ones. Without one, all weights
are trained as fp32 masters with the computation in `policy.precision`, and a reference, where it is needed, is a copy
of the base in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from nemo_rl_lora.config.lora import kernels_off_because, lora_block_key
from nemo_rl_lora.config.policy import PolicyConfig
from nemo_rl_lora.lora.dialects import spec_to_peft_config
from nemo_rl_lora.lora.files import (
    ADAPTER_DIRECTORY,
    REFERENCE_DIRECTORY,
    adapter_tensor_name,
    check_shapes,
    read_adapter,
    read_moments,
    write_adapter,
    write_moments,
)
from nemo_rl_lora.lora.spec import LoraSpec
from nemo_rl_lora.lora.targets import AdaptedModule, resolve_trained_targets
from nemo_rl_lora.policy.adapter import AdapterSwitch, dropout_of
from nemo_rl_lora.policy.adapter_linear import AdapterLinear, install_adapters
from nemo_rl_lora.policy.forward import DEFAULT_CHUNK_TOKENS, ForwardPass
from nemo_rl_lora.policy.masters import MasterAdam
from nemo_rl_lora.policy.microbatches import MicrobatchPlan, plan_from_config, plan_microbatches
from nemo_rl_lora.policy.model import linear_modules, load_model, share_structure
from nemo_rl_lora.policy.passes import copies_on_cpu, holding, microbatch_loss, step_output
from nemo_rl_lora.policy.protocol import PolicySetup
from nemo_rl_lora.policy.segment_attention import layout_problems, supports_segments
from nemo_rl_lora.policy.weights import offer
from nemo_rl_lora.tensors import torch_dtype
from nemo_rl_lora.types import Batch, LossFn, StepOutput, SyncMode, WeightsRef

logger = logging.getLogger(__name__)


class DTensorPolicy:
    """A Policy (policy/protocol.py) on one device."""

    def __init__(self, config: PolicyConfig, setup: PolicySetup) -> None:
        self._config = config
        self._setup = setup
        compute_dtype = torch_dtype(config.precision)
        master_dtype = compute_dtype if setup.spec is not None else torch.float32
        self._model = load_model(
            setup.model_path, dtype=master_dtype, config_overrides=dict(config.hf_config_overrides)
        )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.nn.Module.to(self._model, device)
        self._compute_dtype = compute_dtype
        self.adapted: tuple[AdaptedModule, ...] = ()
        self._switch: AdapterSwitch | None = None
        self._base_structure = share_structure(self._model)
        if setup.spec is None:
            self._model.requires_grad_(True)
        else:
            self._install(setup.spec)
        self._trained = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        if setup.initial_adapter is not None:
            self._read_adapter(setup.initial_adapter)
        self._reference = copies_on_cpu(self._trained) if setup.copies_reference else None
        self._optimizer = MasterAdam(list(self._trained.values()), setup.adam)
        self._flat = supports_segments(self._model.config, config.max_total_sequence_length)
        if problems := layout_problems(config, self._model.config):
            raise ValueError("\n".join(problems))
        self._forward = ForwardPass(
            model=self._model,
            flat=self._flat,
            temperature=setup.temperature,
            chunk_tokens=config.logprob_chunk_size or DEFAULT_CHUNK_TOKENS,
            autocast_dtype=compute_dtype if setup.spec is None and compute_dtype != torch.float32 else None,
        )
        self._forward.verify()
        if config.dtensor_cfg.activation_checkpointing:
            self._checkpoint_activations()

    def logprobs(self, batch: Batch) -> Tensor:
        """[B, T] fp32, dropout off; 0.0 outside the loss mask."""
        width = batch.token_ids.shape[1]
        out = torch.zeros(batch.token_ids.shape, dtype=torch.float32)
        with torch.no_grad():
            for micro in plan_microbatches(batch, self._microbatch_plan("logprob")):
                out[micro.rows] = self._forward.logprobs(micro, width).cpu()
        return out

    def reference_logprobs(self, batch: Batch) -> Tensor:
        """The same with the adapter switched off, or with the copied reference in place."""
        with self._as_reference():
            return self.logprobs(batch)

    def train_step(self, batch: Batch, loss_fn: LossFn) -> StepOutput:
        """All microbatches, then one optimizer step. FloatingPointError before the optimizer moves on bad numbers."""
        self._optimizer.zero_grad(set_to_none=True)
        width, shares = batch.token_ids.shape[1], []
        for index, micro in enumerate(plan_microbatches(batch, self._microbatch_plan("train"))):
            with dropout_of(self._switch, self._setup.seed, self._optimizer.num_steps, index):
                logprobs = self._forward.logprobs(micro, width)
                loss, share = microbatch_loss(batch, micro, logprobs, loss_fn)
                loss.backward()
            shares.append(share)
        gradients = [p.grad for p in self._trained.values() if p.grad is not None]
        return step_output(shares, lambda loss: self._optimizer.move(loss, torch.nn.utils.get_total_norm(gradients)))

    def publish(self, version: int, mode: SyncMode) -> WeightsRef:
        """merged: `<module>.weight` in the compute dtype, merged when read; adapter: A and B in fp32.

        Without an adapter every weight is published as merged.
        """
        has_adapter = self._setup.spec is not None
        return offer(
            version,
            mode,
            self._adapter_tensors() if has_adapter else self._trained,
            adapted=self.adapted if has_adapter else None,
            weight_of=self._model.get_parameter,
            dtype=self._compute_dtype,
        )

    def save(self, path: Path) -> None:
        """adapter/ (PEFT files) or weights/ (a Hugging Face model), reference_adapter/ if copied, and optimizer/."""
        if self._setup.spec is None:
            # transformers' own: nemo-automodel's override works only with its checkpointer
            PreTrainedModel.save_pretrained(self._model, path / "weights")
        else:
            peft = spec_to_peft_config(self._setup.spec, self._setup.base_model_name, self.adapted)
            write_adapter(path / ADAPTER_DIRECTORY, self._adapter_tensors(), peft)
            if self._reference is not None:
                with self._as_reference():
                    write_adapter(path / REFERENCE_DIRECTORY, self._adapter_tensors(), peft)
        moments = {name: self._optimizer.moments_of(p) for name, p in self._named_masters().items()}
        write_moments(path / "optimizer", moments, self._optimizer.num_steps)

    def load(self, path: Path) -> None:
        """Strictly what `save` wrote. Moments are optional: a checkpoint without them starts the optimizer anew."""
        masters = self._named_masters()
        if self._setup.spec is None:
            saved = AutoModelForCausalLM.from_pretrained(path / "weights", dtype=torch.float32).state_dict()
            missing = [name for name in masters if name not in saved]
            assert not missing, missing
            self._copy(path, saved)
        else:
            if self._reference is not None:
                self._read_adapter(path / REFERENCE_DIRECTORY)
                self._reference = copies_on_cpu(self._trained)
            self._read_adapter(path / ADAPTER_DIRECTORY)
        if (path / "optimizer").is_dir():
            moments, self._optimizer.num_steps = read_moments(path / "optimizer", expected=masters.keys(), aliases={})
            for name, parameter in masters.items():
                self._optimizer.set_moments(parameter, *moments[name])

    def close(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    # Beyond the protocol: what the composition root wires into an engine of the same process.

    def base_model(self) -> PreTrainedModel:
        """A module tree without adapters over the same base parameters, which nobody may write."""
        return self._base_structure

    @property
    def compute_dtype(self) -> torch.dtype:
        return self._compute_dtype

    def named_adapters(self) -> Iterator[tuple[str, AdapterLinear]]:
        """Adapted modules by their full Hugging Face name."""
        for module in self.adapted:
            yield module.name, self._adapter(module.name)

    def _adapter(self, name: str) -> AdapterLinear:
        linear = self._model.get_submodule(name)
        assert isinstance(linear, AdapterLinear), type(linear)
        return linear

    def _install(self, spec: LoraSpec) -> None:
        tied = bool(getattr(self._model.config, "tie_word_embeddings", False))
        self.adapted = resolve_trained_targets(
            spec,
            linear_modules(self._model),
            tied_head=tied,
            model_label=self._setup.base_model_name,
            config_key=lora_block_key(self._config),
        )
        why_off = kernels_off_because(self._config, spec, cuda=torch.cuda.is_available())
        if why_off is not None:
            logger.warning(why_off)
        self._switch = install_adapters(
            self._model, self.adapted, spec, seed=self._setup.seed, use_kernels=spec.kernels and why_off is None
        )

    def _microbatch_plan(self, kind: Literal["train", "logprob"]) -> MicrobatchPlan:
        max_rows = self._config.train_micro_batch_size if kind == "train" else self._setup.logprob_rows
        return plan_from_config(self._config, kind, max_rows=max_rows, flat=self._flat)

    def _as_reference(self) -> AbstractContextManager[None]:
        if self._reference is not None:
            return holding(self._trained, self._reference)
        assert self._switch is not None, "a full fine-tuning policy was built without a reference"
        return self._switch.off()

    def _read_adapter(self, directory: Path) -> None:
        self._copy(directory, read_adapter(directory, expected=self._named_masters().keys())[0])

    @torch.no_grad()
    def _copy(self, source: Path, tensors: Mapping[str, Tensor]) -> None:
        masters = self._named_masters()
        check_shapes(source, expected={name: master.shape for name, master in masters.items()}, found=tensors)
        for name, parameter in masters.items():
            parameter.copy_(tensors[name])

    def _checkpoint_activations(self) -> None:
        self._model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for module in self._model.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.training = True  # this layer alone: its children keep dropout off

    def _adapter_tensors(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self._named_masters().items()}

    def _named_masters(self) -> Mapping[str, torch.nn.Parameter]:
        """What the optimizer holds: canonical adapter names, or the model's own."""
        if self._setup.spec is None:
            return self._trained
        masters: dict[str, torch.nn.Parameter] = {}
        for name, linear in self.named_adapters():
            for side, factor in (("A", linear.lora_A), ("B", linear.lora_B)):
                assert isinstance(factor.weight, torch.nn.Parameter)
                masters[adapter_tensor_name(name, side)] = factor.weight
        return masters
