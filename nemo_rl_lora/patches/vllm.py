"""What vLLM 0.32 needs changed: LoRA on a CPU at a usable speed, an end that leaves the trainer's process groups
alone, a CPU engine that compiles nothing where it is told so, and weights that can be loaded after a load broke off.

tests/patches/test_vllm.py shows that the first two are still needed, and tests/generation/vllm/test_sync_memory.py that
the last is. Each is called from where vLLM runs: the first and the last in its worker, the others beside the engine
(generation/vllm/).
"""

from __future__ import annotations

import gc
from typing import Any

import torch.nn.functional as F
from torch import Tensor


def multiply_once_for_all_rows() -> None:
    """On a CPU vLLM copies A and B once for each row of a batch. There is one adapter here, and every row has it, so a
    plain product does (two to three times the tokens a second, measured); `self.no_lora` says that none is loaded."""
    from vllm.lora.punica_wrapper import punica_cpu

    wrapper: Any = punica_cpu.PunicaWrapperCPU

    def shrink(self: Any, y: Tensor, x: Tensor, stacked: Tensor, scale: float) -> None:
        if not self.no_lora:
            y.copy_(F.linear(x.to(stacked.dtype), stacked[0, 0]) * scale)

    def expand(
        self: Any, y: Tensor, x: Tensor, stacked: Tensor, offset: int, size: int, add_inputs: bool = True
    ) -> None:
        if self.no_lora:
            return
        product, rows = F.linear(x.to(stacked.dtype), stacked[0, 0]), y[:, offset : offset + size]
        rows.copy_(rows + product if add_inputs else product)

    wrapper._apply_shrink, wrapper._apply_expand = shrink, expand


def compile_nothing() -> None:
    """`enforce_eager` leaves parts that are compiled all the same, for half a minute. Turns torch.compile off in this
    process, which is the trainer's where the engine is colocated; policy.compile is refused then."""
    from torch import _dynamo

    _dynamo.config.disable = True


def shut_down(llm: Any) -> None:
    """End an engine of this process. Not by the core's own shutdown, now or when it is collected: that destroys every
    process group of this process, the trainer's among them."""
    client = llm.llm_engine.engine_core
    client._finalizer.detach()
    core = client.engine_core
    core.model_executor.shutdown()
    core.scheduler.shutdown()
    gc.unfreeze()  # what was made while the engine started


def forget_cached_blocks(block_pool: Any) -> None:
    """Let no request meet a block of the prefix cache any more; those that run keep the blocks that they have.

    vLLM empties the cache only where nothing runs, or makes what runs compute everything again.
    """
    for block in block_pool.blocks:
        if block.block_hash is not None:
            block_pool._maybe_evict_cached_block(block)


def forget_reload(model: Any, model_config: Any) -> None:
    """Give a model its tensors back, of which some are new, after `reload_weights` broke off.

    vLLM leaves its layers on the meta device, with what they had received, and the next reload would count that too.
    """
    from vllm.model_executor.model_loader.reload.layerwise import finalize_layerwise_reload, get_layerwise_info

    for layer in model.modules():
        info = get_layerwise_info(layer)
        info.load_numel = 0
        info.loaded_weights.clear()
    finalize_layerwise_reload(model, model_config)
