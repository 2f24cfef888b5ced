"""Whether the decoder serves what the policy offered: the bytes that it holds, and what its own products show.

Contract: `Inspection` is told of each tensor of a ref as the engine reads it, and asks the decoder once it serves them.
Columns of every tensor come from products with one-hot rows, as do those of the base beside an adapter, and of B where
a merged sync has to leave none. The bytes are those of A and B that the decoder holds; of merged weights those of the
engine's copies, and of one in eight those that the decoder multiplies by, unpacked, against the weight merged once
more; the others follow in later syncs. No merged weight is kept meanwhile.
It does not see arithmetic between products; `gen_kl_error` measures that.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nemo_rl_lora.generation.in_process.decoder import Decoder
from nemo_rl_lora.generation.proof import (
    PROBE_COLUMNS,
    Shown,
    Verdict,
    Witness,
    columns_of,
    digests_of,
    one_hot,
    probed_columns,
    require_bytes,
)
from nemo_rl_lora.lora.adapter_tensors import canonical_shapes, side_of
from nemo_rl_lora.lora.files import adapter_tensor_name, module_of
from nemo_rl_lora.lora.targets import AdaptedModule
from nemo_rl_lora.tensors import combined_digest
from nemo_rl_lora.types import WeightsRef

UNPACKED_EVERY = 8  # syncs: to unpack a weight takes as long as to pack it


class Inspection:
    """Of one decoder, sync after sync."""

    def __init__(
        self, decoder: Decoder, model: PreTrainedModel, adapted: Sequence[AdaptedModule], dtype: torch.dtype
    ) -> None:
        self._decoder, self._dtype, self._device = decoder, dtype, model.device
        self._scales = {module.name: module.scale for module in adapted}
        parameters = {name: p for name, p in model.named_parameters() if p.dim() in (1, 2)}
        self._shapes = {name: tuple(p.shape) for name, p in parameters.items()} | canonical_shapes(adapted)
        adapted_weights = [f"{name}.weight" for name in self._scales]
        self._base = {
            name: columns_of(name, parameters[name].detach(), dtype) for name in (adapted_weights or parameters)
        }
        self._no_update = {
            adapter_tensor_name(m.name, "B"): torch.zeros(m.out_features, min(PROBE_COLUMNS, m.dim)) for m in adapted
        }
        names = {id(p): name for name, p in parameters.items()}
        every = model.named_parameters(remove_duplicate=False)
        self._also = {name: names[id(p)] for name, p in every if id(p) in names and names[id(p)] != name}
        self._witness = Witness(self._base)
        self._columns: dict[str, Tensor] = {}
        self._kept: dict[str, Tensor] = {}  # of an adapter
        self.noting_seconds = 0.0
        self._received: dict[str, str] = {}

    def begin(self, ref: WeightsRef) -> None:
        """A sync begins. What it will not bring has to be as the base has it, or no adapter."""
        self._ref, self._kept, self._received, self.noting_seconds = ref, {}, {}, 0.0
        self._columns = dict(self._base) if ref.mode == "adapter" else dict(self._no_update)

    def note(self, name: str, sent: Tensor, staged: Tensor) -> None:
        """A tensor as the policy offered it, and the engine's copy, of which the decoder is to make what it serves."""
        started = time.perf_counter()
        self._note(name, sent, staged)
        self.noting_seconds += time.perf_counter() - started

    def _note(self, name: str, sent: Tensor, staged: Tensor) -> None:
        source = staged if staged.dtype == sent.dtype else sent.detach()
        if self._ref.mode == "adapter":
            self._kept[name] = source
        self._received |= digests_of({name: source}, self._ref.mode)
        if name not in self._shapes:
            return
        served = sent.detach().to(staged.dtype)
        if side_of(name) == "B":
            # rounded as the decoder rounds it where it scales a row that has a one
            served = served * torch.tensor(self._scales[module_of(name)], dtype=staged.dtype)
        self._columns[name] = columns_of(name, served, staged.dtype)
        self._columns |= {other: self._columns[name] for other, own in self._also.items() if own == name}

    @torch.inference_mode()
    def judge(self) -> tuple[str, Verdict]:
        """The digest of what is held, and whether products confirm it. SyncMismatch where it is not what was sent."""
        version, received = self._ref.version, self._received
        self._witness.expect(version, self._columns)
        verdict = self._witness.judge([{name: Shown.whole(self._shown(name)) for name in self._columns}])
        for index, info in enumerate(self._ref.manifest):
            is_due = self._ref.mode == "adapter" or (index - version) % UNPACKED_EVERY == 0
            if is_due and not _holds(self._decoder.held(info.name), self._offered(info.name)):
                received[info.name] = "other bytes"
        self._kept = {}
        require_bytes(version, self._ref.handed, received)
        return combined_digest(received), verdict

    def _offered(self, name: str) -> Tensor:
        """What was sent under a name: merged once more, since nobody has kept it, and known by its digest to be the
        same."""
        assert self._ref.tensors is not None
        return self._kept[name] if name in self._kept else self._ref.tensors[name].detach()

    def _shown(self, name: str) -> Tensor:
        """Columns of what stands under a name, by the decoder's product where it has one; zero without an adapter."""
        own, dtype, held = self._also.get(name, name), self._dtype, None
        if side_of(name) is not None:
            held = self._decoder.held(name)
            if held is None:
                return torch.zeros_like(self._columns[name])
            dtype = held.dtype
        shape = self._shapes[own]
        if len(shape) == 2:
            columns = tuple(probed_columns(own, shape[1]))
            x = one_hot(columns, shape[1], dtype, self._device)[: len(columns)]
            product = self._decoder.multiply(name, x)
            if product is not None:
                return product.T.cpu()
        held = self._decoder.held(name)
        assert held is not None, name
        return columns_of(own, held, dtype)


def _holds(held: Tensor | None, kept: Tensor) -> bool:
    """Whether a tensor has the bytes of another, rounded as an engine rounds."""
    if held is None or held.shape != kept.shape:
        return False
    cast = kept.to(device=held.device, dtype=held.dtype)
    return torch.equal(held.contiguous().view(torch.uint8), cast.contiguous().view(torch.uint8))
