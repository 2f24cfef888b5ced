"""Prints, as JSON, how each spot of the shim behaves without its change and with it.

Two tensor-parallel ranks, of which this process is the first, over torch's fake process group, which answers without
communicating.
"""

import importlib
import json
import sys

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import forward_backward_no_pipelining
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.testing._internal.distributed.fake_pg import FakeStore

from nemo_rl_lora.patches import megatron_core


def config(**fields) -> TransformerConfig:
    return TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        use_cpu_initialization=True,
        tensor_model_parallel_size=2,
        pipeline_dtype=torch.float32,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        add_bias_linear=False,
        **fields,
    )


def gather_columns() -> None:
    group = parallel_state.get_tensor_model_parallel_group()
    assert gather_from_tensor_model_parallel_region(torch.ones(3, 2), group).shape == (3, 4)


def train_under_sequence_parallelism() -> None:
    linear = ColumnParallelLinear(
        8, 6, config=config(sequence_parallel=True), init_method=torch.nn.init.ones_, bias=False
    )
    out, _ = linear(torch.ones(3, 1, 8, requires_grad=True))
    assert out.shape == (6, 1, 3)
    out.sum().backward()
    assert linear.weight.grad.shape == (3, 8)


def route() -> None:
    groups = ProcessGroupCollection.use_mpu_process_groups()
    router = TopKRouter(config(num_moe_experts=4, moe_router_load_balancing_type="none"), groups).eval()
    torch.nn.init.normal_(router.weight)
    probabilities, _ = router(torch.randn(3, 1, 8))
    assert probabilities.shape == (3, 4)
    probabilities.sum().backward()


def receive_from_the_stage_before() -> None:
    group = parallel_state.get_tensor_model_parallel_group()  # any two ranks
    received = P2PCommunicator(group, config(batch_p2p_comm=True)).recv_forward((3, 1, 8), is_first_stage=False)
    assert received.shape == (3, 1, 8)


class Doubling(MegatronModule):
    model_type = ModelType.encoder_or_decoder

    def __init__(self) -> None:
        super().__init__(config())
        self.weight = torch.nn.Parameter(torch.ones(2))

    def set_input_tensor(self, _: object) -> None:
        """It has an input of its own."""


def run_microbatches() -> None:
    model = Doubling()
    forward_backward_no_pipelining(
        forward_step_func=lambda _, model: (model.weight * 2, lambda out: (out.sum(), {})),
        data_iterator=[None],
        model=model,
        num_microbatches=2,
        seq_length=1,
        micro_batch_size=1,
    )
    assert torch.equal(model.weight.grad, torch.full((2,), 2.0))


SPOTS = {
    "megatron.core.tensor_parallel.mappings": gather_columns,
    "megatron.core.tensor_parallel.layers": train_under_sequence_parallelism,
    "megatron.core.utils": train_under_sequence_parallelism,
    "megatron.core.transformer.moe.router": route,
    "megatron.core.pipeline_parallel.p2p_communication": receive_from_the_stage_before,
    "megatron.core.pipeline_parallel.schedules": run_microbatches,
    "megatron.core.transformer.moe.moe_utils": route,
}


missing = object()


def outcome(run) -> str:
    parallel_state._GLOBAL_MEMORY_BUFFER.buffer.clear()  # it would keep what an earlier run allocated
    try:
        run()
    except (RuntimeError, AssertionError, NameError) as error:
        return f"{type(error).__name__}: {error}"
    return "ran"


def main() -> None:
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2, create_gloo_process_groups=False)
    modules = {name: vars(importlib.import_module(name)) for name in SPOTS}
    before = {name: dict(module) for name, module in modules.items()}
    megatron_core.install()
    found = {}
    for name, run in SPOTS.items():
        module, changed = modules[name], dict(modules[name])
        module.clear()
        module.update(before[name])
        without = outcome(run)
        module.update(changed)
        differing = [key for key, value in changed.items() if before[name].get(key, missing) is not value]
        found[name] = {"changed": differing, "without": without, "with": outcome(run)}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
