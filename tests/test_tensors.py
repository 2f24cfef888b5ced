"""One digest for a tensor wherever it is; one reader and one writer of safetensors files."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_rl_lora import tensors as tensors_module
from nemo_rl_lora.lora.spec import LoraSpec
from nemo_rl_lora.tensors import (
    DTYPES,
    NUM_PAGES,
    PAGE_BYTES,
    TensorReader,
    digested_spans,
    entry_of,
    file_digest,
    file_tensors,
    plan_shards,
    stored_dtype,
    stored_tensors,
    tensors_digest,
    torch_dtype,
    weight_files,
    write_index,
    write_tensors,
)

BOUND = NUM_PAGES * PAGE_BYTES  # bytes up to which every byte counts
MIB = 1 << 20
# Around the bound of the rule, around the block in which a whole tensor is read, and 1 to 4 MiB,
# where a stride over bytes meets the same byte of each element
SIZES = [  # (bytes, dtype)
    *((size, torch.float32) for size in (4, 12, BOUND - 4, BOUND, BOUND + 4, MIB, MIB + 4, 2 * MIB, 3 * MIB + 8)),
    *((size, torch.float32) for size in (4 * MIB - 4, 4 * MIB, 4 * MIB + 4)),
    *((size, torch.bfloat16) for size in (2, 6, BOUND - 2, BOUND, BOUND + 2, MIB + 2, 3 * MIB + 2)),
    (3 * MIB + 24, torch.float64),
]
SIZE_IDS = [f"{size} bytes, {str(dtype).removeprefix('torch.')}" for size, dtype in SIZES]


def drawn(num_bytes: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(num_bytes // dtype.itemsize, generator=torch.Generator().manual_seed(num_bytes)).to(dtype)


def digest(tensor: torch.Tensor, whole: bool = False) -> str:
    return tensors_digest({"w": tensor}, whole=whole)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(("num_bytes", "dtype"), SIZES, ids=SIZE_IDS)
def test_twice_a_tensor_and_its_negative_have_other_digests(num_bytes, dtype, whole):
    b = drawn(num_bytes, dtype)
    assert len({digest(x, whole) for x in (b, 2 * b, -b, torch.zeros_like(b))}) == 4


@pytest.mark.parametrize(("num_bytes", "dtype"), SIZES, ids=SIZE_IDS)
def test_the_sign_of_any_one_element_counts_where_the_whole_tensor_does(num_bytes, dtype):
    b = drawn(num_bytes, dtype)
    before = digest(b, whole=True)
    for place in {0, len(b) // 3, len(b) // 2, len(b) - 1}:
        changed = b.clone()
        changed[place] *= -1
        assert digest(changed, whole=True) != before, place
        assert num_bytes > BOUND or digest(changed) != digest(b), place


@pytest.mark.parametrize("num_bytes", [BOUND + 1, BOUND + 4, MIB, 3 * MIB + 6, 40 * MIB])
def test_of_a_large_tensor_pages_from_its_first_to_its_last_byte_count(num_bytes):
    spans = digested_spans(num_bytes, whole=False)
    assert [stop - start for start, stop in spans] == [PAGE_BYTES] * NUM_PAGES
    assert (spans[0][0], spans[-1][1]) == (0, num_bytes)
    gaps = [start - stop for (_, stop), (start, _) in zip(spans, spans[1:], strict=False)]
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("num_bytes", [0, 1, BOUND, BOUND + 1, 9 * MIB + 3])
def test_the_whole_is_every_byte_once(num_bytes):
    spans = digested_spans(num_bytes, whole=True)
    assert [byte for start, stop in spans for byte in (start, stop)][1:-1:2] == [start for start, _ in spans][1:]
    assert sum(stop - start for start, stop in spans) == num_bytes


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.5),
        torch.empty(0, 4),
        torch.tensor([True, False]),
        torch.arange(7, dtype=torch.uint8),
        torch.randn(5, 3).to(torch.float8_e4m3fn),
        *(drawn(num_bytes, dtype) for num_bytes, dtype in SIZES),
    ],
    ids=lambda value: f"{list(value.shape)} {value.dtype}" if isinstance(value, torch.Tensor) else str(value),
)
def test_a_tensor_in_memory_and_in_a_file_has_one_digest(tensor, whole, tmp_path):
    save_file({"other": torch.ones(3), "w": tensor}, tmp_path / "model.safetensors")
    stored = stored_tensors(tmp_path)
    assert tensors_digest({"w": stored["w"]}, whole=whole) == digest(tensor, whole)
    write_tensors(tmp_path / "own", [entry_of("w", tensor.shape, tensor.dtype)], lambda _: tensor)
    assert tensors_digest(file_tensors(tmp_path / "own"), whole=whole) == digest(tensor, whole)


@pytest.mark.parametrize("shape", [(9, 5), (1200, 1000)])
def test_strides_do_not_count(shape):
    tensor = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    strided = tensor.T.contiguous().T
    assert not strided.is_contiguous()
    for whole in (True, False):
        assert digest(strided, whole) == digest(tensor, whole)
        assert digest(torch.nn.Parameter(tensor), whole) == digest(tensor, whole)


def test_names_shapes_dtypes_and_every_tensor_count_and_their_order_does_not():
    w = torch.arange(6, dtype=torch.float32)
    others = [{"v": w}, {"w": w.view(2, 3)}, {"w": w.view(torch.int32)}, {"w": w, "v": w}, {}]
    assert len({tensors_digest(tensors) for tensors in [{"w": w}, *others]}) == 6
    assert tensors_digest({"a": w, "b": 2 * w}) == tensors_digest({"b": 2 * w, "a": w})


def test_the_digest_of_a_base_is_the_one_that_earlier_checkpoints_recorded(tmp_path):
    """By the formula, written out: a changed rule would refuse every checkpoint that there is."""
    import hashlib

    tensors = {"b": drawn(3 * MIB + 8, torch.float32).view(2, -1), "a": drawn(100, torch.bfloat16)}
    expected = hashlib.sha256(b"a [50] BF16\n" + tensors["a"].view(torch.uint8).numpy().tobytes())
    expected.update(f"b {list(tensors['b'].shape)} F32\n".encode())
    data = tensors["b"].numpy().tobytes()
    for page in range(16):
        start = (len(data) - 4096) * page // 15
        expected.update(data[start : start + 4096])
    assert tensors_digest(tensors) == expected.hexdigest()


def test_a_tensor_of_another_process_has_no_digest():
    assert tensors_digest({"a": torch.ones(2), "w": torch.empty(2, device="meta")}) == ""


def test_a_file_that_ends_early_is_named(tmp_path):
    save_file({"w": torch.ones(100)}, tmp_path / "model.safetensors")
    stored = stored_tensors(tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(200)
    with pytest.raises(OSError, match=r"model.safetensors ended within w: it changed while it was read"):
        tensors_digest(stored)


def test_a_file_digest_is_that_of_the_bytes_one_file_after_another(tmp_path):
    import hashlib

    for name, content in {"a": b"x" * 3_000_000, "b": b"", "c": b"yz"}.items():
        (tmp_path / name).write_bytes(content)
    paths = [tmp_path / name for name in "abc"]
    assert file_digest(*paths) == hashlib.sha256(b"x" * 3_000_000 + b"yz").hexdigest()
    assert file_digest(paths[2]) == hashlib.sha256(b"yz").hexdigest()


def test_every_dtype_of_the_table_is_what_torch_and_safetensors_say(tmp_path):
    for name, dtype in DTYPES.items():
        assert torch_dtype(name) is torch_dtype(dtype.stored) is getattr(torch, name)
        assert torch_dtype(name).itemsize == dtype.num_bytes
        assert stored_dtype(torch_dtype(name)) == dtype
        save_file({"w": torch.zeros(2, dtype=torch_dtype(name))}, tmp_path / "model.safetensors")
        assert stored_tensors(tmp_path)["w"].dtype == dtype.stored
    for name in tensors_module.COMPUTE_DTYPES:
        assert LoraSpec(dim=1, alpha=1, dtype=name)
    assert {DTYPES[name].stored for name in tensors_module.COMPUTE_DTYPES} < set(tensors_module.MERGEABLE)


def test_shards_and_their_index_are_read_back_by_safetensors_and_by_us(tmp_path):
    tensors = {f"t{i}": torch.randn(50, i + 1).to((torch.float32, torch.bfloat16)[i % 2]) for i in range(6)}
    tensors["scalar"] = torch.tensor(2.5)
    asked = []

    def tensor_of(name):
        asked.append(name)
        return tensors[name]

    shards = plan_shards([entry_of(name, t.shape, t.dtype) for name, t in tensors.items()], 1000)
    for shard in shards:
        write_tensors(tmp_path / shard.file_name, shard.tensors, tensor_of)
        assert (tmp_path / shard.file_name).stat().st_size == shard.num_bytes
    write_index(tmp_path, shards)
    assert sorted(asked) == sorted(tensors)
    written = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert weight_files(tmp_path) == [shard.file_name for shard in shards] == written
    found = {name: t for shard in shards for name, t in load_file(tmp_path / shard.file_name).items()}
    assert all(torch.equal(found[name], t) and found[name].dtype == t.dtype for name, t in tensors.items())
    assert tensors_digest(stored_tensors(tmp_path)) == tensors_digest(tensors)
    total = json.loads((tmp_path / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    assert total == sum(tensor.nbytes for tensor in tensors.values())


def test_a_tensor_that_was_read_whole_stays_as_it_is(tmp_path):
    stored = {
        "scalar": torch.tensor(3.5, dtype=torch.bfloat16),
        "none": torch.empty(0, 4),
        "matrix": torch.arange(6.0).view(2, 3),
        "whole numbers": torch.arange(5),
    }
    save_file(stored, tmp_path / "model.safetensors")
    with TensorReader() as reader:
        read = {name: reader.read_tensor(one) for name, one in stored_tensors(tmp_path).items()}
    assert read.keys() == stored.keys()
    for name, tensor in stored.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_one_file_wins_over_an_index_as_in_transformers(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "model-1.safetensors"}}))
    assert weight_files(tmp_path) == ["model-1.safetensors"]
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    assert weight_files(tmp_path) == ["model.safetensors"]
    assert stored_tensors(tmp_path).keys() == {"w"}


def test_importing_it_loads_no_torch():
    code = "import sys, nemo_rl_lora.tensors, nemo_rl_lora.models.source; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
