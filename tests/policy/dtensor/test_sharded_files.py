"""All weights and their moments saved by several processes, and read back however they are sharded then."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, NemotronHConfig, PreTrainedModel

from nemo_rl_lora.models.load import empty_model
from nemo_rl_lora.policy.dtensor import own_part
from nemo_rl_lora.policy.dtensor.sharded_files import is_sharded, read_sharded, write_hf_directory, write_sharded
from tests.policy.dtensor.sharded_models import LAYOUTS, num_processes, shard, whole
from tests.policy.dtensor.test_loading import EXPERTS, NEMOTRON, same_bits
from tests.rank_processes import run_ranks
from tests.tiny_models import save_random_model

NUM_STEPS = 7
Masters = dict[str, Tensor]
Moments = dict[str, tuple[Tensor, Tensor]]


def make_masters(path: Path, layout: str | None) -> tuple[PreTrainedModel, Masters, Moments]:
    """Parameters of a directory's model and moments beside them, sharded, all zero."""
    model = empty_model(AutoConfig.from_pretrained(path))
    if layout is not None:
        shard(model, layout)
    model.to_empty(device="cpu")
    model.tie_weights()
    masters: Masters = dict(model.named_parameters())
    moments = {name: (torch.zeros_like(master), torch.zeros_like(master)) for name, master in masters.items()}
    return model, masters, moments


def numbers(masters: Masters) -> tuple[Masters, Moments]:
    """Whole tensors to save: every element is another, and some are -0.0."""
    generator = torch.Generator().manual_seed(3)

    def draw(master: Tensor) -> Tensor:
        drawn = torch.randn(master.shape, generator=generator)
        drawn.view(-1)[::7] = -0.0
        return drawn

    weights = {name: draw(master) for name, master in masters.items()}
    return weights, {name: (draw(master), draw(master).square()) for name, master in masters.items()}


def fill(masters: Masters, moments: Moments) -> None:
    weights, values = numbers(masters)
    with torch.no_grad():
        for name, master in masters.items():
            for tensor, value in zip((master, *moments[name]), (weights[name], *values[name]), strict=True):
                own_part.own_part(tensor).take(0, value)


def compare(masters: Masters, moments: Moments) -> None:
    weights, values = numbers(masters)
    for name, master in masters.items():
        same_bits(name, whole(master), weights[name])
        for moment, value in zip(moments[name], values[name], strict=True):
            same_bits(name, whole(moment), value)


def save(rank: int, layout: str | None, path: Path, directory: Path) -> None:
    """Masters and moments, and a Hugging Face directory in several files; most tensors in several blocks."""
    own_part.MAX_BLOCK_BYTES = 4000
    model, masters, moments = make_masters(path, layout)
    fill(masters, moments)
    write_sharded(directory / "optimizer", masters, moments, NUM_STEPS)
    write_hf_directory(directory / "weights", model, masters, source=path, max_shard_bytes=60_000)


def read(rank: int, layout: str, path: Path, directory: Path) -> None:
    _, masters, moments = make_masters(path, layout)
    assert read_sharded(directory / "optimizer", masters, moments) == NUM_STEPS
    compare(masters, moments)


@pytest.fixture(scope="module")
def saved(tiny_model, tmp_path_factory) -> Path:
    """What four processes saved."""
    directory = tmp_path_factory.mktemp("saved")
    run_ranks(4, tmp_path_factory.mktemp("meeting"), save, "fsdp 4", tiny_model("qwen3"), directory)
    return directory


def test_each_process_writes_its_part(saved: Path):
    files = sorted((saved / "optimizer").glob("*.safetensors"))
    assert is_sharded(saved / "optimizer")
    assert not is_sharded(saved / "weights")
    assert len(files) == 4
    sizes = [file.stat().st_size for file in files]
    assert max(sizes) < 1.2 * min(sizes)


@pytest.mark.parametrize("layout", [*LAYOUTS])
def test_every_layout_reads_what_another_saved(layout: str, saved: Path, tiny_model, tmp_path: Path):
    run_ranks(num_processes(layout), tmp_path, read, layout, tiny_model("qwen3"), saved)


def test_one_process_reads_what_four_saved(saved: Path, tiny_model):
    _, masters, moments = make_masters(tiny_model("qwen3"), None)
    assert read_sharded(saved / "optimizer", masters, moments) == NUM_STEPS
    compare(masters, moments)


@pytest.mark.parametrize("layout", ["fsdp 2 x tp 2", "replicate 2 x shard 2"])
def test_what_other_layouts_save_is_read_by_one_process(layout: str, tiny_model, tmp_path: Path):
    path = tiny_model("llama")
    (tmp_path / "meeting").mkdir()
    run_ranks(4, tmp_path / "meeting", save, layout, path, tmp_path)
    _, masters, moments = make_masters(path, None)
    assert read_sharded(tmp_path / "optimizer", masters, moments) == NUM_STEPS
    compare(masters, moments)
    compare_directory(tmp_path / "weights", masters)


