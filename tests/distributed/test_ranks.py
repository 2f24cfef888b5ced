"""Sums, gathers and reports over plain process groups: of one process, and of two that know no backend."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from nemo_rl_lora.distributed.ranks import Ranks, Shard


def parameter(gradient: list[float] | None) -> nn.Parameter:
    made = nn.Parameter(torch.zeros(2))
    made.grad = None if gradient is None else torch.tensor(gradient)
    return made


def test_one_process_sends_nothing_and_needs_no_group():
    ranks, tensor = Ranks(), torch.ones(2)
    named = {"a": parameter([3.0, 0.0]), "b": parameter([0.0, 4.0]), "c": parameter(None)}
    ranks.sum_gradients(named)
    assert named["c"].grad is None
    assert ranks.total_norm(named) == 5.0
    assert replace(ranks, counts=lambda name: name == "a").total_norm(named) == 3.0
    assert ranks.total(tensor) is tensor
    assert ranks.fetch([Shard(rank=0, shape=(2,), read=lambda: tensor)], torch.float32)[0] is tensor
    assert ranks.reported("found") == ["found"]


def test_no_vendor_is_imported():
    code = "import sys, nemo_rl_lora.distributed.ranks; print({'megatron', 'nemo_automodel', 'ray'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def one_of_two(rank: int, directory: str) -> None:
    """What one process finds, in a file. The first reports, and answers for "both"; "here" is the second's."""
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    assert dist.group.WORLD is not None
    ranks = Ranks(
        rank=rank,
        number=2,
        reports=rank == 0,
        gradient_sums=((dist.group.WORLD, lambda name: name != "apart"),),
        counts=lambda name: rank == 0 or name == "here",
    )
    named = {
        "both": parameter([3.0, 0.0] if rank == 0 else None),
        "also": parameter([rank, 1.0]),
        "apart": parameter([1.0, rank]),
    }
    shards = [Shard(rank=owner, shape=(2,), read=lambda: torch.tensor([5.0, rank])) for owner in (1, 0, 1)]
    fetched = ranks.fetch(shards, torch.float32)
    ranks.sum_gradients(named)
    seen = {"both": named["both"]} | ({"here": parameter([0.0, 4.0])} if rank == 1 else {})
    found = {
        "fetched": ["meta" if tensor.is_meta else tensor.tolist() for tensor in fetched],
        "gradients": {name: p.grad.tolist() for name, p in named.items()},
        "norm": float(ranks.total_norm(seen)),
        "total": ranks.total(torch.full((2,), rank + 1.0)).tolist(),
        "reported": ranks.reported(rank),
        "everybodys": ranks.everybodys(rank),
    }
    torch.save(found, Path(directory) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ranks")
    mp.start_processes(one_of_two, args=(str(directory),), nprocs=2, start_method="spawn")
    return [torch.load(directory / f"{rank}.pt") for rank in range(2)]


def test_shards_reach_the_first_process_alone(found):
    assert found[0]["fetched"] == [[5.0, 1.0], [5.0, 0.0], [5.0, 1.0]]
    assert found[1]["fetched"] == ["meta"] * 3


def test_gradients_are_summed_where_a_group_shares_them_and_zero_where_a_process_had_none(found):
    for rank in (0, 1):
        assert found[rank]["gradients"] == {"both": [3.0, 0.0], "also": [1.0, 2.0], "apart": [1.0, rank]}


def test_every_element_of_a_gradient_counts_once(found):
    assert [one["norm"] for one in found] == [5.0, 5.0]


def test_what_the_reporting_process_has_reaches_all(found):
    for one in found:
        assert (one["total"], one["reported"], one["everybodys"]) == ([1.0, 1.0], [0], [0, 1])
