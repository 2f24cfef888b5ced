"""One of two tensor-parallel ranks: hidden states, adapter gradients and the number of all-to-alls, for every case."""

from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.tensor_parallel.mappings import all_to_all_hp2sp, gather_from_sequence_parallel_region
from torch import Tensor

from nemo_rl_lora.config.megatron import MegatronConfig
from nemo_rl_lora.lora.spec import LoraSpec
from nemo_rl_lora.lora.targets import resolve_targets
from nemo_rl_lora.models.load import empty_model, linear_modules, load_model_config
from nemo_rl_lora.policy.attention import AttentionPlan
from nemo_rl_lora.policy.megatron import lora
from nemo_rl_lora.policy.megatron.convert import open_checkpoint, shard_adapter, share
from nemo_rl_lora.policy.megatron.families import read_family
from nemo_rl_lora.policy.megatron.groups import join_processes, ranks_of
from nemo_rl_lora.policy.megatron.layers import build_model, flat_run, transformer_config
from nemo_rl_lora.policy.megatron.lora import Adapters
from nemo_rl_lora.policy.megatron.weights import StageWeights
from nemo_rl_lora.policy.microbatches import Microbatch, Segment

SEED = 7


@dataclass(frozen=True, kw_only=True)
class Case:
    """A way to split the work, and an adapter."""

    name: str
    sequence_parallel: bool = False
    fields: dict


SHARED = {"targets": ("linear_qkv", "linear_fc1", "linear_fc2"), "fused": "shared"}
ADAPTERS = {
    "plain": {},
    "dropped before A": {"dropout": 0.3, "dropout_position": "pre"},
    "dropped after B": {"dropout": 0.3, "dropout_position": "post"},
    "some of a fused layer": {"targets": ("k_proj", "up_proj", "o_proj")},
    "a shared A": SHARED,
    "a shared A, dropped after B": {**SHARED, "dropout": 0.3, "dropout_position": "post"},
}
CASES = [
    Case(name=f"{name}, {how}", sequence_parallel=how == "by sequence", fields=fields)
    for name, fields in ADAPTERS.items()
    for how in ("by columns", "by sequence")
]
CASES += [
    Case(name=f"{name}, by all-to-all", sequence_parallel=True, fields={**ADAPTERS[name], "a2a": True})
    for name in ("plain", "dropped after B", "a shared A")
]


def microbatch() -> Microbatch:
    """A prompt of 6 tokens that two completions share, and a sequence of its own: 24 tokens."""
    segments = (
        Segment(start=0, length=6, parent=None),
        Segment(start=6, length=7, parent=0),
        Segment(start=13, length=3, parent=0),
        Segment(start=16, length=8, parent=None),
    )
    positions = [*range(6), *range(6, 13), *range(6, 9), *range(8)]
    empty = torch.zeros(0, dtype=torch.int64)
    return Microbatch(
        rows=empty,
        token_ids=torch.arange(24) * 37 % 211,
        position_ids=torch.tensor(positions),
        segments=segments,
        predictor=empty,
        loss_row=empty,
        loss_column=empty,
        target=empty,
        num_padding_tokens=0,
    )


def run_case(path: Path, case: Case, num_ranks: int) -> dict[str, Tensor]:
    """Hidden states [N, H], and on the first rank the gradient of every canonical factor."""
    config = load_model_config(path, {})
    family = read_family(config, "tiny", 64)
    megatron = MegatronConfig(
        tensor_model_parallel_size=num_ranks, sequence_parallel=case.sequence_parallel and num_ranks > 1
    )
    join_processes(megatron)
    ranks = ranks_of(family, megatron)
    layout = ranks.layout
    model = build_model(family, layout, transformer_config(family, megatron, torch.float32))
    with open_checkpoint(path) as slices:
        StageWeights(model, family, ranks).load(slices.__getitem__, str(path))
    spec = LoraSpec(dim=4, alpha=8, **case.fields)
    modules = linear_modules(empty_model(config))
    adapted = resolve_targets(spec, modules, tied_head=True, model_label="tiny", config_key="policy.lora")
    adapters = Adapters(model, adapted, spec, family=family, ranks=ranks, seed=SEED)
    generator = torch.Generator().manual_seed(3)
    b = {m.name: torch.randn(m.out_features, m.dim, generator=generator) * 0.1 for m in adapted}
    with torch.no_grad():
        for held in adapters._held:
            shards = [shard_adapter(held.layer, "B", b[module.name], layout) for module in held.modules]
            adapters._factors[held.name].b.copy_(
                shards[0] if len(shards) == 1 else share(held.layer, "B", shards, family)
            )
    adapters.switch.dropout_seed = SEED
    micro = microbatch()
    attention = AttentionPlan(micro.segments, torch.device("cpu"))
    run = flat_run(micro.position_ids, attention, torch.tensor(family.inverse_frequencies), torch.float32)
    hidden = model(micro.token_ids[None], micro.position_ids[None], None, packed_seq_params=run)
    if megatron.sequence_parallel:
        # Every rank's loss is the whole one, so each sends back only the gradient of its own tokens.
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(5))
    (hidden * weight).sum().backward()
    gradients = adapters.canonical(gradient_of)
    return {"hidden": hidden.detach()[:, 0], **(gradients if ranks.is_first else {})}


class Counted:
    """A function, and how often it was called."""

    def __init__(self, function) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *arguments, **named):
        self.calls += 1
        return self.function(*arguments, **named)


def gradient_of(master: torch.nn.Parameter) -> Tensor:
    assert master.grad is not None
    return master.grad


def run_cases(rank: int, meeting: Path, path: Path) -> None:
    """Every case with the model at `path`, as one of two ranks; what was found is saved in `meeting`."""
    found = {}
    for case in CASES:
        lora.all_to_all_hp2sp = Counted(all_to_all_hp2sp)
        found[case.name] = run_case(path, case, 2), lora.all_to_all_hp2sp.calls
    torch.save(found, meeting / f"rank{rank}.pt")
