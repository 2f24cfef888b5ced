"""What runs inside vLLM's worker: weights are received there, hashed there, and probed through its kernels.

Contract: vLLM mixes `WorkerExtension` into its worker class (`worker_extension_cls`), so `self` is that worker and
every public method can be called by name, in each rank that shares the model. Names are Hugging Face's (merged) or
PEFT's (adapter); this file alone knows where vLLM keeps what they name (held_part.py: which part of it a rank has).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from nemo_rl_lora.distributed.shared_memory import mapped_files
from nemo_rl_lora.generation.proof import NAMED_AT_MOST, PROBE_COLUMNS, Shown, digests_of, one_hot, probed_columns
from nemo_rl_lora.generation.vllm.held_part import HeldPart, held_part
from nemo_rl_lora.lora.files import ADAPTER_FILE, module_of
from nemo_rl_lora.models.families import has_tied_head
from nemo_rl_lora.patches.vllm import multiply_once_for_all_rows
from nemo_rl_lora.tensors import StoredTensor, stored_tensors
from nemo_rl_lora.types import TensorInfo

ADAPTER_ID = 1
VLLM_FILES = ("psm_", "vllm_dist_")  # by megabytes; two semaphores of 32 bytes stay where ranks are killed
_EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True, slots=True)
class Place:
    """Where vLLM keeps a Hugging Face tensor: a module, its parameter, and which projection of a fused layer it is."""

    layer: str
    module: nn.Module
    parameter: str
    part: int | None

    @property
    def held(self) -> HeldPart:
        return held_part(self.module, self.parameter, self.part)


class WorkerExtension:
    """Mixed into vLLM's worker. Methods without an underscore are called from outside, by name."""

    model_runner: Any
    vllm_config: Any
    device: torch.device
    _places_of: nn.Module
    _places: dict[str, Place | None]

    def weight_problems(self, manifest: Sequence[TensorInfo]) -> list[str]:
        """Why merged weights of these names and shapes cannot be loaded; nothing is touched."""
        problems = []
        for info in manifest:
            place = self._place(info.name)
            if place is None:
                problems.append(f"{info.name!r}: {type(self._model()).__name__} has no such weight")
            elif (shape := place.held.shape) != tuple(info.shape):
                problems.append(f"{info.name!r}: shape {tuple(info.shape)}, and the engine's is {shape}")
        return problems

    def receive_weights(self, source: Mapping[str, Tensor] | str) -> dict[str, str]:
        """Load merged weights, from tensors or from a safetensors file. Returns the digests of what was received."""
        tensors = load_file(source) if isinstance(source, str) else source
        received = digests_of(tensors, "merged")
        arrived = [TensorInfo(name=n, shape=tuple(t.shape), dtype=t.dtype) for n, t in tensors.items()]
        if problems := self.weight_problems(arrived):  # a load that breaks off leaves vLLM between two versions
            raise ValueError("; ".join(problems[:NAMED_AT_MOST]))
        self._load([*tensors.items(), *self._siblings(tensors)])
        return received

    def receive_adapter(self, directory: str) -> dict[str, str]:
        """The digests of an adapter's file, as this process reads it; vLLM's LoRA request loads it."""
        if self.device.type == "cpu":
            multiply_once_for_all_rows()
        return digests_of(load_file(Path(directory) / ADAPTER_FILE), "adapter")

    def shared_files(self) -> list[str]:
        """What vLLM keeps in shared memory between ranks, and leaves there where they are killed."""
        return mapped_files(VLLM_FILES)

    def probe_base(self, names: Sequence[str]) -> dict[str, Shown]:
        """Columns of the base weights of these names, of all that the engine has."""
        places = {name: place for name in names if (place := self._place(name)) is not None}
        return self._probe(places)

    def probe_weights(self, names: Sequence[str]) -> dict[str, Shown]:
        """Columns of weights; with tied embeddings the head's own copy too, as `lm_head.weight`."""
        places = {name: place for name in names if (place := self._place(name)) is not None}
        head = self._tied_head()
        if head is not None and _EMBEDDING in places:
            places["lm_head.weight"] = Place("lm_head", head, "weight", None)
        return self._probe(places)

    @torch.inference_mode()
    def probe_adapter(self, names: Sequence[str], ranks: Mapping[str, int]) -> dict[str, Shown]:
        """Columns of A, and of B with its scale, by the LoRA kernels; zero where no adapter is loaded."""
        self._select_adapter()
        shown: dict[str, Shown] = {}
        for name in names:
            module_name = module_of(name)
            place = self._place(f"{module_name}.weight")
            assert place is not None, name
            probe = self._probe_a if name.endswith("lora_A.weight") else self._probe_b
            shown[name] = probe(name, place, ranks[module_name])
        return shown

    # Where things are

    def _model(self) -> nn.Module:
        return self.model_runner.get_model()

    def _wrapper(self, layer: str) -> Any:
        """A layer as the model holds it: with LoRA enabled, vLLM's wrapper around it."""
        try:
            return self._model().get_submodule(layer)
        except AttributeError:
            return None

    def _place(self, name: str) -> Place | None:
        """The same as long as the model is; found once."""
        model = self._model()
        if getattr(self, "_places_of", None) is not model:
            self._places_of, self._places = model, dict[str, Place | None]()
        if name not in self._places:
            self._places[name] = self._find(name)
        return self._places[name]

    def _find(self, name: str) -> Place | None:
        layer, _, parameter = name.rpartition(".")
        parent, _, last = layer.rpartition(".")
        part = None
        for fused, parts in getattr(self._model(), "packed_modules_mapping", {}).items():
            if last in parts and self._wrapper(f"{parent}.{fused}") is not None:
                layer, part = f"{parent}.{fused}", parts.index(last)
        module = self._wrapper(layer)
        module = getattr(module, "base_layer", module)
        if module is None or not isinstance(getattr(module, parameter, None), Tensor):
            return None
        if layer == "lm_head" and self._tied_head() is not None:
            return None  # it has no tensor of its own in a checkpoint
        return Place(layer, module, parameter, part)

    def _tied_head(self) -> nn.Module | None:
        model: Any = self._model()
        head = getattr(model, "lm_head", None)
        tied = has_tied_head(self.vllm_config.model_config.hf_text_config)
        return getattr(head, "base_layer", head) if tied else None

    # Loading

    def _load(self, tensors: Sequence[tuple[str, Tensor]]) -> None:
        self.model_runner.reload_weights(weights_iterator=iter(tensors))
        self._refresh_tied_head(tensors)

    def _siblings(self, sent: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
        """What else belongs to the layers that are loaded, from the model's own files: a fused layer is packed as a
        whole, and so is a bias with its weight."""
        touched = {place.layer for name in sent if (place := self._place(name)) is not None}
        stored = _stored_once(self.vllm_config.model_config.model)
        missing = [
            name
            for name in stored.keys() - sent.keys()
            if (place := self._place(name)) is not None and place.layer in touched
        ]
        found = []
        for path in sorted({stored[name].path for name in missing}):
            with safe_open(path, framework="pt") as file:
                found += [(name, file.get_tensor(name)) for name in missing if stored[name].path == path]
        return found

    def _refresh_tied_head(self, tensors: Sequence[tuple[str, Tensor]]) -> None:
        """On a CPU the tied head multiplies by a packed copy of the embeddings, which a load leaves as it was."""
        head: Any = self._tied_head()
        if head is not None and any(name == _EMBEDDING for name, _ in tensors):
            head.quant_method.process_weights_after_loading(head)

    # Probing

    @property
    def _num_ranks(self) -> int:
        return self.vllm_config.parallel_config.tensor_parallel_size

    @torch.inference_mode()
    def _probe(self, places: Mapping[str, Place]) -> dict[str, Shown]:
        """One product for each layer, with one-hot rows for the columns of all its tensors."""
        shown: dict[str, Shown] = {}
        products: dict[str, Tensor] = {}
        for name, place in places.items():
            module: Any = place.module
            value: Tensor = getattr(module, place.parameter)
            held = place.held
            if place.parameter != "weight" or not hasattr(module, "quant_method"):
                shown[name] = Shown(value.detach().cpu()[held.local][:, None], held.rows, (0, 1))
                continue
            probed = self._own_columns(_EMBEDDING if place.layer == "lm_head" else name, held)
            if type(module).__name__ == "VocabParallelEmbedding":
                values = value[held.local][:, list(probed.local)].cpu()
            else:
                if place.layer not in products:
                    width, dtype = held.columns[1] - held.columns[0], self.vllm_config.model_config.dtype
                    x = one_hot(probed.local, width, dtype, value.device)
                    products[place.layer] = module.quant_method.apply(module, x)[: len(probed.local)]
                values = products[place.layer][:, held.local].T.cpu().contiguous()
            shown[name] = Shown(values, held.rows, probed.places)
        return shown

    def _own_columns(self, name: str, held: HeldPart) -> _Probed:
        """Those of the probed columns that this rank holds."""
        start, end = held.columns
        columns = probed_columns(name, held.shape[1], self._num_ranks)
        places = [place for place, column in enumerate(columns) if start <= column < end]
        return _Probed(tuple(columns[place] - start for place in places), (places[0], places[-1] + 1))

    def _select_adapter(self) -> None:
        """Tell the LoRA kernels that PROBE_COLUMNS rows belong to the adapter, if one is loaded."""
        from vllm.lora.layers import LoRAMapping

        manager = self.model_runner.lora_manager._adapter_manager
        self._has_adapter = ADAPTER_ID in manager.lora_index_to_id
        if self._has_adapter:
            ids = (ADAPTER_ID,) * max(PROBE_COLUMNS, self._num_ranks)
            manager.set_adapter_mapping(LoRAMapping(ids, ids, is_prefill=True))

    def _probe_a(self, name: str, place: Place, rank: int) -> Shown:
        layer, part, held = self._wrapper(place.layer), place.part or 0, place.held
        stacked: Tensor = layer.lora_a_stacked[part]
        probed = self._own_columns(name, held)
        x = one_hot(probed.local, stacked.shape[-1], stacked.dtype, stacked.device)
        y = torch.zeros(len(x), stacked.shape[-2], dtype=torch.float32, device=stacked.device)
        if self._has_adapter:
            layer.punica_wrapper.add_shrink(y[None], x, (stacked,), 1.0)  # one tensor: so the GPU's takes it
        return Shown(y[: len(probed.local), :rank].T.to(stacked.dtype).cpu().contiguous(), (0, rank), probed.places)

    def _probe_b(self, name: str, place: Place, rank: int) -> Shown:
        layer, part = self._wrapper(place.layer), place.part or 0
        stacked: Tensor = layer.lora_b_stacked[part]
        columns = tuple(probed_columns(name, rank))
        buffer = one_hot(columns, stacked.shape[-1], torch.float32, stacked.device)
        y = torch.zeros(len(buffer), stacked.shape[-2], dtype=stacked.dtype, device=stacked.device)
        if self._has_adapter:
            layer.punica_wrapper.add_expand(y, buffer[None], (stacked,), (stacked.shape[-2],))
        return Shown(y[: len(columns)].T.cpu().contiguous(), place.held.rows, (0, len(columns)))


@dataclass(frozen=True, slots=True)
class _Probed:
    """Columns of a rank's own part, and the places that they have among the probed ones of the whole tensor."""

    local: tuple[int, ...]
    places: tuple[int, int]


@cache
def _stored_once(model: str) -> Mapping[str, StoredTensor]:
    """Where the model's own tensors are: its files stay as they are while it is served."""
    return stored_tensors(Path(model))
