"""AdapterLinear on nemo-automodel's kernels, in Triton's interpreter: values, gradients and launches. Needs no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# fp32: sums of at most 96 products, each rounding 6e-8 of its term. Measured at most 2.2e-7.
# bf16: the operands are exact in the reference, and every stage rounds once: x A^T (or dy B), the product with the
# other factor, the base product and their sum. A rounding is at most 2^-9 of its term; four stages make 2^-7. Measured
# at most 2.9e-3; a wrong scale or a missing term would be above 1e-1.
TOLERANCE = {"float32": 2e-6, "bfloat16": 2.0**-7}


# dtype of x, and that of the adapter's computation where it is another. Masters are always fp32.
DTYPES = {("float32", None), ("bfloat16", None), ("float32", "bfloat16"), ("bfloat16", "float32")}


def tolerance(case: dict) -> float:
    """That of the coarser dtype that took part."""
    return max(TOLERANCE[case["compute"]], TOLERANCE[case["adapter"] or case["compute"]])


@pytest.fixture(scope="module")
def results() -> list[dict]:
    """What kernel_check.py found, in a process of its own with the interpreter on."""
    script = Path(__file__).with_name("kernel_check.py")
    root = Path(__file__).parents[3]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_cases_cover_rows_dims_dtypes_and_axes(results) -> None:
    cases = [result["case"] for result in results if result["case"]["kernels"]]
    assert {(tuple(c["shape"]), c["dim"]) for c in cases} >= {((1,), 4), ((17,), 16), ((64,), 4), ((4, 16), 16)}
    assert {(c["compute"], c["adapter"]) for c in cases} == DTYPES
    assert {c["bias"] for c in cases} == {True, False}
    assert 1.0 not in {c["scale"] for c in cases}


@pytest.mark.parametrize("tensor", ["y", "x", "A", "B"])
def test_values_and_gradients_equal_the_formula(results, tensor) -> None:
    wrong = [
        (result["case"], result["errors"][tensor])
        for result in results
        if not result["errors"][tensor] <= tolerance(result["case"])
    ]
    assert wrong == []


def test_every_kernel_runs_once_where_kernels_are_on(results) -> None:
    """Also where x is not fp32 as the masters are: unlike dtypes would make the vendor leave the kernels out unsaid."""
    launches = {
        (result["case"]["compute"], result["case"]["adapter"], *result["launches"].values())
        for result in results
        if result["case"]["kernels"]
    }
    assert launches == {(*dtypes, 1, 1, 1) for dtypes in DTYPES}


def test_no_kernel_runs_where_kernels_are_off(results) -> None:
    launches = [list(result["launches"].values()) for result in results if not result["case"]["kernels"]]
    assert len(launches) == 4
    assert all(counts == [0, 0, 0] for counts in launches)


def test_adapter_dtype_decides_how_exact_its_gradients_are(results) -> None:
    """A and B get fp32 gradients of an adapter that computes in fp32 under a bf16 model, and coarse ones in reverse."""
    for result in results:
        case, errors = result["case"], result["errors"]
        exact = (case["adapter"] or case["compute"]) == "float32"
        for tensor in ("A", "B"):
            assert (errors[tensor] < TOLERANCE["float32"]) == exact, (case, tensor)


def test_output_has_the_dtype_of_the_input_and_gradients_are_fp32(results) -> None:
    for result in results:
        case, dtypes = result["case"], result["dtypes"]
        assert (dtypes["y"], dtypes["x"]) == (case["compute"], case["compute"]), case
        assert (dtypes["A"], dtypes["B"]) == ("float32", "float32"), case
        assert result["shapes_kept"], case
