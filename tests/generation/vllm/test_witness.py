"""What ranks show of a matrix, judged without an engine: which columns are probed, and which rank is named."""

import pytest
import torch

from nemo_rl_lora.generation.proof import (
    PROBE_COLUMNS,
    Shown,
    SyncMismatch,
    Witness,
    columns_of,
    probed_columns,
    require_received,
)

NAME = "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("num_columns", [1, 3, 16, 48, 576, 4096])
def test_every_rank_has_a_probed_column_in_its_share_of_a_matrix(num_ranks, num_columns):
    for layer in range(20):
        columns = probed_columns(f"model.layers.{layer}.mlp.down_proj.weight", num_columns, num_ranks)
        assert columns == sorted(set(columns))
        assert 0 <= columns[0] <= columns[-1] < num_columns
        if num_columns % num_ranks == 0:  # else no engine splits it by its columns
            share = num_columns // num_ranks
            assert len({column // share for column in columns}) == num_ranks
        else:
            assert len(columns) == min(PROBE_COLUMNS, num_columns)


def test_without_ranks_the_columns_are_eight_that_lie_together_elsewhere_in_each_block():
    starts = set()
    for layer in range(20):
        q, k = (probed_columns(f"model.layers.{layer}.self_attn.{part}_proj.weight", 576) for part in "qk")
        assert q == k == list(range(q[0], q[0] + PROBE_COLUMNS))
        starts.add(q[0])
    assert len(starts) > 15


def shown_by_ranks(by: str, tensors: list[torch.Tensor]) -> list[dict[str, Shown]]:
    """What ranks show that split the matrix by its rows or its columns, each of the tensor that it has."""
    number, ranks = len(tensors), []
    for rank, tensor in enumerate(tensors):
        columns = columns_of(NAME, tensor, torch.float32, number)
        size = columns.shape[0 if by == "rows" else 1] // number
        own, whole = (rank * size, (rank + 1) * size), (0, columns.shape[1 if by == "rows" else 0])
        rows, across = (own, whole) if by == "rows" else (whole, own)
        ranks.append({NAME: Shown(columns[slice(*rows), slice(*across)].clone(), rows, across)})
    return ranks


@pytest.mark.parametrize("by", ["rows", "columns"])
@pytest.mark.parametrize("stale", [0, 1])
def test_a_stale_rank_is_named_whichever_way_the_matrix_is_split(by, stale):
    base, old, new = (torch.randn(12, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    witness = Witness({NAME: columns_of(NAME, base, torch.float32, 2)})
    witness.judge_base(shown_by_ranks(by, [base, base]))
    for version, tensor in enumerate((old, new)):
        witness.expect(version, {NAME: columns_of(NAME, tensor, torch.float32, 2)})
        assert witness.judge(shown_by_ranks(by, [tensor, tensor])) == "confirmed"
    for tensor, what in ((old, "as the version before had it"), (base, "as the base has it")):
        served = shown_by_ranks(by, [tensor if rank == stale else new for rank in range(2)])
        with pytest.raises(SyncMismatch, match=rf"rank {stale} of the engine's kernels .*{NAME} is {what}"):
            witness.judge(served)
    with pytest.raises(SyncMismatch, match=rf"the base of rank {stale} of the engine is not the policy's: 1 of 1"):
        witness.judge_base(shown_by_ranks(by, [new if rank == stale else base for rank in range(2)]))


def test_ranks_that_leave_out_a_part_confirm_nothing():
    tensor = torch.randn(12, 32, generator=torch.Generator().manual_seed(0))
    witness = Witness({})
    witness.expect(0, {NAME: columns_of(NAME, tensor, torch.float32, 2)})
    first, _ = shown_by_ranks("rows", [tensor, tensor])
    with pytest.raises(AssertionError, match=r"down_proj.*\(12, 8\)"):
        witness.judge([first, first])
    assert witness.judge(shown_by_ranks("columns", [tensor, tensor])) == "undecided"  # nothing to be told from


def test_a_rank_that_received_other_bytes_is_named():
    sent = {"a": "1", "b": "2"}
    require_received(3, sent, [sent, sent])
    with pytest.raises(SyncMismatch, match="version 3: rank 1 of the engine received other bytes in 1 of 2 tensors: b"):
        require_received(3, sent, [sent, {"a": "1", "b": "x"}])
    with pytest.raises(SyncMismatch, match="version 3: the engine received other bytes in 1 of 2 tensors: b"):
        require_received(3, sent, [{"a": "1"}])
