"""Peak memory of the processes that load a sharded model. As a program, with a size in MB: the table for that size."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nemo_rl_lora.policy.dtensor.loading import How, load_weights
from nemo_rl_lora.policy.dtensor.own_part import own_part
from tests.policy.dtensor.sharded_models import LAYOUTS, empty_sharded, num_processes
from tests.rank_processes import run_ranks

MB = 2**20
LAYOUT = "fsdp 4"


def make_llama(path: Path, megabytes: int) -> Path:
    """A random fp32 Llama of about this size."""
    width = 1024 if megabytes < 1024 else 2048
    sizes = {"hidden_size": width, "intermediate_size": 11 * width // 4, "num_attention_heads": 16}
    config = LlamaConfig(**sizes, vocab_size=16000, num_hidden_layers=1, tie_word_embeddings=False)
    per_layer = 4 * (4 * width**2 + 3 * width * config.intermediate_size)
    config.num_hidden_layers = max(1, round((megabytes * MB - 2 * 4 * config.vocab_size * width) / per_layer))
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def load_measured(rank: int, path: Path, how: How, results: Path) -> None:
    """Write this process's peak over what it had before, and the bytes of its shard."""
    model = empty_sharded(path, LAYOUT)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _status("VmRSS")
    load_weights(model, path, how=how, dtype=torch.float32, device=torch.device("cpu"))
    own = sum(part.local.nbytes for part in map(own_part, model.parameters()))
    numbers = {"peak": _status("VmHWM") - before, "shard": own / MB}
    (results / f"{how}{rank}.json").write_text(json.dumps(numbers))


def measure(path: Path, how: How, results: Path) -> list[dict[str, float]]:
    """For each process, in MB: its peak over what it had before loading, and its shard."""
    number = num_processes(LAYOUT)
    meeting = results / f"meeting_{how}"
    meeting.mkdir()
    run_ranks(number, meeting, load_measured, path, how, results)
    return [json.loads((results / f"{how}{rank}.json").read_text()) for rank in range(number)]


def _status(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        path = make_llama(root / "model", int(sys.argv[1]))
        total = sum(file.stat().st_size for file in path.glob("*.safetensors")) / MB
        sys.stdout.write(f"a Llama of {total:,.0f} MB in fp32, {LAYOUT}: {LAYOUTS[LAYOUT]}\n")
        sys.stdout.write("| way | shard, MB | peak of the first process | peaks of the others |\n|---|---|---|---|\n")
        for how in ("all_ranks", "broadcast"):
            first, *others = measure(path, how, root)
            peaks = ", ".join(f"{numbers['peak']:,.0f}" for numbers in others)
            sys.stdout.write(f"| {how} | {first['shard']:,.0f} | {first['peak']:,.0f} | {peaks} |\n")


if __name__ == "__main__":
    main()
