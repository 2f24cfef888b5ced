"""The judgement of an export: where its bound lies, and which rows are looked at."""

from pathlib import Path

import pytest
import torch

from nemo_rl_lora.export.merged import ExportError
from nemo_rl_lora.export.verify import Accuracy, _measure, _row_ranges
from nemo_rl_lora.tensors import StoredTensor, stored_tensors
from tests.export.exports import write_tensors


def stored(directory: Path, num_rows: int) -> StoredTensor:
    directory.mkdir()
    write_tensors(directory, {"w": torch.zeros(num_rows, 3)})
    return stored_tensors(directory)["w"]


def test_an_error_may_reach_its_own_bound_and_no_more():
    exact = torch.tensor([[1.0, -2.0], [3.0, 4.0]], dtype=torch.float64)
    bound = torch.tensor([[0.5, 0.25], [0.125, 1.0]], dtype=torch.float64)
    far = torch.tensor([[0.25, 0.25], [0.0, 0.5]], dtype=torch.float64)
    found = _measure(Accuracy(), "w", (exact + far).float(), exact, bound)
    assert found == Accuracy(num_rows=2, max_abs_error=0.5, bound=1.0, tensor="w", worst_ratio=1.0)
    for place in ((0, 0), (0, 1), (1, 0), (1, 1)):
        rows = exact.clone()
        rows[place] -= 1.01 * bound[place]
        with pytest.raises(ExportError, match=r"w: is 1\.01 times as far"):
            _measure(Accuracy(), "w", rows, exact, bound)


def test_sampled_rows_are_spread_from_the_first_to_the_last(tmp_path):
    rows = [begin for begin, _ in _row_ranges(stored(tmp_path / "many", 301), every_row=False)]
    assert rows == [20 * sample for sample in range(16)]
    few = list(_row_ranges(stored(tmp_path / "few", 9), every_row=False))
    assert few == [(0, 9)] == list(_row_ranges(stored(tmp_path / "again", 9), every_row=True))
