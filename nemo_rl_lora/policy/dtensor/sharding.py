"""How processes share a model of the DTensor backend: a mesh, tensor parallelism, and FSDP2 around it.

Contract: the mesh has three dimensions, replicas of the sharded model, its data-parallel shards, and tensor-parallel
ranks, of which those of one model copy are neighbours. Weights are split between tensor-parallel ranks by
nemo-automodel's plans, and what each has is split again by PyTorch's FSDP2, layer by layer. Gradients are summed, not
averaged: losses have global denominators. Nothing here reads a weight: a model may be on the meta device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor.parallel import parallelize_module
from transformers import PreTrainedModel

from nemo_rl_lora.config.dtensor import DTensorConfig
from nemo_rl_lora.distributed.ranks import DataShare, Ranks
from nemo_rl_lora.models.families import has_tied_head
from nemo_rl_lora.policy.dtensor.tensor_plan import planned_modules, tensor_plan

_REPLICATE, _SHARD, _TENSOR = "dp_replicate", "dp_shard", "tp"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """The mesh of the processes that share a model, and this process's place in it."""

    mesh: DeviceMesh
    sequence_parallel: bool

    @property
    def tensor_mesh(self) -> DeviceMesh | None:
        """The tensor-parallel ranks; None where each has whole matrices."""
        return self.mesh[_TENSOR] if self.mesh[_TENSOR].size() > 1 else None

    @property
    def sequence_mesh(self) -> DeviceMesh | None:
        """The ranks that share a sequence's activations; None where each has all of them."""
        return self.tensor_mesh if self.sequence_parallel else None

    @property
    def data_mesh(self) -> DeviceMesh:
        """What FSDP shards over, and replicates over first where there are replicas."""
        return self.mesh[_REPLICATE, _SHARD] if self.mesh[_REPLICATE].size() > 1 else self.mesh[_SHARD]

    def answers_for(self, parameter: Tensor) -> bool:
        """Whether this process is the first of those that hold the same elements of a parameter."""
        place = self._coordinate()
        if isinstance(parameter, DTensor):
            names = parameter.device_mesh.mesh_dim_names or ()
            for name, placement in zip(names, parameter.placements, strict=True):
                if not placement.is_replicate():
                    del place[name]
        return not any(place.values())

    def ranks(self, partial_names: Callable[[str], bool], counts: Callable[[str], bool]) -> Ranks:
        """This process among the others. `partial_names`: parameters of whose gradient a tensor-parallel rank has a
        part."""
        place, number = self._coordinate(), self.mesh[_REPLICATE].size() * self.mesh[_SHARD].size()
        return Ranks(
            rank=dist.get_rank(),
            number=dist.get_world_size(),
            data_share=DataShare(
                index=place[_REPLICATE] * self.mesh[_SHARD].size() + place[_SHARD],
                number=number,
                meets="passes" if number > 1 else "never",
            ),
            reports=place[_TENSOR] == 0,
            gradient_sums=((self.mesh.get_group(_TENSOR), partial_names),),
            counts=counts,
        )

    def _coordinate(self) -> dict[str, int]:
        coordinate, names = self.mesh.get_coordinate(), self.mesh.mesh_dim_names
        assert coordinate is not None
        assert names is not None
        return dict(zip(names, coordinate, strict=True))


def join_processes(config: DTensorConfig) -> Sharing | None:
    """The mesh of all processes; None where this one is alone and needs none."""
    if not dist.is_initialized() and config.cpu_offload:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if not config.cpu_offload and (not dist.is_initialized() or dist.get_world_size() == 1):
        return None
    tensor, replicas = config.tensor_parallel_size, config.dp_replicate_size
    shape = (replicas, dist.get_world_size() // (replicas * tensor), tensor)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Sharing(
        mesh=init_device_mesh(device, shape, mesh_dim_names=(_REPLICATE, _SHARD, _TENSOR)),
        sequence_parallel=config.sequence_parallel and tensor > 1,
    )


