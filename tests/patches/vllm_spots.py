"""Prints, as JSON, how vLLM's LoRA on a CPU and its shutdown behave without the changes, and the LoRA with them."""

import json
import sys

import torch
import torch.distributed as dist
from torch.distributed import HashStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.v1.engine.core import EngineCore

from nemo_rl_lora.patches import vllm

ROWS, WIDTH, RANK, ADAPTER = 24, 64, 8, 1


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that an operation made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


def branch(is_prefill: bool, is_loaded: bool) -> tuple[torch.Tensor, int]:
    """A LoRA branch of 24 rows, added to ones, and the elements of the largest tensor on the way."""
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(1, 1, RANK, WIDTH, generator=generator)
    b = torch.randn(1, 1, WIDTH, RANK, generator=generator)
    x = torch.randn(ROWS, WIDTH, generator=generator)
    wrapper = PunicaWrapperCPU(max_num_batched_tokens=64, max_batches=32, device="cpu")
    ids = (ADAPTER if is_loaded else 0,) * ROWS
    wrapper.update_metadata(LoRAMapping(ids, ids, is_prefill=is_prefill), [ADAPTER], 1, 100)
    inner, out = torch.zeros(ROWS, RANK), torch.ones(ROWS, 2 * WIDTH)
    with Largest() as largest:
        wrapper._apply_shrink(inner, x, a, 0.5)
        wrapper._apply_expand(out, inner, b, WIDTH, WIDTH, add_inputs=True)
    return out, largest.elements


def main() -> None:
    cases = [(True, True), (False, True), (True, False)]  # that none is loaded is seen in a prefill
    without = [branch(*case) for case in cases]
    vllm.multiply_once_for_all_rows()
    found = [
        {
            "is_prefill": is_prefill,
            "is_loaded": is_loaded,
            "elements": [one[1], other[1]],
            "changed": bool((other[0] != 1).any()),
            "difference": float((one[0] - other[0]).abs().max()),
        }
        for (is_prefill, is_loaded), one, other in zip(cases, without, [branch(*case) for case in cases], strict=True)
    ]
    dist.init_process_group("gloo", rank=0, world_size=1, store=HashStore())
    cleanup_dist_env_and_memory()
    shutdown = {
        "calls_it": "cleanup_dist_env_and_memory" in EngineCore.shutdown.__code__.co_names,
        "leaves_groups": dist.is_initialized(),
    }
    json.dump({"lora": found, "shutdown": shutdown}, sys.stdout)


if __name__ == "__main__":
    main()
