"""What runs inside vLLM's worker: weights are received there, hashed there, and probed through its kernels.

Contract: vLLM mixes `WorkerExtension` into its worker class (`worker_extension_cls`), so `self` is that worker and
every public method can be called by name, in each rank that shares the model. Names are Hugging Face's (merged) or
PEFT's (adapter); this file alone knows where vLLM keeps what they name (held_part.py: which part of it a rank has).
Merged weights are read and loaded a layer of vLLM's at a time: it fuses and packs a layer once all of it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from nemo_rl_lora.distributed.shared_memory import mapped_files
from nemo_rl_lora.generation.proof import NAMED_AT_MOST, PROBE_COLUMNS, Shown, digests_of, one_hot, probed_columns
from nemo_rl_lora.generation.vllm.held_part import HeldPart, held_part
from nemo_rl_lora.lora.files import ADAPTER_FILE, module_of
from nemo_rl_lora.models.families import has_tied_head
from nemo_rl_lora.patches.vllm import forget_reload, multiply_once_for_all_rows
from nemo_rl_lora.tensors import StoredTensor, TensorReader, file_tensors, stored_tensors, torch_dtype
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
        """Load merged weights, from tensors or from a safetensors file. Returns the digests of what was received.

        ValueError where a file holds what cannot be loaded: nothing was touched. Anything else that is raised leaves
        the model between two versions, until the next load that is complete.
        """
        if not isinstance(source, str):
            return self._received(source, source.__getitem__)
        stored = file_tensors(Path(source))
        infos = [TensorInfo(name=n, shape=one.shape, dtype=torch_dtype(one.dtype)) for n, one in stored.items()]
        if problems := self.weight_problems(infos):
            raise ValueError("; ".join(problems[:NAMED_AT_MOST]))
        with TensorReader() as reader:
            return self._received(stored, lambda name: reader.read_tensor(stored[name]))

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

    def _received(self, names: Iterable[str], read: Callable[[str], Tensor]) -> dict[str, str]:
        """Load these weights, each read once. Returns their digests."""
        received: dict[str, str] = {}

        def arriving(name: str) -> Tensor:
            tensor = read(name)
            received.update(digests_of({name: tensor}, "merged"))
            info = TensorInfo(name=name, shape=tuple(tensor.shape), dtype=tensor.dtype)
            if problems := self.weight_problems([info]):
                raise ValueError(problems[0])
            return tensor

        try:
            self._load(self._layer_by_layer(list(names), arriving))
            if _EMBEDDING in received:
                self._refresh_tied_head()
        except BaseException as error:
            forget_reload(self._model(), self.vllm_config.model_config)
            if isinstance(error, ValueError):  # as which it would say that nothing was touched
                raise RuntimeError(str(error)) from error
            raise
        return received

    def _load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """vLLM asks for one after the other, and lets a layer's go once it is packed."""
        self.model_runner.reload_weights(weights_iterator=iter(tensors))

    def _layer_by_layer(self, sent: Sequence[str], read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """What was sent and, with each layer of it, what else belongs to that from the model's own files: a fused layer
        is packed as a whole, and so is a bias with its weight. Layers are in the order in which they were sent."""
        stored, layers = _stored_once(self.vllm_config.model_config.model), dict[str, list[str]]()
        for name in sent:
            layers.setdefault(self._layer(name), []).append(name)
        siblings: dict[str, list[StoredTensor]] = {layer: [] for layer in layers}
        own = set(sent)
        for name, one in stored.items():
            if name not in own and (layer := self._layer(name)) in layers:
                siblings[layer].append(one)
        with TensorReader() as reader:
            for layer, names in layers.items():
                for name in names:
                    yield name, read(name)
                for one in siblings[layer]:
                    yield one.name, reader.read_tensor(one)

    def _layer(self, name: str) -> str:
        """Which layer of vLLM's a tensor belongs to; one that the engine does not have stands alone."""
        place = self._place(name)
        return name if place is None else place.layer

    def _refresh_tied_head(self) -> None:
        """On a CPU the tied head multiplies by a packed copy of the embeddings, which a load leaves as it was."""
        head: Any = self._tied_head()
        if head is not None:
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
