"""The DTensor backend: nemo-automodel's model and LoRA layers, trained with AdamW. One process in this version.

With an adapter, only A and B are trained, as fp32 masters; the base weights are never written, and the reference
policy is the same model with the adapters switched off, or with a copy of the initial ones. Without one, all weights
are trained as fp32 masters with the computation in `policy.precision`, and a reference, where it is needed, is a copy
of the base in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from nemo_rl_lora.config.lora import kernels_off_because
from nemo_rl_lora.config.policy import PolicyConfig
from nemo_rl_lora.distributed.ranks import Ranks
from nemo_rl_lora.lora.adapter_tensors import canonical_tensors
from nemo_rl_lora.lora.targets import AdaptedModule
from nemo_rl_lora.models.load import load_model, share_structure
from nemo_rl_lora.patches.nemo_automodel import save_pretrained
from nemo_rl_lora.patches.transformers import checkpoint_activations
from nemo_rl_lora.policy.adapter_state import AdapterSwitch, dropout_of
from nemo_rl_lora.policy.attention import layout_problems, supports_segments
from nemo_rl_lora.policy.dtensor.linear import AdapterLinear, install_adapters
from nemo_rl_lora.policy.forward import DEFAULT_CHUNK_TOKENS, ForwardPass
from nemo_rl_lora.policy.protocol import PolicySetup
from nemo_rl_lora.policy.step import microbatch_loss
from nemo_rl_lora.policy.trained import Trained, TrainedPolicy, adapted_modules
from nemo_rl_lora.tensors import torch_dtype
from nemo_rl_lora.types import Batch, LossFn, StepOutput

logger = logging.getLogger(__name__)


class DTensorPolicy(TrainedPolicy):
    """A Policy (policy/protocol.py) on one device."""

    def __init__(self, config: PolicyConfig, setup: PolicySetup) -> None:
        compute_dtype, spec = torch_dtype(config.precision), setup.spec
        self._model = load_model(
            setup.model_path,
            dtype=torch.float32 if spec is None else compute_dtype,
            config_overrides=dict(config.hf_config_overrides),
        )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.nn.Module.to(self._model, device)
        self._base_structure = share_structure(self._model)
        super().__init__(config, setup, Ranks(), self._prepare(config, setup))
        self._flat = supports_segments(self._model.config, config.max_total_sequence_length)
        if problems := layout_problems(config, self._model.config):
            raise ValueError("\n".join(problems))
        self._forward = ForwardPass(
            model=self._model,
            flat=self._flat,
            temperature=setup.temperature,
            chunk_tokens=config.logprob_chunk_size or DEFAULT_CHUNK_TOKENS,
            autocast_dtype=compute_dtype if spec is None and compute_dtype != torch.float32 else None,
        )
        self._forward.verify()
        if config.dtensor_cfg.activation_checkpointing:
            checkpoint_activations(self._model)

    def logprobs(self, batch: Batch) -> Tensor:
        """[B, T] fp32, dropout off; 0.0 outside the loss mask."""
        width = batch.token_ids.shape[1]
        out = torch.zeros(batch.token_ids.shape, dtype=torch.float32)
        with torch.no_grad():
            for micro in self._microbatches(batch, "logprob", flat=self._flat):
                out[micro.rows] = self._forward.logprobs(micro, width).cpu()
        return self._ranks.total(out)

    def train_step(self, batch: Batch, loss_fn: LossFn) -> StepOutput:
        """All microbatches, then one optimizer step. FloatingPointError before the optimizer moves on bad numbers."""
        self._optimizer.zero_grad(set_to_none=True)
        width, shares = batch.token_ids.shape[1], []
        for index, micro in enumerate(self._microbatches(batch, "train", flat=self._flat)):
            with dropout_of(self._trained.switch, self._setup.seed, self._optimizer.num_steps, index):
                logprobs = self._forward.logprobs(micro, width)
                loss, share = microbatch_loss(batch, micro, logprobs, loss_fn)
                loss.backward()
            shares.append(share)
        return self._optimizer_step(shares)

    def base_model(self) -> PreTrainedModel:
        """A module tree without adapters over the same base parameters, which nobody may write."""
        return self._base_structure

    def named_adapters(self) -> Iterator[tuple[str, AdapterLinear]]:
        """Adapted modules by their full Hugging Face name."""
        return _named_adapters(self._model, self.adapted)

    def _base_weight(self, name: str) -> Tensor:
        return self._model.get_parameter(name)

    def _write_weights(self, directory: Path, tensors: Mapping[str, Tensor]) -> None:
        save_pretrained(self._model, directory, tensors)

    def _read_weights(self, directory: Path) -> Mapping[str, Tensor]:
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).state_dict()

    def _prepare(self, config: PolicyConfig, setup: PolicySetup) -> ModuleParameters:
        """Put adapters into the model, if there are any, and let what is trained have gradients."""
        if (spec := setup.spec) is None:
            return ModuleParameters(self._model.requires_grad_(True))
        adapted = adapted_modules(config, setup, spec, self._model)
        why_off = kernels_off_because(config, spec, cuda=torch.cuda.is_available())
        if why_off is not None:
            logger.warning(why_off)
        use_kernels = spec.kernels and why_off is None
        switch = install_adapters(self._model, adapted, spec, seed=setup.seed, use_kernels=use_kernels)
        return ModuleParameters(self._model, adapted, switch)


class ModuleParameters(Trained):
    """The parameters of a Hugging Face model that are trained, under canonical adapter names or the model's own.

    Every process has them whole: the two places that would gather and cut shards say so.
    """

    def __init__(
        self, model: nn.Module, adapted: tuple[AdaptedModule, ...] = (), switch: AdapterSwitch | None = None
    ) -> None:
        self.adapted, self.switch = adapted, switch
        self._masters = dict(model.named_parameters())
        if switch is not None:
            tensors = canonical_tensors({name: linear.tensors for name, linear in _named_adapters(model, adapted)})
            self._masters = cast(dict[str, nn.Parameter], tensors)

    def masters(self) -> dict[str, nn.Parameter]:
        return self._masters

    def canonical(self, of: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
        return {name: of(master).detach() for name, master in self._masters.items()}  # shards would be gathered here

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(master.shape) for name, master in self._masters.items()}

    def masters_from(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[nn.Parameter, Tensor]]:
        return ((master, tensors[name]) for name, master in self._masters.items())  # shards would be cut here


def _named_adapters(model: nn.Module, adapted: tuple[AdaptedModule, ...]) -> Iterator[tuple[str, AdapterLinear]]:
    for module in adapted:
        linear = model.get_submodule(module.name)
        assert isinstance(linear, AdapterLinear), type(linear)
        yield module.name, linear