def test_one_process_writes_the_same_directory(
    saved: Path, tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(own_part, "MAX_BLOCK_BYTES", own_part.MAX_BLOCK_BYTES)  # put back after the test
    save(0, None, tiny_model("qwen3"), tmp_path)
    for file in sorted((saved / "weights").iterdir()):
        assert (tmp_path / "weights" / file.name).read_bytes() == file.read_bytes(), file.name
    _, masters, moments = make_masters(tiny_model("qwen3"), None)
    assert read_sharded(tmp_path / "optimizer", masters, moments) == NUM_STEPS
    compare(masters, moments)


def test_transformers_loads_the_directory(saved: Path, tiny_model):
    assert len(list((saved / "weights").glob("*.safetensors"))) > 4
    compare_directory(saved / "weights", make_masters(tiny_model("qwen3"), None)[1])


def compare_directory(directory: Path, masters: Masters) -> None:
    model, report = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    assert json.loads((directory / "config.json").read_text())["dtype"] == "float32"
    for name, value in numbers(masters)[0].items():
        same_bits(name, model.get_parameter(name), value)


def test_experts_are_written_as_transformers_writes_them(tmp_path: Path):
    path = save_random_model(NemotronHConfig(**NEMOTRON, layers_block_type=EXPERTS), tmp_path / "model")
    (tmp_path / "meeting").mkdir()
    run_ranks(2, tmp_path / "meeting", write_loaded, path, tmp_path / "written")
    written = {k: v for file in (tmp_path / "written").glob("*.safetensors") for k, v in load_file(file).items()}
    expected = load_file(path / "model.safetensors")
    assert set(written) == set(expected)
    for name, tensor in written.items():
        same_bits(name, tensor, expected[name])
    assert any("experts.1.up_proj" in name for name in written)


def write_loaded(rank: int, path: Path, directory: Path) -> None:
    from nemo_rl_lora.policy.dtensor.loading import load_weights

    model = shard(empty_model(AutoConfig.from_pretrained(path)), "fsdp 2")
    load_weights(model, path, how="broadcast", dtype=torch.float32, device=torch.device("cpu"))
    write_hf_directory(directory, model, dict(model.named_parameters()), source=path, max_shard_bytes=20_000)
    assert dist.get_world_size() == 2


def test_other_names_and_shapes_are_refused(saved: Path, tiny_model):
    _, masters, moments = make_masters(tiny_model("qwen3"), None)
    name = "model.norm.weight"
    masters["model.other"], moments["model.other"] = masters.pop(name), moments.pop(name)
    masters["lm_head.weight"], moments["lm_head.weight"] = masters["model.other"], moments["model.other"]
    for tensors in (masters, moments):
        tensors["model.embed_tokens.weight"] = tensors["model.layers.0.mlp.down_proj.weight"]  # type: ignore
    with pytest.raises(
        ValueError, match=r"6 missing: lm_head.weight, .*; 3 unexpected: model.norm.weight, .*; 3 of ano"
    ):
        read_sharded(saved / "optimizer", masters, moments)


@pytest.mark.parametrize("number", [2, 4])
def test_a_missing_or_cut_file_is_refused(number: int, tiny_model, tmp_path: Path):
    path = tiny_model("qwen3")
    _, masters, moments = make_masters(path, None)
    (tmp_path / "meeting").mkdir()
    run_ranks(4, tmp_path / "meeting", save, "fsdp 4", path, tmp_path)
    file = next((tmp_path / "optimizer").glob(f"shard-{number:05}*"))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="the checkpoint is damaged"):
        read_sharded(tmp_path / "optimizer", masters, moments)
    file.unlink()
    with pytest.raises(ValueError, match="damaged|of another shape"):
        read_sharded(tmp_path / "optimizer", masters, moments)
    assert not any(master.any() for pair in moments.values() for master in pair)


def test_a_directory_that_cannot_be_written_fails_in_every_process(saved: Path, tiny_model, tmp_path: Path):
    (tmp_path / "meeting").mkdir()
    second = sorted(file.name for file in (saved / "weights").glob("*.safetensors"))[1]
    (tmp_path / "weights" / second).mkdir(parents=True)  # in the place of a file
    run_ranks(2, tmp_path / "meeting", fail_to_write, tiny_model("qwen3"), tmp_path / "weights")


def fail_to_write(rank: int, path: Path, directory: Path) -> None:
    model, masters, moments = make_masters(path, "fsdp 2")
    fill(masters, moments)
    with pytest.raises(IsADirectoryError):
        write_hf_directory(directory, model, masters, source=path, max_shard_bytes=60_000)
