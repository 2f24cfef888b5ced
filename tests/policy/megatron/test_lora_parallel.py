"""Adapters split over two tensor-parallel ranks are those of one process: outputs, gradients and dropout."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.policy.megatron.adapted_ranks import CASES, run_case, run_cases
from tests.policy.megatron.twins import distance
from tests.rank_processes import run_ranks
from tests.tiny_models import FAMILIES, save_random_model


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A tiny Llama whose vocabulary two ranks can share."""
    config = copy.deepcopy(FAMILIES["llama"])
    config.vocab_size = 212
    return save_random_model(config, tmp_path_factory.mktemp("even"))


@pytest.fixture(scope="module")
def ranks(path, tmp_path_factory):
    """What each of two processes found."""
    meeting = tmp_path_factory.mktemp("meeting")
    run_ranks(2, meeting, run_cases, meeting, path)
    return [torch.load(meeting / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_ranks_compute_what_one_does(ranks, path, case):
    expected = run_case(path, case, 1)
    assert min(tensor.norm() for tensor in expected.values()) > 0
    assert ranks[0][case.name][0].keys() == expected.keys()
    for rank in ranks:
        found, num_all_to_alls = rank[case.name]
        assert distance(found, {name: expected[name] for name in found}) <= 1e-5
        row_layers = {name.split(".lora_")[0] for name in expected if "o_proj" in name or "down_proj" in name}
        assert num_all_to_alls == (len(row_layers) if case.fields.get("a2a") else 0)
