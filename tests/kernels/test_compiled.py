"""Every pinned configuration of our Triton kernels, compiled for GPUs without one: shared memory, and registers.

The interpreter (interpreted.py) takes programs that the compiler refuses, such as a variable whose type changes in a
loop, and knows nothing of memory.
"""

from __future__ import annotations

import itertools
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nemo_rl_lora.kernels import logprobs, low_rank

HOPPER, AMPERE = 90, 80
SHARED_BYTES = 99 * 1024  # of a program, on the GPUs since Ampere that have the least; Hopper has 227 KiB
# Of a thread. The assembler of Triton 3.6 keeps one number of the largest block elsewhere.
SPILLED_BYTES = 0 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7) else 4
KERNELS = {
    "project": low_rank.project_kernel,
    "expand": low_rank.expand_kernel,
    "reduce": low_rank.reduce_kernel,
}
# what has columns, and the factor of low rank
NARROW = [("bf16", "bf16"), ("fp16", "fp16")]
WIDE = [("fp32", "fp32"), ("bf16", "fp32"), ("fp32", "bf16")]
# which stride is 1 in the forward pass, or in the gradient of A, and which in the backward pass, or in that of B
LAYOUTS = {
    "project": ("w_width_stride", "w_rank_stride"),
    "expand": ("w_rank_stride", "w_width_stride"),
    "reduce": ("out_width_stride", "out_rank_stride"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    shared_bytes: int
    spilled_bytes: int


def compiled(
    kernel: Any, constants: dict[str, Any], pointers: dict[str, str], options: dict[str, int], target: int, file: Path
) -> Compiled:
    """The kernel with these constants and types of pointers, for a compute capability. Other arguments are fp32 where
    they are factors, else integers; all but the number of tokens as multiples of 16, as those of models mostly are."""
    signature, attributes = {}, {}
    for at, name in enumerate(kernel.arg_names):
        is_factor = name == "scale" or "factor" in name or name == "cap"
        kind = f"*{pointers[name]}" if name in pointers else "fp32" if is_factor else "i32"
        signature[name] = "constexpr" if name in constants else kind
        if signature[name].startswith(("*", "i32")) and name != "num_tokens":
            attributes[(at,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    found = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    file.write_text(found.asm["ptx"])
    name = f"--gpu-name=sm_{target}{'a' if target >= HOPPER else ''}"
    assembler = [triton.knobs.nvidia.ptxas.path, "-v", name, str(file), "-o", str(file.with_suffix(".cubin"))]
    said = subprocess.run(assembler, check=True, capture_output=True, text=True).stderr
    spilled = re.findall(r"(\d+) bytes spill stores", said)
    return Compiled(shared_bytes=found.metadata.shared, spilled_bytes=sum(map(int, spilled)))


def pinned(name: low_rank.Name, rank: int, dtypes: tuple[str, str], layout: int, target: int, file: Path) -> Compiled:
    columns, factor = dtypes
    blocks = low_rank.configuration(name, rank, wide="fp32" in dtypes).arguments()
    options = {option: blocks.pop(option) for option in ("num_warps", "num_stages")}
    constants = {**blocks, LAYOUTS[name][layout]: 1} | ({"HAS_BASE": True} if name == "expand" else {})
    of_columns = {"project": ("x",), "expand": ("out",), "reduce": ("x",)}[name]
    pointers = dict.fromkeys(("h", "w"), factor) | dict.fromkeys(of_columns, columns)
    pointers = {"out": "fp32"} | pointers  # the parts of a sum
    return compiled(KERNELS[name], constants, pointers, options, target, file)


def assert_fits(found: Compiled) -> None:
    assert found.shared_bytes <= SHARED_BYTES
    assert found.spilled_bytes <= SPILLED_BYTES


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("rank", [low_rank.BUCKETS[0], low_rank.BUCKETS[-1]])
@pytest.mark.parametrize("dtypes", [NARROW[0], WIDE[0]], ids=str)
def test_the_smallest_and_the_largest_blocks_fit_a_gpu(name, rank, dtypes, tmp_path):
    layout = int(name == "reduce")
    assert_fits(pinned(name, rank, dtypes, layout, HOPPER, tmp_path / "kernel.ptx"))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("target", [HOPPER, AMPERE])
def test_every_configuration_fits_a_gpu(name, target, tmp_path):
    for rank, dtypes, layout in itertools.product(low_rank.BUCKETS, NARROW + WIDE, (0, 1)):
        found = pinned(name, rank, dtypes, layout, target, tmp_path / "kernel.ptx")
        fits = found.shared_bytes <= SHARED_BYTES, found.spilled_bytes <= SPILLED_BYTES
        assert fits == (True, True), (rank, dtypes, layout, found)


@pytest.mark.parametrize(("dtype", "has_cap"), [("bf16", True), ("fp32", False)])
def test_the_heads_kernel_fits_a_gpu(dtype, has_cap, tmp_path):
    constants = {"HAS_CAP": has_cap, "WITH_SLOPE": True, "BLOCK": logprobs.BLOCK}
    pointers = {"logits": dtype, "target": "i64", "logprobs": "fp32"}
    options = {"num_warps": logprobs.WARPS}
    assert_fits(compiled(logprobs.logprob_kernel, constants, pointers, options, HOPPER, tmp_path / "kernel.ptx"))


def test_the_sum_of_parts_compiles(tmp_path):
    assert_fits(
        compiled(
            low_rank.sum_kernel, {"BLOCK": 1024}, {"parts": "fp32", "out": "bf16"}, {}, HOPPER, tmp_path / "kernel.ptx"
        )
    )


@pytest.mark.parametrize(
    ("rank", "expected"), [(1, 16), (16, 16), (17, 32), (64, 64), (65, 128), (256, 256), (900, 256)]
)
def test_a_rank_has_the_least_block_that_holds_it(rank, expected):
    """A higher one than the largest takes several."""
    assert low_rank.bucket(rank) == expected