def split_matrices(model: PreTrainedModel, sharing: Sharing, custom_plan: str | None) -> frozenset[str]:
    """Split a model's matrices, and adapters on them, between tensor-parallel ranks, in place.

    Names the parameters that each rank holds whole and of whose gradient it computes a part.
    """
    if (mesh := sharing.tensor_mesh) is None:
        return frozenset()
    from nemo_automodel.components.distributed.parallel_styles import ReplicatedWithGradAllReduce, translate_to_lora

    plan = tensor_plan(model, sharing.sequence_parallel, custom_plan)
    summed = {name: style for name, style in plan.items() if isinstance(style, ReplicatedWithGradAllReduce)}
    partial_modules = {name for names in planned_modules(model, summed).values() for name in names}
    styles = {name: translate_to_lora(style) for name, style in plan.items()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    parallelize_module(model, mesh, styles, src_data_rank=None)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)  # some styles let what they replace have gradients
    if has_tied_head(model.config):
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        assert isinstance(head, nn.Module)
        assert isinstance(embedding, nn.Module)
        head.register_parameter("weight", embedding.get_parameter("weight"))
    return frozenset(name for name, _ in model.named_parameters() if name.rpartition(".")[0] in partial_modules)


def shard_layers(
    forward: nn.Module,
    model: PreTrainedModel,
    sharing: Sharing,
    *,
    compute_dtype: torch.dtype | None,
    cpu_offload: bool,
) -> FSDPModule:
    """FSDP2 around each layer of a model, and around `forward`, which reads all that is left: embeddings and head, and
    layers with parameters that others have too.

    `compute_dtype`: what trained weights are gathered in, where masters have another dtype; gradients are summed in
    fp32. None: every parameter is gathered as it is.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if cpu_offload else OffloadPolicy()
    shard = partial(fully_shard, mesh=sharing.data_mesh, mp_policy=policy, offload_policy=offload)
    for layer in list(layers_of(model)):
        shard(layer)
    shard(forward)
    for module in forward.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
    assert isinstance(forward, FSDPModule)
    return forward


def layers_of(model: PreTrainedModel) -> Iterator[nn.Module]:
    """The outermost of a model's layers all of whose parameters are theirs alone: no two of them overlap. The classes
    may be FSDP2's, which are subclasses of the model's."""
    layer_names = set(model._no_split_modules or ())
    uses = _uses(model)

    def within(module: nn.Module) -> Iterator[nn.Module]:
        is_layer = any(base.__name__ in layer_names for base in type(module).__mro__)
        own = _uses(module) if is_layer else {}
        if own and all(uses[parameter] == number for parameter, number in own.items()):
            yield module
            return
        for child in module.children():
            yield from within(child)

    return within(model)


def _uses(module: nn.Module) -> Counter[int]:
    """In how many places of a module each of its parameters is."""
    return Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))


def whole_on_first(parameter: Tensor, part: Tensor | None = None) -> Tensor:
    """The whole tensor, on the first process; on others, which make this call too, of the meta device.

    `part`: what this process has of a tensor that is split as the parameter is; None: the parameter's own.
    """
    if not isinstance(parameter, DTensor):
        return parameter if part is None else part
    own = parameter.to_local() if part is None else part
    whole = split_as(parameter, own.to(parameter.device_mesh.device_type))  # where the processes speak
    assert isinstance(whole, DTensor)
    found = whole.full_tensor()
    return found if dist.get_rank() == 0 else found.to("meta")


def split_as(parameter: Tensor, part: Tensor) -> Tensor:
    """A tensor of which this process has `part`, over its memory, and which is split as the parameter is."""
    if not isinstance(parameter, DTensor):
        return part
    meta = TensorMeta(parameter.shape, parameter.stride(), part.dtype)
    spec = DTensorSpec(parameter.device_mesh, parameter.placements, tensor_meta=meta)
    return DTensor(part.detach(), spec, requires_grad=False)  # from_local would copy it to the mesh's device
